# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.4,<2", "datasets>=5.0,<6", "diffusers>=0.40,<1", "huggingface_hub>=1.23,<3", "numpy",
#     "peft>=0.19,<1", "pillow>=10.3", "safetensors>=0.8,<1", "tensorboard", "torch>=2.6,<2.14", "tqdm",
#     "transformers>=5.6,<6",
# ]
# ///
"""Teach Stable Diffusion or an LCM a subject from a few pictures, with a LoRA that leaves the rest be.

    accelerate launch train_dreambooth_nullspace.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --nullspace_name_or_path <your-username>/nullspace-sd15 \\
        --instance_data_dir pictures --instance_prompt "a photo of a sks dog" \\
        --train_batch_size 1 --learning_rate 1e-3 --max_train_steps 800 --output_dir lora

It is DreamBooth LoRA as in diffusers' train_dreambooth_lora.py; in place of prior preservation, the
LoRA is kept in the null space of what the attention layers read on the prompts that a bundle of
build_nullspace.py protects.
"""

import argparse
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nullspace.flags import parse_first


if __name__ == "__main__":
    parse_first(__file__)

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    reduce,
    set_seed,
)
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr, free_memory
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import ModelCardData
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import ImageOps
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from build_nullspace import make_scheduler
from nullspace.captions import trained_prompts
from nullspace.cards import code_span, plain, python_string, table_cell, utf8
from nullspace.checkpoint import (
    check_same_run,
    describe_models,
    describe_run,
    find_checkpoint,
    read_record,
    resume_help,
    save_checkpoint,
)
from nullspace.checks import Parser, output_folder_fault, resolution_fault, unquoted_prompt
from nullspace.divergence import (
    DrawnLatents,
    SkippedSteps,
    check_scalars,
    check_weights,
    run_in_float32,
    sound_vae,
)
from nullspace.kohya import is_ours, save_kohya
from nullspace.pictures import INTERPOLATION, colour, comparison_grid, fit, read_instances, save_picture
from nullspace.prompts import length_warnings, tokenizer_fault, word_warnings
from nullspace.system import follow_umask, sort_header
from nullspace_utils import (
    DEFAULT_SOFTNESS,
    DEFAULT_THRESHOLDS,
    JOINT,
    LORA_NAME,
    MODEL_TYPES,
    PROCESS_TIMEOUT,
    TEXT_ENCODER,
    Bundle,
    HelpFormatter,
    NullSpaceError,
    NullSpaceProjector,
    SecondMoments,
    audit,
    base_license,
    check_clip_skip,
    check_launcher,
    check_softness,
    check_threshold,
    check_writable,
    create_repository,
    download_model,
    encode_tokens,
    find_module,
    hub_repository,
    load_lora,
    load_whole,
    loading,
    model_type,
    prompt_arguments,
    push_folder,
    reason,
    require,
    split_groups,
    text_encoder_inputs,
    without_skipped,
)


logger = get_logger(__name__)

HUBER = 1e-3  # an LCM's losses are quadratic below this error of a latent, linear above, as in its distillation
PICTURES_PER_EXTRA_PROMPT = 8
REPORT_NAME = "nullspace_report.json"
COMPARISON_NAME = "comparison.png"
# All of diffusers' `SchedulerType` but piecewise_constant, which needs rules of its own.
SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
# What is gone, and what takes its place; none of them is in the help.
BUILDER = "build_nullspace.py"
REPLACED = {
    "--with_prior_preservation": "--nullspace_name_or_path, which protects what a bundle holds without drawing it",
    "--prior_loss_weight": "--nullspace_softness at its default (the weight does not carry over)",
    "--num_class_images": f"--max_prompts of {BUILDER}",
    "--class_data_dir": "--nullspace_name_or_path",
    "--class_prompt": "--nullspace_extra_prompts",
    "--prior_generation_precision": f"--mixed_precision of {BUILDER}",
    "--sample_batch_size": f"--batch_size of {BUILDER}",
}


class Kind(NamedTuple):
    """What differs between the types of model: how they are trained, and how they are drawn with."""

    pipeline: type
    noise_scheduler: type
    sampler: type
    num_inference_steps: int


KINDS = {
    "sd": Kind(StableDiffusionPipeline, DDPMScheduler, DPMSolverMultistepScheduler, 25),
    "lcm": Kind(LatentConsistencyModelPipeline, LCMScheduler, LCMScheduler, 4),
}
UNPROTECTED_NAME = f"unprotected_{LORA_NAME}"
# How much of a layer's change may reach what is protected in a file that is saved, by what it is saved in; 16 bits
# round it to within 2^-9 (bfloat16) of each weight.
LEAKAGE_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}
PUBLISHED = [LORA_NAME, "README.md", REPORT_NAME, COMPARISON_NAME, "pictures/*.png"]


class Replaced(argparse.Action):
    """A flag of prior preservation: an error that names what takes its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(
            f"{self.option_strings[0]} belongs to prior preservation, which the null space replaces; use "
            f"{REPLACED[self.option_strings[0]]}."
        )


def parse_args(argv=None):
    parser = Parser(usage="accelerate launch %(prog)s [flags]", description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the base model (required)."
    )
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for instance fp16.")
    group.add_argument(
        "--model_type",
        choices=["auto", *MODEL_TYPES],
        default="auto",
        help="Stable Diffusion or Latent Consistency Model; auto reads it from the model (default: %(default)s).",
    )
    group.add_argument("--tokenizer_name", help="Folder or Hub id of another tokenizer than the model's own.")
    group.add_argument("--tokenizer_max_length", type=int, help="Tokens of a prompt (default: the tokenizer's own).")
    group.add_argument(
        "--text_encoder_use_attention_mask",
        action="store_true",
        help="Hide the padding of a prompt from the text encoder, which Stable Diffusion does not do.",
    )

    group.add_argument(
        "--clip_skip",
        type=int,
        default=0,
        help="Last layers of the text encoder to skip, as diffusers counts them and as the bundle was built; 1 is the "
        "web UIs' Clip skip 2 (default: %(default)s).",
    )

    group = parser.add_argument_group("null space")
    group.add_argument(
        "--nullspace_name_or_path", required=True, help="Folder or Hub dataset id of its bundle (required)."
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
        "--nullspace_softness",
        type=float,
        default=DEFAULT_SOFTNESS,
        metavar="SHARE",
        help="The criterion's directions are closed. The others are held back by the energy that they hold: one with "
        "this share of it is given half of a gradient step. Less protects more, inf frees them (default: %(default)g).",
    )
    group.add_argument(
        "--nullspace_extra_prompts",
        nargs="+",
        action="extend",
        help="Prompts to protect besides the bundle's, above all the subject's class: 'a photo of a dog'. A few "
        "pictures of each are sampled before training; together they weigh as much as the bundle.",
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
    group.add_argument(
        "--allow_unprotected",
        action="store_true",
        help="Train also those layers that --lora_layers or --train_text_encoder reaches and the bundle does not "
        "cover. They change what the model knows; report and model card say so.",
    )

    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=4, help="Rank of the LoRA (default: %(default)s).")
    group.add_argument("--lora_alpha", type=int, help="The LoRA is scaled by lora_alpha / rank (default: the rank).")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Of the LoRA's inputs (default: %(default)s).")
    group.add_argument(
        "--lora_layers",
        help="UNet layers to train, separated by commas, each by the end of its name: attn2.to_k,attn2.to_v "
        "(default: all that the bundle covers).",
    )
    group.add_argument(
        "--train_text_encoder",
        action="store_true",
        help=f"Train a LoRA on the text encoder's attention too; build the bundle with {BUILDER} --with_text_encoder.",
    )
    group.add_argument(
        "--output_kohya_format",
        action="store_true",
        help="Also write <name of --output_dir>.safetensors, which AUTOMATIC1111, Forge and ComfyUI load.",
    )
    group.add_argument(
        "--upcast_before_saving",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Save the LoRA in float32, as it is trained; otherwise in the precision of the model, half the size at "
        "--mixed_precision fp16 or bf16, with a leakage of about 1e-3 by rounding (default: yes).",
    )

    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--instance_data_dir",
        type=Path,
        help="Folder with the subject's pictures, or with kohya's folders of them ('10_sks dog': 10 times an epoch). "
        "A caption beside a picture (0.txt for 0.png), or in a metadata.jsonl, takes the place of --instance_prompt. "
        "HEIC needs pillow-heif; pictures more than 10 times as long as wide are refused.",
    )
    group.add_argument(
        "--dataset_name", help="Instead of that folder, a folder or Hub id of a dataset with pictures (and captions)."
    )
    group.add_argument("--dataset_config_name", help="Configuration of that dataset.")
    group.add_argument("--image_column", default="image", help="Column with its pictures (default: %(default)s).")
    group.add_argument("--caption_column", help="Column with its captions, or of metadata.jsonl.")
    group.add_argument(
        "--background",
        type=colour,
        default="white",
        metavar="COLOUR",
        help="What transparent pictures are laid on, a name or #rrggbb (default: %(default)s).",
    )
    group.add_argument("--cache_dir", help="Where that dataset is stored (default: the datasets library's cache).")
    group.add_argument(
        "--instance_prompt",
        nargs="+",
        metavar="PROMPT",
        help="Prompt with an identifier for the subject (required for pictures without a caption). Several take turns "
        "at random, so that the subject is not tied to the words of one.",
    )
    group.add_argument("--repeats", type=int, default=1, help="Times a picture is in an epoch (default: %(default)s).")
    group.add_argument("--resolution", type=int, default=512, help="Side of the training pictures (default: 512).")
    group.add_argument("--center_crop", action="store_true", help="Crop pictures in the centre rather than at random.")
    group.add_argument("--random_flip", action="store_true", help="Mirror pictures at random.")
    group.add_argument(
        "--image_interpolation_mode",
        choices=INTERPOLATION,
        default="lanczos",
        metavar="MODE",
        help=f"How pictures are resized: {', '.join(INTERPOLATION)} (default: %(default)s).",
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("lora-dreambooth-model"),
        help="What to write to (default: %(default)s).",
    )
    group.add_argument("--seed", type=int, help="Seed for reproducible training.")
    group.add_argument("--train_batch_size", type=int, default=4, help="Pictures a device (default: %(default)s).")
    group.add_argument("--num_train_epochs", type=int, default=1, help="Rounds of all pictures (default: %(default)s).")
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="Batches in an optimizer step (default: %(default)s).",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="Save memory, train slower.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's setting.")
    group.add_argument("--allow_tf32", action="store_true", help="Allow TF32 on Ampere GPUs: faster.")
    group.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers, which must be there."
    )
    group.add_argument(
        "--pre_compute_text_embeddings",
        action="store_true",
        help="Free the tokenizer and the text encoder once the prompts are encoded, to save memory.",
    )
    group.add_argument(
        "--cache_latents",
        action="store_true",
        help="Encode the pictures once and free the VAE; each picture then keeps its first crop.",
    )
    group.add_argument(
        "--lcm_loss",
        choices=["consistency", "x0", "epsilon"],
        help="What an LCM is trained with: consistency asks for one end from two points of a noised trajectory "
        "(Latent Consistency Fine-tuning, arXiv 2310.04378), x0 for the picture from one point, epsilon is the plain "
        "diffusion loss (default for an LCM: x0).",
    )
    group.add_argument("--snr_gamma", type=float, help="Min-SNR weighting of the loss (arXiv 2303.09556), mostly 5.")
    group.add_argument(
        "--noise_offset", type=float, default=0.0, help="Noise added to whole channels (default: %(default)s)."
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that load pictures (default: %(default)s)."
    )
    group.add_argument(
        "--local_rank",
        type=int,
        default=-1,
        help="For launchers that pass this process's number on its machine as a flag: taken as LOCAL_RANK where the "
        "environment does not have it.",
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer", choices=["adamw", "prodigy"], default="adamw", help="prodigy needs prodigyopt (default: adamw)."
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states; needs bitsandbytes.")
    group.add_argument("--learning_rate", type=float, help="Default: 5e-4; prodigy, which scales it itself: 1.")
    group.add_argument(
        "--scale_lr", action="store_true", help="Multiply it by processes, accumulation steps and batch size."
    )
    group.add_argument(
        "--lr_scheduler",
        choices=SCHEDULES,
        default="constant",
        metavar="SCHEDULE",
        help=f"{', '.join(SCHEDULES)} (default: %(default)s).",
    )
    group.add_argument(
        "--lr_warmup_steps", type=int, default=500, help="For schedules that start from 0 (default: %(default)s)."
    )
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Of cosine_with_restarts (default: %(default)s).")
    group.add_argument("--lr_power", type=float, default=1.0, help="Of polynomial (default: %(default)s).")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Also prodigy's (default: %(default)s).")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Also prodigy's (default: %(default)s).")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Also prodigy's (default: %(default)s).")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Also prodigy's (default: %(default)s).")
    group.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to it (default: %(default)s)."
    )

    group = parser.add_argument_group("validation, checkpoints and logging")
    group.add_argument(
        "--validation_prompt",
        nargs="+",
        action="extend",
        help="Prompts drawn by base and tuned model with equal seeds: the subject's, and unrelated ones that should "
        "not change; several values, or the flag again (default, at the end only: the instance prompt and some that "
        "the bundle protects).",
    )
    group.add_argument(
        "--compare_with_base",
        action=argparse.BooleanOptionalAction,
        help="Draw the base model's pictures above the tuned one's (default: where something is protected).",
    )
    group.add_argument("--num_validation_images", type=int, default=4, help="Pictures a prompt (default: 4).")
    group.add_argument("--validation_epochs", type=int, default=50, help="Draw every so many epochs (default: 50).")
    group.add_argument("--validation_steps", type=int, help="Draw every so many steps, not by epochs.")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Save every so many (default: 500).")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep only so many checkpoints.")
    group.add_argument("--resume_from_checkpoint", help=resume_help())
    group.add_argument("--logging_dir", default="logs", help="Within --output_dir (default: %(default)s).")
    group.add_argument(
        "--report_to",
        default="tensorboard",
        metavar="TRACKER",
        help="tensorboard, wandb, comet_ml, all or none (default: tensorboard).",
    )

    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="Publish the LoRA as a model on the Hub.")
    group.add_argument("--hub_model_id", help="Its repository (default: the folder's name under your account).")
    group.add_argument("--hub_private_repo", action="store_true", help="Create that repository as a private one.")
    group.add_argument("--hub_token", help="Token to use instead of the one you are logged in with.")
    for flag in REPLACED:
        parser.add_argument(flag, action=Replaced, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if (args.instance_data_dir is None) == (args.dataset_name is None):
        parser.error("give the pictures as either --instance_data_dir or --dataset_name.")
    if args.output_kohya_format and kohya_path(args.output_dir).name.endswith(LORA_NAME):
        parser.error(f"--output_kohya_format writes a file named after --output_dir, beside {LORA_NAME}: rename it.")
    if args.pre_compute_text_embeddings and args.train_text_encoder:
        parser.error("--pre_compute_text_embeddings frees the text encoder, which --train_text_encoder trains.")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error("--use_8bit_adam is for --optimizer adamw.")
    if 0.01 <= args.nullspace_softness < math.inf:
        parser.error(
            f"--nullspace_softness {args.nullspace_softness:g} is too high: from 0.01 up hardly any direction is held "
            "back; leave the default, or say inf to free them all."
        )
    if fault := unquoted_prompt(args.instance_prompt or []):
        parser.error(fault)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 5e-4
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        parser.error(
            f"--report_to {args.report_to} with --hub_token would record the token with the run; log in with "
            "`hf auth login` instead."
        )
    if args.nullspace_threshold is None:
        args.nullspace_threshold = DEFAULT_THRESHOLDS[args.nullspace_criterion]
    try:
        check_threshold(args.nullspace_criterion, args.nullspace_threshold)
        check_softness(args.nullspace_softness)
    except NullSpaceError as error:
        parser.error(str(error))
    return args


# ---- Pictures --------------------------------------------------------------------------------------------------------


def seeded(*parts):
    """A CPU generator seeded by all of the parts, so that what is drawn depends on nothing else.

    Every random choice in training has its own, named by the seed and the step: a resumed run then draws what an
    undisturbed one would have drawn, and no worker, process or device changes another's draws.
    """
    return torch.Generator().manual_seed(random.Random(repr(parts)).getrandbits(63))


class InstanceDataset(Dataset):
    """Pictures (3, resolution, resolution) in [-1, 1] and the numbers of their captions.

    Crops, unless they are centred, mirroring and one of several captions are drawn anew in each epoch, for each of the
    repeats.

    Args:
        pictures (`list[Image]`): the pictures.
        captions (`list[list[int]]`): for each, the numbers of its captions.
        args: the flags on pictures, and the seed.
    """

    def __init__(self, pictures, captions, args):
        self.pictures, self.captions, self.args = [], captions, args
        for picture in pictures:
            self.pictures.append(fit(picture, args.resolution, args.image_interpolation_mode))
        self.epoch = 0
        self.cached = None
        self.processor = VaeImageProcessor(do_resize=False)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pictures) * self.args.repeats

    def __getitem__(self, index):
        number = index % len(self.pictures)
        flip = self.args.random_flip and torch.rand(1, generator=self._generator("flip", index)).item() < 0.5
        captions = self.captions[number]
        caption = captions[torch.randint(len(captions), (), generator=self._generator("caption", index))]
        return self.picture(index, flip) if self.cached is None else self.cached[number][flip], caption

    def _generator(self, what, index):
        return seeded(self.args.seed, what, self.epoch, index)

    def picture(self, index, flip):
        picture, side = self.pictures[index % len(self.pictures)], self.args.resolution
        slack = torch.tensor(picture.size) - side
        if self.args.center_crop:
            left, top = (slack // 2).tolist()
        else:
            left, top = (torch.rand(2, generator=self._generator("crop", index)) * (slack + 1)).long().tolist()
        cropped = picture.crop((left, top, left + side, top + side))
        return self.processor.preprocess(ImageOps.mirror(cropped) if flip else cropped)[0]

    def first_epoch(self):
        """Each of the pictures (3, side, side) once, as the first epoch has it but for mirroring."""
        return (self.picture(number, False) for number in range(len(self.pictures)))

    def cache(self, encode):
        """From now on give, instead of pictures, what `encode` makes of them, (1, 3, side, side) each, crops fixed."""
        flips = (False, True) if self.args.random_flip else (False,)
        numbers = tqdm(range(len(self.pictures)), desc="Caching latents", unit="picture")
        self.cached = [[encode(self.picture(number, flip)[None])[0].cpu() for flip in flips] for number in numbers]


# ---- The training step -----------------------------------------------------------------------------------------------


class TimestepSampler:
    """Draws training timesteps uniformly, and tells which group of the bundle a step protects.

    Args:
        groups (`list[dict]`): the bundle's groups for "nearest", or an empty list, for which every draw is from all
            timesteps and the group is "joint".
        timesteps (`Sequence[int]`): those to draw from, ascending.
    """

    UNPROTECTED = "unprotected"  # timesteps outside of all groups, where only a range of timesteps is protected

    def __init__(self, groups, timesteps):
        self.intervals, start = [], 0  # (first, end, group), counted in `timesteps`
        for group in sorted(groups, key=lambda group: group["range"]):
            first, end = (bisect_left(timesteps, edge) for edge in (group["range"][0], group["range"][1] + 1))
            if first > start:
                self.intervals.append((start, first, self.UNPROTECTED))
            if end > first:
                self.intervals.append((first, end, group["name"]))
            start = end
        if start < len(timesteps):
            self.intervals.append((start, len(timesteps), self.UNPROTECTED if groups else JOINT))
        self.timesteps = torch.tensor(timesteps)

    def group(self, generator):
        """Draw the interval (first, end, group) of one optimizer step, each in proportion to its width.

        The generator must be the same on all processes, so that they agree on the null space.
        """
        index = torch.randint(len(self.timesteps), (1,), generator=generator).item()
        return next(interval for interval in self.intervals if interval[0] <= index < interval[1])

    def draw(self, first, end, count, generator):
        """Timesteps (count,) of an interval."""
        return self.timesteps[torch.randint(first, end, (count,), generator=generator)]


@torch.no_grad()
def encode_pictures(vae, pixel_values):
    """Mean and standard deviation (batch, 8, h, w), stacked, of the latents of pictures (batch, 3, H, W)."""
    latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([latents.mean, latents.std], dim=1)


def draw_noise(latents, offset, generator):
    """Noise (batch, 4, h, w); with an offset, also one value for each whole channel (crosslabs.org, offset noise)."""
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return noise.to(latents)


def diffusion_loss(unet, noise_scheduler, latents, prompt_embeds, timesteps, noise, snr_gamma=None):
    """Mean squared error of the prediction (noise or velocity) for latents (batch, 4, h, w), as a scalar.

    DDPM, arXiv 2006.11239, eq. 14; v-prediction: arXiv 2202.00512, sec. 2.4. With `snr_gamma`, the loss of a picture
    is weighted by min(SNR, gamma) / SNR, or / (SNR + 1) for the velocity: arXiv 2303.09556, sec. 3.4.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, prompt_embeds).sample
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise NullSpaceError(f"Models with prediction type {kind} cannot be trained.")
    target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
    if snr_gamma is None:
        return F.mse_loss(prediction.float(), target.float())
    snr = compute_snr(noise_scheduler, timesteps)
    weights = snr.clamp(max=snr_gamma) / (snr if kind == "epsilon" else snr + 1)
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return (losses * weights).mean()


def solver_grid(noise_scheduler):
    """The timesteps that an LCM was distilled on, ascending: `original_inference_steps` of all, evenly spaced."""
    noise_scheduler.set_timesteps(noise_scheduler.config.original_inference_steps)
    return noise_scheduler.timesteps.flip(0).tolist()


def embed_guidance(guidance_scale, size):
    """The embedding (1, size) of a guidance scale that an LCM's UNet takes, as its pipeline computes it."""
    # The method uses nothing of the pipeline, which embeds one less than the scale that it is called with.
    embed = partial(LatentConsistencyModelPipeline.get_guidance_scale_embedding, None)
    return embed(torch.tensor([guidance_scale - 1.0]), size)


def consistency_function(unet, noise_scheduler, noisy, timesteps, prompt_embeds):
    """The clean latents at the end of the trajectory through noisy ones (batch, 4, h, w): f of arXiv 2310.04378, eq. 9.

    c_skip and c_out, as `LCMScheduler` samples with them, make it the identity at timestep 0.
    """
    prediction, noisy = unet(noisy, timesteps, prompt_embeds).sample.float(), noisy.float()
    alpha_bar = noise_scheduler.alphas_cumprod.to(noisy.device)[timesteps]
    scalings = noise_scheduler.get_scalings_for_boundary_condition_discrete(timesteps)
    keep, lose, c_skip, c_out = (
        each.view(-1, 1, 1, 1) for each in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), *scalings)
    )
    if noise_scheduler.config.prediction_type == "v_prediction":
        return c_skip * noisy + c_out * (keep * noisy - lose * prediction)
    return c_skip * noisy + c_out * (noisy - lose * prediction) / keep


def latents_loss(unet, noise_scheduler, latents, prompt_embeds, timesteps, noise):
    """Huber distance of the consistency function from the clean latents (batch, 4, h, w), as a scalar."""
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    answer = consistency_function(unet, noise_scheduler, noisy, timesteps, prompt_embeds)
    return F.smooth_l1_loss(answer, latents.float(), beta=HUBER)


def consistency_loss(unet, noise_scheduler, latents, prompt_embeds, timesteps, noise):
    """Huber distance of the consistency function at two points of one trajectory, as a scalar.

    Latent Consistency Fine-tuning, arXiv 2310.04378, sec. 4.4: latents (batch, 4, h, w) are noised with one noise to
    two points of the solver grid, as far apart as those of sampling in 4 steps; the answer from the noisier point is
    drawn to that from the other. The other carries no gradient and is the model's own, without an average over its
    past, which does not help (arXiv 2310.14189, sec. 3.2). Points before the grid's first are timestep 0.
    """
    config = noise_scheduler.config
    skipped = max(1, config.original_inference_steps // KINDS["lcm"].num_inference_steps)  # k, in steps of the grid
    earlier = timesteps - skipped * (config.num_train_timesteps // config.original_inference_steps)
    earlier = earlier.clamp_min(0)
    with torch.no_grad():
        noisy = noise_scheduler.add_noise(latents, noise, earlier)
        target = consistency_function(unet, noise_scheduler, noisy, earlier, prompt_embeds)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    answer = consistency_function(unet, noise_scheduler, noisy, timesteps, prompt_embeds)
    return F.smooth_l1_loss(answer, target, beta=HUBER)


# By --lcm_loss, which a Stable Diffusion has none of.
LOSSES = {None: diffusion_loss, "consistency": consistency_loss, "x0": latents_loss, "epsilon": diffusion_loss}


# ---- What is written -------------------------------------------------------------------------------------------------


def save_lora(folder, unet, text_encoder=None, dtype=torch.float32):
    """Write the LoRA of a UNet, and of a text encoder that has one, in diffusers' format, whole or not at all."""
    layers = {"unet": convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))}
    adapted = {"unet": unet}
    if text_encoder is not None:
        state_dict = get_peft_model_state_dict(text_encoder, save_embedding_layers=False)
        # Files name the module that holds the layers, whether this version of transformers has it or not.
        prefix = "" if hasattr(text_encoder, "text_model") else "text_model."
        state_dict = {f"{prefix}{key}": value for key, value in state_dict.items()}
        layers[TEXT_ENCODER] = convert_state_dict_to_diffusers(state_dict)
        adapted[TEXT_ENCODER] = text_encoder
    layers = {
        f"{model}_lora_layers": {key: state_dict[key].to(dtype) for key in sorted(state_dict)}
        for model, state_dict in layers.items()
    }
    # Of peft's configuration only what a reader needs and every version knows: an older peft refuses what it does not
    metadata = {
        f"{model}_lora_adapter_metadata": {
            "r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules),
            "rank_pattern": {}, "alpha_pattern": {},  # diffusers 0.36 looks for them
        }
        for model, config in ((model, adapted[model].peft_config["default"]) for model in adapted)
    }  # fmt: skip
    partial = f"partial-{LORA_NAME}"
    StableDiffusionPipeline.save_lora_weights(folder, weight_name=partial, **layers, **metadata)
    sort_header(folder / partial)
    follow_umask(folder / partial)
    os.replace(folder / partial, folder / LORA_NAME)


def restore_lora(folder, unet, text_encoder=None):
    """Put the LoRA of a checkpoint back into models that have adapters on the same layers."""
    layers = load_lora(folder)
    adapted = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    if text_encoder is not None:
        layers_of = {name: find_module(name, unet, text_encoder) for name in text_encoder_inputs(text_encoder)}
        adapted |= {name: layer for name, layer in layers_of.items() if hasattr(layer, "lora_A")}
    elsewhere = sorted(layers.keys() ^ adapted.keys())
    if elsewhere:
        raise NullSpaceError(
            f"The checkpoint {folder} has LoRA layers in other places ({elsewhere[0]}); resume with the bundle, "
            "--lora_layers and --train_text_encoder that it was made with."
        )
    for name, layer in layers.items():
        parameters = adapted[name].lora_A["default"].weight, adapted[name].lora_B["default"].weight
        for parameter, value in zip(parameters, (layer.down, layer.up), strict=True):
            if parameter.shape != value.shape:
                raise NullSpaceError(f"The checkpoint {folder} does not fit; resume with the --rank it was made with.")
            parameter.data.copy_(value)


def write_json(path, content):
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


# ---- What people look at ---------------------------------------------------------------------------------------------


def load_pipeline(args, dtype, device, **components):
    """The base model's pipeline with the sampler that diffusers' scripts validate with, or that an LCM has.

    Components that are given, which may be in training, are left as they are.
    """
    if args.tokenizer_name:
        components.setdefault("tokenizer", load_tokenizer(args))
    kind = KINDS[args.model_type]
    pipeline = kind.pipeline.from_pretrained(args.model_folder, variant=args.variant, safety_checker=None, **components)
    pipeline.scheduler = kind.sampler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in components:
            component.to(device, dtype)
    if "vae" not in components and args.vae_in_float32:
        with loading(args.pretrained_model_name_or_path):  # anew, for float16 may not hold its weights
            pipeline.vae = AutoencoderKL.from_pretrained(args.model_folder, subfolder="vae", variant=args.variant)
        run_in_float32(pipeline.vae.to(device))
    return pipeline


def draw(pipeline, prompts, args, description):
    """--num_validation_images pictures of each prompt, each from a seed of its own: a list of rows.

    They are drawn in 25 steps, by an LCM in 4, at the guidance scale that the bundle was built at.
    """
    steps = KINDS[args.model_type].num_inference_steps
    rows, latents = [], DrawnLatents()
    for index in tqdm(range(args.num_validation_images), desc=description, unit="row"):
        seed = (args.seed or 0) + index
        rows.append(
            [
                pipeline(
                    **prompt_arguments(pipeline, prompt, args.clip_skip),
                    height=args.resolution, width=args.resolution, num_inference_steps=steps,
                    guidance_scale=args.guidance_scale, generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=latents,
                ).images[0]
                for prompt in prompts
            ]
        )  # fmt: skip
        latents.check(description, args.learning_rate)
    return rows


def log_picture(accelerator, name, picture, step):
    """Send a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            tracker.writer.add_image(name, array.view(picture.height, picture.width, 3), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb  # present where its tracker is

            tracker.log({name: wandb.Image(picture)}, step=step)


def describe_setting(args):
    """The null-space flags in short."""
    return (
        f"{args.nullspace_criterion} {args.nullspace_threshold:g}, softness {args.nullspace_softness:g}, "
        f"{args.nullspace_timesteps}"
    )


def describe_protection(bundle, protected, args):
    """The lines that say what this run protects."""
    prompts, groups = bundle.config["prompts"], bundle.config["groups"]
    extra = f" and {len(args.nullspace_extra_prompts)} of your own" if args.nullspace_extra_prompts else ""
    yield (
        f"Protecting {prompts['count']:,} prompts of {prompts['source']}{extra} at "
        f"{len(groups[0]['timesteps'])} timesteps ({describe_setting(args)}):"
    )
    ranks_of = {}
    for name, item in protected.items():
        where = "text encoder layers" if name.startswith(f"{TEXT_ENCODER}.") else "layers"
        others = "free" if item.gains is None else "held back by their energy"
        ranks_of.setdefault((len(item.basis), where, others), []).append(item.rank)
    for (size, where, others), ranks in sorted(ranks_of.items()):
        kept = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        yield f"  {len(ranks)} {where} of input size {size}: {kept} directions closed, the others {others}"


def kinds_of(names):
    """Layer names in short: the kinds of layer among them, and how many there are of each."""
    kinds = Counter(".".join(re.sub(r"\.\d+\b", "", name).split(".")[-2:]) for name in names)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items())


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
    leaking = {name: leakage for name, leakage in leaking.items() if not leakage <= bound}  # nor where it is NaN
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
    if any(item.distance is None for item in bundle.group(JOINT).values()):
        text += (
            " It is measured against the bundle's own directions alone: the bundle is of the old format, which does "
            "not say how far rounding has turned them from those that the base model uses."
        )
    return text


def kohya_path(output_dir):
    """The file for the web UIs: named after the folder, as they show the name of the file."""
    return output_dir / f"{output_dir.resolve().name}.safetensors"


def published_files(args):
    """Patterns of the files in --output_dir that are pushed to the Hub."""
    kohya = [kohya_path(args.output_dir).name] if args.output_kohya_format else []
    return [*PUBLISHED, *kohya, f"{args.logging_dir}/**"]


def write_kohya(report, args):
    """Write the saved LoRA for the web UIs as well, if asked for; the file of an earlier LoRA does not stay beside it.

    Raises:
        NullSpaceError: if it cannot be written.
    """
    path = kohya_path(args.output_dir)
    if args.output_kohya_format:
        save_kohya(path, load_lora(args.output_dir), report)
    elif is_ours(path):
        path.unlink()


def log_audit(accelerator, found, step):
    """Send leakage and predicted drift to the trackers."""
    values = {
        f"{key}/{statistic}": value
        for key in ("leakage", "predicted_drift")
        for statistic, value in found[key].items()
        if value is not None
    }
    accelerator.log(values | {"unprotected_layers": len(found["unprotected"])}, step=step)


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
        instance_prompt=args.instance_prompt[0],
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora",
            *{
                "sd": ("stable-diffusion", "stable-diffusion-diffusers"),
                "lcm": ("latent-consistency-model", "lcm"),
            }[args.model_type],
            "dreambooth", "null-space",
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
    setting = describe_setting(args)
    total, unprotected = len(report["layers"]), report["unprotected"]
    protection = (
        f"It was trained in the null space of what the attention layers read on {prompt_count:,} protected prompts, so "
        "that pictures of other things stay as they were."
    )
    if len(unprotected) == total:
        protection = "It was trained without protection, as a plain DreamBooth LoRA."
    elif args.nullspace_timesteps == "nearest":
        protection = (
            "Each of its training steps was projected into the null space of what the attention layers read on "
            f"{prompt_count:,} protected prompts, at timesteps near its own alone: nothing is guaranteed."
        )
    elif unprotected:
        protection = (
            f"It was trained partly unprotected: {total - len(unprotected)} of its {total} layers are in the null "
            f"space of what they read on {prompt_count:,} protected prompts, but the other {len(unprotected)} are "
            f"not, and may change any picture: {kinds_of(unprotected)}."
        )
    drawn = "Base model and LoRA, equal seeds" if args.compare_with_base else "What the LoRA draws"
    base_shown = f"[{base}](https://huggingface.co/{base})" if data.base_model else code_span(base)
    source_shown = f"[{source}](https://huggingface.co/datasets/{source})" if data.datasets else code_span(source)
    triggers = " or ".join(map(code_span, args.instance_prompt))
    few_steps = ""
    if args.model_type == "lcm":
        few_steps = f", num_inference_steps=4, guidance_scale={args.guidance_scale:g}"
    with_skip = f", clip_skip={args.clip_skip}" if args.clip_skip else ""
    text = f"""---
{data.to_yaml()}
---

# {plain(args.output_dir.resolve().name)}

{report["guarantee"]}

<Gallery />

A DreamBooth LoRA for {base_shown}. {protection}

![{drawn}]({COMPARISON_NAME})

## Trigger words

Use {triggers} to trigger the subject.

## Use it with diffusers

```py
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({python_string(base)}, torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights({python_string(args.hub_model_id or args.output_dir)})
image = pipeline({python_string(args.instance_prompt[0])}{few_steps}{with_skip}).images[0]
```

## Null space

| | |
|---|---|
| bundle | {table_cell(source_shown)} |
| protected | {setting}, timesteps {covered[0]} to {covered[1]} |
| leakage, share of a layer's change that protected inputs see | {shown["leakage"]} |
| predicted drift, relative change of a layer's output on protected inputs | {shown["predicted_drift"]} |
| layers trained, of them unprotected | {total}, {len(unprotected)} |
| rank, steps, learning rate | {args.rank}, {args.max_train_steps}, {args.learning_rate:g} |
| clip skip | {args.clip_skip} |

`{REPORT_NAME}` has the figures of every layer. Trained with `train_dreambooth_nullspace.py`.
"""
    partial = args.output_dir / "partial-README.md"
    partial.write_text(utf8(text), encoding="utf-8")
    os.replace(partial, args.output_dir / "README.md")


# ---- The models and what is trained of them --------------------------------------------------------------------------


def load_tokenizer(args):
    """The model's tokenizer, or that of --tokenizer_name."""
    if not args.tokenizer_name:
        with loading(args.pretrained_model_name_or_path):
            return CLIPTokenizer.from_pretrained(args.model_folder, subfolder="tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(args.tokenizer_name, token=args.hub_token)
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"--tokenizer_name {args.tokenizer_name} cannot be had ({reason(error)}).") from error


def warn_of_prompts(tokenizer, captions, instance_prompts, args):
    """Log the words of --instance_prompt that are no single token, and the prompts that the window cuts off.

    Args:
        captions (`list[list[str]]`): of each picture; those without a caption of their own have --instance_prompt.
        instance_prompts (`list[str]` or `None`): as given.
    """
    given, length = instance_prompts or [], args.tokenizer_max_length or tokenizer.model_max_length
    written = dict.fromkeys(caption for several in captions for caption in several if caption not in given)
    for sentence in (
        *word_warnings(tokenizer, given),
        *length_warnings(tokenizer, given, "--instance_prompt", length),
        *length_warnings(tokenizer, written, "the captions", length),
        # Drawn as the pipeline does, which knows no --tokenizer_max_length
        *length_warnings(tokenizer, args.nullspace_extra_prompts or [], "--nullspace_extra_prompts"),
    ):
        logger.warning(sentence)


def lora_targets(unet, text_encoder, bundle, args):
    """Names of the layers to train: those of the UNet that the bundle covers, or --lora_layers, and the text encoder's.

    Raises:
        NullSpaceError: if --lora_layers names no layer, or the bundle does not cover all without --allow_unprotected.
    """
    targets = dict.fromkeys(bundle.config["modules"])
    if args.lora_layers is not None:
        linear = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        targets = {}
        for ending in args.lora_layers.split(","):
            found = [name for name in linear if f".{name}".endswith(f".{ending.strip()}")]
            if not ending.strip() or not found:
                raise NullSpaceError(f"--lora_layers names '{ending.strip()}', which no layer of the UNet ends with.")
            targets |= dict.fromkeys(found)
    if args.train_text_encoder:
        depth = text_encoder.config.num_hidden_layers
        targets |= dict.fromkeys(without_skipped(text_encoder_inputs(text_encoder), args.clip_skip, depth))
    unprotected = [name for name in targets if name not in bundle.modules]
    if unprotected and not args.allow_unprotected:
        raise NullSpaceError(
            f"The bundle leaves {len(unprotected)} layers to train unprotected ({kinds_of(unprotected)}); name others "
            "in --lora_layers, build the bundle with --attention all, or pass --allow_unprotected."
        )
    if unprotected:
        logger.warning(f"{len(unprotected)} of {len(targets)} layers train unprotected: {kinds_of(unprotected)}.")
    return list(targets)


def add_lora(adapted, targets, args):
    """Put LoRA layers on the targets of the adapted models, and return their parameters, in float32."""
    for name, model in adapted.items():
        prefix = f"{TEXT_ENCODER}." if name == TEXT_ENCODER else ""
        own = [
            target.removeprefix(prefix) for target in targets if target.startswith(f"{TEXT_ENCODER}.") == bool(prefix)
        ]
        # peft's own, since transformers' and diffusers' add_adapter ask for a peft of the same week
        inject_adapter_in_model(
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=own,
            ),
            model,
        )
        cast_training_params(model, torch.float32)
    return [parameter for model in adapted.values() for parameter in model.parameters() if parameter.requires_grad]


def enable_lora(adapted, enabled):
    """Let the adapted models answer with or without their LoRA."""
    for model in adapted.values():
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(enabled)


def save_memory(unet, text_encoder, args):
    """Turn on what trades time for memory."""
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:  # no GPU, or an xformers built for another torch
            raise NullSpaceError(
                f"--enable_xformers_memory_efficient_attention fails here ({reason(error)})."
            ) from error
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            # The reentrant kind would need gradients of the text encoder's inputs, which are none.
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})


def make_optimizer(parameters, args):
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **settings, use_bias_correction=True, safeguard_warmup=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


class PromptEncoder:
    """Embeddings of the captions: computed anew for each batch where the text encoder is trained, otherwise once.

    Args:
        captions (`list[str]`): different ones; batches name them by number.
        args: --tokenizer_max_length, --text_encoder_use_attention_mask and --train_text_encoder.
    """

    def __init__(self, tokenizer, text_encoder, captions, device, args):
        length = args.tokenizer_max_length or tokenizer.model_max_length
        longest = text_encoder.config.max_position_embeddings
        if length > longest:
            raise NullSpaceError(f"--tokenizer_max_length {length} is more than the text encoder's {longest} tokens.")
        self.tokens = tokenizer(
            captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).to(device)
        self.use_mask, self.clip_skip = args.text_encoder_use_attention_mask, args.clip_skip
        self.embeddings = None
        if not args.train_text_encoder:
            batches = torch.arange(len(captions)).split(16)
            progress = tqdm(batches, desc="Encoding prompts", unit="batch", disable=len(batches) == 1)
            with torch.no_grad():
                self.embeddings = torch.cat([self.encode(text_encoder, batch) for batch in progress])

    def encode(self, text_encoder, numbers):
        mask = self.tokens.attention_mask[numbers] if self.use_mask else None
        return encode_tokens(text_encoder, self.tokens.input_ids[numbers], mask, self.clip_skip)

    def __call__(self, text_encoder, numbers):
        """Embeddings (batch, tokens, width) of the captions of these numbers (batch,)."""
        return self.encode(text_encoder, numbers) if self.embeddings is None else self.embeddings[numbers]


# ---- The job ---------------------------------------------------------------------------------------------------------


class ScalarLog:
    """Sends the scalars of every step to the trackers and the progress bar, a few steps at a time.

    Reading a value from the device waits for all that it has still to do, so values stay there until `flush`, which
    stops a training that has diverged. Of the latents (their sum) nothing but that is looked at.
    """

    def __init__(self, accelerator, progress, every=10):
        self.accelerator, self.progress, self.every = accelerator, progress, every
        self.pending = []  # (step, lr, whether the step was skipped, scalar tensors by name)
        self.skipped_steps = SkippedSteps()

    def add(self, step, lr, skipped, **tensors):
        self.pending.append((step, lr, skipped, tensors))
        self.progress.update()
        if len(self.pending) == self.every:
            self.flush()
        self.skipped_steps.add(skipped, step, lr)

    def flush(self):
        if not self.pending:
            return
        rows = torch.stack([torch.stack(list(tensors.values())).float() for *_, tensors in self.pending]).tolist()
        for (step, lr, skipped, tensors), row in zip(self.pending, rows, strict=True):
            values = dict(zip(tensors, row, strict=True))
            self.accelerator.log({name: values[name] for name in values if name != "latents"} | {"lr": lr}, step=step)
            check_scalars(values, step, lr, skipped)
        self.progress.set_postfix(loss=values["loss"], lr=lr)
        self.pending.clear()


def make_accelerator(args):
    """The `Accelerator`.

    Raises:
        NullSpaceError: if something that a flag asks for is not there, or the launcher shards gradients.
    """
    check_launcher()
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, args.output_dir / args.logging_dir),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    except ValueError as error:  # a tracker that is not installed, a precision that the device does not have
        raise NullSpaceError(reason(error)) from error
    check_launcher(accelerator.distributed_type)
    return accelerator


def check_packages(args):
    """Raise `NullSpaceError` unless what the flags need is installed."""
    for wanted, package, flag in (
        (args.enable_xformers_memory_efficient_attention, "xformers", "--enable_xformers_memory_efficient_attention"),
        (args.use_8bit_adam, "bitsandbytes", "--use_8bit_adam"),
        (args.optimizer == "prodigy", "prodigyopt", "--optimizer prodigy"),
        (args.report_to in ("tensorboard", "wandb", "comet_ml"), args.report_to, f"--report_to {args.report_to}"),
    ):
        if wanted:
            require(package, flag)


def settle_model_type(bundle, args):
    """Set --model_type and --lcm_loss to what they come to for this model, and the guidance scale to the bundle's.

    Raises:
        NullSpaceError: if a flag contradicts the model, or the bundle is of the other type.
    """
    args.model_type = model_type(args.pretrained_model_name_or_path, args.revision, args.hub_token, args.model_type)
    bundle.check_model_type(args.model_type)
    args.guidance_scale = bundle.config["guidance_scale"]
    if args.model_type == "lcm":
        args.lcm_loss = args.lcm_loss or "x0"
    elif args.lcm_loss:
        raise NullSpaceError(
            f"--lcm_loss is for Latent Consistency Models, and {args.pretrained_model_name_or_path} is none."
        )
    if args.snr_gamma is not None and LOSSES[args.lcm_loss] is not diffusion_loss:
        raise NullSpaceError(
            "--snr_gamma weighs the errors of a noise prediction; an LCM is trained on those with --lcm_loss epsilon "
            f"only, and this is {args.lcm_loss}."
        )


def load_protection(args):
    """The bundle, the groups of timesteps to draw from ("nearest") and what each group protects.

    Raises:
        NullSpaceError: if it cannot be had, or does not protect what is to be trained.
    """
    bundle = Bundle.load(
        args.nullspace_name_or_path,
        args.nullspace_timesteps,
        args.nullspace_timestep_range,
        revision=args.nullspace_revision,
        token=args.hub_token,
        text_encoder=args.train_text_encoder,
    )
    bundle.check_clip_skip(args.clip_skip)
    if args.train_text_encoder and TEXT_ENCODER not in bundle.spectra and not args.allow_unprotected:
        raise NullSpaceError(
            "--train_text_encoder moves every prompt, and this bundle does not protect the text encoder; build one "
            f"with {BUILDER} --with_text_encoder, or pass --allow_unprotected."
        )
    nearest = split_groups(bundle.config) if args.nullspace_timesteps == "nearest" else []
    return bundle, nearest, protect(bundle, nearest, args)


def protect(bundle, nearest, args):
    """What each group of timesteps that is used protects: `dict[str, dict[str, Protected]]`."""
    return {
        name: bundle.protected(name, args.nullspace_criterion, args.nullspace_threshold, args.nullspace_softness)
        for name in [group["name"] for group in nearest] or [JOINT]
    }


def add_extra_prompts(bundle, components, accelerator, dtype, args):
    """The bundle in which --nullspace_extra_prompts weigh as much as all of its own.

    They are drawn by the base model as the bundle's prompts were, a batch of training at a time.

    Args:
        components (`dict`): of the base model's pipeline, without LoRA.
    """
    config = bundle.config
    pipeline = load_pipeline(args, dtype, accelerator.device, **components)
    pipeline.scheduler = make_scheduler(config["sampler"], pipeline.scheduler.config)
    groups = split_groups(config)
    if not all(group["name"] in bundle.spectra for group in groups):
        groups = [group for group in config["groups"] if group["name"] == JOINT]
    group_of = {timestep: group["name"] for group in groups for timestep in group["timesteps"]}
    read = bundle.group(JOINT)
    inputs = {name: info["input"] for name, info in bundle.modules.items() if info["input"] in read}
    moments = SecondMoments(components["unet"], inputs, group_of, components[TEXT_ENCODER])
    prompts = [prompt for prompt in args.nullspace_extra_prompts for _ in range(PICTURES_PER_EXTRA_PROMPT)]
    starts = range(0, len(prompts), args.train_batch_size)
    with moments.collect():
        for start in tqdm(
            starts, desc="Protecting extra prompts", unit="batch", disable=not accelerator.is_local_main_process
        ):
            batch = prompts[start : start + args.train_batch_size]
            seeds = [config["seed"] + start + index for index in range(len(batch))]
            moments.draw(
                pipeline, batch, seeds, config["num_inference_steps"], config["guidance_scale"], config["resolution"],
                clip_skip=args.clip_skip,
            )  # fmt: skip
    # Every process drew the same; their sum is the same in all of them, to the last bit.
    moments.reduce(lambda tensor: reduce(tensor, "sum"))
    return bundle.emphasize(Bundle.from_moments(moments, groups, config))


def draw_in_training(accelerator, adapted, kept, dtype, step, args):
    """Draw the validation prompts with the models in training, and without their LoRA: one picture."""
    for model in adapted.values():
        model.eval()
    pipeline = load_pipeline(args, dtype, accelerator.device, **{**kept, **adapted})
    rows = {}
    with accelerator.autocast():
        if args.compare_with_base:
            enable_lora(adapted, False)
            rows["base"] = draw(pipeline, args.validation_prompt, args, "Validating, base")
            enable_lora(adapted, True)
        rows["tuned"] = draw(pipeline, args.validation_prompt, args, "Validating")
    for model in adapted.values():
        model.train()
    return comparison_grid(rows, args.validation_prompt, args.seed, step)


def draw_saved(folder, prompts, device, dtype, args):
    """Draw prompts with the base model and with the LoRA in a folder: `dict[str, list[list[Image]]]`."""
    pipeline = load_pipeline(args, dtype, device)
    rows = {"base": draw(pipeline, prompts, args, "Drawing with the base model")} if args.compare_with_base else {}
    pipeline.load_lora_weights(folder)
    return rows | {"tuned": draw(pipeline, prompts, args, "Drawing with the LoRA")}


def main(args):
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    check_packages(args)
    accelerator = make_accelerator(args)
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
    with accelerator.main_process_first():
        pictures, captions = read_instances(
            args,
            args.background,
            keep=partial(fit, resolution=args.resolution, interpolation=args.image_interpolation_mode),
            tell=logger.info,
            need_captions=True,
        )
    given_prompts, args.instance_prompt = args.instance_prompt, trained_prompts(captions, args.instance_prompt)
    if fault := output_folder_fault(args.output_dir, args.instance_data_dir):
        raise NullSpaceError(fault)
    if not args.output_dir.is_dir():
        check_writable(args.output_dir)
    checkpoint = find_checkpoint(args)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = hub_repository(args.hub_model_id, args.output_dir, args.hub_token)
    with accelerator.main_process_first():
        bundle, nearest, protected = load_protection(args)
    settle_model_type(bundle, args)
    is_protected = any(item.rank for items in protected.values() for item in items.values())
    if args.compare_with_base is None:
        args.compare_with_base = is_protected
    run = describe_run(args, pictures, captions, bundle.config, accelerator.num_processes, accelerator.mixed_precision)
    check_same_run(checkpoint, run)

    if args.push_to_hub and accelerator.is_main_process:
        create_repository(args.hub_model_id, "model", args.hub_private_repo, args.hub_token)
    with accelerator.main_process_first():  # all of it, so that nothing is left to download after the training
        args.model_folder = download_model(
            args.pretrained_model_name_or_path, args.revision, args.variant, args.hub_token
        )

    # Seed everything
    if args.seed is None:
        saved = read_record(checkpoint)["seed"] if checkpoint else None
        args.seed = broadcast_object_list([random.randrange(2**31) if saved is None else saved])[0]
        accelerator.dataloader_config.data_seed = args.seed
        run["--seed"] = args.seed
    set_seed(args.seed)

    # Load the models
    with loading(args.pretrained_model_name_or_path):
        vae_config = AutoencoderKL.load_config(args.model_folder, subfolder="vae")
    if fault := resolution_fault(args.resolution, vae_config["block_out_channels"]):
        raise NullSpaceError(fault)
    device = accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    folder = args.model_folder
    tokenizer = load_tokenizer(args)
    if fault := tokenizer_fault(tokenizer, args.tokenizer_name or args.pretrained_model_name_or_path):
        raise NullSpaceError(fault)
    warn_of_prompts(tokenizer, captions, given_prompts, args)
    with loading(args.pretrained_model_name_or_path):
        text_encoder = load_whole(CLIPTextModel, folder, "text_encoder", variant=args.variant)
        unet = load_whole(UNet2DConditionModel, folder, "unet", variant=args.variant)
        vae = load_whole(AutoencoderKL, folder, "vae", variant=args.variant)
        noise_scheduler = KINDS[args.model_type].noise_scheduler.from_pretrained(folder, subfolder="scheduler")
    scaling_factor = vae.config.scaling_factor
    adapted = {"unet": unet} | ({TEXT_ENCODER: text_encoder} if args.train_text_encoder else {})
    bundle.check(unet, text_encoder, tokenizer=tokenizer, noise_scheduler=noise_scheduler)
    prompts = list(dict.fromkeys(caption for several in captions for caption in several))
    if checkpoint or args.max_train_steps is None or args.checkpointing_steps <= args.max_train_steps:
        encoded = prompts + (args.nullspace_extra_prompts or [])
        run |= describe_models(unet, text_encoder, vae, noise_scheduler, tokenizer, encoded)
    check_same_run(checkpoint, run)
    check_clip_skip(args.clip_skip, text_encoder.config.num_hidden_layers)
    targets = lora_targets(unet, text_encoder, bundle, args)
    for model in (text_encoder, vae, unet):  # the last stays in reach by this name, and is needed to the end
        model.requires_grad_(False).to(device, weight_dtype)

    if args.nullspace_extra_prompts:
        bundle = add_extra_prompts(
            bundle,
            {"unet": unet, TEXT_ENCODER: text_encoder, "tokenizer": tokenizer, "vae": vae},
            accelerator,
            weight_dtype,
            args,
        )
        protected = protect(bundle, nearest, args)
    if is_protected:
        for line in describe_protection(bundle, next(iter(protected.values())), args):
            logger.info(line)
    else:
        logger.warning("Nothing is protected: this trains a plain DreamBooth LoRA.")

    # Add the LoRA, and an optimizer that is kept in the null space
    parameters = add_lora(adapted, targets, args)
    save_memory(unet, text_encoder, args)
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = make_optimizer(parameters, args)
    protected = {group: {name: items[name] for name in targets if name in items} for group, items in protected.items()}
    projector = NullSpaceProjector(unet, protected, text_encoder=text_encoder)
    projector.attach(optimizer)

    # Data: pictures and captions, encoded once where nothing changes them
    dataset = InstanceDataset(pictures, [[prompts.index(caption) for caption in several] for several in captions], args)
    dataloader = DataLoader(dataset, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers)
    if weight_dtype == torch.float16:
        vae = sound_vae(vae, dataset.first_epoch, folder, args.variant, args.learning_rate)
    args.vae_in_float32 = weight_dtype != vae.dtype
    prompt_encoder = PromptEncoder(tokenizer, text_encoder, prompts, device, args)
    kept = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae}  # what validation need not load again
    if args.pre_compute_text_embeddings:
        del kept["tokenizer"], kept["text_encoder"]
        tokenizer = text_encoder = None
    if args.cache_latents:
        dataset.cache(lambda pixel_values: encode_pictures(vae, pixel_values).to(weight_dtype))
        del kept["vae"]
        vae = None
    free_memory()

    # Schedule
    steps_per_epoch = math.ceil(
        math.ceil(len(dataloader) / accelerator.num_processes) / args.gradient_accumulation_steps
    )
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    run["--max_train_steps"] = args.max_train_steps
    check_same_run(checkpoint, run)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once for each process
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    # `adapted` keeps the models as they are, whatever they are wrapped in to train (DDP, torch.compile)
    *models, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        *adapted.values(), optimizer, dataloader, lr_scheduler
    )
    unet = models[0]
    if args.train_text_encoder:
        text_encoder = models[1]

    # Checkpoints hold the LoRA in the published format; it is all there is to save of the models
    def save_model_hook(models, weights, folder):
        if accelerator.is_main_process:
            save_lora(Path(folder), **adapted)
        weights.clear()

    def load_model_hook(models, folder):
        restore_lora(folder, **adapted)
        models.clear()

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
        step = read_record(checkpoint)["step"]
        logger.info(f"Resuming from {checkpoint} at step {step}")

    # Train
    logger.info(
        f"Training on {len(pictures)} pictures for {args.max_train_steps} steps, {args.num_train_epochs} epochs, "
        f"batch {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} accumulated"
    )
    denoise, grid = unet, range(noise_scheduler.config.num_train_timesteps)
    if args.model_type == "lcm":
        guidance = embed_guidance(args.guidance_scale, adapted["unet"].config.time_cond_proj_dim)
        denoise = partial(unet, timestep_cond=guidance.to(device, weight_dtype))
        grid = solver_grid(noise_scheduler)
    loss_function = LOSSES[args.lcm_loss]
    if args.snr_gamma is not None:
        loss_function = partial(loss_function, snr_gamma=args.snr_gamma)
    sampler = TimestepSampler(nearest, grid)
    progress = tqdm(
        total=args.max_train_steps,
        initial=step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    scalars = ScalarLog(accelerator, progress)

    def validate():
        if accelerator.is_main_process:
            scalars.flush()
            picture = draw_in_training(accelerator, adapted, kept, weight_dtype, step, args)
            save_picture(picture, args.output_dir / "validation" / f"{step:06d}.png")
            log_picture(accelerator, "validation", picture, step)

    # Resumed from its last checkpoint, a run has nothing left to do, even in the middle of an epoch
    epochs = range(step // steps_per_epoch, args.num_train_epochs) if step < args.max_train_steps else ()
    for epoch in epochs:
        for model in models:
            model.train()
        dataset.set_epoch(epoch)
        dataloader.set_epoch(epoch)
        done = (step - epoch * steps_per_epoch) * args.gradient_accumulation_steps  # batches of this epoch
        batches = accelerator.skip_first_batches(dataloader, done) if done else dataloader
        batches.set_epoch(epoch)  # before accelerate 1.15 what skips batches begins at epoch 0 again
        for index, (batch, numbers) in enumerate(batches, done):
            with accelerator.accumulate(*models):
                here = (args.seed, "step", epoch, index, accelerator.process_index)
                generator = seeded(*here)
                torch.manual_seed(seeded(*here, "dropout").initial_seed())  # dropout draws from the global generator
                first, end, group = sampler.group(seeded(args.seed, "group", step))
                projector.select(group)
                moments = batch if args.cache_latents else encode_pictures(vae, batch).to(weight_dtype)
                mean, std = moments.chunk(2, dim=1)
                latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
                latents = latents * scaling_factor
                timesteps = sampler.draw(first, end, len(latents), generator).to(latents.device)
                noise = draw_noise(latents, args.noise_offset, generator)
                prompt_embeds = prompt_encoder(text_encoder, numbers)
                loss = loss_function(denoise, noise_scheduler, latents, prompt_embeds, timesteps, noise)

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()
                    norm = get_total_norm([parameter.grad for parameter in parameters])
                    projector.project_gradients()
                    allowed_norm = clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            scalars.add(
                step,
                lr_scheduler.get_last_lr()[0],
                accelerator.optimizer_step_was_skipped,
                latents=latents.float().sum(),
                loss=loss.detach(),
                grad_norm=norm,
                grad_norm_projected=allowed_norm,
            )
            if step % args.checkpointing_steps == 0:
                scalars.flush()
                check_weights(parameters, step, args.learning_rate)
                folder = save_checkpoint(accelerator, step, args, run)
                if accelerator.trackers:
                    log_audit(accelerator, audit_file(folder, bundle, adapted, args), step)
            if args.validation_prompt and args.validation_steps and step % args.validation_steps == 0:
                validate()
            if step >= args.max_train_steps:
                break
        if args.validation_prompt and not args.validation_steps and epoch % args.validation_epochs == 0:
            validate()
    scalars.flush()
    progress.close()

    # Save the LoRA, read it back, and show what it did
    lora_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    check_weights(parameters, step, args.learning_rate, lora_dtype)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # It takes its place, and that of an earlier one, only once the file and its pictures turn out sound
        with tempfile.TemporaryDirectory(prefix="partial-lora-", dir=args.output_dir) as staging:
            found = save_audited(Path(staging), bundle, adapted, lora_dtype, args)
            log_audit(accelerator, found, step)
            for key in ("leakage", "predicted_drift"):
                if found[key]["max"] is not None:
                    logger.info(f"{key}: at most {found[key]['max']:.2e}, mean {found[key]['mean']:.2e}")
            del unet, denoise, text_encoder, vae, model, models, optimizer, projector, prompt_encoder
            adapted.clear()
            kept.clear()
            accelerator.free_memory()  # it keeps what it prepared
            free_memory()
            prompts = args.validation_prompt or [args.instance_prompt[0], *bundle.config["prompts"]["examples"][:3]]
            rows = draw_saved(staging, prompts, device, weight_dtype, args)
            os.replace(Path(staging) / LORA_NAME, args.output_dir / LORA_NAME)
        (args.output_dir / UNPROTECTED_NAME).unlink(missing_ok=True)  # of an earlier run, whose place this one takes
        report = make_report(found, bundle, lora_dtype, args)
        write_json(args.output_dir / REPORT_NAME, report)
        write_kohya(report, args)
        picture = comparison_grid(rows, prompts, args.seed, step)
        save_picture(picture, args.output_dir / COMPARISON_NAME)
        log_picture(accelerator, "comparison", picture, step)
        write_card(bundle, report, prompts, rows["tuned"][0], args)
        logger.info(f"Wrote {LORA_NAME}, {REPORT_NAME} and {COMPARISON_NAME} to {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        published = published_files(args)
        included = [word for pattern in published for word in ("--include", pattern)]
        base = args.pretrained_model_name_or_path
        base = Path(base).name if Path(base).is_dir() else base
        url = push_folder(
            args.hub_model_id,
            "model",
            args.output_dir,
            published,
            f"Null-space DreamBooth LoRA of {base}: {args.instance_prompt[0]}",
            shlex.join(["hf", "upload", args.hub_model_id, str(args.output_dir), ".", *included]),
            args.hub_token,
        )
        logger.info(f"Pushed to {url}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
