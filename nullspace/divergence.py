"""Notices that a training has diverged: NaN or infinity in latents, loss, gradients, weights or pictures."""

import math
import weakref
from contextlib import contextmanager
from functools import wraps
from itertools import islice

import torch
from accelerate.logging import get_logger

from nullspace.checkpoint import checkpoints, damage
from nullspace.errors import UnsoundError
from nullspace.names import LORA_NAME, WORD_NAME


logger = get_logger(__name__)

MOST_SKIPPED = 20  # steps in a row that fp16's loss scaling may skip: from 2^16 it is down to 1 after 16


class DivergedError(UnsoundError):
    """A training has come to numbers that are not finite, and there is nothing to save of it."""


def diverged(what, when, args):
    """The `DivergedError` that says what is not finite, when it was found so, and what usually mends it."""
    flag = "word_learning_rate" if args.word_only else "learning_rate"
    return DivergedError(
        f"The training diverged: {what} {when}; what usually mends it is a lower --{flag} (it is "
        f"{getattr(args, flag):g}), --mixed_precision bf16 where it is fp16, or a VAE that does not overflow in it"
    )


def naming_what_is_left(main):
    """Have the sentence of a `DivergedError` from `main(args)` end with what --output_dir still holds, if anything."""

    @wraps(main)
    def run(args):
        try:
            return main(args)
        except DivergedError as error:
            raise DivergedError(f"{error}{what_is_left(args.output_dir)}.") from error.__cause__

    return run


def what_is_left(folder):
    """The end of a sentence that names the LoRA and the last whole checkpoint in a folder, "" where it has neither."""
    left = [name for name in (LORA_NAME, WORD_NAME) if (folder / name).is_file()]
    left += [path.name for path in reversed(checkpoints(folder)) if damage(path) is None][:1]
    return f"; {folder} still holds {' and '.join(left)}, left as before" if left else ""


def check_scalars(values, step, args, skipped=False):
    """Raise `DivergedError` if a value of a step is not finite.

    Args:
        values (`dict[str, float]`): by "latents", "loss", "predicted_drift", "grad_norm" and "grad_norm_projected"; the
            latter two are passed over where fp16's loss scaling skipped the step, for finding them infinite is its way.
    """
    whats = {
        "latents": "the latents that the VAE made are",
        "loss": "the loss is",
        "predicted_drift": "the predicted drift is",
    }
    for name, value in values.items():
        if not math.isfinite(value) and not (skipped and name not in whats):
            what = whats.get(name, f"the gradients ({name}) are")
            raise diverged(f"{what} not finite", f"at step {step}", args)


def check_weights(parameters, step, args, dtype=torch.float32):
    """Raise `DivergedError` unless all weights that are trained are finite in the type that they are to be saved in."""
    finite = torch.stack([parameter.detach().to(dtype).isfinite().all() for parameter in parameters])
    if not finite.all():
        bad, kind = len(finite) - int(finite.sum()), str(dtype).removeprefix("torch.")
        what = f"the weights of {bad} of the {len(finite)} trained matrices are not finite in {kind}"
        raise diverged(what, f"at step {step}", args)


class SkippedSteps:
    """Counts the steps in a row that fp16's loss scaling skipped."""

    def __init__(self):
        self.count = 0

    def add(self, skipped, step, args):
        """Raise `DivergedError` once there are too many."""
        self.count = self.count + 1 if skipped else 0
        if self.count == MOST_SKIPPED:
            what = f"the gradients were infinite in {self.count} steps in a row, which fp16's loss scaling skipped,"
            raise diverged(what, f"up to step {step}", args)


# ---- Pictures --------------------------------------------------------------------------------------------------------


class Drawn:
    """Looks at the latents (batch, 4, h, w) and the pictures (batch, 3, H, W) of all that pipelines draw.

    It is their `callback_on_step_end`, and sees their pictures within `decoding`, before 8 bits make NaN black.
    """

    def __init__(self):
        self.finite = {}  # scalar tensors, which stay on their device until `check`

    def __call__(self, pipeline, step, timestep, values):
        self._look("latents of the pictures", values["latents"])
        return values

    @contextmanager
    def decoding(self, vae):
        """Look at all that a VAE decodes."""
        handle = vae.decoder.register_forward_hook(lambda decoder, given, made: self._look("pictures", made))
        try:
            yield
        finally:
            handle.remove()

    def _look(self, what, tensor):
        finite = tensor.isfinite().all()
        self.finite[what] = self.finite.get(what, finite) & finite

    def check(self, where, args):
        """Raise `DivergedError` if some were not finite; `where` says what was done with the pictures."""
        for what, finite in self.finite.items():
            if not finite:
                raise diverged(f"the {what} are not finite", f"({where})", args)


# ---- The VAE --------------------------------------------------------------------------------------------------------


def run_in_float32(vae):
    """Have a VAE encode and decode in float32, whatever the type of what it is given, and autocast around it."""
    vae.float()
    for name in ("encode", "decode"):
        setattr(vae, name, _outside_autocast(weakref.ref(vae), getattr(type(vae), name)))
    return vae


def _outside_autocast(vae, method):
    """A method that does not hold its VAE, which would then stay in memory until cycles are looked for."""

    def call(tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return method(vae(), tensor.float(), *args, **kwargs)

    return call


@torch.no_grad()
def overflows(vae, pictures):
    """The number of the first picture (3, side, side) whose latents, or the first one decoded again, are not finite.

    None where all are; a VAE that overflows does so for most pictures, if not for all.
    """
    for number, picture in enumerate(pictures):
        latents = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist.mean
        if not latents.isfinite().all() or (number == 0 and not vae.decode(latents).sample.isfinite().all()):
            return number
    return None


def sound_vae(vae, pictures, reload, args, known=False):
    """A VAE whose latents and pictures are finite: the one given, or in float32 where it overflows in float16.

    In float16, unless it is `known` to overflow there, it is tried on all pictures, in other types, which hardly
    overflow, on the first.

    Args:
        vae (`AutoencoderKL`): in the type that is trained in.
        pictures (`Callable[[], Iterable[Tensor]]`): gives the training pictures (3, side, side).
        reload (`Callable[[], AutoencoderKL]`): gives it anew in float32, for float16 may not hold its weights.
        args: the rates that were given, for the sentence.

    Raises:
        DivergedError: if it is not finite, in float16 if it is not in float32 either.
    """
    is_half, when = vae.dtype == torch.float16, "before the first step"
    number = 0 if is_half and known else overflows(vae, pictures() if is_half else islice(pictures(), 1))
    if number is not None and is_half:
        vae = reload().to(vae.device)
        vae, when = run_in_float32(vae.requires_grad_(False)), f"{when}, in float32 too"
        number = overflows(vae, pictures())
        if number is None:
            logger.warning("The VAE overflows in fp16: it is run in fp32, and the rest in fp16.")
    if number is not None:
        what = f"the latents that the VAE makes of picture {number + 1}, or the picture of them, are not finite"
        raise diverged(what, when, args)
    return vae
