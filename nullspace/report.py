"""What is said of a trained LoRA: what is guaranteed of it, and the figures of every layer."""

import json
import math
import os

import torch

from nullspace.adapters import save_lora
from nullspace.audit import audit
from nullspace.errors import NullSpaceError
from nullspace.lora import load_lora
from nullspace.names import JOINT, LORA_NAME, UNPROTECTED_NAME


# How much of a layer's change may reach what is protected in a file that is saved, by what it is saved in; 16 bits
# round it to within 2^-9 (bfloat16) of each weight.
SMALL = 1e-5  # what rounding hides of a leakage and nobody need be told
LEAKAGE_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}


def write_json(path, content):
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def audit_file(folder, bundle, adapted, args):
    """Read a saved LoRA back and tell what it does to the protected inputs, see `audit`."""
    return audit(
        load_lora(folder), bundle, **adapted, criterion=args.nullspace_criterion, threshold=args.nullspace_threshold
    )


def save_audited(folder, bundle, adapted, dtype, args):
    """Write the LoRA to a folder, read it back, and return what `audit_file` found.

    Raises:
        NullSpaceError: if a protected layer leaks more than `LEAKAGE_BOUNDS` allow. The file is then
            `UNPROTECTED_NAME` in --output_dir.
    """
    save_lora(folder, **adapted, dtype=dtype)
    found, bound = audit_file(folder, bundle, adapted, args), LEAKAGE_BOUNDS[dtype]
    leaking = {row["module"]: row["leakage"] for row in found["layers"] if row["leakage"] is not None}
    # What the bundle's rounding may hide is counted, and is no fault of the file; nor is NaN below any bound
    hidden = {row["module"]: row["rounding"]["leakage"] for row in found["layers"] if row["rounding"]}
    leaking = {name: leakage for name, leakage in leaking.items() if not leakage - hidden.get(name, 0.0) <= bound}
    if leaking and args.nullspace_timesteps != "nearest":  # which promises nothing
        target = args.output_dir / UNPROTECTED_NAME
        os.replace(folder / LORA_NAME, target)
        name = max(leaking, key=lambda name: math.inf if math.isnan(leaking[name]) else leaking[name])
        advice = "report it with your command line" if dtype == torch.float32 else "pass --upcast_before_saving"
        raise NullSpaceError(
            f"The LoRA breaks its promise: {leaking[name]:.1e} of what it changes in {name} reaches what is protected, "
            f"and {bound:g} is the bound of {describe_dtype(dtype)} file ({len(leaking)} of {len(found['layers'])} "
            f"layers are above it); it was written to {target} only, without a card, and should not be used: {advice}."
        )
    return found


def describe_dtype(dtype):
    return "a float32" if dtype == torch.float32 else "a 16-bit"


def describe_guarantee(found, bundle, dtype, args):
    """The first sentences of report and card: what is guaranteed of the saved LoRA, or that nothing is."""
    leakage, unprotected, total = found["leakage"]["max"], len(found["unprotected"]), len(found["layers"])
    if leakage is None:
        reason = "--nullspace_threshold 0" if args.nullspace_threshold == 0 else "none of its layers is protected"
        return f"Nothing is guaranteed: no direction of any layer was closed ({reason})."
    if args.nullspace_timesteps == "nearest":
        return (
            "Nothing is guaranteed: with --nullspace_timesteps nearest each step is protected at timesteps near its "
            f"own alone, and up to {leakage:.1e} of what the LoRA changes in a layer reaches what is protected."
        )
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
    hidden = max((row["rounding"]["leakage"] for row in found["layers"] if row["rounding"]), default=0.0)
    if hidden > leakage / 2 and hidden > SMALL:
        text += (
            f" Up to {hidden:.1e} of that is what the bundle may hide, which stores directions beyond those of its "
            "default threshold in 16 bits."
        )
    if any(item.distances is None for item in bundle.group(JOINT).values()):
        text += (
            " It is measured against the bundle's own directions alone: the bundle is of the old format, which does "
            "not say how far rounding has turned them from those that the base model uses."
        )
    return text


def make_report(found, bundle, dtype, args):
    """What is written of a run: what is guaranteed, its settings, and what `audit_file` found."""
    return {
        "guarantee": describe_guarantee(found, bundle, dtype, args),
        "base_model": bundle.config["base_model"],
        "model_type": args.model_type,
        "prediction_type": bundle.config.get("prediction_type"),
        "nullspace": {
            "bundle": str(args.nullspace_name_or_path),
            "revision": bundle.revision,
            "prompts": {key: bundle.config["prompts"][key] for key in ("source", "count", "sha256")},
            "criterion": args.nullspace_criterion,
            "threshold": args.nullspace_threshold,
            "softness": None if args.nullspace_softness == math.inf else args.nullspace_softness,
            "extra_prompts": args.nullspace_extra_prompts,
            "timesteps": args.nullspace_timesteps,
            "timestep_range": args.nullspace_timestep_range,
        },
        "training": {
            key: getattr(args, key)
            for key in (
                "instance_prompt", "rank", "lora_alpha", "lora_dropout", "lora_layers", "train_text_encoder",
                "lcm_loss", "max_train_steps", "optimizer", "learning_rate", "train_batch_size", "seed",
                "mixed_precision", "clip_skip",
            )
        },
        **found,
    }  # fmt: skip
