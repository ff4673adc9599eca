"""How a script is launched: what a process must be able to see, and how long it waits for others."""

import os
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import psutil

from nullspace.errors import NullSpaceError


PROCESS_TIMEOUT = timedelta(days=7)  # how long processes wait for one that draws, decomposes or saves; 10 minutes else
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # in the environment: `accelerate launch` has started this process
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def on_main_process(work):
    """What a function returns on the main process, on every process: the others wait for it.

    Raises:
        NullSpaceError: on every process, if the function does.
    """
    from accelerate import PartialState  # takes seconds to import
    from accelerate.utils import broadcast_object_list

    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [work(), None]
        except NullSpaceError as error:
            outcome = [None, error]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def check_launcher(distributed_type=None):
    """Raise `NullSpaceError` where a process does not see whole gradients, which the projector needs.

    Args:
        distributed_type (`str`, *optional*): accelerate's, once that is known; what `accelerate launch` puts into the
            environment is looked at in any case.
    """
    found = [name for key, name in SHARDING.items() if os.environ.get(key, "").lower() in ("1", "true", "yes", "on")]
    if distributed_type == "XLA":
        found.append("a TPU (XLA)")
    if found:
        raise NullSpaceError(
            f"accelerate is set up for {' and '.join(found)}, under which no process sees whole gradients, so that "
            "nothing could be protected; run `accelerate config` for plain data parallelism, or launch with "
            "--config_file and one such configuration."
        )


def share_cores(device):
    """Have work on the CPU use all cores while a GPU waits for it: `accelerate launch` leaves each process one.

    Of processes on the CPU, each of which has been given its share, nothing is changed; nor where more were asked for.

    Args:
        device (`torch.device`): that this process trains or draws on.
    """
    import torch

    if device.type != "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def without(argv, beginning):
    """A command line without a flag that has a value, under any of the shorter names that argparse takes for it."""
    kept, words = [], iter(argv)
    for word in words:
        if not word.startswith(beginning):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def without_token(argv):
    """A command line without the secret that may be in it."""
    return without(argv, "--hub_t")


@cache
def launcher():
    """The words of the command that this process was launched by, where the system tells them."""
    try:
        return psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # not ours to read, or gone
        return []


def command_line(resume=None):
    """The command that this process was started with, the launcher's part included, without the token: its words.

    Args:
        resume (`str`, *optional*): what --resume_from_checkpoint is to say in it.
    """
    command, started = ["python", *sys.argv], launcher() if LAUNCHED in os.environ else []
    started = started[: started.index(sys.argv[0])] if sys.argv[0] in started else []
    for number, word in enumerate(started):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate":
            flags = started[number + (1 if word == "accelerate.commands.launch" else 2) :]
            command = ["accelerate", "launch", *flags, *sys.argv]
            break
    command = without_token(command)
    return command if resume is None else [*without(command, "--resu"), "--resume_from_checkpoint", resume]
