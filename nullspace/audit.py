"""The audit: what a LoRA does to protected inputs, in closed form."""

import math

import torch

from nullspace.errors import NullSpaceError, listed
from nullspace.families import get_family
from nullspace.layers import base_layer, find_module
from nullspace.lora import with_magnitude
from nullspace.models import download_model, loading
from nullspace.names import DEFAULT_THRESHOLDS, JOINT
from nullspace.spectrum import Spectrum, in_double


# Root mean square drifts of the layers between which the verdict changes. On the demo's model held-out pictures then
# move by about 2% and 4% of a pixel's range (benchmarks/preservation.py).
LITTLE, MUCH = 0.3, 0.6


def _compact(layer):
    """A matrix (r, in) float64 with the same norms as dW has: ||dW M|| = ||compact M|| for every M (in, ...)."""
    return layer.scale * torch.linalg.qr(layer.up.double()).R @ layer.down.double()


def leakage(layer, protected):
    """||dW U_k||_F / ||dW||_F, U_k (in, k) being the protected directions: 0 is the promise, 1 is no protection.

    It is what is seen of the directions as they are stored, and what their rounding may hide besides, see `Spectrum`,
    so that the share is at most this much. Where `protected.distance` is None, as with bundles of format 1 and sums of
    bundles, the latter is not known and not in it.

    Args:
        layer (`LoraLayer`): without a magnitude, see `with_magnitude`.
        protected (`Protected`): of its input.

    Returns:
        `float`: the share.
    """
    return _share_inside(_compact(layer), protected)


def _share_inside(compact, protected):
    inside = compact @ protected.basis[:, : protected.rank].double()
    return (inside.norm() / compact.norm().clamp_min(1e-300)).item() + (protected.distance or 0.0)


def predicted_drift(layer, weight, spectrum):
    """sqrt(tr(dW C dW^T) / tr(W C W^T)): relative RMS change of the layer's output on the protected inputs.

    Args:
        layer (`LoraLayer`): what is added to the layer, without a magnitude, see `with_magnitude`.
        weight (`Tensor`): W, (out, in).
        spectrum (`Spectrum`): of C.

    Returns:
        `float`: the change; what the rounding of the spectrum may hide is not in it, see `audit`.
    """
    roots = _roots(spectrum)
    return ((_compact(layer) @ roots).norm() / _outputs(weight, roots)).item()


def _roots(spectrum):
    """C^(1/2) but for a rotation, (in, in) float64."""
    return spectrum.orthonormal().double() * spectrum.eigenvalues.double().sqrt()


def _outputs(weight, roots):
    """tr(W C W^T)^(1/2), a scalar."""
    return (in_double(weight) @ roots).norm()


class Auditor:
    """Tells what LoRAs of one model do to the inputs that a bundle protects at all of its timesteps: `audit`.

    What the layers' outputs weigh does not depend on the LoRA, takes a minute or more for SDXL, and is computed once.
    The bases, which take 840 MB of SDXL's, are unpacked for each audit.

    Args:
        bundle (`Bundle`): with its joint group loaded, and that of the text encoder if LoRAs have layers there.
        protected (`dict[str, Protected]`): what is closed, from `Bundle.protected`, whatever is held back.
        models (`dict[str, Module]`): the base model's `unet`, and text encoders by their names; with LoRA or without.
    """

    def __init__(self, bundle, protected, models):
        self.bundle, self.models = bundle, models
        self.closed = {name: item._replace(basis=None, gains=None) for name, item in protected.items()}
        self._outputs = {}  # of each layer, once it is asked for

    def __call__(self, layers):
        """What `audit` returns of layers, `dict[str, LoraLayer]`."""
        unknown = {"protected_rank": 0, "leakage": None, "predicted_drift": None, "rounding": None}
        rows = {name: {"module": name, "in_features": item.down.shape[1], **unknown} for name, item in layers.items()}
        readers = {}  # input -> the layers that read it
        for name in filter(self.closed.__contains__, layers):
            readers.setdefault(self.bundle.modules[name]["input"], []).append(name)
        spectra = [self.bundle.group(JOINT)[source] for source in readers]
        bases = Spectrum.orthonormal_all(spectra)
        for names, packed, basis in zip(readers.values(), spectra, bases, strict=True):
            spectrum = packed._replace(eigenvectors=basis, rest=None)
            roots = _roots(spectrum)
            for name in names:
                rows[name] |= self._measure(name, layers[name], spectrum, roots)
        return summarize(list(rows.values()))

    def _measure(self, name, layer, spectrum, roots):
        item = self.closed[name]._replace(basis=spectrum.eigenvectors)
        weight = base_layer(find_module(name, **self.models)).weight
        if (len(layer.up), *layer.down.shape[1:]) != (len(weight), len(item.basis)):
            raise NullSpaceError(f"The LoRA was made for another model than the bundle: their sizes of {name} differ.")
        if name not in self._outputs:
            self._outputs[name] = _outputs(weight, roots)
        compact, distance = _compact(with_magnitude(layer, weight)), spectrum.drift_distance()
        row = {
            "protected_rank": item.rank,
            "leakage": _share_inside(compact, item) if item.rank else None,
            "predicted_drift": ((compact @ roots).norm() / self._outputs[name]).item(),
        }
        if distance is not None:
            hidden = (compact.norm() * roots.norm() * distance / self._outputs[name]).item()
            row["rounding"] = {"leakage": item.distance, "predicted_drift": hidden}
        return row


def audit(layers, bundle, unet, threshold=DEFAULT_THRESHOLDS["energy"], **text_encoders):
    """What a LoRA does to the inputs that a bundle protects at all of its timesteps.

    Args:
        layers (`dict[str, LoraLayer]`): from `load_lora`.
        bundle (`Bundle`): with its joint group loaded, and that of the text encoder if the LoRA has layers there.
        unet (`UNet2DConditionModel`), text_encoder (`CLIPTextModel`, *optional*): the base model's.
        threshold (`float`): leakage is that into the directions that hold this share of the energy.

    Returns:
        `dict`: `layers`, one `dict` for each with `module`, `in_features`, `protected_rank`, `leakage` (None where
        nothing is protected) and `predicted_drift`, both None where the bundle does not cover the layer, and
        `rounding`: how much of its leakage, and how much drift besides, the bundle's rounding may hide, None where
        that is not known; the `max`, `mean` and root mean square (`rms`) of both over the layers that have them; and
        `unprotected`, the modules in which nothing is protected.

    Raises:
        NullSpaceError: if a layer's sizes are not those of the bundle, or `Bundle.protected` refuses the threshold.
        AttributeError: if the models are not the bundle's and lack a layer that it covers.
    """
    protected = bundle.protected("energy", threshold, math.inf)
    return Auditor(bundle, protected, {"unet": unet, **text_encoders})(layers)


def summarize(rows):
    """What `audit` returns, from the `layers` in it."""
    summary = {}
    for key in ("leakage", "predicted_drift"):
        values = [row[key] for row in rows if row[key] is not None]
        summary[key] = dict.fromkeys(("max", "mean", "rms"))
        if values:
            rms = math.sqrt(sum(value**2 for value in values) / len(values))
            summary[key] = {"max": max(values), "mean": sum(values) / len(values), "rms": rms}
    unprotected = [row["module"] for row in rows if not row["protected_rank"]]
    return {**summary, "unprotected": unprotected, "layers": rows}


def load_audited_models(
    bundle, with_text_encoder, loras=(), name_or_path=None, revision=None, variant=None, token=None, config=None
):
    """The base model's UNet, and its text encoders if asked for: arguments for `audit`.

    Args:
        loras (`tuple[Earlier]`): that were in it.
        name_or_path, revision, variant, token (`str`, *optional*): of the base model, see `Bundle.base_model`.
        config (`str`, *optional*): folder or Hub id of the configuration of a single file, see `find_configuration`.

    Raises:
        NullSpaceError: if they cannot be had, or are not those that the bundle was built from.
    """
    family = get_family(bundle.config["model_type"])
    parts = ["unet", *(family.text_encoders if with_text_encoder else ())]
    skip = {*family.text_encoders, "vae"} - set(parts)
    where = bundle.base_model(name_or_path, revision, variant)
    model = download_model(*where, token, config, skip=skip)._replace(loras=loras)
    with loading(model.name):
        models = family.load_models(model, parts)
    bundle.check(**models)
    return models


def verdict(found, unknown=()):
    """One sentence on what `audit` found; `unknown` is what `read_lora` did not understand."""
    if unknown:
        return (
            f"Verdict: not known: the file also holds {listed(unknown, 3)}, which the audit does not understand, and "
            "what that changes comes on top of what is listed."
        )
    drift, uncovered = found["predicted_drift"]["rms"], sum(row["predicted_drift"] is None for row in found["layers"])
    if drift is None:
        return "Verdict: the bundle covers no layer of this LoRA, so nothing can be said."
    word = "little" if drift < LITTLE else "noticeably" if drift < MUCH else "strongly"
    text = (
        f"Verdict: on what the bundle protects, this LoRA changes its layers' outputs {word} (by {drift:.2g}, RMS; "
        f"noticeably from {LITTLE:g}, strongly from {MUCH:g})"
    )
    if (share := found["leakage"]["max"]) is not None:
        text += f"; up to {share:.2g} of a layer's change reaches what it closes"
    if uncovered:
        text += f"; {uncovered} of its {len(found['layers'])} layers are not covered and not counted"
    return f"{text}."
