"""How a script is launched: what a process must be able to see, and how long it waits for others."""

import os
from datetime import timedelta

from nullspace.errors import NullSpaceError


PROCESS_TIMEOUT = timedelta(days=7)  # how long processes wait for one that draws, decomposes or saves; 10 minutes else
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
