"""What a run tells: the log, the trackers and the progress bar."""

import logging

import diffusers
import torch
import transformers
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from nullspace.divergence import SkippedSteps, check_scalars
from nullspace.system import without_folder
from nullspace.terminal import printable


logger = get_logger(__name__)

AT_ONCE = 10  # steps whose scalars are read together


class PrintableFormatter(logging.Formatter):
    """Of messages that hold what others wrote, and addresses and headers of the Hub."""

    def formatMessage(self, record):
        return printable(super().formatMessage(record))

    def formatException(self, exception):
        return "\n".join(map(printable, super().formatException(exception).splitlines()))


def set_up_logging(accelerator):
    """What the trainer and the libraries say, once for all processes."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    # The Hub client's log each address, upload signatures included; accelerate's each file of a checkpoint
    for name in ("httpx", "httpx2", "accelerate.accelerator", "accelerate.checkpointing"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger.info(f"{accelerator.state}".replace("\n", ", "), main_process_only=False)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def start_trackers(accelerator, args):
    """Tell the trackers the flags, but no secret, and no folder of this machine: their files may be published."""
    if accelerator.is_main_process:
        hidden = ("hub_token", "base_model", "config")
        settings = {key: _without_folders(value) for key, value in vars(args).items() if key not in hidden}
        accelerator.init_trackers("dreambooth-nullspace", config=settings)


def _without_folders(value):
    """The value of a flag as a number or text, in which what is on this machine goes by its last name."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_without_folders(each)) for each in value)
    return without_folder(value)


class ScalarLog:
    """Sends the scalars of every step to the trackers and a progress bar, a few steps at a time.

    The bar also has leakage and predicted drift, of the last checkpoint.

    Reading a value from the device waits for all that it has still to do, so values stay there until `flush`, which
    stops a training that has diverged. Of the latents (their sum) nothing but that is looked at.

    Args:
        lr_scheduler: whose learning rate goes with each step.
        step (`int`): where the bar begins.
        args: --max_train_steps, where it ends, and the rates, for the sentence of a training that has diverged.
    """

    def __init__(self, accelerator, lr_scheduler, step, args):
        self.accelerator, self.lr_scheduler, self.args = accelerator, lr_scheduler, args
        disable = not accelerator.is_local_main_process
        self.progress = tqdm(total=args.max_train_steps, initial=step, desc="Training", unit="step", disable=disable)
        self.pending = []  # (step, lr, whether the step was skipped, scalar tensors by name)
        self.audited = {}  # what was found in the last checkpoint, for the bar
        self.skipped_steps = SkippedSteps()

    def add(self, step, **tensors):
        """Take the scalar tensors of the step that optimizer and schedule have just made."""
        lr, skipped = self.lr_scheduler.get_last_lr()[0], self.accelerator.optimizer_step_was_skipped
        self.pending.append((step, lr, skipped, tensors))
        self.progress.update()
        if len(self.pending) == AT_ONCE:
            self.flush()
        self.skipped_steps.add(skipped, step, self.args)

    def flush(self):
        """Send what is pending; `DivergedError` if it shows that the training has diverged."""
        if not self.pending:
            return
        rows = torch.stack([torch.stack(list(tensors.values())).float() for *_, tensors in self.pending]).tolist()
        for (step, lr, skipped, tensors), row in zip(self.pending, rows, strict=True):
            values = dict(zip(tensors, row, strict=True))
            self.accelerator.log({name: values[name] for name in values if name != "latents"} | {"lr": lr}, step=step)
            check_scalars(values, step, self.args, skipped)
        drift = {"drift": values["predicted_drift"]} if "predicted_drift" in values else {}
        self.progress.set_postfix({"loss": values["loss"], "lr": lr} | self.audited | drift)
        self.pending.clear()

    def take_audit(self, found, step):
        """Send what `audit` found in a checkpoint to the trackers, and show it in the bar from now on."""
        log_audit(self.accelerator, found, step)
        shown = {"leakage": found["leakage"]["max"], "drift": found["predicted_drift"]["rms"]}
        self.audited = {name: f"{value:.2g}" for name, value in shown.items() if value is not None}

    def close(self):
        """Flush, and end the progress bar, which would write over what is said next."""
        self.flush()
        self.progress.close()


def log_audit(accelerator, found, step):
    """Send leakage and predicted drift to the trackers."""
    values = {
        f"{key}/{statistic}": value
        for key in ("leakage", "predicted_drift")
        for statistic, value in found[key].items()
        if value is not None
    }
    accelerator.log(values | {"unprotected_layers": len(found["unprotected"])}, step=step)


def log_picture(accelerator, name, picture, step):
    """Send a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            tracker.writer.add_image(name, array.view(picture.height, picture.width, 3), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb  # present where its tracker is

            tracker.log({name: wandb.Image(picture)}, step=step)
