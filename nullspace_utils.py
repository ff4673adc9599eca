"""Null-space projection for LoRA: second moments, the projection bundle, the projector and its audit.

A linear layer maps inputs x (in,) to W x. Over the inputs that it sees on knowledge to keep, C = E[x x^T] says which
directions they use. LoRA adds s * B @ A to W; with every row of A orthogonal to the leading eigenvectors of C, the
layer answers those inputs as before, whatever B is (AlphaEdit, arXiv 2410.02355, eq. 5 to 8, for closed-form edits;
Adam-NSCL, CVPR 2021, for training).

    bundle = Bundle.load("demo/output/bundle")
    bundle.check(unet)
    projector = NullSpaceProjector(unet, {"joint": bundle.protected("joint", "energy", 0.999)})
    projector.attach(optimizer)  # and call projector.project_gradients() after each backward pass

Run as a script, it audits any LoRA, in closed form, with no GPU and no picture:

    python nullspace_utils.py audit --lora lora --nullspace <your-username>/nullspace-sd15
"""

import sys
from pathlib import Path

from nullspace.checks import RANGES, SHARE, HelpFormatter, Parser
from nullspace.errors import NullSpaceError
from nullspace.names import DEFAULT_THRESHOLDS, LORA_NAME, TEXT_ENCODERS


def parse_args(argv=None):
    parser = Parser(description="Tools for LoRAs and null-space bundles.", formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "audit",
        help="Tell what any LoRA does to what a bundle protects, without drawing a picture.",
        formatter_class=HelpFormatter,
    )
    command.ranges = RANGES | {"nullspace_threshold": SHARE}
    command.add_argument("--lora", required=True, help="Folder, file or Hub id of the LoRA.")
    command.add_argument("--nullspace", required=True, help="Folder or Hub dataset id of the base model's bundle.")
    command.add_argument(
        "--pretrained_model_name_or_path", help="Folder or Hub id of the base model (default: what the bundle names)."
    )
    command.add_argument(
        "--nullspace_threshold",
        type=float,
        default=DEFAULT_THRESHOLDS["energy"],
        help="Leakage is that into the directions that hold this share of the energy (default: %(default)s).",
    )
    command = commands.add_parser(
        "export",
        help="Write a LoRA as one file that AUTOMATIC1111, Forge and ComfyUI load.",
        formatter_class=HelpFormatter,
    )
    command.add_argument("--lora", required=True, help="Folder, file or Hub id of the LoRA.")
    command.add_argument("--format", choices=["kohya"], default="kohya", help="Of the file (default: %(default)s).")
    command.add_argument("--output", required=True, help="The file, *.safetensors, which it replaces if there is one.")
    args = parser.parse_args(argv)
    if args.command == "export" and Path(args.output).suffix != ".safetensors":
        parser.error(f"--output {args.output} must end in .safetensors, by which the programs find it.")
    return args


# Flags come before libraries, which take seconds to import: neither help nor a wrong flag needs them.
if __name__ == "__main__":
    ARGS = parse_args()


from nullspace.audit import audit, leakage, load_audited_models, predicted_drift, verdict
from nullspace.bundle import Bundle
from nullspace.kohya import read_report, save_kohya
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs
from nullspace.lora import LoraLayer, load_lora, read_lora
from nullspace.moments import SecondMoments
from nullspace.projector import NullSpaceProjector, Protected
from nullspace.spectrum import Spectrum
from nullspace.timesteps import timestep_groups


__all__ = [
    "Bundle", "LoraLayer", "NullSpaceError", "NullSpaceProjector", "Protected", "SecondMoments", "Spectrum",
    "attention_inputs", "audit", "find_module", "leakage", "load_lora", "predicted_drift", "read_lora",
    "text_encoder_inputs", "timestep_groups", "verdict",
]  # fmt: skip


def export(args):
    """Write a LoRA for the web UIs."""
    output, lora = Path(args.output), Path(args.lora)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise NullSpaceError(f"--output {output} is no file in a folder that there is; name one.")
    if output.exists() and any(source.exists() and output.samefile(source) for source in (lora, lora / LORA_NAME)):
        raise NullSpaceError(f"--output {output} is the LoRA itself; name another file.")
    layers = load_lora(args.lora)
    if any(layer.magnitude is not None for layer in layers.values()):
        raise NullSpaceError(f"{args.lora} is a DoRA, which is not exported; give the programs the file itself.")
    save_kohya(output, layers, read_report(args.lora))
    print(f"Wrote {len(layers)} layers to {output}")


def main(args):
    if args.command == "export":
        return export(args)
    layers, unknown = read_lora(args.lora)
    if not layers:
        print(verdict({}, unknown or ["nothing that is a LoRA layer"]))
        return
    with_text_encoder = any(name.partition(".")[0] in TEXT_ENCODERS for name in layers)
    bundle = Bundle.load(args.nullspace, text_encoder=with_text_encoder)
    models = load_audited_models(bundle, args.pretrained_model_name_or_path, with_text_encoder)
    found = audit(layers, bundle, **models, threshold=args.nullspace_threshold)

    width = max(len(row["module"]) for row in found["layers"])
    print(f"{'module':{width}}  inputs  closed   leakage     drift")
    for row in found["layers"]:
        values = ["-" if row[key] is None else f"{row[key]:.2e}" for key in ("leakage", "predicted_drift")]
        print(f"{row['module']:{width}}{row['in_features']:8}{row['protected_rank']:8}{values[0]:>10}{values[1]:>10}")
    print(verdict(found, unknown))


if __name__ == "__main__":
    try:
        main(ARGS)
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
