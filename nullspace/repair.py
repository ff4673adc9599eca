"""A finished LoRA, moved into the null space in closed form, with the least loss of what it does for its subject."""

import math

import torch

from nullspace.audit import audit
from nullspace.errors import NullSpaceError, listed
from nullspace.names import JOINT
from nullspace.protection import moments_of
from nullspace.spectrum import in_double


RIDGE = 1e-6  # of the trace: what the subject's few tokens never showed is left at zero, not divided by it
DRAWN_AT_ONCE = 4


def repair_layer(layer, protected, spectrum, subject, drift_weight):
    """The layer of the same B whose A (r, in) lies in the free directions and is nearest to A on the subject's inputs.

    It minimises ||(A' - A) x||^2 over the subject's inputs x plus `drift_weight` times ||A' x||^2 over the protected
    ones, each as a share of the inputs' mean square: A' = A C_s F (F^T (C_s + m C + e I) F)^-1 F^T, with F (in, f) the
    free directions, C_s and C the two second moments of trace 1, m the weight and e a ridge. B is free of it, for it
    multiplies both from the left. The derivation is this project's: least squares in the coordinates that F gives.

    Args:
        layer (`LoraLayer`): without a magnitude.
        protected (`Protected`), spectrum (`Spectrum`): of its input.
        subject (`Tensor`): C_s (in, in), of any trace.
        drift_weight (`float`): m, at least 0; 1 weighs what moves of the protected inputs as the subject's loss.

    Returns:
        `LoraLayer`: A' in float32; the rest as it was.
    """
    free = protected.basis[:, protected.rank :].double()
    subject = in_double(subject)
    subject = subject / subject.trace()
    inside = free.T @ subject @ free + torch.diag(drift_weight * spectrum.shares()[protected.rank :] + RIDGE)
    down = torch.linalg.solve(inside, free.T @ subject @ layer.down.double().T).T @ free.T
    return layer._replace(down=down.float())


def subject_moments(pipeline, bundle, prompts):
    """C_s by input, `dict[str, Tensor (in, in)]`: what the layers read while the LoRA in a pipeline draws its prompts.

    Args:
        pipeline (`DiffusionPipeline`): of the bundle's model, with the LoRA loaded and the bundle's sampler.
        prompts (`list[str]`): those of the subject; without any, all directions count the same.
    """
    if not prompts:
        return {source: torch.eye(len(item.eigenvalues)) for source, item in bundle.group(JOINT).items()}
    moments = moments_of(prompts, bundle, [bundle.joint], pipeline, DRAWN_AT_ONCE, "Drawing the subject")
    return {source: total for (_, source), total in moments.sums.items()}


def kept(before, after, subject):
    """1 - ||(dW' - dW) C_s^(1/2)||_F / ||dW C_s^(1/2)||_F: the share of its function that a layer keeps, at most 1.

    A measure of this project's: the relative RMS change of what the layer adds on the subject's inputs, from 1.

    Args:
        before (`LoraLayer`), after (`LoraLayer`): of dW and dW', without a magnitude.
        subject (`Tensor`): C_s (in, in), of any trace.
    """
    difference = torch.cat([before.scale * before.up.double(), -after.scale * after.up.double()], dim=1)
    both = torch.cat([before.down.double(), after.down.double()])

    def size(up, down):
        return ((up.T @ up) * (down @ in_double(subject) @ down.T)).sum().clamp_min(0).sqrt()

    whole = size(before.scale * before.up.double(), before.down.double())
    return 1 - (size(difference, both) / whole).item() if whole else 1.0  # of nothing, nothing is lost


def audit_repairable(layers, bundle, **models):
    """What `audit` says of a finished LoRA, before anything is drawn for its repair.

    Raises:
        NullSpaceError: if a layer is a DoRA, of another model, or not protected.
    """
    if magnitudes := [name for name, layer in layers.items() if layer.magnitude is not None]:
        raise NullSpaceError(f"{listed(magnitudes, 3)} are of a DoRA, which cannot be repaired; train it anew.")
    found = audit(layers, bundle, **models)
    if found["unprotected"]:
        raise NullSpaceError(
            f"The bundle closes no direction of {listed(found['unprotected'], 3)}, which would go on to move any "
            "picture; build one with build_nullspace.py --attention all --with_text_encoder."
        )
    return found


def repair(layers, before, bundle, subject, drift_weight, **models):
    """A LoRA's layers in the null space, and what that cost: `dict[str, LoraLayer]`, and a `dict` for each layer.

    Args:
        layers (`dict[str, LoraLayer]`): of the finished LoRA.
        before (`dict`): from `audit_repairable`.
        subject (`dict[str, Tensor]`): from `subject_moments`.
        drift_weight (`float`): see `repair_layer`.
        models: the base model's `unet` and text encoders, by their names in a pipeline.

    Returns:
        The layers, and `dict`s with `module`, `kept` (see there), `drift_before` and `drift` as `predicted_drift` gives
        them, and `leakage` as `audit` does.

    Raises:
        NullSpaceError: if what the LoRA does is too large to be told.
    """
    protected, spectra = bundle.protected(softness=math.inf), bundle.group(JOINT)
    repaired, rows = {}, []
    for name, layer in layers.items():
        source = bundle.modules[name]["input"]
        repaired[name] = repair_layer(layer, protected[name], spectra[source], subject[source], drift_weight)
        rows.append({"module": name, "kept": kept(layer, repaired[name], subject[source])})
    after = audit(repaired, bundle, **models)
    for row, old, new in zip(rows, before["layers"], after["layers"], strict=True):
        row |= {"drift_before": old["predicted_drift"], "drift": new["predicted_drift"], "leakage": new["leakage"]}
    if beyond := [row["module"] for row in rows if not all(map(math.isfinite, list(row.values())[1:]))]:
        raise NullSpaceError(f"What the LoRA does in {listed(beyond, 3)} is too large to be told; it is not repaired.")
    return repaired, rows
