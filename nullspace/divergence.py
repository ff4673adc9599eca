"""Notices that a training has diverged: NaN or infinity in latents, loss, gradients, weights or pictures."""

import math

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL

from nullspace.errors import NullSpaceError
from nullspace.models import loading


logger = get_logger(__name__)

MOST_SKIPPED = 20  # steps in a row that fp16's loss scaling may skip: from 2^16 it is down to 1 after 16


class DivergedError(NullSpaceError):
    """A training has come to numbers that are not finite, and there is nothing to save of it."""


def diverged(what, when, learning_rate):
    """The `DivergedError` that says what is not finite, when it was found so, and what usually mends it."""
    return DivergedError(
        f"The training diverged: {what} {when}; what usually mends it is a lower --learning_rate (it is "
        f"{learning_rate:g}), --mixed_precision bf16 where it is fp16, or a VAE that does not overflow in it. The LoRA "
        "and the checkpoints that --output_dir holds are good ones, and were left alone."
    )


def check_scalars(values, step, learning_rate, skipped=False):
    """Raise `DivergedError` if a value of a step is not finite.

    Args:
        values (`dict[str, float]`): by "latents", "loss", "grad_norm" and "grad_norm_projected"; the latter two are
            passed over where fp16's loss scaling skipped the step, for finding them infinite is its way.
    """
    whats = {"latents": "the latents that the VAE made are", "loss": "the loss is"}
    for name, value in values.items():
        if not math.isfinite(value) and not (skipped and name not in whats):
            what = whats.get(name, f"the gradients ({name}) are")
            raise diverged(f"{what} not finite", f"at step {step}", learning_rate)


def check_weights(parameters, step, learning_rate, dtype=torch.float32):
    """Raise `DivergedError` unless all weights of the LoRA are finite in the type that they are to be saved in."""
    finite = torch.stack([parameter.detach().to(dtype).isfinite().all() for parameter in parameters])
    if not finite.all():
        bad, kind = len(finite) - int(finite.sum()), str(dtype).removeprefix("torch.")
        what = f"the weights of {bad} of the LoRA's {len(finite)} matrices are not finite in {kind}"
        raise diverged(what, f"at step {step}", learning_rate)


class SkippedSteps:
    """Counts the steps in a row that fp16's loss scaling skipped."""

    def __init__(self):
        self.count = 0

    def add(self, skipped, step, learning_rate):
        """Raise `DivergedError` once there are too many."""
        self.count = self.count + 1 if skipped else 0
        if self.count == MOST_SKIPPED:
            what = f"the gradients were infinite in {self.count} steps in a row, which fp16's loss scaling skipped,"
            raise diverged(what, f"up to step {step}", learning_rate)


# ---- Pictures --------------------------------------------------------------------------------------------------------


class DrawnLatents:
    """A pipeline's `callback_on_step_end` that looks at the latents (batch, 4, h, w) of all that it draws."""

    def __init__(self):
        self.finite = None

    def __call__(self, pipeline, step, timestep, values):
        finite = values["latents"].isfinite().all()  # stays on its device until `check`
        self.finite = finite if self.finite is None else self.finite & finite
        return values

    def check(self, what, learning_rate):
        """Raise `DivergedError` if some were not finite; `what` says what was done with the pictures."""
        if self.finite is not None and not self.finite:
            raise diverged("the latents of the pictures are not finite", f"({what})", learning_rate)


# ---- The VAE in fp16 -------------------------------------------------------------------------------------------------


def run_in_float32(vae):
    """Have a VAE encode and decode in float32, whatever the type of what it is given, and autocast around it."""
    vae.float()
    for name in ("encode", "decode"):
        setattr(vae, name, _outside_autocast(getattr(vae, name)))
    return vae


def _outside_autocast(method):
    def call(tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return method(tensor.float(), *args, **kwargs)

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


def sound_vae(vae, pictures, folder, variant, learning_rate):
    """A VAE in float16, or the same in float32 where that overflows.

    Args:
        vae (`AutoencoderKL`): in float16.
        pictures (`Callable[[], Iterable[Tensor]]`): gives the training pictures (3, side, side).
        folder (`Path`), variant: where its weights are, which float16 may not hold.
        learning_rate (`float`): as given, for the sentence.

    Raises:
        DivergedError: if it is not finite in float32 either.
    """
    if overflows(vae, pictures()) is None:
        return vae
    with loading(folder):
        mended = AutoencoderKL.from_pretrained(folder, subfolder="vae", variant=variant, torch_dtype=torch.float32)
    mended = run_in_float32(mended.requires_grad_(False).to(vae.device))
    number = overflows(mended, pictures())
    if number is not None:
        what = f"the latents that the VAE makes of picture {number + 1}, or the picture of them, are not finite"
        raise diverged(what, "before the first step, in float32 too", learning_rate)
    logger.warning("The VAE overflows in fp16: it is run in fp32, and the rest in fp16.")
    return mended
