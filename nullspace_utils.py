"""The tools beside trainer and builder, and the names to import for code of one's own.

As a script it audits any LoRA, in closed form, with no GPU and no picture:

    python nullspace_utils.py audit --lora lora --nullspace <your-username>/nullspace-sd15

and has a model tell whether a bundle protects what it reads:

    python nullspace_utils.py verify --nullspace <your-username>/nullspace-sd15

It also moves a finished LoRA into the null space (`repair`), exports LoRAs for the web UIs (`export`), puts several
into one (`merge-loras`), adds bundles up (`merge`), lists those of a base model (`find`), and those that trainings have
built and kept (`cache`).

Imported, it has the pieces that the trainer is made of:

    bundle = Bundle.load("nullspace-sd15")
    bundle.check(unet)
    projector = NullSpaceProjector(unet, bundle.protected())
    projector.attach(optimizer)  # and call projector.project_gradients() before gradients are clipped
"""

import math
import os
import shlex
import sys
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

from nullspace import signals
from nullspace.checks import COUNT, NATURAL, RANGES, SHARE, HelpFormatter, Parser, check_output_dir
from nullspace.errors import NullSpaceError, listed
from nullspace.flags import SINGLE_FILE_CONFIG, add_hub_token, add_model_files, add_model_type
from nullspace.names import DEFAULT_THRESHOLDS, LORA_NAME, TEXT_ENCODER, TEXT_ENCODERS, embedding_path
from nullspace.system import make_inside, quiet_imports, without_folder
from nullspace.terminal import print_table, printable


CACHE_HELP = "Where trainings keep the bundles that they build (default: nullspace in HF_HOME, ~/.cache/huggingface)."


def add_base_model(command, note, **options):
    """Add the flags that name a base model to a command."""
    what = f"Folder, .safetensors file or Hub id of the base model ({note})."
    command.add_argument("--pretrained_model_name_or_path", help=what, **options)
    command.add_argument("--single_file_config", help=SINGLE_FILE_CONFIG)
    command.add_argument(
        "--base_lora",
        nargs="+",
        metavar="LORA",
        help="LoRAs that are part of the base model, in order, as in the trainer: what was trained on top of them has "
        "bundles of its own.",
    )
    add_model_files(command)
    add_hub_token(command)


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
    add_base_model(command, "default: what the bundle names")
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
    command.add_argument(
        "--output", type=Path, required=True, help="The file, *.safetensors, which it replaces if there is one."
    )
    add_hub_token(command)
    command = commands.add_parser(
        "merge",
        help="Add bundles of one model up: a bundle of all their prompts, as if it had been built at once.",
        formatter_class=HelpFormatter,
    )
    command.add_argument(
        "--nullspace",
        required=True,
        action="append",
        type=os.path.expanduser,
        help="Folder or Hub dataset id of a bundle; give the flag for each of them.",
    )
    command.add_argument("--output_dir", type=Path, required=True, help="The folder of the new bundle.")
    add_hub_token(command)
    command = commands.add_parser(
        "merge-loras",
        help="Put LoRAs into one that does what they do together, and their words into one file.",
        formatter_class=HelpFormatter,
    )
    command.add_argument(
        "--lora",
        required=True,
        nargs="+",
        help="Folders, files or Hub ids of two LoRAs or more; one that was trained on top of others comes after them.",
    )
    command.add_argument("--output_dir", type=Path, required=True, help="The folder of the new LoRA.")
    add_hub_token(command)
    command = commands.add_parser(
        "verify",
        help="Have a model read some of a bundle's prompts, and tell whether it protects what it says.",
        formatter_class=HelpFormatter,
    )
    command.ranges = RANGES | {"prompts": COUNT}
    command.add_argument("--nullspace", required=True, help="Folder or Hub dataset id of the bundle.")
    add_base_model(command, "default: what the bundle names")
    command.add_argument(
        "--prompts",
        type=int,
        help="Draw so many of the prompts that the bundle ships, in all its sampler's steps, as it was built "
        "(default: few and in few steps, as before a training).",
    )
    command = commands.add_parser(
        "repair",
        help="Move somebody's finished LoRA into the null space, with the least loss of what it does for its subject.",
        formatter_class=HelpFormatter,
    )
    command.ranges = RANGES | {"drift_weight": NATURAL}
    command.add_argument("--lora", required=True, help="Folder, file or Hub id of the LoRA.")
    command.add_argument("--nullspace", required=True, help="Folder or Hub dataset id of the base model's bundle.")
    add_base_model(command, "default: what the bundle names")
    command.add_argument(
        "--instance_prompt",
        nargs="+",
        default=[],
        help="Prompts of the subject: what the LoRA does on a few pictures of each is kept best (default: it is kept "
        "alike in all directions, and nothing is drawn).",
    )
    command.add_argument(
        "--drift_weight",
        type=float,
        default=1.0,
        help="What moving the protected prompts weighs against losing the subject (default: %(default)s).",
    )
    command.add_argument("--output_dir", type=Path, required=True, help="The folder of the new LoRA.")
    command = commands.add_parser(
        "find",
        help="List the bundles of a base model that are in the cache, and on the Hub.",
        formatter_class=HelpFormatter,
    )
    add_base_model(command, "required", required=True)
    add_model_type(command)
    command.add_argument("--nullspace_namespace", metavar="NAME", help="User or organization on the Hub to ask, too.")
    command.add_argument("--nullspace_cache_dir", type=Path, help=CACHE_HELP)
    command = commands.add_parser(
        "cache", help="List the bundles that trainings have built, or remove some.", formatter_class=HelpFormatter
    )
    command.add_argument("--nullspace_cache_dir", type=Path, help=CACHE_HELP)
    command.add_argument("--remove", nargs="+", metavar="NAME", help="Bundles to remove, as they are listed, or all.")
    args = parser.parse_args(argv)
    if args.command == "merge" and len(args.nullspace) < 2:
        parser.error("merge needs --nullspace two times or more, once for each bundle.")
    if args.command == "merge-loras" and len(args.lora) < 2:
        parser.error("merge-loras needs two LoRAs or more in --lora.")
    if args.command == "export" and args.output.suffix != ".safetensors":
        parser.error(f"--output {args.output} must end in .safetensors, by which the programs find it.")
    return args


# Flags come before libraries, which take seconds to import: neither help nor a wrong flag needs them.
if __name__ == "__main__":
    ARGS = parse_args()
    signals.listen()
    quiet_imports(hidden=["bitsandbytes"])

import torch
from accelerate import PartialState

from nullspace.adapters import model_of, write_layers
from nullspace.audit import audit, leakage, load_audited_models, predicted_drift, verdict
from nullspace.bundle import Bundle, check_output_folder
from nullspace.captions import counted
from nullspace.dataset_card import draw_spectra, write_dataset_card
from nullspace.embeddings import bundled_tokens, holds, load_words, loading_code, save_embedding, save_words, unbundled
from nullspace.finding import bundles_of_model, cache_folder, cached, describe_cache, remove_from_cache
from nullspace.hub import base_license
from nullspace.kohya import embedding_metadata, read_report, save_kohya
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs
from nullspace.lora import LoraLayer, check_finite, load_lora, read_embeddings, read_lora
from nullspace.markdown import python_string
from nullspace.moments import SecondMoments
from nullspace.projector import NullSpaceProjector, Protected
from nullspace.repair import audit_repairable, repair, subject_moments
from nullspace.samplers import make_scheduler
from nullspace.spectrum import Spectrum
from nullspace.stack import check_bundle, check_one_model, concatenated, read_stack
from nullspace.timesteps import timestep_groups
from nullspace.verify import examples, load_verified, refuse, verify


__all__ = [
    "Bundle", "LoraLayer", "NullSpaceError", "NullSpaceProjector", "Protected", "SecondMoments", "Spectrum",
    "attention_inputs", "audit", "find_module", "leakage", "load_lora", "predicted_drift", "read_lora",
    "text_encoder_inputs", "timestep_groups", "verdict",
]  # fmt: skip


def open_bundle(args, text_encoder=True):
    """The bundle of --nullspace, and the LoRAs of --base_lora, once it turned out to be of the model with them.

    Args:
        text_encoder (`bool`): whether to load what it protects in text encoders, too.
    """
    bundle = Bundle.load(args.nullspace, text_encoder=text_encoder, token=args.hub_token)
    loras = read_stack(args.base_lora, args.hub_token)
    check_bundle(bundle.config, args.nullspace, loras, "--nullspace")
    return bundle, loras


def base_model(args):
    """What the flags say of the base model, by the names of `load_audited_models` and `load_verified`."""
    return {
        "name_or_path": args.pretrained_model_name_or_path,
        "config": args.single_file_config,
        "revision": args.revision,
        "variant": args.variant,
        "token": args.hub_token,
    }


def to_device(pipeline):
    """Move a pipeline to the GPU in 16 bits, as trainings are, where there is one; else leave it in float32."""
    device = PartialState().device
    if device.type != "cpu":
        is_wide = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        pipeline.to(device, torch.bfloat16 if is_wide else torch.float16)


def reach_text_encoder(layers):
    """Whether a LoRA has layers in a text encoder."""
    return any(model_of(name) in TEXT_ENCODERS for name in layers)


def audit_lora(args):
    """Print what a LoRA does to what a bundle protects, and what it brings besides."""
    layers, unknown = read_lora(args.lora, args.hub_token)
    check_finite(layers, args.lora)
    if not layers:
        print(printable(verdict({}, unknown or ["nothing that is a LoRA layer"])))
        return
    with_text_encoder = reach_text_encoder(layers)
    bundle, loras = open_bundle(args, with_text_encoder)
    models = load_audited_models(bundle, with_text_encoder, loras, **base_model(args))
    found = audit(layers, bundle, **models, threshold=args.nullspace_threshold)

    rows = []
    for row in found["layers"]:
        values = ["-" if row[key] is None else f"{row[key]:.2e}" for key in ("leakage", "predicted_drift")]
        rows.append([row["module"], str(row["in_features"]), str(row["protected_rank"]), *values])
    print_table(["module", "inputs", "closed", "leakage", "drift"], rows)
    print(printable(verdict(found, unknown)))
    report = read_report(args.lora) or {}
    if of_another_model(report, bundle):
        trained_on = report["base_model"]["id"]
        print(printable(f"It was trained on another model, {trained_on}; this is what it does to the bundle's."))
    if tokens := bundled_tokens(read_embeddings(args.lora, args.hub_token)):
        told = f"It comes with an embedding of {listed(tokens, 3)}, which changes prompts that hold it, and no others."
        print(printable(told))
    beneath = report.get("base_model", {}).get("loras", [])
    if beneath and not loras:
        shown = listed(lora["id"] for lora in beneath)
        print(printable(f"It was trained on top of {shown}, which are to be loaded with it and are not counted here."))


def of_another_model(report, bundle):
    """Whether a LoRA's report names other weights of the UNet than the bundle's configuration."""
    trained, built = (each.get("base_model", {}).get("fingerprint") for each in (report, bundle.config))
    return isinstance(trained, dict) and isinstance(built, dict) and trained.get("unet") != built.get("unet")


def export_lora(args):
    """Write a LoRA for the web UIs, and its word, if it has one, beside it: some read that from a file of its own."""
    output, lora = args.output, Path(args.lora)
    if output.is_dir():
        raise NullSpaceError(f"--output {output} is a folder; name a file.")
    if not output.absolute().parent.is_dir():
        raise NullSpaceError(f"--output {output} lies in a folder that is not there; make it, or name another.")
    if output.exists() and any(source.exists() and output.samefile(source) for source in (lora, lora / LORA_NAME)):
        raise NullSpaceError(f"--output {output} is the LoRA itself; name another file.")
    layers = load_lora(args.lora, args.hub_token)
    check_finite(layers, args.lora)
    if any(layer.magnitude is not None for layer in layers.values()):
        raise NullSpaceError(f"{args.lora} is a DoRA, which is not exported; give the programs the file itself.")
    embeddings = read_embeddings(args.lora, args.hub_token)
    words = {embedding_path(output.parent, word.token): word for word in unbundled(embeddings)}
    for path, word in words.items():
        if path.exists() and not holds(path, word):
            raise NullSpaceError(
                f"--output {output} brings its word to {path}, where another is, perhaps that of another step; name an "
                "--output in another folder."
            )
    save_kohya(output, layers, read_report(args.lora), embeddings)
    told = [f"the embedding of {token}" for token in bundled_tokens(embeddings)]
    print(printable(f"Wrote {' and '.join([f'{len(layers)} layers', *told])} to {output}"))
    for path, word in words.items():
        make_inside(path.parent)
        save_embedding(path, word, embedding_metadata(word.token))
        print(printable(f"Wrote the embedding of {word.token} to {path}, for ComfyUI and Forge"))


def merge_bundles(args):
    """Write the bundle of all that several bundles of one model protect."""
    output = args.output_dir
    check_output_folder(output)
    for name in args.nullspace:
        if output.exists() and Path(name).exists() and output.samefile(name):
            raise NullSpaceError(f"--output_dir {output} is one of the bundles that are merged; name another folder.")
    bundles = []
    for name in args.nullspace:
        bundle = Bundle.load(name, text_encoder=True, every_group=True, token=args.hub_token)
        if twin := next((each for each in bundles if each.group_hashes() == bundle.group_hashes()), None):
            other = args.nullspace[bundles.index(twin)]
            raise NullSpaceError(
                f"{name} is the same bundle as {other}, whose prompts would count twice; leave it out."
            )
        bundles.append(bundle)
    merged = reduce(Bundle.merge, bundles)
    named = [word for name in args.nullspace for word in ("--nullspace", without_folder(name))]
    command = ["python", "nullspace_utils.py", "merge", *named, "--output_dir", without_folder(output)]
    merged.config["command"] = shlex.join(command)
    base = merged.config["base_model"]
    license_name = base_license(base["id"], args.hub_token) if base.get("revision") else None  # of a folder
    merged.save(output, [draw_spectra, write_dataset_card(license_name)])
    print(f"Wrote {merged.config['prompts']['count']:,} prompts of {len(bundles)} bundles to {output}")


def check_empty(folder):
    """Raise `NullSpaceError` unless a folder can be written to and holds nothing, as a report of another LoRA."""
    check_output_dir(folder)
    if folder.exists() and any(folder.iterdir()):
        raise NullSpaceError(f"--output_dir {folder} holds other files; name an empty folder.")


def merge_loras(args):
    """Write one LoRA that does what several do together, and print the code that loads it."""
    check_empty(args.output_dir)
    loras = read_stack(args.lora, args.hub_token, flag="--lora")
    check_one_model(loras)
    layers, words = concatenated(loras), [word for lora in loras for word in lora.words]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines, imports = [], []
    if layers:
        write_layers(args.output_dir, layers)
        lines.append(f"pipeline.load_lora_weights({python_string(args.output_dir)})")
    if words:
        save_words(args.output_dir, words)
        imports, more = loading_code(args.output_dir, False, [word.token for word in words], list(words[0].rows))
        lines += more
    ranks = sorted({len(layer.down) for layer in layers.values()})
    told = [f"{len(layers)} layers of rank {listed(ranks)}", *(f"the word {word.token}" for word in words)]
    print(printable(f"Wrote {listed(told, len(told))} to {args.output_dir}; load them with:"))
    for line in [*imports, *lines]:
        print(printable(f"    {line}"))


def verify_bundle(args):
    """Print what a bundle's projectors let through of what the model reads; refuse it where that is too much."""
    bundle, loras = open_bundle(args)
    shipped = len(examples(bundle))
    if args.prompts and args.prompts > shipped:
        raise NullSpaceError(
            f"--prompts {args.prompts} is more than the {shipped} that the bundle ships; choose fewer."
        )
    pipeline = load_verified(bundle, loras, **base_model(args))
    to_device(pipeline)
    drawn = {"prompts": args.prompts, "whole": True} if args.prompts else {}
    findings = verify(bundle, pipeline, **drawn)

    rows = []
    for item in findings:
        shares = [f"{share:.1e}" for share in (item.claimed, item.measured, item.limit)]
        closed = [f"{share:.4f}" for share in (item.closed_claimed, item.closed_measured)]
        mark = "<- too much" if item.measured > item.limit else f"<- {item.energy:.0e} times the energy"
        rows.append([item.source, str(item.size), str(item.closed), *shares, *closed, "" if item.holds else mark])
    # Shares of the energy: what is let through, and what the closed directions hold
    let_through, in_closed = ["let through: claimed", "measured", "at most"], ["in closed: claimed", "measured"]
    print_table(["input", "size", "closed", *let_through, *in_closed, ""], rows)
    refuse(findings)
    print(f"Verdict: on what this model read, the bundle protects what it claims at all {len(findings)} inputs.")


def repair_lora(args):
    """Write a LoRA's counterpart in the null space, and tell what it kept and what it moves."""
    source = Path(args.lora) / LORA_NAME if Path(args.lora).is_dir() else Path(args.lora)
    if source.exists() and source.resolve() == (args.output_dir / LORA_NAME).resolve():
        raise NullSpaceError(f"--output_dir {args.output_dir} holds the LoRA itself; name another folder.")
    check_empty(args.output_dir)
    layers = load_lora(args.lora, args.hub_token)
    words = unbundled(read_embeddings(args.lora, args.hub_token))
    tokens = [word.token for word in words]
    if tokens and args.instance_prompt and not any(token in text for token in tokens for text in args.instance_prompt):
        raise NullSpaceError(f"--instance_prompt does not name the LoRA's subject; write {tokens[0]} in it.")
    check_finite(layers, args.lora)
    bundle, loras = open_bundle(args, reach_text_encoder(layers))
    pipeline = load_verified(bundle, loras, **base_model(args))
    to_device(pipeline)
    models = {name: getattr(pipeline, name) for name in ("unet", *TEXT_ENCODERS) if hasattr(pipeline, name)}
    before = audit_repairable(layers, bundle, **models)
    if args.instance_prompt:
        with TemporaryDirectory() as folder:  # in the one format that diffusers reads with a word, too
            write_layers(Path(folder), layers)
            pipeline.load_lora_weights(folder)
        load_words(pipeline, words)
        pipeline.scheduler = make_scheduler(bundle.config["sampler"], pipeline.scheduler.config)
    subject = subject_moments(pipeline, bundle, args.instance_prompt)
    repaired, rows = repair(layers, before, bundle, subject, args.drift_weight, **models)

    keys = ("drift_before", "drift", "leakage")
    table = [[row["module"], f"{row['kept']:.1%}", *(f"{row[key]:.2e}" for key in keys)] for row in rows]
    print_table(["module", "kept", "drift", "now", "leakage"], table)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_layers(args.output_dir, repaired)
    if words:
        save_words(args.output_dir, words)
    rms = {key: math.sqrt(sum(row[key] ** 2 for row in rows) / len(rows)) for key in ("drift_before", "drift")}
    of_what = "what the LoRA does for its subject" if args.instance_prompt else "the LoRA's change"
    print(
        f"Kept {sum(row['kept'] for row in rows) / len(rows):.0%} of {of_what} (mean of its layers); predicted drift "
        f"{rms['drift']:.2g}, {rms['drift_before']:.2g} before (RMS). Wrote {args.output_dir / LORA_NAME}"
    )


def list_bundles(args):
    """List the bundles of a base model."""
    found = bundles_of_model(args, lambda sentence: print(printable(sentence), file=sys.stderr))
    for where, config in found:
        layers = config["attention"] + " attention" + " and text encoder" * (TEXT_ENCODER in config)
        steps, prompts = ", ".join(map(str, config["num_inference_steps"])), config["prompts"]
        print(printable(str(where)))
        told = (
            f"{layers}; {prompts['count']:,} prompts of {prompts['source']}; {config['sampler']}, {steps} steps, "
            f"guidance scale {config['guidance_scale']:g}, {config['resolution']} pixels"
        )
        print(printable(f"  {told}"))
    if not found:
        print("There is no bundle of this very model; a training without --nullspace_name_or_path builds one.")


def list_cache(args):
    """List the bundles in the cache, or remove some."""
    folder = cache_folder(args.nullspace_cache_dir)
    if args.remove:
        names = list(cached(folder)) if args.remove == ["all"] else args.remove
        remove_from_cache(folder, names)
        print(f"Removed {len(names)} from {folder}")
        return
    rows = describe_cache(folder)
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, size, what in rows:
        print(printable(f"{name:{width}}{size / 1e6:10.1f} MB  {what}"))
    print(f"{counted(len(rows), 'bundle')}, {sum(size for _, size, _ in rows) / 1e6:.1f} MB, in {folder}")


def main(args):
    """Run a command."""
    commands = {
        "audit": audit_lora,
        "export": export_lora,
        "merge": merge_bundles,
        "merge-loras": merge_loras,
        "verify": verify_bundle,
        "repair": repair_lora,
        "find": list_bundles,
        "cache": list_cache,
    }
    commands[args.command](args)


if __name__ == "__main__":
    signals.run(main, ARGS)
