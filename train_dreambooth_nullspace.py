# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate", "diffusers", "huggingface_hub", "peft", "pillow", "safetensors", "tensorboard", "torch", "tqdm",
#     "transformers",
# ]
# ///
"""Teach a Stable Diffusion model a subject from a few pictures, with a LoRA that leaves everything else in place.

    accelerate launch train_dreambooth_nullspace.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --nullspace_name_or_path <your-username>/nullspace-sd15 \\
        --instance_data_dir pictures --instance_prompt "a photo of sks dog" \\
        --max_train_steps 500 --output_dir lora

It is DreamBooth LoRA as in diffusers' train_dreambooth_lora.py; in place of prior preservation, the LoRA is kept in
the null space of what the attention layers read on the prompts that a bundle of build_nullspace.py protects.
"""

import argparse
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub import ModelCardData
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from nullspace_utils import (
    DEFAULT_THRESHOLDS,
    JOINT,
    LORA_NAME,
    Bundle,
    NullSpaceError,
    NullSpaceProjector,
    audit,
    base_license,
    check_threshold,
    check_writable,
    create_repository,
    download_model,
    hub_repository,
    load_lora,
    model_type,
    push_folder,
    split_groups,
)


logger = get_logger(__name__)

REPORT_NAME = "nullspace_report.json"
COMPARISON_NAME = "comparison.png"
PUBLISHED = [LORA_NAME, "README.md", REPORT_NAME, COMPARISON_NAME, "pictures/*.png"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100, max_help_position=36),
    )
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the base model.")
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for instance fp16.")

    group = parser.add_argument_group("null space")
    group.add_argument(
        "--nullspace_name_or_path", required=True, help="Folder or Hub dataset id of the base model's bundle."
    )
    group.add_argument("--nullspace_revision", help="Revision of the bundle on the Hub.")
    group.add_argument(
        "--nullspace_criterion",
        choices=DEFAULT_THRESHOLDS,
        default="energy",
        help="How a layer's protected directions are chosen: those that hold a share of the energy, those with an "
        "eigenvalue of at least the threshold, or all but the lowest percentile (default: %(default)s).",
    )
    group.add_argument(
        "--nullspace_threshold",
        type=float,
        help="More energy protects more, a lower eigenvalue or percentile protects more; energy 0 protects nothing "
        f"(defaults: {', '.join(f'{name} {value:g}' for name, value in DEFAULT_THRESHOLDS.items())}).",
    )
    group.add_argument(
        "--nullspace_timesteps",
        choices=[JOINT, "nearest"],
        default=JOINT,
        help="joint protects all timesteps at once and carries the guarantee. nearest draws each step's timesteps "
        "from one of the bundle's groups and protects that group only: it guarantees nothing, since a step taken "
        "for one group moves the weights that all timesteps share (default: %(default)s).",
    )
    group.add_argument(
        "--nullspace_timestep_range",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="Protect only these training timesteps, out of 0 to 999 (default: all that the bundle has).",
    )

    group = parser.add_argument_group("pictures")
    group.add_argument("--instance_data_dir", type=Path, required=True, help="Folder with the subject's pictures.")
    group.add_argument("--instance_prompt", required=True, help="Prompt with an identifier for the subject.")
    group.add_argument("--resolution", type=int, default=512, help="Side of the training pictures (default: 512).")
    group.add_argument("--center_crop", action="store_true", help="Crop pictures in the centre rather than at random.")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("lora-dreambooth-model"), help="Default: %(default)s.")
    group.add_argument("--seed", type=int, help="Seed for reproducible training.")
    group.add_argument("--rank", type=int, default=4, help="Rank of the LoRA (default: %(default)s).")
    group.add_argument("--train_batch_size", type=int, default=4, help="Pictures a device (default: %(default)s).")
    group.add_argument("--num_train_epochs", type=int, default=1, help="Default: %(default)s.")
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Default: %(default)s.")
    group.add_argument("--gradient_checkpointing", action="store_true", help="Save memory, train slower.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's setting.")
    group.add_argument("--allow_tf32", action="store_true", help="Allow TF32 on Ampere GPUs: faster.")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=5e-4, help="Default: %(default)s.")
    group.add_argument(
        "--scale_lr", action="store_true", help="Multiply it by processes, accumulation steps and batch size."
    )
    group.add_argument(
        "--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant", help="Default: constant."
    )
    group.add_argument("--lr_warmup_steps", type=int, default=500, help="Default: %(default)s.")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Hard resets of cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="Power of the polynomial schedule.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Default: %(default)s.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Default: %(default)s.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Default: %(default)s.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Default: %(default)s.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")

    group = parser.add_argument_group("validation, checkpoints and logging")
    group.add_argument(
        "--validation_prompt",
        nargs="+",
        help="Prompts drawn by base and tuned model with equal seeds: the subject's, and unrelated ones that should "
        "not change (default, at the end only: the instance prompt and some that the bundle protects).",
    )
    group.add_argument("--num_validation_images", type=int, default=4, help="Pictures a prompt (default: 4).")
    group.add_argument("--validation_epochs", type=int, default=50, help="Draw every so many epochs (default: 50).")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Default: %(default)s.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep only so many checkpoints.")
    group.add_argument("--resume_from_checkpoint", help="A checkpoint's folder, or latest.")
    group.add_argument("--logging_dir", default="logs", help="Within --output_dir (default: %(default)s).")
    group.add_argument(
        "--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none (default: tensorboard)."
    )

    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="Publish the LoRA as a model on the Hub.")
    group.add_argument("--hub_model_id", help="Its repository (default: the folder's name under your account).")
    group.add_argument("--hub_private_repo", action="store_true", help="Create that repository as a private one.")
    group.add_argument("--hub_token", help="Token to use instead of the one you are logged in with.")
    args = parser.parse_args(argv)

    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        parser.error(
            f"--report_to {args.report_to} with --hub_token would record the token with the run; log in with "
            "`hf auth login` instead."
        )
    if args.nullspace_threshold is None:
        args.nullspace_threshold = DEFAULT_THRESHOLDS[args.nullspace_criterion]
    positive = ("resolution", "rank", "train_batch_size", "num_train_epochs", "max_train_steps")
    positive += ("gradient_accumulation_steps", "num_validation_images", "validation_epochs", "checkpointing_steps")
    for name in positive + ("checkpoints_total_limit",):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    try:
        check_threshold(args.nullspace_criterion, args.nullspace_threshold)
    except NullSpaceError as error:
        parser.error(str(error))
    return args


# ---- Pictures --------------------------------------------------------------------------------------------------------


def read_pictures(folder):
    """The pictures of a folder, upright and in RGB, in the order of their names.

    Raises:
        NullSpaceError: if there are none, or one cannot be read.
    """
    if not folder.is_dir():
        raise NullSpaceError(f"--instance_data_dir {folder} is not a folder.")
    extensions = Image.registered_extensions()
    pictures = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in extensions):
        try:
            with Image.open(path) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            raise NullSpaceError(f"The picture {path} cannot be read ({error}); mend or remove it.") from error
    if not pictures:
        raise NullSpaceError(f"--instance_data_dir {folder} holds no pictures.")
    return pictures


def seeded(*parts):
    """A CPU generator seeded by all of the parts, so that what is drawn depends on nothing else.

    Every random choice in training has its own, named by the seed and the step: a resumed run then draws what an
    undisturbed one would have drawn, and no worker, process or device changes another's draws.
    """
    return torch.Generator().manual_seed(random.Random(repr(parts)).getrandbits(63))


class InstanceDataset(Dataset):
    """Pictures (3, resolution, resolution) in [-1, 1], cropped anew in each epoch unless they are centred."""

    def __init__(self, pictures, resolution, center_crop, seed):
        self.pictures = []
        for picture in pictures:
            scale = resolution / min(picture.size)
            size = tuple(max(resolution, round(side * scale)) for side in picture.size)
            self.pictures.append(picture.resize(size, Image.Resampling.LANCZOS))
        self.resolution, self.center_crop, self.seed = resolution, center_crop, seed
        self.epoch = 0
        self.processor = VaeImageProcessor(do_resize=False)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        slack = torch.tensor(picture.size) - self.resolution
        if self.center_crop:
            left, top = (slack // 2).tolist()
        else:
            where = torch.rand(2, generator=seeded(self.seed, "crop", self.epoch, index))
            left, top = (where * (slack + 1)).long().tolist()
        cropped = picture.crop((left, top, left + self.resolution, top + self.resolution))
        return self.processor.preprocess(cropped)[0]


# ---- The training step -----------------------------------------------------------------------------------------------


class TimestepSampler:
    """Draws training timesteps uniformly, and tells which group of the bundle a step protects.

    Args:
        groups (`list[dict]`): the bundle's groups for "nearest", or an empty list, for which every draw is from all
            timesteps and the group is "joint".
        num_train_timesteps (`int`): of the noise schedule.
    """

    UNPROTECTED = "unprotected"  # timesteps outside of all groups, where only a range of timesteps is protected

    def __init__(self, groups, num_train_timesteps):
        self.intervals, start = [], 0
        for group in sorted(groups, key=lambda group: group["range"]):
            first, last = group["range"]
            if first > start:
                self.intervals.append((start, first, self.UNPROTECTED))
            self.intervals.append((first, last + 1, group["name"]))
            start = last + 1
        if start < num_train_timesteps:
            self.intervals.append((start, num_train_timesteps, self.UNPROTECTED if groups else JOINT))
        self.num_train_timesteps = num_train_timesteps

    def group(self, generator):
        """Draw the interval (first, end, group) of one optimizer step, each in proportion to its width.

        The generator must be the same on all processes, so that they agree on the null space.
        """
        timestep = torch.randint(self.num_train_timesteps, (1,), generator=generator).item()
        return next(interval for interval in self.intervals if interval[0] <= timestep < interval[1])


def diffusion_loss(unet, noise_scheduler, latents, prompt_embeds, timesteps, noise):
    """Mean squared error of the prediction (noise or velocity) for latents (batch, 4, h, w), as a scalar.

    DDPM, arXiv 2006.11239, eq. 14; v-prediction: arXiv 2202.00512, sec. 2.4.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, prompt_embeds.expand(len(latents), -1, -1)).sample
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise NullSpaceError(f"Models with prediction type {kind} cannot be trained.")
    target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(prediction.float(), target.float())


# ---- What is written -------------------------------------------------------------------------------------------------


def save_lora(unet, folder):
    """Write the LoRA of a UNet in diffusers' format, whole or not at all."""
    partial = f"partial-{LORA_NAME}"
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        weight_name=partial,
        **_collate_lora_metadata({"unet": unet}),
    )
    os.replace(folder / partial, folder / LORA_NAME)


def restore_lora(unet, folder):
    """Put the LoRA of a checkpoint back into a UNet that has adapters of the same kind."""
    state_dict, _ = StableDiffusionPipeline.lora_state_dict(folder)
    state_dict = {key.removeprefix("unet."): value for key, value in state_dict.items() if key.startswith("unet.")}
    try:
        result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state_dict))
    except RuntimeError as error:
        raise NullSpaceError(
            f"The checkpoint {folder} does not fit; resume with the --rank it was made with."
        ) from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise NullSpaceError(
            f"The checkpoint {folder} has LoRA layers in other places ({(result.unexpected_keys or missing)[0]}); "
            "resume with the bundle that it was made with."
        )


def write_json(path, content):
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def checkpoints(folder):
    """Finished checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator, step, args):
    """Write `checkpoint-<step>`, whole or not at all, and drop those beyond --checkpoints_total_limit."""
    final = args.output_dir / f"checkpoint-{step}"
    partial = args.output_dir / f"partial-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / "training.json", {"step": step, "seed": args.seed})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if args.checkpoints_total_limit:
            for path in checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def find_checkpoint(args):
    """The checkpoint to resume from, or None.

    Raises:
        NullSpaceError: if a named one does not exist.
    """
    if args.resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(args.output_dir)), None)
    if args.resume_from_checkpoint:
        for path in (Path(args.resume_from_checkpoint), args.output_dir / args.resume_from_checkpoint):
            if (path / "training.json").is_file():
                return path
        raise NullSpaceError(f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a checkpoint.")
    return None


# ---- What people look at ---------------------------------------------------------------------------------------------


def load_pipeline(args, dtype, device, **components):
    """The base model's pipeline with the sampler that diffusers' scripts validate with.

    Components that are given, which may be in training, are left as they are.
    """
    pipeline = DiffusionPipeline.from_pretrained(
        args.model_folder, variant=args.variant, safety_checker=None, **components
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in components:
            component.to(device, dtype)
    return pipeline


def draw(pipeline, prompts, args, description):
    """--num_validation_images pictures of each prompt in 25 steps, each from a seed of its own: a list of rows."""
    rows = []
    for index in tqdm(range(args.num_validation_images), desc=description, unit="row"):
        seed = (args.seed or 0) + index
        rows.append(
            [
                pipeline(
                    prompt, height=args.resolution, width=args.resolution, num_inference_steps=25,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
                for prompt in prompts
            ]
        )  # fmt: skip
    return rows


def comparison_grid(rows_by_name, prompts, side=160):
    """One picture: a column for each prompt, below it what each model drew, equal seeds next to each other.

    Args:
        rows_by_name (`dict[str, list[list[Image]]]`): model name -> rows from `draw`.
        prompts (`list[str]`): the columns' titles.
        side (`int`): of each picture, in pixels; smaller pictures are enlarged without smoothing.
    """
    margin, title = 90, 60
    seeds = len(next(iter(rows_by_name.values())))
    grid = Image.new("RGB", (margin + side * len(prompts), title + side * seeds * len(rows_by_name)), "white")
    pen = ImageDraw.Draw(grid)
    for column, prompt in enumerate(prompts):
        lines = [""]
        for word in prompt.split():
            if lines[-1] and pen.textlength(f"{lines[-1]} {word}") > side - 10:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((margin + column * side + 4, 4), "\n".join(lines[:4]), fill="black")
    y = title
    for seed in range(seeds):
        for name, rows in rows_by_name.items():
            pen.text((4, y + side // 2), name, fill="black")
            for column, picture in enumerate(rows[seed]):
                smooth = Image.Resampling.LANCZOS if picture.width >= side else Image.Resampling.NEAREST
                grid.paste(picture.resize((side - 4, side - 4), smooth), (margin + column * side + 2, y + 2))
            y += side
    return grid


def save_picture(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    picture.save(partial)
    os.replace(partial, path)


def log_picture(accelerator, name, picture, step):
    """Send a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            tracker.writer.add_image(name, array.view(picture.height, picture.width, 3), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb  # present where its tracker is

            tracker.log({name: wandb.Image(picture)}, step=step)


def describe_protection(bundle, protected, args):
    """The lines that say what this run protects."""
    prompts, groups = bundle.config["prompts"], bundle.config["groups"]
    yield (
        f"Protecting {prompts['count']:,} prompts of {prompts['source']} at "
        f"{len(groups[0]['timesteps'])} timesteps ({args.nullspace_timesteps}), "
        f"{args.nullspace_criterion} {args.nullspace_threshold:g}:"
    )
    sizes = {}
    for item in protected.values():
        sizes.setdefault(len(item.basis), []).append(item.rank)
    for size, ranks in sorted(sizes.items()):
        kept = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        yield f"  {len(ranks)} layers of input size {size}: {kept} directions protected, the others free"


def make_report(bundle, unet, args):
    """Read the saved LoRA back and tell what it does to the protected inputs: the content of the report."""
    found = audit(load_lora(args.output_dir), bundle, unet, args.nullspace_criterion, args.nullspace_threshold)
    return {
        "base_model": bundle.config["base_model"],
        "nullspace": {
            "bundle": str(args.nullspace_name_or_path),
            "revision": bundle.revision,
            "prompts": {key: bundle.config["prompts"][key] for key in ("source", "count", "sha256")},
            "criterion": args.nullspace_criterion,
            "threshold": args.nullspace_threshold,
            "timesteps": args.nullspace_timesteps,
            "timestep_range": args.nullspace_timestep_range,
        },
        "training": {
            "instance_prompt": args.instance_prompt,
            "rank": args.rank,
            "max_train_steps": args.max_train_steps,
            "learning_rate": args.learning_rate,
            "train_batch_size": args.train_batch_size,
            "seed": args.seed,
            "mixed_precision": args.mixed_precision,
        },
        **found,
    }


def write_card(bundle, report, prompts, pictures, args):
    """Write the model card, and the pictures that it shows: one for each prompt."""
    for index, picture in enumerate(pictures):
        save_picture(picture, args.output_dir / "pictures" / f"{index}.png")
    base, source = args.pretrained_model_name_or_path, args.nullspace_name_or_path
    data = ModelCardData(
        license=base_license(base, args.hub_token),
        library_name="diffusers",
        base_model=None if Path(base).is_dir() else base,
        datasets=None if Path(source).is_dir() else [source],
        instance_prompt=args.instance_prompt,
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "stable-diffusion",
            "stable-diffusion-diffusers", "dreambooth", "null-space",
        ],
        widget=[
            {"text": prompt, "output": {"url": f"pictures/{index}.png"}} for index, prompt in enumerate(prompts)
        ],
    )  # fmt: skip
    shown = {
        key: "nothing is protected" if value["max"] is None else f"at most {value['max']:.1e}, mean {value['mean']:.1e}"
        for key, value in report.items()
        if key in ("leakage", "predicted_drift")
    }
    prompt_count = bundle.config["prompts"]["count"]
    covered = args.nullspace_timestep_range or bundle.config["groups"][0]["range"]
    setting = f"{args.nullspace_criterion} {args.nullspace_threshold:g}, {args.nullspace_timesteps}"
    protection = (
        f"It was trained in the null space of what the attention layers read on {prompt_count:,} protected prompts, so "
        "that pictures of other things stay as they were."
        if report["leakage"]["max"] is not None
        else "It was trained without protection, as a plain DreamBooth LoRA."
    )
    base_shown = f"[{base}](https://huggingface.co/{base})" if data.base_model else f"`{base}`"
    source_shown = f"[{source}](https://huggingface.co/datasets/{source})" if data.datasets else f"`{source}`"
    text = f"""---
{data.to_yaml()}
---

# {args.output_dir.resolve().name}

<Gallery />

A DreamBooth LoRA for {base_shown}. {protection}

![Base model and LoRA, equal seeds]({COMPARISON_NAME})

## Trigger words

Use `{args.instance_prompt}` to trigger the subject.

## Use it with diffusers

```py
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{args.hub_model_id or args.output_dir}")
image = pipeline("{args.instance_prompt}").images[0]
```

## Null space

| | |
|---|---|
| bundle | {source_shown} |
| protected | {setting}, timesteps {covered[0]} to {covered[1]} |
| leakage, share of a layer's change that protected inputs see | {shown["leakage"]} |
| predicted drift, relative change of a layer's output on protected inputs | {shown["predicted_drift"]} |
| rank, steps, learning rate | {args.rank}, {args.max_train_steps}, {args.learning_rate:g} |

`{REPORT_NAME}` has the figures of every layer. Trained with `train_dreambooth_nullspace.py`.
"""
    partial = args.output_dir / "partial-README.md"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, args.output_dir / "README.md")


# ---- The job ---------------------------------------------------------------------------------------------------------


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / args.logging_dir),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    for name in ("httpx", "httpx2"):  # the Hub client's: they log each address, upload signatures included
        logging.getLogger(name).setLevel(logging.WARNING)
    logger.info(f"{accelerator.state}".replace("\n", ", "), main_process_only=False)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # Find out all that can go wrong before the work
    pictures = read_pictures(args.instance_data_dir)
    check_writable(args.output_dir)
    checkpoint = find_checkpoint(args)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = hub_repository(args.hub_model_id, args.output_dir, args.hub_token)
    with accelerator.main_process_first():
        bundle = Bundle.load(
            args.nullspace_name_or_path,
            args.nullspace_timesteps,
            args.nullspace_timestep_range,
            revision=args.nullspace_revision,
            token=args.hub_token,
        )
    nearest = split_groups(bundle.config) if args.nullspace_timesteps == "nearest" else []
    names = [group["name"] for group in nearest] or [JOINT]
    protected = {name: bundle.protected(name, args.nullspace_criterion, args.nullspace_threshold) for name in names}
    kind = model_type(args.pretrained_model_name_or_path, args.revision, args.hub_token)
    if kind != "sd" or bundle.config["model_type"] != "sd":
        raise NullSpaceError("This trainer is made for Stable Diffusion models, and for bundles of them.")
    for line in describe_protection(bundle, protected[names[0]], args):
        logger.info(line)
    if not any(item.rank for item in protected[names[0]].values()):
        logger.warning("Nothing is protected: this trains a plain DreamBooth LoRA.")

    if args.push_to_hub and accelerator.is_main_process:
        create_repository(args.hub_model_id, "model", args.hub_private_repo, args.hub_token)
    with accelerator.main_process_first():  # all of it, so that nothing is left to download after the training
        args.model_folder = download_model(
            args.pretrained_model_name_or_path, args.revision, args.variant, args.hub_token
        )

    # Seed everything
    if args.seed is None:
        saved = json.loads((checkpoint / "training.json").read_text())["seed"] if checkpoint else None
        args.seed = broadcast_object_list([random.randrange(2**31) if saved is None else saved])[0]
        accelerator.dataloader_config.data_seed = args.seed
    set_seed(args.seed)

    # Load the models
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    folder = args.model_folder
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant=args.variant)
    bundle.check(unet)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", variant=args.variant)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", variant=args.variant)
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    for model in (unet, text_encoder, vae):
        model.requires_grad_(False).to(accelerator.device, weight_dtype)

    # Add the LoRA, on the layers that the bundle covers and no others
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=list(bundle.config["modules"]),
        )
    )
    cast_training_params(unet, torch.float32)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    # Optimizer, kept in the null space
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    projector = NullSpaceProjector(unet, protected)
    projector.attach(optimizer)

    # Data: the pictures, and the one prompt, whose embeddings never change
    dataset = InstanceDataset(pictures, args.resolution, args.center_crop, args.seed)
    dataloader = DataLoader(dataset, args.train_batch_size, shuffle=True)
    with torch.no_grad():
        tokens = tokenizer(
            args.instance_prompt,
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        prompt_embeds = text_encoder(tokens.input_ids.to(accelerator.device))[0]
    del text_encoder

    # Schedule
    steps_per_epoch = math.ceil(
        math.ceil(len(dataloader) / accelerator.num_processes) / args.gradient_accumulation_steps
    )
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once for each process
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    unet, optimizer, dataloader, lr_scheduler = accelerator.prepare(unet, optimizer, dataloader, lr_scheduler)

    def unwrap(model):
        model = accelerator.unwrap_model(model)
        return model._orig_mod if is_compiled_module(model) else model

    def save_model_hook(models, weights, folder):
        if accelerator.is_main_process:
            save_lora(unwrap(models[0]), Path(folder))
        weights.clear()  # the LoRA is all there is to save

    def load_model_hook(models, folder):
        restore_lora(unwrap(models.pop()), folder)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        settings = {
            key: value if isinstance(value, (int, float, str)) else str(value) for key, value in vars(args).items()
        }
        del settings["hub_token"], settings["model_folder"]
        accelerator.init_trackers("dreambooth-nullspace", config=settings)

    # Resume
    step = 0
    if checkpoint:
        accelerator.load_state(checkpoint)
        step = json.loads((checkpoint / "training.json").read_text())["step"]
        logger.info(f"Resuming from {checkpoint} at step {step}")
        # A checkpoint of these settings is in the null space and stays as it is, bit for bit; one of others is not.
        if JOINT in protected and projector.leakage() > 1e-6:
            logger.warning("The checkpoint was not in this null space: projecting it.")
            projector.project_values()

    # Train
    logger.info(
        f"Training on {len(pictures)} pictures for {args.max_train_steps} steps, {args.num_train_epochs} epochs, "
        f"batch {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} accumulated"
    )
    sampler = TimestepSampler(nearest, noise_scheduler.config.num_train_timesteps)
    progress = tqdm(
        total=args.max_train_steps,
        initial=step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    first_epoch = step // steps_per_epoch
    for epoch in range(first_epoch, args.num_train_epochs):
        unet.train()
        dataset.set_epoch(epoch)
        dataloader.set_epoch(epoch)
        done = (step - epoch * steps_per_epoch) * args.gradient_accumulation_steps  # batches of this epoch
        batches = accelerator.skip_first_batches(dataloader, done) if done else dataloader
        for index, pixel_values in enumerate(batches, done):
            with accelerator.accumulate(unet):
                generator = seeded(args.seed, "step", epoch, index, accelerator.process_index)
                first, end, group = sampler.group(seeded(args.seed, "group", step))
                projector.select(group)
                latents = vae.encode(pixel_values.to(weight_dtype)).latent_dist
                latents = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=generator).to(
                    latents.mean
                )
                latents = latents * vae.config.scaling_factor
                timesteps = torch.randint(first, end, (len(latents),), generator=generator).to(latents.device)
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                loss = diffusion_loss(unet, noise_scheduler, latents, prompt_embeds, timesteps, noise)

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    projector.project_gradients()
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0]}
            progress.set_postfix(**logs)
            accelerator.log(logs, step=step)
            if step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, step, args)
            if step >= args.max_train_steps:
                break
        if args.validation_prompt and epoch % args.validation_epochs == 0 and accelerator.is_main_process:
            model = unwrap(unet).eval()
            pipeline = load_pipeline(args, weight_dtype, accelerator.device, unet=model, vae=vae)
            with accelerator.autocast():
                tuned = draw(pipeline, args.validation_prompt, args, "Validating")
                model.disable_adapters()
                base = draw(pipeline, args.validation_prompt, args, "Validating")
                model.enable_adapters()
            picture = comparison_grid({"base": base, "tuned": tuned}, args.validation_prompt)
            save_picture(picture, args.output_dir / "validation" / f"{step:06d}.png")
            log_picture(accelerator, "validation", picture, step)
    progress.close()

    # Save the LoRA, read it back, and show what it did
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model = unwrap(unet)
        save_lora(model, args.output_dir)
        report = make_report(bundle, model, args)
        write_json(args.output_dir / REPORT_NAME, report)
        for key in ("leakage", "predicted_drift"):
            if report[key]["max"] is not None:
                logger.info(f"{key}: at most {report[key]['max']:.2e}, mean {report[key]['mean']:.2e}")
        del unet, model, optimizer, vae
        prompts = args.validation_prompt or [args.instance_prompt, *bundle.config["prompts"]["examples"][:3]]
        pipeline = load_pipeline(args, weight_dtype, accelerator.device)
        base = draw(pipeline, prompts, args, "Drawing with the base model")
        pipeline.load_lora_weights(args.output_dir)
        tuned = draw(pipeline, prompts, args, "Drawing with the LoRA")
        picture = comparison_grid({"base": base, "tuned": tuned}, prompts)
        save_picture(picture, args.output_dir / COMPARISON_NAME)
        log_picture(accelerator, "comparison", picture, step)
        write_card(bundle, report, prompts, tuned[0], args)
        logger.info(f"Wrote {LORA_NAME}, {REPORT_NAME} and {COMPARISON_NAME} to {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        published = PUBLISHED + [f"{args.logging_dir}/**"]
        included = [word for pattern in published for word in ("--include", pattern)]
        url = push_folder(
            args.hub_model_id,
            "model",
            args.output_dir,
            published,
            f"Null-space DreamBooth LoRA of {args.pretrained_model_name_or_path}: {args.instance_prompt}",
            shlex.join(["hf", "upload", args.hub_model_id, str(args.output_dir), ".", *included]),
            args.hub_token,
        )
        logger.info(f"Pushed to {url}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
