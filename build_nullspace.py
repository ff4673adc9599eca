# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.4,<2", "datasets>=5.0,<6", "diffusers>=0.40,<1", "huggingface_hub>=1.23,<3", "matplotlib",
#     "peft>=0.19,<1", "safetensors>=0.8,<1", "torch>=2.6,<2.14", "tqdm", "transformers>=5.6,<6",
# ]
# ///
"""Build the null-space bundle of a Stable Diffusion or LCM model, once for all who train on it.

    accelerate launch build_nullspace.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --output_dir nullspace-sd15 --mixed_precision bf16

The model draws the prompts as it does for its users, and the second moments of what its attention
projections read are summed on the way. Add `--push_to_hub` to publish the bundle as a dataset, now
or later:

    python build_nullspace.py --output_dir nullspace-sd15 --push_to_hub
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path
from statistics import median

from nullspace.flags import parse_first


if __name__ == "__main__":
    parse_first(__file__)

import accelerate
import diffusers
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from huggingface_hub import DatasetCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from nullspace.cards import code_block, code_span, plain, table_cell, utf8
from nullspace.checks import Parser, resolution_fault
from nullspace.fingerprints import fingerprints
from nullspace.prompts import Counted, length_warnings, read_lines, tokenizer_fault
from nullspace.system import follow_umask
from nullspace_utils import (
    CARD_NAME,
    CONFIG_NAME,
    ENERGIES,
    JOINT,
    MODEL_TYPES,
    PROCESS_TIMEOUT,
    TABLE_NAME,
    TEXT_ENCODER,
    TEXT_INPUT,
    Bundle,
    HelpFormatter,
    NullSpaceError,
    SecondMoments,
    attention_inputs,
    base_license,
    check_clip_skip,
    check_files,
    check_output_folder,
    config_sha256,
    create_repository,
    download_model,
    find_module,
    group_file,
    hub_repository,
    load_whole,
    loading,
    model_type,
    push_folder,
    read_config,
    reason,
    require,
    sha256,
    text_encoder_inputs,
    timestep_groups,
)


DPM = DPMSolverMultistepScheduler
SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (DPM, {"solver_order": 2}),
    "dpmpp_2m_karras": (DPM, {"solver_order": 2, "use_karras_sigmas": True}),
    "dpmpp_3m": (DPM, {"solver_order": 3}),
    "dpmpp_3m_sde_karras": (
        DPM,
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
STAGES = 4
# What differs between the kinds of model, each sampled as its own pipeline does by default.
DEFAULTS = {
    "sd": {"sampler": "ddim", "num_inference_steps": [25], "guidance_scale": 7.5, "timestep_groups": JOINT},
    "lcm": {"sampler": "lcm", "num_inference_steps": [1, 2, 4, 8], "guidance_scale": 8.5, "timestep_groups": "steps"},
}
PIPELINES = {"sd": StableDiffusionPipeline, "lcm": LatentConsistencyModelPipeline}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv=None):
    parser = Parser(usage="accelerate launch %(prog)s [flags]", description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="Folder or Hub id of the base model. Without it, the bundle already in --output_dir is pushed.",
    )
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for instance fp16.")
    group.add_argument(
        "--model_type",
        choices=["auto", *MODEL_TYPES],
        default="auto",
        help="Stable Diffusion or Latent Consistency Model; auto reads it from the model (default: %(default)s).",
    )
    group.add_argument(
        "--attention",
        choices=["cross", "self", "all"],
        default="cross",
        help="Attention layers to cover; LoRA can then be trained on those (default: %(default)s).",
    )
    group.add_argument(
        "--with_text_encoder",
        action="store_true",
        help="Cover the text encoder's own attention too, so that it can be trained with --train_text_encoder.",
    )

    group = parser.add_argument_group("prompts to protect; the empty prompt is always one of them")
    group.add_argument("--prompts_file", type=Path, help="Text file with a prompt on each line.")
    group.add_argument("--prompts_dataset_name", help="Folder or Hub id of a dataset with prompts.")
    group.add_argument("--prompts_dataset_config_name", help="Configuration of that dataset.")
    group.add_argument("--prompts_split", default="train", help="Split of that dataset (default: %(default)s).")
    group.add_argument("--prompt_column", default="text", help="Column of that dataset (default: %(default)s).")
    group.add_argument("--max_prompts", type=int, help="Use only the first so many prompts.")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SAMPLERS, help="Default: ddim, or lcm for an LCM.")
    group.add_argument(
        "--num_inference_steps",
        type=int,
        nargs="+",
        help="Sampler steps; with several numbers the prompts are drawn with each (default: 25; LCM: 1 2 4 8).",
    )
    group.add_argument("--guidance_scale", type=float, help="Guidance scale (default: 7.5; LCM: 8.5).")
    group.add_argument(
        "--clip_skip",
        type=int,
        default=0,
        help="Last layers of the text encoder to skip, as diffusers counts them; 1 is the web UIs' Clip skip 2 "
        "(default: %(default)s).",
    )
    group.add_argument("--resolution", type=int, help="Side of the pictures in pixels (default: the model's own).")
    group.add_argument("--batch_size", type=int, default=8, help="Prompts drawn at once (default: %(default)s).")
    group.add_argument(
        "--mixed_precision", choices=DTYPES, default="no", help="Precision of the model (default: %(default)s)."
    )
    group.add_argument("--seed", type=int, default=0, help="Prompt i is drawn from seed + i (default: %(default)s).")
    group.add_argument(
        "--checkpointing_steps",
        type=int,
        default=10,
        help="Batches of prompts between checkpoints, in <output_dir>.checkpoint: a build that was killed goes on from "
        "there when the same command is run again (default: %(default)s).",
    )

    group = parser.add_argument_group("bundle")
    group.add_argument(
        "--timestep_groups",
        choices=[JOINT, "stages", "steps"],
        help=f"Besides the sum over all timesteps, keep {STAGES} stages or every step apart "
        "(default: joint; LCM: steps).",
    )
    group.add_argument(
        "--output_dir", type=Path, default=Path("nullspace-bundle"), help="Its folder (default: %(default)s)."
    )
    group.add_argument("--push_to_hub", action="store_true", help="Publish the bundle as a dataset on the Hub.")
    group.add_argument("--hub_dataset_id", help="Its repository (default: the folder's name under your account).")
    group.add_argument("--hub_private_repo", action="store_true", help="Create that repository as a private one.")
    group.add_argument("--hub_token", help="Token to use instead of the one you are logged in with.")
    args = parser.parse_args(argv)

    if args.pretrained_model_name_or_path is None and not args.push_to_hub:
        parser.error("--pretrained_model_name_or_path is needed to build a bundle.")
    if args.pretrained_model_name_or_path and (args.prompts_file is None) == (args.prompts_dataset_name is None):
        parser.error("give the prompts as either --prompts_file or --prompts_dataset_name.")
    return args


# ---- What goes in ----------------------------------------------------------------------------------------------------


class Prompts:
    """The prompts to protect, the empty one first: in a temporary file rather than in memory, however many they are.

    Only one iteration at a time.

    Args:
        lines (`Iterable[str]`): prompts and empty lines, which are passed over.
        limit (`int`, *optional*): take only the first so many prompts.

    Attributes:
        sha256 (`str`): of the prompts joined by newlines.
        examples (`list[str]`): up to 8 of them, evenly spread.
    """

    def __init__(self, lines, limit=None):
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._count, digest, kept, stride = 0, hashlib.sha256(), [], 1
        for prompt in chain([""], islice(filter(None, map(str.strip, lines)), limit)):
            self._file.write(json.dumps(prompt) + "\n")  # a prompt of a dataset may hold a newline
            digest.update(("\n" if self._count else "").encode() + prompt.encode())
            if self._count and (self._count - 1) % stride == 0:
                kept.append(prompt)
            if len(kept) == 16:
                kept, stride = kept[::2], 2 * stride
            self._count += 1
        self.sha256 = digest.hexdigest()
        shown = min(8, len(kept))
        self.examples = [kept[len(kept) * index // shown] for index in range(shown)]

    def __len__(self):
        return self._count

    def __iter__(self):
        self._file.seek(0)
        return map(json.loads, self._file)


def read_prompts(args, tell=lambda sentence: None):
    """The `Prompts` to protect; `tell` is called with a sentence on lines that were empty or repeated.

    Raises:
        NullSpaceError: if there are none.
    """
    lines = Counted(file_lines(args) if args.prompts_file else dataset_lines(args))
    prompts = Prompts(lines, args.max_prompts)
    if len(prompts) == 1:
        raise NullSpaceError(f"{args.prompts_file or args.prompts_dataset_name} holds no prompt.")
    if counts := str(lines):
        tell(f"{args.prompts_file or args.prompts_dataset_name}: {counts}.")
    return prompts


def file_lines(args):
    try:
        yield from read_lines(args.prompts_file)
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"--prompts_file {args.prompts_file} cannot be read: {error}.") from error


def dataset_lines(args):
    require("datasets", "--prompts_dataset_name")
    from datasets import load_dataset  # slow to import, and seldom needed

    column = args.prompt_column
    try:
        rows = load_dataset(
            args.prompts_dataset_name, args.prompts_dataset_config_name, split=args.prompts_split, streaming=True
        )
        columns = list(next(iter(rows), {column: None}))
        if column in columns:
            yield from (row[column] or "" for row in rows)
            return
    except (OSError, ValueError) as error:
        raise NullSpaceError(
            f"--prompts_dataset_name {args.prompts_dataset_name} cannot be read ({reason(error)})."
        ) from error
    raise NullSpaceError(
        f"--prompts_dataset_name {args.prompts_dataset_name} has no column '{column}'; choose a --prompt_column of "
        f"{', '.join(columns)}."
    )


def load_model(folder, tokenizer, args):
    """The pipeline of a base model in a folder, with its files of --variant where there are such.

    Raises:
        OSError, ValueError: if a file is missing or lacks weights.
    """
    parts = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for name, kind in parts.items():
        has_variant = args.variant and any((folder / name).glob(f"*.{args.variant}*"))
        parts[name] = load_whole(kind, folder, name, variant=args.variant if has_variant else None)
    return PIPELINES[args.model_type].from_pretrained(
        folder, variant=args.variant, safety_checker=None, tokenizer=tokenizer, **parts
    )


def make_scheduler(sampler, config):
    """The diffusers scheduler of a sampler's name, on the noise schedule of the model's own."""
    scheduler_class, overrides = SAMPLERS[sampler]
    return scheduler_class.from_config(config, **overrides)


# ---- Collecting ------------------------------------------------------------------------------------------------------


class Checkpoint:
    """What this process has summed so far, in a folder beside the bundle.

    Sums, counts and the number of batches are in one file, which is renamed into place, so that they always agree.

    Args:
        output_dir (`Path`): the bundle's folder.
        settings (`dict`): all that determines the result; a checkpoint of others is refused.
        state (`PartialState`): names the process.
    """

    def __init__(self, output_dir, settings, state):
        output_dir = Path(output_dir).resolve()
        self.folder = output_dir.with_name(f"{output_dir.name}.checkpoint")
        self.path = self.folder / f"process-{state.process_index}.safetensors"
        self.settings = json.loads(json.dumps(settings))
        self.device = state.device

    def save(self, moments, batches):
        """Record what `moments` hold after so many batches."""
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {
            "batches": str(batches),
            "settings": json.dumps(self.settings),
            # A list, for the order in which the inputs were first seen is that of the bundle's files
            "tokens": json.dumps([[*key, count] for key, count in moments.tokens.items()]),
        }
        tensors = {f"{group} {source}": total for (group, source), total in moments.sums.items()}
        partial = self.path.with_name(f"partial-{self.path.name}")
        save_file(tensors, partial, metadata=metadata)
        follow_umask(partial)
        os.replace(partial, self.path)

    def load(self, moments):
        """Put what was recorded, if anything, into `moments`, and return the number of batches that it holds.

        Raises:
            NullSpaceError: if it was recorded with other settings, or cannot be read.
        """
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:  # on the CPU: not every name of a device is one that it takes
                metadata = file.metadata()
                settings = json.loads(metadata["settings"])
                differing = [key for key in self.settings if settings.get(key) != self.settings[key]]
                if differing:
                    raise NullSpaceError(
                        f"{self.folder} is the checkpoint of another build ({', '.join(differing)}); run that "
                        "command again, or delete the folder to start anew."
                    )
                for group, source, tokens in json.loads(metadata["tokens"]):
                    moments.sums[group, source] = file.get_tensor(f"{group} {source}").to(self.device)
                    moments.tokens[group, source] = tokens
        except (OSError, SafetensorError) as error:
            raise NullSpaceError(f"{self.path} cannot be read ({error}); delete it to start anew.") from error
        return int(metadata["batches"])

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def collect_moments(pipeline, prompts, groups, checkpoint, args, state):
    """Draw this process's share of the prompts and return the `SecondMoments` over all processes."""
    group_of = {timestep: group["name"] for group in groups for timestep in group["timesteps"]}
    inputs = attention_inputs(pipeline.unet, args.attention)
    if args.with_text_encoder:
        inputs |= text_encoder_inputs(pipeline.text_encoder)
    moments = SecondMoments(pipeline.unet, inputs, group_of, pipeline.text_encoder)
    done = checkpoint.load(moments)
    steps_per_batch = sum(args.num_inference_steps)
    share = range(state.process_index, len(prompts), state.num_processes)
    progress = tqdm(
        total=math.ceil(len(share) / args.batch_size) * steps_per_batch,
        initial=done * steps_per_batch,
        desc="Collecting",
        unit="step",
        disable=not state.is_local_main_process,
    )

    def advance(pipeline, step, timestep, values):
        progress.update()
        return values

    numbered = islice(enumerate(prompts), share.start, None, share.step)
    batches = iter(lambda: list(islice(numbered, args.batch_size)), [])
    with moments.collect():
        for number, batch in enumerate(islice(batches, done, None), done + 1):
            moments.draw(
                pipeline,
                [prompt for _, prompt in batch],
                [args.seed + index for index, _ in batch],
                args.num_inference_steps,
                args.guidance_scale,
                args.resolution,
                advance,
                args.clip_skip,
            )
            if number % args.checkpointing_steps == 0:
                checkpoint.save(moments, number)
    progress.close()
    moments.reduce(lambda tensor: reduce(tensor, "sum"))
    return moments


def describe(pipeline, prompts, revision, args):
    """The bundle's configuration: all that one needs to know to use it or to build it again."""
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    inputs = attention_inputs(unet, args.attention)

    def describe_modules(inputs):
        layers = {name: find_module(name, unet, text_encoder) for name in inputs}
        return {
            name: {"input": inputs[name], "in_features": layer.in_features, "out_features": layer.out_features}
            for name, layer in layers.items()
        }

    covered = {"modules": describe_modules(inputs)}
    if args.with_text_encoder:
        text_inputs = text_encoder_inputs(text_encoder)
        covered[TEXT_ENCODER] = {"modules": describe_modules(text_inputs)}
    source = args.prompts_file.name if args.prompts_file else args.prompts_dataset_name
    return {
        "base_model": {
            "id": args.pretrained_model_name_or_path,
            "revision": revision,
            "variant": args.variant,
            "fingerprint": fingerprints(
                unet=unet, text_encoder=text_encoder, tokenizer=pipeline.tokenizer, noise_scheduler=pipeline.scheduler
            ),
        },
        "model_type": args.model_type,
        "prediction_type": pipeline.scheduler.config.prediction_type,
        "sampler": args.sampler,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "clip_skip": args.clip_skip,
        "resolution": args.resolution,
        "attention": args.attention,
        **covered,
        "prompts": {
            "source": source,
            "count": len(prompts),
            "sha256": prompts.sha256,
            "examples": prompts.examples,
        },
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
        "command": shlex.join(["accelerate", "launch", Path(sys.argv[0]).name, *without_token(sys.argv[1:])]),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, diffusers, transformers, accelerate, peft)},
        },
    }


def weights_sha256(*models):
    """Hex digest of all weights of models in float32."""
    digest = hashlib.sha256()
    for model in models:
        for tensor in model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def without_token(argv):
    """A command line without the secret that may be in it."""
    kept, words = [], iter(argv)
    for word in words:
        if not word.startswith("--hub_t"):  # argparse takes a beginning of --hub_token for it
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


# ---- What people see -------------------------------------------------------------------------------------------------


def rank_table(bundle):
    """Header and rows of strings: for each size of layer input, how many directions hold how much of the energy."""
    header = ["input size", "inputs", "layers", *(f"rank at {energy}" for energy in ENERGIES), "bytes"]
    kinds = {JOINT: "", TEXT_INPUT: " (text)", TEXT_ENCODER: " (text encoder)"}
    by_kind = {}
    for row in bundle.table():
        if row["group"] in kinds:
            by_kind.setdefault((list(kinds).index(row["group"]), row["in_features"], row["group"]), []).append(row)
    rows = []
    for (_, size, group), members in sorted(by_kind.items()):
        unique = {row["input"]: row for row in members}.values()
        ranks = [f"{median(row[f'rank_{energy}'] for row in unique):g}" for energy in ENERGIES]
        stored = len(unique) * size * (4 * size + 4)
        rows.append([f"{size}{kinds[group]}", str(len(unique)), str(len(members)), *ranks, f"{stored:,}"])
    return header, rows


def model_name(config):
    """The base model's id on the Hub, or the name of its folder."""
    model = config["base_model"]
    return model["id"] if model["revision"] else Path(model["id"]).name


def print_table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def draw_spectra(bundle, folder):
    """Write `spectra.png`: the eigenvalues of every input, as shares of their sum, and the energy they leave out."""
    import matplotlib  # only the picture needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    sizes = sorted({len(spectrum.eigenvalues) for spectrum in bundle.group(JOINT).values()})
    for source, spectrum in sorted(bundle.group(JOINT).items()):
        share = spectrum.eigenvalues.double() / spectrum.eigenvalues.double().sum()
        size = len(share)
        is_text = source == TEXT_INPUT
        within_text = source.startswith(f"{TEXT_ENCODER}.")
        style = {
            "color": "black" if is_text else "grey" if within_text else f"C{sizes.index(size)}",
            "linestyle": "-" if is_text else ("--" if ".to_out" in source else ":"),
            "linewidth": 1.8 if is_text else 1.0,
        }
        axis = torch.arange(1, size + 1) / size
        left.semilogy(axis, share.clamp_min(1e-12), **style)
        right.semilogy(axis, (1 - share.cumsum(0)).clamp_min(1e-9), **style)
    left.set(xlabel="direction, as a share of all", ylabel="share of the energy", title="Eigenvalues", ylim=(1e-10, 1))
    right.set(xlabel="directions protected, as a share of all", ylabel="energy left unprotected", ylim=(1e-7, 1))
    right.set_title("What protecting more of them leaves")
    for energy in ENERGIES:
        right.axhline(1 - energy, color="grey", linewidth=0.5)
        place = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "va": "center"}
        right.annotate(f"energy {energy}", (1.02, 1 - energy), fontsize=8, color="grey", **place)
    kinds = [("black", "-", "text: to_k, to_v")] + [
        (f"C{index}", line, f"{size}: {label}")
        for index, size in enumerate(sizes)
        for line, label in ((":", "hidden states"), ("--", "to_out"))
        if any(
            len(spectrum.eigenvalues) == size and (".to_out" in source) == (label == "to_out")
            for source, spectrum in bundle.spectra[JOINT].items()
        )
    ]
    kinds += [("grey", ":", "within the text encoder")] * (TEXT_ENCODER in bundle.spectra)
    lines = [plt.Line2D([], [], color=color, linestyle=line) for color, line, _ in kinds]
    left.legend(lines, [label for _, _, label in kinds], fontsize=7, loc="lower left")
    figure.savefig(folder / "spectra.png", dpi=120)
    plt.close(figure)


def break_lines(command):
    """A command line with each flag on a line of its own."""
    lines = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def write_card(license_name):
    """A writer of the dataset card, `README.md`, for `Bundle.save`."""

    def write(bundle, folder):
        config = bundle.config
        model = config["base_model"]
        is_hub_id = model["revision"] is not None
        data = DatasetCardData(
            license=license_name,
            task_categories=["text-to-image"],
            size_categories=["n<1K" if len(bundle.table()) < 1000 else "1K<n<10K"],
            tags=["null-space", "dreambooth", "lora", "diffusers", f"model-type:{config['model_type']}"],
            pretty_name=f"Null-space bundle of {Path(model['id']).name}",
            configs=[{"config_name": "default", "data_files": TABLE_NAME}],
            **({"base_model": model["id"]} if is_hub_id else {}),
        )
        header, rows = rank_table(bundle)
        table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---:"] * len(header), *rows))
        groups = "\n".join(
            f"| `{group_file(group['name'])}` | {group['range'][0]} to {group['range'][1]} | "
            f"{len(group['timesteps'])} |"
            for group in config["groups"]
        )
        prompts = config["prompts"]
        text_modules = config.get(TEXT_ENCODER, {}).get("modules")
        fingerprints_shown = ", ".join(
            f"{part.replace('_', ' ')} `{value}`" for part, value in model["fingerprint"].items()
        )
        within_text = (
            f"{len(text_modules)} projections, in `{group_file(TEXT_ENCODER)}`" if text_modules else "not covered"
        )
        steps = ", ".join(map(str, config["num_inference_steps"]))
        sampling = f"{config['sampler']}, {steps} steps, guidance scale {config['guidance_scale']}"
        hidden = max(item.distance for spectra in bundle.spectra.values() for item in spectra.values())
        with_skip = f"  --clip_skip {bundle.clip_skip} \\\n" if bundle.clip_skip else ""
        named = f"[{model['id']}](https://huggingface.co/{model['id']})" if is_hub_id else code_span(model["id"])
        card = f"""---
{data.to_yaml()}
---

# Null-space bundle of {plain(Path(model["id"]).name)}

The directions that the attention layers of {named} use on {prompts["count"]:,} prompts
({code_span(prompts["source"])}, the empty prompt included). A DreamBooth LoRA that is trained outside of them learns
its subject and leaves these prompts as they were.

## Train with it

```bash
accelerate launch train_dreambooth_nullspace.py \\
  --pretrained_model_name_or_path {shlex.quote(model["id"])} \\
  --nullspace_name_or_path <this repository> \\
  --instance_data_dir <folder with 3 to 5 pictures> \\
  --instance_prompt "a photo of a sks dog" \\
{with_skip}  --resolution {config["resolution"]} --train_batch_size 1 --learning_rate 1e-3 --max_train_steps 800 \\
  --output_dir lora
```

## What is protected

| | |
|---|---|
| base model | {table_cell(named)}{f", revision `{model['revision']}`" if is_hub_id else ""} |
| its fingerprints | {fingerprints_shown} |
| model type, prediction type | {config["model_type"]}, {config["prediction_type"]} |
| attention layers | {config["attention"]}, {len(config["modules"])} projections |
| text encoder | {within_text} |
| sampling | {sampling}, {config["resolution"]} pixels |
| clip skip | {bundle.clip_skip} |
| prompts | {prompts["count"]:,}, sha256 `{prompts["sha256"]}` |
| what rounding may hide of a leakage | at most {hidden:.1e}, see `distances` in `{CONFIG_NAME}` |

Median number of directions, over the inputs of one size, that hold a share of the energy (the trace of the second
moment). Layers that read the same input share it; each layer is a row of `{TABLE_NAME}`.

{table}

![Eigenvalue spectra](spectra.png)

## Files

| file | training timesteps | sampled timesteps in it |
|---|---|---:|
{groups}

`{group_file(TEXT_INPUT)}` holds the text encoder's output, which to_k and to_v of every cross-attention layer read
at all timesteps. `{CONFIG_NAME}` describes everything and holds the sha256 of every file.

## How it was built

{code_block("bash", break_lines(config["command"]))}
"""
        (folder / CARD_NAME).write_text(utf8(card), encoding="utf-8")

    return write


# ---- Publishing ------------------------------------------------------------------------------------------------------


def push_command(repo_id, args):
    """The command that pushes the bundle in --output_dir later."""
    words = ["python", Path(sys.argv[0]).name, "--output_dir", str(args.output_dir), "--push_to_hub"]
    words += ["--hub_dataset_id", repo_id] if repo_id else []
    return shlex.join(words + ["--hub_private_repo"] * args.hub_private_repo)


def name_repository(repo_id, folder):
    """Write the repository's id into the card's training command, and record the card as it is now."""
    config, card = read_config(folder), folder / CARD_NAME
    if card.is_file():  # a bundle that was merged has none
        text = card.read_text(encoding="utf-8")
        text = re.sub(r"(--nullspace_name_or_path ).*( \\\n)", rf"\g<1>{repo_id}\g<2>", text, count=1)
        replace_text(card, text)
        config["files"][CARD_NAME] = sha256(card)
        config["sha256"] = config_sha256(config)
        replace_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    return config


def replace_text(path, text):
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def push(repo_id, args):
    """Upload the bundle in --output_dir in one commit.

    Raises:
        NullSpaceError: if that fails, with the command that tries again.
    """
    config = name_repository(repo_id, args.output_dir)
    url = push_folder(
        repo_id,
        "dataset",
        args.output_dir,
        [CONFIG_NAME, *config["files"]],
        f"Null-space bundle of {model_name(config)}: {config['prompts']['count']:,} prompts, "
        f"{config['sampler']}, format {config['format_version']}",
        push_command(repo_id, args),
        args.hub_token,
        outdated=group_file("timesteps-*"),  # of an earlier bundle, which may have had other groups
    )
    print(f"Pushed to {url}")


# ---- The job ---------------------------------------------------------------------------------------------------------


def main(args):
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, timeout=PROCESS_TIMEOUT)  # as Accelerator reads it from `launch`
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    def tell(sentence):
        if state.is_main_process:
            print(sentence, file=sys.stderr)

    # Find out all that can go wrong before the work
    repo_id, retry, model = args.hub_dataset_id, "run this command again", args.pretrained_model_name_or_path
    if model is not None:
        require("matplotlib", "The picture of the spectra")
        check_output_folder(args.output_dir)
        prompts = read_prompts(args, tell)
        if len(prompts) < state.num_processes:
            raise NullSpaceError(
                f"There are {len(prompts)} prompts, the empty one included, for {state.num_processes} processes; start "
                "fewer, or give more prompts."
            )
        args.model_type = model_type(model, args.revision, args.hub_token, args.model_type)
        if args.model_type == "lcm" and args.sampler not in (None, "lcm"):
            raise NullSpaceError(f"A Latent Consistency Model is drawn with --sampler lcm only, not {args.sampler}.")
    elif (args.output_dir / CONFIG_NAME).is_file():
        check_files(args.output_dir)
        retry = f"push it with: {push_command(repo_id, args)}"
    else:
        raise NullSpaceError(f"{args.output_dir} holds no bundle; build one with --pretrained_model_name_or_path.")
    if args.push_to_hub and state.is_main_process:
        repo_id = hub_repository(repo_id, args.output_dir, args.hub_token, retry)
        create_repository(repo_id, "dataset", args.hub_private_repo, args.hub_token, retry)
    if model is None:
        if state.is_main_process:
            push(repo_id, args)
        return
    with state.main_process_first():
        folder = download_model(model, args.revision, args.variant, args.hub_token)
    revision = None if Path(model).is_dir() else folder.name  # a snapshot is named after its commit
    for name, value in DEFAULTS[args.model_type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    with loading(model):
        vae_config = AutoencoderKL.load_config(folder, subfolder="vae")
    if args.resolution and (fault := resolution_fault(args.resolution, vae_config["block_out_channels"])):
        raise NullSpaceError(fault)
    with loading(model):
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    if fault := tokenizer_fault(tokenizer, model):
        raise NullSpaceError(fault)
    for sentence in length_warnings(tokenizer, prompts, "the prompts"):
        tell(sentence)

    # Load the model with the sampler
    with loading(model):
        pipeline = load_model(folder, tokenizer, args)
    check_clip_skip(args.clip_skip, pipeline.text_encoder.config.num_hidden_layers)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(args.sampler, pipeline.scheduler.config)
    args.resolution = args.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    config = describe(pipeline, prompts, revision, args)
    weights = weights_sha256(pipeline.unet, pipeline.text_encoder)
    pipeline.to(state.device, DTYPES[args.mixed_precision])

    # Draw the prompts and sum what the layers read
    visited = []
    for steps in args.num_inference_steps:
        try:
            pipeline.scheduler.set_timesteps(steps)
        except ValueError as error:  # more steps than the sampler has
            raise NullSpaceError(f"--num_inference_steps {steps} is too many ({reason(error)}).") from error
        visited += pipeline.scheduler.timesteps.tolist()
    count = {JOINT: 1, "stages": STAGES, "steps": len(visited)}[args.timestep_groups]
    groups = timestep_groups(visited, count, pipeline.scheduler.config.num_train_timesteps)
    settings = {key: value for key, value in config.items() if key != "command"}
    settings |= {"groups": groups, "weights": weights, "batch_size": args.batch_size, "processes": state.num_processes}
    checkpoint = Checkpoint(args.output_dir, settings, state)
    moments = collect_moments(pipeline, prompts, groups, checkpoint, args, state)

    # Decompose, write and publish
    if state.is_main_process:
        bundle = Bundle.from_moments(moments, groups, config)
        license_name = base_license(args.pretrained_model_name_or_path, args.hub_token)
        bundle.save(args.output_dir, extras=[draw_spectra, write_card(license_name)])
        checkpoint.remove()
        print_table(*rank_table(bundle))
        print(f"Wrote {args.output_dir}")
        if args.push_to_hub:
            push(repo_id, args)
    state.wait_for_everyone()


if __name__ == "__main__":
    try:
        main(parse_args())
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
