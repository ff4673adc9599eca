"""SIGINT and SIGTERM: a run stops where it can go on from, and says how; a second signal ends it at once."""

import atexit
import multiprocessing
import multiprocessing.util  # its own function for the exit must be registered before ours, to run after it
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from nullspace.errors import NullSpaceError
from nullspace.launch import LAUNCHED, command_line, launcher


SIGNALS = (signal.SIGINT, signal.SIGTERM)
_now = SimpleNamespace(asked=None, waiting=False, running=False)


class Stopped(BaseException):
    """A signal ends the run: no `Exception`, for nothing but the end of the script handles it.

    Args:
        number (`int`): of the signal.
        saved (`str`): what the run has just written, for the sentence.
        resume (`str`, *optional*): what the command goes on from with --resume_from_checkpoint.
    """

    def __init__(self, number, saved="", resume=None):
        super().__init__(number)
        self.number, self.saved, self.resume = number, saved, resume


def listen():
    """Have signals handled here from now on, and take the end of the launcher for one."""
    for each in SIGNALS:
        signal.signal(each, _handle)
    if LAUNCHED in os.environ:  # `accelerate launch` of one process passes no signal on
        launcher()  # its command line, as long as it is there
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _handle(number, frame):
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    _now.asked = number
    if not _now.running:  # libraries are being imported
        os._exit(128 + number)
    if not _now.waiting:
        raise Stopped(number)


def _follow(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    if _now.asked is None:
        os.kill(os.getpid(), signal.SIGTERM)


def asked():
    """The number of the signal that has come, or None."""
    return _now.asked


@contextmanager
def waiting(now=True):
    """Within the block the first signal is only noted, for `asked`; elsewhere it ends the run."""
    before, _now.waiting = _now.waiting, now
    try:
        yield
    finally:
        _now.waiting = before


def noted_during(items):
    """Iterate, and only note a signal until that is over."""
    with waiting():
        yield from items


@contextmanager
def cut_short():
    """Leave the block when a signal comes: for what the run can go on without."""
    with suppress(Stopped), waiting(False):
        yield


class Agreement:
    """Whether a signal has come to any process, which all ask at the same step."""

    def __init__(self, processes, timeout):
        self.group = None
        if processes > 1:
            from torch import distributed  # slow to import

            # Of the CPU's, so that no device is waited for
            self.group = distributed.new_group(backend="gloo", timeout=timeout)

    def asked(self):
        """The number of the signal, or None: the same for all."""
        if self.group is None:
            return asked()
        import torch

        number = torch.tensor(asked() or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number) or None


def leave_to_parent(worker):
    """Have a dataloader's worker ignore the signals that its whole group is sent: who loads from it ends it."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@atexit.register
def _end_children():
    for child in multiprocessing.active_children():
        child.kill()


def run(main, args):
    """Run a script's `main(args)`: what it raises for users ends it with a sentence and no traceback."""
    _now.running = True
    try:
        main(args)
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            saved = f" {stopped.saved}" if stopped.saved else ""
            command = shlex.join(command_line(stopped.resume))
            name = signal.Signals(stopped.number).name
            print(f"Stopped by {name}.{saved} Go on with:\n{command}", file=sys.stderr)
        sys.exit(128 + stopped.number)
