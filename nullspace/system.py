"""What the scripts ask of the operating system, and the one place that looks at which it is."""

import errno
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from nullspace.errors import NullSpaceError


WINDOWS = os.name == "nt"
PATIENCE = (0.1, 0.3, 1.0, 3.0)  # seconds between attempts, while a virus scanner holds a file open
LEFTOVER = re.compile(r"(?P<name>.*)\.(?P<kind>partial|old|probe)-(?P<pid>\d+)")
# What earlier versions left behind, which name no process: they are given a day.
EARLIER = re.compile(r"partial-(checkpoint-\d+|lora-\w{8}|.+\.(safetensors|png|json|md))")
DAY = 24 * 60 * 60  # seconds
# What a disk, or who looks after it, says no with; anything else is a fault of the code. Windows lacks some.
FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")} - {None}
REFUSALS = FULL | {getattr(errno, name, None) for name in ("EROFS", "EACCES", "EPERM", "EIO", "ESTALE")} - {None}

# ---- Writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path, size=None):
    """Write what matters: the block fills a temporary path, which then takes the place of `path`, whole or not at all.

    It is a file or a folder, whichever the block makes of it. It lies beside `path`, on the same file system, and is on
    the disk before it is renamed. What was there before stays until then, and for good if anything fails.

    Args:
        path (`Path`): in a folder that is there.
        size (`int`, *optional*): bytes that will be written, for the sentence of a disk that is full.

    Raises:
        NullSpaceError: if the disk is full or read-only, or the folder is gone.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.stat()  # before a library makes it again
        remove(partial)
        yield partial
        put(partial, path)
    except Exception as error:
        fault = write_fault(path, partial, error, size)
        _remove_quietly(partial)
        if fault is None:
            raise
        raise NullSpaceError(fault) from error
    except BaseException:  # a signal
        _remove_quietly(partial)
        raise


@contextmanager
def staging(path):
    """A folder beside `path`, under a name that `remove_leftovers` knows, that is gone after the block."""
    folder = path.with_name(f"{path.name}.partial-{os.getpid()}")
    remove(folder)
    make_inside(folder)
    try:
        yield folder
    finally:
        _remove_quietly(folder)


def put(source, target):
    """Put a file or folder on the disk, and then in the place of another that may be there.

    A folder cannot be replaced in one step: the earlier one steps aside, and `remove_leftovers` puts it back if the
    power fails in between.
    """
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            follow_umask(path)
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    if not source.is_dir():
        os.replace(source, target)
        sync_folder(target.parent)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    remove(old)
    if target.exists():
        rename_folder(target, old)
    try:
        rename_folder(source, target)
    except BaseException:
        if old.exists() and not target.exists():
            rename_folder(old, target)
        raise
    finally:
        if target.exists():
            _remove_quietly(old)


def make_inside(folder):
    """Make a folder, but not the one around it, which was there when the run began.

    Raises:
        NullSpaceError: if it cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise NullSpaceError(write_fault(folder, folder, error)) from error


def without_folder(name):
    """A path of this machine by its last name, for what may be published; a Hub id, or any other text, as it is."""
    return Path(name).resolve().name if isinstance(name, Path) or os.path.exists(str(name)) else str(name)


def write_text(path, text):
    """Write a text file that matters, in UTF-8."""
    content = text.encode("utf-8")
    with replacing(path, len(content)) as partial:
        partial.write_bytes(content)


def remove(path):
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_quietly(path):
    try:
        remove(path)
    except OSError:  # a disk that refused to write may refuse this too: the next start removes it
        pass


def write_fault(path, partial, error, size=None):
    """What keeps a path from being written, as a sentence, or None where an error is none of the disk's."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)", str(error)):  # as safetensors says it
        number = int(found[1])
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch's writer, which does not say why
        number = errno.ENOSPC
    folder = path.parent
    if isinstance(error, OSError) and not folder.is_dir():
        return f"{path} cannot be written: {folder} was removed while the run wrote to it; run the command again."
    if number not in REFUSALS:
        return None
    written = sum(file.stat().st_size for file in [partial, *partial.rglob("*")] if file.is_file())
    space = ""
    if number in FULL:
        needed = in_bytes(size) if size else f"more than {in_bytes(written)}"
        free = in_bytes(shutil.disk_usage(folder).free + written)  # as it was before
        space = f", where {free} were free, quotas aside, and {needed} are needed"
    return (
        f"{path} cannot be written ({os.strerror(number)}{space}); what was there before is as it was: "
        f"{'make room' if number in FULL else 'see to it that it can be'}, or name another folder, and run the command "
        "again."
    )


def in_bytes(count):
    """A number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def check_space(folder, needed, what):
    """Raise `NullSpaceError` unless a disk has room for what a run will write.

    Args:
        folder (`Path`): there already or yet to be made.
        needed (`int`): in bytes.
        what (`str`): is to be written, for the sentence.
    """
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NullSpaceError(
            f"The disk of {folder} is too full for {what}: {in_bytes(needed)} are needed and {in_bytes(free)} are "
            "free; make room, or choose another --output_dir."
        )


def rename_folder(source, target):
    """Rename a folder to a name that is free, so that a power cut leaves it whole under one of both names.

    Raises:
        OSError: if it cannot be renamed; on Windows, where open files stand in the way, only after some attempts.
    """
    source, target = Path(source), Path(target)
    for pause in PATIENCE if WINDOWS else ():
        try:
            source.rename(target)
            break
        except PermissionError:
            time.sleep(pause)
    else:
        source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder):
    """Put on the disk which names a folder holds. Windows opens no folders, and its file system journals the names."""
    if WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(path):
    """Give a file the permissions that a new one has: safetensors makes its files readable by their owner alone."""
    path = Path(path)
    probe = path.with_name(f"{path.name}.probe-{os.getpid()}")
    probe.touch()
    shutil.copymode(probe, path)
    probe.unlink()


# ---- What killed runs left -------------------------------------------------------------------------------------------


def remove_leftovers(folder, tell, name=None):
    """Remove what killed runs left in a folder, and put back what they had moved aside and not yet replaced.

    Who calls this holds the folder's lock. A leftover names its process: it stays while that one runs, unless it began
    after the leftover was last written to, for then it is another that was given the same number.

    Args:
        folder (`Path`): need not be there.
        tell (`Callable[[str], None]`): is told a line of each.
        name (`str`, *optional*): of the one file or folder whose leftovers are meant; all are, without it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        if found is None:
            if name is None and EARLIER.fullmatch(path.name) and path.lstat().st_mtime < time.time() - DAY:
                remove(path)
                tell(f"Removed {path}, which a run that was killed left.")
            continue
        if name not in (None, found["name"]) or _in_use(path, int(found["pid"])):
            continue
        target = path.with_name(found["name"])
        if found["kind"] == "old" and not target.exists():
            rename_folder(path, target)
            tell(f"Put {target} back, which a run that was killed was about to replace.")
        else:
            remove(path)
            tell(f"Removed {path}, which a run that was killed left.")


def _in_use(path, pid):
    try:
        began = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    return pid != os.getpid() and began <= path.lstat().st_mtime


# ---- Others ----------------------------------------------------------------------------------------------------------


def sort_header(path):
    """Write the metadata of a safetensors file in the order of their names: the library shuffles them at each start."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length comes first, in 8 bytes
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)  # tensors begin at a multiple of 8 bytes
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])


def quiet_imports(hidden=()):
    """Have the libraries import and tell only what is needed: call it before they are imported.

    Args:
        hidden (`Iterable[str]`): packages that they import wherever they are installed, and which then print.
    """
    for package in hidden:
        sys.modules.setdefault(package, None)  # which Python takes for "not installed"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that are not needed
