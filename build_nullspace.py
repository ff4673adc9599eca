# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.4,<2", "datasets>=5.0,<6", "diffusers>=0.36,<1", "huggingface_hub>=1.5,<3", "matplotlib",
#     "peft>=0.19,<1", "safetensors>=0.5,<1", "torch>=2.6,<2.14", "tqdm", "transformers>=5.6,<6",
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
from itertools import islice
from pathlib import Path

from nullspace.checks import HelpFormatter, Parser, check_clip_skip, require, resolution_fault
from nullspace.errors import NullSpaceError, reason
from nullspace.families import FAMILIES, get_family, recognise
from nullspace.names import CARD_NAME, CONFIG_NAME, JOINT, TEXT_ENCODER
from nullspace.samplers import SAMPLERS, make_scheduler
from nullspace.system import follow_umask, hide_package


STAGES = 4
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of --mixed_precision, as torch calls them


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
        choices=["auto", *FAMILIES],
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
        "--mixed_precision", choices=PRECISIONS, default="no", help="Precision of the model (default: %(default)s)."
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


# Flags come before libraries, which take seconds to import: neither help nor a wrong flag needs them.
if __name__ == "__main__":
    ARGS = parse_args()
    hide_package("bitsandbytes")  # which peft imports wherever it is installed, and which then prints

import accelerate
import diffusers
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from nullspace.bundle import Bundle, check_files, check_output_folder, group_file, read_config
from nullspace.dataset_card import draw_spectra, model_name, rank_table, write_dataset_card
from nullspace.fingerprints import fingerprints
from nullspace.hashes import config_sha256, sha256
from nullspace.hub import base_license, create_repository, hub_repository, push_folder
from nullspace.launch import PROCESS_TIMEOUT
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs
from nullspace.models import download_model, loading
from nullspace.moments import SecondMoments
from nullspace.prompts import length_warnings, read_prompts, tokenizer_fault
from nullspace.timesteps import timestep_groups


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
    family = get_family(args.model_type)
    moments = SecondMoments(pipeline.unet, inputs, group_of, text_encoder=pipeline.text_encoder)
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
            moments.start_batch()
            family.sample(
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
        layers = {name: find_module(name, unet, text_encoder=text_encoder) for name in inputs}
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


def print_table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


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
        family = recognise(model, args.revision, args.hub_token, args.model_type)
        args.model_type = family.name
        if family.samplers and args.sampler not in (None, *family.samplers):
            title = family.title[0].upper() + family.title[1:]
            raise NullSpaceError(
                f"{title} is drawn with --sampler {' or '.join(family.samplers)} only, not {args.sampler}."
            )
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
    for name, value in family.collection.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    with loading(model):
        vae_config = AutoencoderKL.load_config(folder, subfolder="vae")
    if args.resolution and (fault := resolution_fault(args.resolution, vae_config["block_out_channels"])):
        raise NullSpaceError(fault)
    with loading(model):
        tokenizer = family.load_tokenizer(folder)
    if fault := tokenizer_fault(tokenizer, model):
        raise NullSpaceError(fault)
    for sentence in length_warnings(tokenizer, prompts, "the prompts"):
        tell(sentence)

    # Load the model with the sampler
    with loading(model):
        models = family.load_models(folder, args.variant)
        pipeline = family.load_pipeline(folder, args.variant, tokenizer=tokenizer, **models)
    check_clip_skip(args.clip_skip, pipeline.text_encoder.config.num_hidden_layers)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(args.sampler, pipeline.scheduler.config)
    args.resolution = args.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    config = describe(pipeline, prompts, revision, args)
    weights = weights_sha256(pipeline.unet, pipeline.text_encoder)
    pipeline.to(state.device, getattr(torch, PRECISIONS[args.mixed_precision]))

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
        bundle.save(args.output_dir, extras=[draw_spectra, write_dataset_card(license_name)])
        checkpoint.remove()
        print_table(*rank_table(bundle))
        print(f"Wrote {args.output_dir}")
        if args.push_to_hub:
            push(repo_id, args)
    state.wait_for_everyone()


if __name__ == "__main__":
    try:
        main(ARGS)
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
