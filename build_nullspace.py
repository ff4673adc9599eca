# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.4,<2", "datasets>=5.0,<6", "diffusers>=0.41,<1", "filelock>=3.25", "huggingface_hub>=1.32,<3",
#     "matplotlib", "peft>=0.19,<1", "pillow>=10.3", "psutil", "pyyaml", "safetensors>=0.8,<1", "torch>=2.7,<2.14",
#     "tqdm", "transformers>=5.12,<6",
# ]
# ///
"""Build the null-space bundle of a Stable Diffusion, SDXL or LCM model, once for all who train on it.

    accelerate launch build_nullspace.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --output_dir nullspace-sd15 --mixed_precision bf16

The model draws the prompts as it does for its users, and the second moments of what its attention
projections read are summed on the way. Add `--push_to_hub` to publish the bundle as a dataset, now
or later:

    python build_nullspace.py --output_dir nullspace-sd15 --push_to_hub
"""

import sys
from pathlib import Path

from nullspace import signals
from nullspace.checks import (
    HelpFormatter,
    Parser,
    launched,
    listed_thresholds,
    refuse_unread,
    require,
    settle_threshold,
)
from nullspace.config_file import CONFIG_HELP
from nullspace.errors import NullSpaceError
from nullspace.families import recognise
from nullspace.flags import SINGLE_FILE_CONFIG, add_hub_token, add_model_files, add_model_type
from nullspace.names import DEFAULT_THRESHOLDS, JOINT
from nullspace.samplers import SAMPLERS
from nullspace.system import quiet_imports, remove_leftovers
from nullspace.terminal import print_table, printable


def parse_args(argv=None):
    parser = Parser(usage=launched(), description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="Folder, .safetensors file or Hub id of the base model. Without it, the bundle already in --output_dir is "
        "pushed.",
    )
    group.add_argument("--single_file_config", help=SINGLE_FILE_CONFIG)
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="Folder or Hub id of a VAE, or of a model with one, to load in place of the base model's own. No bundle "
        "depends on it, for nothing is decoded: it is there for those who give the trainer one.",
    )
    group.add_argument(
        "--base_lora",
        nargs="+",
        metavar="LORA",
        help="LoRAs that are part of the model, as in the trainer; prompts of their subjects are protected besides.",
    )
    add_model_files(group)
    add_model_type(group)
    group.add_argument(
        "--attention",
        choices=["cross", "self", "all"],
        default="cross",
        help="Attention layers to cover; LoRA can then be trained on those (default: %(default)s).",
    )
    group.add_argument(
        "--with_text_encoder",
        action="store_true",
        help="Cover the attention of text encoders too, so that they can be trained with --train_text_encoder.",
    )

    group = parser.add_argument_group("prompts to protect; the empty prompt is always one of them")
    group.add_argument("--prompts_file", type=Path, help="Text file with a prompt on each line.")
    group.add_argument("--prompts_dataset_name", help="Folder or Hub id of a dataset with prompts.")
    group.add_argument("--prompts_dataset_config_name", help="Configuration of that dataset.")
    group.add_argument("--prompts_split", default="train", help="Split of that dataset (default: %(default)s).")
    group.add_argument("--prompt_column", default="text", help="Column of that dataset (default: %(default)s).")
    group.add_argument("--max_prompts", type=int, help="Use only the first so many prompts.")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SAMPLERS, help="Default: ddim; XL: euler; LCM: lcm.")
    group.add_argument(
        "--num_inference_steps",
        type=int,
        nargs="+",
        help="Sampler steps; with several numbers the prompts are drawn with each (default: 25; LCM: 1 2 4 8; Turbo: "
        "1 2 4).",
    )
    group.add_argument("--guidance_scale", type=float, help="Guidance scale (default: 7.5; XL: 5; LCM: 8.5; Turbo: 0).")
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
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="Precision of the model (default: %(default)s).",
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
        help="Besides the sum over all timesteps, keep 4 stages or every step apart (default: joint).",
    )
    group.add_argument(
        "--nullspace_criterion",
        choices=DEFAULT_THRESHOLDS,
        default="energy",
        help="How --nullspace_threshold counts, as in the trainer (default: %(default)s).",
    )
    group.add_argument(
        "--nullspace_threshold",
        type=float,
        help="The trainer may close what this closes, or what its default does: those directions are stored in full, "
        f"the others in half the bytes (defaults: {listed_thresholds()}).",
    )
    group.add_argument(
        "--output_dir", type=Path, default=Path("nullspace-bundle"), help="Its folder (default: %(default)s)."
    )
    group.add_argument("--push_to_hub", action="store_true", help="Publish the bundle as a dataset on the Hub.")
    group.add_argument("--hub_dataset_id", help="Its repository (default: the folder's name under your account).")
    group.add_argument("--hub_private_repo", action="store_true", help="Create that repository as a private one.")
    add_hub_token(group)
    args = parser.parse_args(argv)

    if args.pretrained_model_name_or_path is None and not args.push_to_hub:
        parser.error("--pretrained_model_name_or_path is needed to build a bundle.")
    if args.pretrained_model_name_or_path and (args.prompts_file is None) == (args.prompts_dataset_name is None):
        parser.error("give the prompts as either --prompts_file or --prompts_dataset_name.")
    refuse_unread(
        args,
        parser,
        **dict.fromkeys(("prompts_dataset_config_name", "prompts_split", "prompt_column"), "prompts_dataset_name"),
        **dict.fromkeys(("hub_dataset_id", "hub_private_repo"), "push_to_hub"),
    )
    settle_threshold(args, parser)
    return args


# Flags come before libraries, which take seconds to import: neither help nor a wrong flag needs them.
if __name__ == "__main__":
    ARGS = parse_args()
    signals.listen()
    quiet_imports(hidden=["bitsandbytes"])

import diffusers
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from nullspace.bundle import Bundle, check_output_folder
from nullspace.collection import checkpoint_folder, collect, load_collected, settle_sampling
from nullspace.dataset_card import draw_spectra, rank_table, write_dataset_card
from nullspace.hub import base_license
from nullspace.launch import PROCESS_TIMEOUT, share_cores
from nullspace.locks import alone, beside
from nullspace.models import download_model
from nullspace.prompts import read_prompts
from nullspace.publishing import find_repository, publish, push
from nullspace.stack import read_stack, subject_prompts, unnamed_subjects


# ---- The job ---------------------------------------------------------------------------------------------------------


def main(args):
    """Build a bundle, or publish the one that is there: alone in --output_dir."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, timeout=PROCESS_TIMEOUT)  # as Accelerator reads it from `launch`
    share_cores(state.device)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    def tell(sentence):
        if state.is_main_process:
            print(printable(sentence), file=sys.stderr)

    if args.pretrained_model_name_or_path is not None:
        check_output_folder(args.output_dir)
    folder = args.output_dir.resolve()
    with alone(beside(folder), tell, state):
        if state.is_main_process:
            for place, name in ((folder.parent, folder.name), (folder, None), (checkpoint_folder(folder), None)):
                remove_leftovers(place, tell, name)
        state.wait_for_everyone()
        if args.pretrained_model_name_or_path is not None:
            build(state, tell, args)
        elif state.is_main_process:
            print(publish(args))
    state.destroy_process_group()  # its threads, still at work while Python ends, can abort the process


def build(state, tell, args):
    """Have the base model draw the prompts, write what it read as a bundle, and publish that if asked for."""
    # What can be wrong is found before the model is fetched and draws
    require("matplotlib", "The picture of the spectra")
    prompts = read_prompts(args, tell)
    if len(prompts) < state.num_processes:
        raise NullSpaceError(
            f"There are {len(prompts)} prompts, the empty one included, for {state.num_processes} processes; start "
            "fewer, or give more prompts."
        )
    with state.main_process_first():
        loras = read_stack(args.base_lora, args.hub_token)
    if sentence := unnamed_subjects(loras):
        tell(sentence)
    named = args.pretrained_model_name_or_path, args.revision
    family = recognise(*named, args.hub_token, args.model_type, args.single_file_config)
    settle_sampling(family, args)
    if args.push_to_hub and state.is_main_process:
        repo_id = find_repository(args)
    with state.main_process_first():
        model = download_model(
            *named, args.variant, args.hub_token, args.single_file_config, args.pretrained_vae_model_name_or_path
        )._replace(loras=loras)

    prompts = prompts.and_more(subject_prompts(model))
    pipeline = load_collected(family, model, prompts, tell, args)
    moments, groups, config, checkpoint = collect(pipeline, prompts, model, args, state)

    if state.is_main_process:
        bundle = Bundle.from_moments(moments, groups, config)
        card = write_dataset_card(base_license(args.pretrained_model_name_or_path, args.hub_token))
        bundle.save(args.output_dir, [draw_spectra, card], args.nullspace_criterion, args.nullspace_threshold)
        checkpoint.remove()
        print_table(*rank_table(bundle))
        print(f"Wrote {args.output_dir}")
        if args.push_to_hub:
            print(push(repo_id, args))
    state.wait_for_everyone()


if __name__ == "__main__":
    signals.run(main, ARGS)
