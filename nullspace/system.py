"""What the scripts ask of the operating system, and the one place that looks at which it is."""

import json
import os
import shutil
import sys
import time
from pathlib import Path


WINDOWS = os.name == "nt"
PATIENCE = (0.1, 0.3, 1.0, 3.0)  # seconds between attempts, while a virus scanner holds a file open


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
