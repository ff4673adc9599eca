"""What the trainer's flags make of each other: contradictions are refused, and what was not given is settled.

Standard library only, as `nullspace.checks`.
"""

import argparse
import math
import shlex

from nullspace.checks import check_softness, refuse_unread, settle_threshold
from nullspace.errors import NullSpaceError
from nullspace.names import (
    BUILDER,
    DEFAULT_RANK,
    DEFAULT_RATES,
    DEFAULT_SOFTNESS,
    DEFAULT_WORD_RATE,
    LORA_NAME,
    TOKEN_NAME,
    WORD_NAME,
    WORD_SOFTNESS,
    kohya_path,
)


# What is gone, and what takes its place; none of them is in the help.
REPLACED = {
    "--with_prior_preservation": "--nullspace_name_or_path, which protects what a bundle holds without drawing it",
    "--prior_loss_weight": "--nullspace_softness at its default (the weight does not carry over)",
    "--num_class_images": f"--max_prompts of {BUILDER}",
    "--class_data_dir": "--nullspace_name_or_path",
    "--class_prompt": "--nullspace_extra_prompts",
    "--prior_generation_precision": f"--mixed_precision of {BUILDER}",
    "--sample_batch_size": f"--batch_size of {BUILDER}",
}


class Replaced(argparse.Action):
    """A flag of prior preservation: an error that names what takes its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(
            f"{self.option_strings[0]} belongs to prior preservation, which the null space replaces; use "
            f"{REPLACED[self.option_strings[0]]}."
        )


def refuse_prior_preservation(parser):
    """Have a parser know the flags that are gone, though its help does not."""
    for flag in REPLACED:
        parser.add_argument(flag, action=Replaced, nargs="*", help=argparse.SUPPRESS)


READ_WITH = {
    **dict.fromkeys(("dataset_config_name", "image_column", "cache_dir"), "dataset_name"),
    **dict.fromkeys(("hub_model_id", "hub_private_repo"), "push_to_hub"),
    "text_encoder_lr": "train_text_encoder",
}
WORD_FLAGS = ("initializer_token", "num_vectors", "word_learning_rate", "word_only")
# What is of a LoRA alone
UNUSED_BY_WORD = (
    "nullspace_name_or_path", "nullspace_revision", "nullspace_namespace", "nullspace_cache_dir",
    "nullspace_criterion", "nullspace_threshold", "nullspace_softness", "nullspace_extra_prompts",
    "nullspace_timestep_range", "max_drift", "allow_unprotected", "rank", "lora_alpha", "lora_dropout", "lora_layers",
    "init_lora", "train_text_encoder", "text_encoder_lr", "learning_rate", "adam_weight_decay", "upcast_before_saving",
)  # fmt: skip


def settle(args, parser):
    """Refuse flags that contradict each other, and set those that were not given and depend on others."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        parser.error("give the pictures as either --instance_data_dir or --dataset_name.")
    refuse_unread(args, parser, **READ_WITH)
    if args.output_kohya_format and kohya_path(args.output_dir).name.endswith((LORA_NAME, WORD_NAME)):
        name = kohya_path(args.output_dir).name
        parser.error(f"--output_kohya_format writes a file named after --output_dir, beside {name}: rename it.")
    check_word(args, parser)
    if args.pre_compute_text_embeddings and args.train_text_encoder:
        parser.error("--pre_compute_text_embeddings frees the text encoder, which --train_text_encoder trains.")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error("--use_8bit_adam is for --optimizer adamw.")
    if args.nullspace_softness is None:
        args.nullspace_softness = WORD_SOFTNESS if args.placeholder_token else DEFAULT_SOFTNESS
    if 0.01 <= args.nullspace_softness < math.inf:
        parser.error(
            f"--nullspace_softness {args.nullspace_softness:g} is too high: from 0.01 up hardly any direction is held "
            "back; leave the default, or say inf to free them all."
        )
    named = args.nullspace_name_or_path is not None
    for name, is_of_named in (("revision", True), ("namespace", False), ("cache_dir", False)):
        if getattr(args, f"nullspace_{name}") is not None and named != is_of_named:
            parser.error(
                f"--nullspace_{name} is {'of' if is_of_named else 'read only without'} --nullspace_name_or_path; "
                f"{'name the bundle' if is_of_named else 'leave one of them out'}."
            )
    if args.nullspace_timestep_range and not named:
        parser.error(
            f"--nullspace_timestep_range needs a bundle that keeps timesteps apart; build one with {BUILDER} "
            "--timestep_groups steps and name it in --nullspace_name_or_path."
        )
    if fault := unquoted_prompt(args.instance_prompt or []):
        parser.error(fault)
    settle_rates(args, parser)
    if args.init_lora is None:  # which has its own
        args.rank = args.rank or DEFAULT_RANK
        args.lora_alpha = args.lora_alpha or args.rank
    if args.report_to in ("wandb", "comet_ml", "all") and args.hub_token is not None:
        parser.error(
            f"--report_to {args.report_to} with --hub_token would record the token with the run; log in with "
            "`hf auth login` instead."
        )
    settle_threshold(args, parser)
    try:
        check_softness(args.nullspace_softness)
    except NullSpaceError as error:
        parser.error(str(error))


def settle_rates(args, parser):
    """Set the learning rates that were not given; refuse those that nothing would be trained with."""
    own = [name for name in ("text_encoder_lr", "word_learning_rate") if getattr(args, name) is not None]
    if own and args.optimizer == "prodigy":
        parser.error(f"--optimizer prodigy takes one rate for all that is trained; leave --{own[0]} out.")
    if args.learning_rate is None:
        args.learning_rate = DEFAULT_RATES[args.optimizer]
    if args.placeholder_token and args.word_learning_rate is None:
        args.word_learning_rate = args.learning_rate if args.optimizer == "prodigy" else DEFAULT_WORD_RATE


def check_word(args, parser):
    """Refuse flags on the word that contradict each other or others, and a token that files could not be named after.

    Call it before flags that were not given are settled.
    """
    token = args.placeholder_token
    for name in WORD_FLAGS if token is None else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is of a word, and there is none; name it in --placeholder_token.")
    if token is None:
        return
    if not TOKEN_NAME.fullmatch(token):
        parser.error(
            f"--placeholder_token {token} names files and is read in lower case, so it is made of lower-case letters "
            "without accents, digits, - and _; choose another, as sks-star."
        )
    if args.initializer_token is None:
        parser.error("--placeholder_token needs an --initializer_token that it begins as, mostly the class: dog.")
    if args.pre_compute_text_embeddings:
        parser.error("--pre_compute_text_embeddings frees the text encoder, through which --placeholder_token learns.")
    if held := [prompt for prompt in args.nullspace_extra_prompts or [] if token in prompt.lower()]:
        parser.error(
            f"--nullspace_extra_prompts protects '{held[0]}', which holds --placeholder_token {token}, so that it "
            "could not be learned; leave that prompt out."
        )
    for name in UNUSED_BY_WORD if args.word_only else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--word_only trains no LoRA, which --{name} is for; leave one of them out.")


def unquoted_prompt(prompts):
    """What is wrong with prompts that are empty, or several of one word each (one without its quotes), or None."""
    if not all(prompt.strip() for prompt in prompts):
        return "--instance_prompt is empty; name the subject in it, as in 'a photo of a sks dog'."
    if len(prompts) > 1 and not any(len(prompt.split()) > 1 for prompt in prompts):
        return (
            f"--instance_prompt was given {len(prompts)} prompts of one word each; put one prompt in quotes: "
            f"--instance_prompt {shlex.quote(' '.join(prompts))}"
        )
    return None
