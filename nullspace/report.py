"""Saving a trained LoRA, which is refused where it leaks, and what is said of it: its guarantee and its figures."""

import json
import math
from pathlib import Path

import torch

from nullspace.adapters import save_lora, scale_lora
from nullspace.budget import RESERVE
from nullspace.errors import UnsoundError
from nullspace.lora import load_lora
from nullspace.names import JOINT, LORA_NAME
from nullspace.system import put, write_text


# The bound on leakage: the most of a layer's change that may reach what is protected, by what a file is saved in; in
# other types none is saved. `save_audited` reads the file back and refuses more: at the end of the trainer, and in
# `NullSpace.save`. What is measured in float32 is far below. 16 bits round to within 2^-9 (bfloat16) of each weight,
# which is why they are allowed more.
LEAKAGE_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}


def write_json(path, content):
    """Write what can be written as JSON, whole or not at all; `NullSpaceError` if the disk takes none of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def audit_file(folder, auditor):
    """Read a saved LoRA back and tell what it does to the protected inputs, see `audit`.

    Args:
        folder (`Path`): with the LoRA.
        auditor (`Auditor`): of the models that have it; of none, where only a word was trained.

    Raises:
        NullSpaceError: if the file cannot be read, or is of another model than the bundle.
    """
    return auditor(load_lora(folder) if auditor.models else {})


def save_audited(folder, auditor, dtype, unprotected, advice=None, max_drift=None, **options):
    """Write the LoRA to a folder, read it back, and refuse it if it leaks more than `LEAKAGE_BOUNDS` allow.

    Args:
        folder (`Path`): that is there.
        auditor (`Auditor`): of the models that have it; of none, where no LoRA was trained.
        dtype (`torch.dtype`): of the saved weights, one of `LEAKAGE_BOUNDS`.
        unprotected (`Path`): where the file is moved to if it leaks.
        advice (`str`, *optional*): what to do then.
        max_drift (`float`, *optional*): the root mean square of the predicted drifts, read back, is at most that: B of
            the models is scaled by what is missing, which only the rounding to 16 bits can bring about.
        options: of `save_lora`.

    Returns:
        `dict`: what `audit` found in the file.

    Raises:
        NullSpaceError: if the file cannot be written.
        UnsoundError: if a protected layer leaks too much.
    """
    if auditor.models:
        save_lora(folder, **auditor.models, dtype=dtype, **options)
    found, bound = audit_file(folder, auditor), LEAKAGE_BOUNDS[dtype]
    while max_drift is not None and found["predicted_drift"]["rms"] > max_drift:
        counted = [row["module"] for row in found["layers"] if row["predicted_drift"] is not None]
        scale_lora(auditor.models, counted, (1 - RESERVE) * max_drift / found["predicted_drift"]["rms"])
        save_lora(folder, **auditor.models, dtype=dtype, **options)
        found = audit_file(folder, auditor)
    leaking = {row["module"]: row["leakage"] for row in found["layers"] if row["leakage"] is not None}
    leaking = {name: leakage for name, leakage in leaking.items() if not leakage <= bound}  # NaN is below no bound
    if leaking:
        put(folder / LORA_NAME, unprotected)
        name = max(leaking, key=lambda name: math.inf if math.isnan(leaking[name]) else leaking[name])
        if advice is None:
            advice = "report it with your command line" if dtype == torch.float32 else "pass --upcast_before_saving"
        raise UnsoundError(
            f"The LoRA breaks its promise: {leaking[name]:.1e} of what it changes in {name} reaches what is protected, "
            f"and {bound:g} is the bound of {describe_dtype(dtype)} file ({len(leaking)} of {len(found['layers'])} "
            f"layers are above it); it was written to {unprotected} only, without a card, and should not be used: "
            f"{advice}."
        )
    return found


def describe_dtype(dtype):
    """'a float32' or 'a 16-bit', as goes before 'file'."""
    return "a float32" if dtype == torch.float32 else "a 16-bit"


def describe_guarantee(found, bundle, dtype, threshold):
    """The first sentences of report and card: what is guaranteed of the saved LoRA, or that nothing is."""
    leakage, unprotected, total = found["leakage"]["max"], len(found["unprotected"]), len(found["layers"])
    if leakage is None:
        reason = "--nullspace_threshold 0" if threshold == 0 else "none of its layers is protected"
        return f"Nothing is guaranteed: no direction of any layer was closed ({reason})."
    text = (
        f"Guaranteed: at most {leakage:.1e} of what the LoRA changes in a layer reaches what is protected; a file "
        f"above {LEAKAGE_BOUNDS[dtype]:g} is not saved."
    )
    if unprotected:
        text = (
            f"Nothing is guaranteed: {unprotected} of {total} layers are unprotected and may change any picture; of "
            f"the others at most {leakage:.1e} of the change reaches what is protected."
        )
    if dtype != torch.float32:
        text += " Most of it is the rounding of its weights to 16 bits."
    if any(item.distances is None for item in bundle.group(JOINT).values()):
        text += " It is measured against the bundle's own directions alone: "
        if bundle.config["format_version"] == 1:
            text += (
                "the bundle is of the old format, which does not say how far rounding has turned them from those that "
                "the base model uses."
            )
        else:
            text += (
                "they are those of a sum that is made of rounded directions, and how far that has turned them from "
                "those that the base model uses is not known."
            )
    return text


def describe_drift(found, max_drift):
    """A sentence for log, report and card on the drift that is predicted of a LoRA and the one that is allowed."""
    return (
        f"The predicted drift of its layers is {found['predicted_drift']['rms']:.4g} (root mean square), of the "
        f"{max_drift:g} that --max_drift allows."
    )


def describe_word(token, vectors, alone):
    """What is guaranteed of a word: a sentence for report and card.

    Args:
        vectors (`int`): rows that it has.
        alone (`bool`): whether no LoRA was trained besides.
    """
    rows = "1 new row" if vectors == 1 else f"{vectors} new rows"
    if alone:
        return (
            f"Guaranteed: prompts without {token} give what they gave, for its {rows} of the embedding are all that "
            "was trained, and the other rows are the base model's, to the last bit."
        )
    return f"{token} is {rows} of the embedding, whose other rows are the base model's, to the last bit."


def make_report(found, bundle, dtype, name, setting, training):
    """What is written of a run: what is guaranteed, its settings, and what `audit_file` found.

    Args:
        dtype (`torch.dtype`): of the saved weights.
        name (`str`): the folder or Hub id of the bundle.
        setting (`dict`): how it was used: `criterion`, `threshold`, `softness` and more.
        training (`dict`): how the LoRA was trained.
    """
    softness = None if setting["softness"] == math.inf else setting["softness"]  # which JSON cannot hold
    return {
        "guarantee": describe_guarantee(found, bundle, dtype, setting["threshold"]),
        "base_model": bundle.config["base_model"],
        "model_type": bundle.config["model_type"],
        "prediction_type": bundle.config.get("prediction_type"),
        "nullspace": {
            # Of a folder the name alone: where it lies is nobody else's business
            "bundle": Path(name).name if Path(name).is_dir() else str(name),
            "revision": bundle.revision,
            "prompts": {key: bundle.config["prompts"][key] for key in ("source", "count", "sha256")},
            **setting,
            "softness": softness,
        },
        "training": training,
        **found,
    }
