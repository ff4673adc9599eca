"""One run at a time in a folder."""

import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


def beside(folder):
    """The lock of a folder that is replaced as a whole, as a bundle is: in the folder around it."""
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def alone(path, tell, state=None):
    """Hold a lock while the block runs; wait for who holds it, and say for whom.

    The system lets go of it when its process ends, however that ends; who holds it is in a file beside it.

    Args:
        path (`Path`): of the lock; its folder is made, and removed again if the run leaves nothing else in it.
        tell (`Callable[[str], None]`): is told a sentence when there is somebody to wait for.
        state (`PartialState` or `Accelerator`, *optional*): the main process holds it for all; without it, this one
            for itself.
    """
    if state is not None and not state.is_main_process:
        state.wait_for_everyone()
        yield
        return
    path = Path(path).resolve()
    made = [folder for folder in path.parents if not folder.exists()]
    lock, holder, told = FileLock(path), path.with_name(f"{path.name}-holder"), False
    try:
        while not lock.is_locked:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
                if not path.exists():  # who held it has just removed it with its folder
                    lock.release()
            except Timeout:
                if not told:
                    tell(f"Waiting for {_describe(holder)}, which is at work in this folder (its lock is {path}).")
                told = True
                time.sleep(0.5)
            except FileNotFoundError:  # its folder
                continue
            except (OSError, NotImplementedError) as error:  # some network file systems have no locks
                tell(f"{path} cannot be locked ({error}): see to it that no other run writes to this folder.")
                break
        if lock.is_locked:
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            holder.write_text(json.dumps(me), encoding="utf-8")
        if state is not None:
            state.wait_for_everyone()
        yield
    finally:
        if lock.is_locked:
            holder.unlink(missing_ok=True)
        for folder in made:
            if folder.is_dir() and set(folder.iterdir()) <= {path}:
                with suppress(OSError):  # Windows removes no file that is open, and it can stay
                    path.unlink(missing_ok=True)
                    folder.rmdir()
        lock.release()


def _describe(holder):
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        since = datetime.fromtimestamp(found["since"]).isoformat(" ", "seconds")
        return f"process {found['pid']} on {found['host']}, since {since}"
    except (OSError, ValueError, KeyError):  # it has just begun, or just ended
        return "another run"
