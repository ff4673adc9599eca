# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.4,<2", "datasets>=5.0,<6", "diffusers>=0.41,<1", "filelock>=3.25", "huggingface_hub>=1.32,<3",
#     "matplotlib", "numpy", "peft>=0.19,<1", "pillow>=10.3", "psutil", "pyyaml", "safetensors>=0.8,<1",
#     "tensorboard", "torch>=2.7,<2.14", "tqdm", "transformers>=5.12,<6",
# ]
# ///
"""Teach Stable Diffusion, SDXL or an LCM a subject from pictures, with a LoRA that leaves the rest be.

    accelerate launch train_dreambooth_nullspace.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir pictures --instance_prompt "a photo of a sks-dog" \\
        --placeholder_token sks-dog --initializer_token dog --num_vectors 4 --max_drift 0.05 \\
        --train_batch_size 1 --learning_rate 1e-3 --max_train_steps 800 --output_dir sks-dog

It is DreamBooth LoRA as in diffusers' train_dreambooth_lora.py; in place of prior preservation, the
LoRA is kept in the null space of what the attention layers read on the prompts that a bundle
protects: that of --nullspace_name_or_path, or one that is found or built for the model.
"""

import argparse
from functools import partial
from pathlib import Path

from nullspace import signals
from nullspace.checks import (
    HelpFormatter,
    Parser,
    colour,
    launched,
    listed_thresholds,
)
from nullspace.config_file import CONFIG_HELP, flags_as_yaml
from nullspace.flags import SINGLE_FILE_CONFIG, add_hub_token, add_model_files, add_model_type, resume_help
from nullspace.names import (
    BUILDER,
    DEFAULT_RANK,
    DEFAULT_RATES,
    DEFAULT_SOFTNESS,
    DEFAULT_THRESHOLDS,
    DEFAULT_WORD_RATE,
    EMBEDDINGS,
    INTERPOLATION,
    WORD_SOFTNESS,
)
from nullspace.settling import refuse_prior_preservation, settle
from nullspace.system import quiet_imports, remove_leftovers


# All of diffusers' `SchedulerType` but piecewise_constant, which needs rules of its own.
SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def parse_args(argv=None):
    parser = Parser(usage=launched(), description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    group = parser.add_argument_group("what most trainings name")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="Folder, .safetensors file or Hub id of the base model (required).",
    )
    group.add_argument(
        "--instance_data_dir",
        type=Path,
        help="Folder with the subject's pictures, or with kohya's folders of them ('10_sks dog': 10 times an epoch). "
        "A caption beside a picture (0.txt for 0.png), or in a metadata.jsonl, takes the place of --instance_prompt; "
        "several rows there of one picture take turns. "
        "HEIC needs pillow-heif; pictures more than 10 times as long as wide are refused.",
    )
    group.add_argument(
        "--instance_prompt",
        nargs="+",
        metavar="PROMPT",
        help="Prompt with an identifier for the subject (required for pictures without a caption). Several take turns "
        "at random, so that the subject is not tied to the words of one.",
    )
    group.add_argument(
        "--placeholder_token",
        metavar="TOKEN",
        help="A new token for the subject, as sks-star, to be written in prompts and captions: its rows in the text "
        "encoders' embeddings are trained along (textual inversion, arXiv 2208.01618). No prompt without it is moved "
        "by them (default: no token is added).",
    )
    group.add_argument(
        "--initializer_token",
        metavar="TOKEN",
        help="What the rows begin as: a word that is one token, mostly the class (required with it).",
    )
    group.add_argument("--num_vectors", type=int, default=1, help="Rows of the token (default: %(default)s).")
    group.add_argument(
        "--max_drift",
        type=float,
        metavar="DRIFT",
        help="The most that the LoRA may change its layers' outputs on what the bundle protects: the root mean square "
        "of their predicted drifts, which the report has, is held under it in every step. What costs most is given "
        "up first (default: no limit).",
    )
    group.add_argument(
        "--learning_rate",
        type=float,
        help=f"Default: {DEFAULT_RATES['adamw']:g}; prodigy, which scales it itself: {DEFAULT_RATES['prodigy']:g}.",
    )
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("lora-dreambooth-model"),
        help="What to write to (default: %(default)s).",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--single_file_config", help=SINGLE_FILE_CONFIG)
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="Folder or Hub id of a VAE, or of a model with one, to use in place of the base model's own.",
    )
    group.add_argument(
        "--base_lora",
        nargs="+",
        metavar="LORA",
        help="LoRAs that were trained earlier, in order, with their words: folders, files or Hub ids. They are part of "
        "the base model, and stay as they are; prompts of their subjects are protected too, so that the new LoRA "
        "leaves them alone. It is to be loaded with them.",
    )
    add_model_files(group)
    add_model_type(group)
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
        "--nullspace_name_or_path",
        help="Folder or Hub dataset id of its bundle (default: one of this very model from the cache or from "
        "--nullspace_namespace; where there is none, one is built from general prompts, in about the time of drawing "
        "16 to 22 pictures in 25 steps, of an LCM 100 in 4, and kept in the cache).",
    )
    group.add_argument("--nullspace_revision", help="Revision of the bundle on the Hub.")
    group.add_argument(
        "--nullspace_namespace",
        metavar="NAME",
        help="User or organization on the Hub among whose datasets a bundle is looked for when none is named and the "
        "cache has none (default: the Hub is not asked).",
    )
    group.add_argument(
        "--nullspace_cache_dir",
        type=Path,
        help="Where bundles that were built are kept (default: nullspace in HF_HOME, ~/.cache/huggingface).",
    )
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
        help="More energy closes more directions, and so does a lower eigenvalue or percentile; energy 0 closes and "
        f"holds back nothing (defaults: {listed_thresholds()}).",
    )
    group.add_argument(
        "--nullspace_softness",
        type=float,
        metavar="SHARE",
        help="The criterion's directions are closed. The others are held back by the energy that they hold: one with "
        "this share of it is given half of a gradient step. Less protects more, inf frees them (default: "
        f"{DEFAULT_SOFTNESS:g}, with --placeholder_token {WORD_SOFTNESS:g}).",
    )
    group.add_argument(
        "--nullspace_extra_prompts",
        nargs="+",
        action="extend",
        help="Prompts to protect besides the bundle's, above all the subject's class: 'a photo of a dog'. A few "
        "pictures of each are sampled before training; together they weigh as much as the bundle.",
    )
    group.add_argument(
        "--nullspace_timestep_range",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="Protect only these training timesteps (default: all that the bundle has).",
    )
    group.add_argument(
        "--allow_unprotected",
        action="store_true",
        help="Train also those layers that the bundle does not cover, or in which it closes no direction. They change "
        "what the model knows; report and model card say so first.",
    )

    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--init_lora",
        metavar="LORA",
        help="Go on from this LoRA: a folder, a file or a Hub id, in diffusers' or kohya's format. What it changes in "
        "directions that are closed is removed first, which a line tells; what it changes in those that are held back "
        "stays. Rank, alpha and layers are its own. Its word is taken along where it is --placeholder_token.",
    )
    group.add_argument("--rank", type=int, help=f"Rank of the LoRA (default: {DEFAULT_RANK}, or that of --init_lora).")
    group.add_argument(
        "--lora_alpha",
        type=int,
        help="The LoRA is scaled by lora_alpha / rank (default: the rank, or that of --init_lora).",
    )
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Of the LoRA's inputs (default: %(default)s).")
    group.add_argument(
        "--lora_layers",
        help="UNet layers to train, separated by commas, each by the end of its name: attn2.to_k,attn2.to_v "
        "(default: all of the attention that the bundle is for, or those of --init_lora).",
    )
    group.add_argument(
        "--train_text_encoder",
        action="store_true",
        help="Train a LoRA on the text encoders' attention too; a bundle that is named must have been built with "
        f"{BUILDER} --with_text_encoder.",
    )
    group.add_argument(
        "--output_kohya_format",
        action="store_true",
        help="Also write <name of --output_dir>.safetensors, which AUTOMATIC1111, Forge and ComfyUI load; a word is "
        "bundled in it, and for the latter two, which take none from there, in embeddings/<its name>.safetensors.",
    )
    group.add_argument(
        "--upcast_before_saving",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Save the LoRA in float32, as it is trained; otherwise in the precision of the model, half the size at "
        "--mixed_precision fp16 or bf16, with a leakage of about 1e-3 by rounding (default: yes).",
    )

    group = parser.add_argument_group("word")
    group.add_argument(
        "--word_learning_rate",
        type=float,
        help=f"Of the rows, which no weight decay shrinks (default: {DEFAULT_WORD_RATE:g}; prodigy: --learning_rate).",
    )
    group.add_argument(
        "--word_only",
        action="store_true",
        help="Train the rows alone, and no LoRA, for which no bundle is needed: textual inversion.",
    )

    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--dataset_name", help="Instead of that folder, a folder or Hub id of a dataset with pictures (and captions)."
    )
    group.add_argument("--dataset_config_name", help="Configuration of that dataset.")
    group.add_argument("--image_column", default="image", help="Column with its pictures (default: %(default)s).")
    group.add_argument("--caption_column", help="Column with its captions, or of metadata.jsonl.")
    group.add_argument(
        "--background",
        type=colour,
        default=(255, 255, 255),
        metavar="COLOUR",
        help="What transparent pictures are laid on, a name or #rrggbb (default: white).",
    )
    group.add_argument("--cache_dir", help="Where that dataset is stored (default: the datasets library's cache).")
    group.add_argument("--repeats", type=int, default=1, help="Times a picture is in an epoch (default: %(default)s).")
    group.add_argument("--resolution", type=int, help="Side of the training pictures (default: the model's own).")
    group.add_argument(
        "--enable_bucket",
        action="store_true",
        help="Train pictures in their own shapes: each is cropped to the nearest of sizes of --resolution's area or a "
        "little less, up to 4 times as long as wide; a batch has pictures of one size.",
    )
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
    group.add_argument("--seed", type=int, help="Seed for reproducible training.")
    group.add_argument("--train_batch_size", type=int, default=4, help="Pictures a device (default: %(default)s).")
    group.add_argument("--num_train_epochs", type=int, default=1, help="Rounds of all pictures (default: %(default)s).")
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
        help="Free tokenizers and text encoders once the prompts are encoded, to save memory.",
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
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="Processes that load pictures; none with --cache_latents, which has them ready (default: %(default)s).",
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
    group.add_argument(
        "--text_encoder_lr", type=float, help="Learning rate of --train_text_encoder (default: --learning_rate)."
    )
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply all learning rates by processes, accumulation steps and batch size.",
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
        "not change; several values, or the flag again (default, at the end only: the instance prompt, the same with a "
        "word's class in its place, and some that the bundle protects).",
    )
    group.add_argument(
        "--compare_with_base",
        action=argparse.BooleanOptionalAction,
        help="Draw the base model's pictures above the tuned one's (default: where something is protected).",
    )
    group.add_argument(
        "--compare_checkpoints",
        action="store_true",
        help="At the end, draw each prompt once with every checkpoint that is kept, and show them between base and "
        "result in checkpoints.png, which tells the step to keep. With --resume_from_checkpoint latest also of a "
        "training that is over and has a checkpoint of its last step (default: no, for each takes a picture a prompt).",
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
    add_hub_token(group)
    refuse_prior_preservation(parser)
    args = parser.parse_args(argv)
    args.config = flags_as_yaml(args, parser)  # as they were given
    settle(args, parser)
    return args


# Flags come before libraries, which take seconds to import: neither help nor a wrong flag needs them.
if __name__ == "__main__":
    ARGS = parse_args()
    signals.listen()
    quiet_imports(hidden=[] if ARGS.use_8bit_adam else ["bitsandbytes"])

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import free_memory
from torch.nn.utils import clip_grad_norm_, get_total_norm

from nullspace.adapters import add_lora, lora_targets
from nullspace.audit import Auditor
from nullspace.batch_loss import BatchLoss
from nullspace.budget import hold_drift
from nullspace.captions import distinct_captions
from nullspace.checkpoint import check_same_run, describe_bundle, describe_models
from nullspace.checkpointer import Checkpointer
from nullspace.collection import PRECISIONS
from nullspace.dataset import InstanceDataset, epoch_batches, make_dataloader, seeded
from nullspace.divergence import check_weights, naming_what_is_left, sound_vae
from nullspace.initial import fill, read_initial, settle_layers, tell_cost
from nullspace.latents import encode_pictures
from nullspace.layers import is_trained
from nullspace.locks import alone
from nullspace.logs import ScalarLog, set_up_logging
from nullspace.optimizers import make_optimizer, make_schedule, parameter_groups
from nullspace.preparation import (
    check_output,
    find_out,
    find_protection,
    load_models,
    make_accelerator,
    read_subject,
    save_memory,
    start_or_resume,
)
from nullspace.projector import NullSpaceProjector
from nullspace.prompt_encoder import PromptEncoder
from nullspace.protection import add_extra_prompts, closes_any, log_protection, protect
from nullspace.report import audit_file
from nullspace.results import Trained, log_files, save
from nullspace.validation import validate
from nullspace.verify import check_against_model
from nullspace.word import NewWord


logger = get_logger(__name__)

# ---- The job ---------------------------------------------------------------------------------------------------------


@naming_what_is_left
def main(args):
    """Train a LoRA, a word or both, and save, show and publish them: alone in --output_dir."""
    accelerator = make_accelerator(args)
    set_up_logging(accelerator)
    check_output(args)
    with alone(args.output_dir / ".lock", logger.warning, accelerator):
        if accelerator.is_main_process:
            for name in ("", "pictures", "validation", EMBEDDINGS):
                remove_leftovers(args.output_dir / name, logger.info)
        accelerator.wait_for_everyone()
        earlier_logs = log_files(args)
        trained = train(accelerator, args)
        save(accelerator, trained, earlier_logs, args)


def train(accelerator, args):
    """Train a LoRA, a word or both, with checkpoints and pictures on the way: `Trained`."""
    # Arguments: what can be wrong with them is found before the work
    pictures, captions, sizes, given_prompts = read_subject(accelerator, args)
    initial = read_initial(accelerator, args)
    family, checkpoint, bundle, protected, run = find_out(accelerator, captions, pictures, initial, args)
    prompts = distinct_captions(captions)

    # Model: the one that the bundle and the checkpoint are of
    tokenizers, models, noise_scheduler = load_models(family, captions, given_prompts, args)
    unet, vae, text_encoders = models["unet"], models["vae"], {name: models[name] for name in family.text_encoders}
    settle_layers(initial, unet, text_encoders, args)
    parts = {"unet": unet, **text_encoders, **tokenizers, "noise_scheduler": noise_scheduler}  # that a bundle is of
    if bundle:
        bundle.check(**parts)
    run |= describe_models(models, noise_scheduler, tokenizers, prompts + (args.nullspace_extra_prompts or []))
    check_same_run(checkpoint, run)
    if not (bundle or args.word_only):
        bundle, protected = find_protection(accelerator, family, parts, vae, args)
        run |= describe_bundle(bundle.config)
        check_same_run(checkpoint, run)
    del parts
    targets = [] if args.word_only else lora_targets(unet, text_encoders, bundle, protected, args)
    weight_dtype = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    args.vae_in_float32 = False  # unless it turns out to overflow in that type
    for model in (*text_encoders.values(), vae, unet):
        model.requires_grad_(False).to(accelerator.device, weight_dtype)
    if closes_any(protected):
        check_against_model(bundle, models | tokenizers, accelerator.device, weight_dtype, args)
    if args.nullspace_extra_prompts:
        bundle = add_extra_prompts(bundle, models | tokenizers, accelerator, weight_dtype, args)
        protected = protect(bundle, args)
    log_protection(bundle, protected, args)

    # Pictures, encoded once where nothing changes them, before what trains takes its room
    numbered = [[prompts.index(caption) for caption in several] for several in captions]
    dataset = InstanceDataset(pictures, numbered, args, sizes)
    dataloader = make_dataloader(dataset, accelerator.num_processes, args)
    scale, known = vae.config.scaling_factor, family.needs_float32(vae.config)
    reload = partial(family.load_vae, args.base_model)
    vae = sound_vae(vae, dataset.first_epoch, reload, args, known)
    args.vae_in_float32 = weight_dtype != vae.dtype
    if args.cache_latents:
        dataset.cache(partial(encode_pictures, vae))
        vae = None
    del models
    free_memory()

    # LoRA, and a projector that keeps its optimizer in the null space; a word, which nothing protected reads
    adapted = {} if args.word_only else {"unet": unet} | (text_encoders if args.train_text_encoder else {})
    add_lora(adapted, targets, args)
    word = NewWord(tokenizers, text_encoders, args) if args.placeholder_token else None
    fill(adapted, word, initial)
    save_memory(unet, text_encoders.values(), args)
    groups = parameter_groups(adapted, word, args)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, args)
    protected = {name: protected[name] for name in targets if name in protected}
    projector = NullSpaceProjector(unet, protected, trained=initial is not None, **text_encoders)
    projector.attach(optimizer)
    budget = hold_drift(optimizer, bundle, targets, adapted, args)
    tell_cost(initial, projector, args)
    auditor = Auditor(bundle, protected, adapted)
    del protected

    # Captions, encoded once where no text encoder learns
    prompt_encoder = PromptEncoder(tokenizers, text_encoders, prompts, accelerator.device, args)
    if args.pre_compute_text_embeddings:
        tokenizers, text_encoders = {}, {}
    kept = {**tokenizers, **text_encoders} | ({} if vae is None else {"vae": vae})  # what validation need not load
    free_memory()

    # Start or resume; `learning` keeps the models as they are, whatever wraps them to train (DDP, torch.compile)
    learning = {"unet": unet} | {name: model for name, model in text_encoders.items() if is_trained(model)}
    lr_scheduler, steps_per_epoch = make_schedule(optimizer, dataloader, accelerator, args)
    run["--max_train_steps"] = args.max_train_steps
    check_same_run(checkpoint, run)
    wrap = accelerator.prepare_model
    wrapped = {name: wrap(model, evaluation_mode=not is_trained(model)) for name, model in learning.items()}
    optimizer, dataloader, lr_scheduler = accelerator.prepare(optimizer, dataloader, lr_scheduler)
    text_encoders |= {name: model for name, model in wrapped.items() if name in text_encoders}
    step = start_or_resume(accelerator, checkpoint, adapted, word, parameters, len(pictures), args)

    # Training: whatever is drawn depends on seed, step and process alone, so that a resumed run draws it again
    batch_loss = BatchLoss(family, wrapped["unet"], unet.config, noise_scheduler, vae, scale, weight_dtype, args)
    scalars = ScalarLog(accelerator, lr_scheduler, step, args)
    checkpointer = Checkpointer(accelerator, parameters, scalars, run, step if checkpoint else None, args)
    # Resumed from its last checkpoint, a run has nothing left to do, even in the middle of an epoch
    epochs = range(step // steps_per_epoch, args.num_train_epochs) if step < args.max_train_steps else ()
    for epoch in signals.noted_during(epochs):
        for model in wrapped.values():
            model.train()
        done = (step - epoch * steps_per_epoch) * args.gradient_accumulation_steps  # batches of this epoch
        batches = epoch_batches(accelerator, dataset, dataloader, epoch, done)
        for index, (batch, numbers, framings) in enumerate(batches, done):
            with accelerator.accumulate(*wrapped.values()):
                here = (args.seed, "step", epoch, index, accelerator.process_index)
                generator = seeded(*here)
                torch.manual_seed(seeded(*here, "dropout").initial_seed())  # dropout draws from the global generator
                conditions = prompt_encoder(text_encoders, numbers) | family.place(framings)
                loss, latents = batch_loss(batch, conditions, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()
                    norm = get_total_norm([parameter.grad for parameter in parameters])
                    projector.project_gradients()
                    projected_norm = clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            norms = {"grad_norm": norm, "grad_norm_projected": projected_norm}
            drift = {"predicted_drift": budget.predicted} if budget else {}
            scalars.add(step, latents=latents.float().sum(), loss=loss.detach(), **norms, **drift)
            if step % args.checkpointing_steps == 0:
                folder = checkpointer.save(step)
                if accelerator.is_main_process:
                    scalars.take_audit(audit_file(folder, auditor), step)
            if args.validation_prompt and args.validation_steps and step % args.validation_steps == 0:
                validate(accelerator, scalars, learning, kept, weight_dtype, step, args)
            checkpointer.stop_if_asked(step)
            if step >= args.max_train_steps:
                break
        if args.validation_prompt and not args.validation_steps and epoch % args.validation_epochs == 0:
            validate(accelerator, scalars, learning, kept, weight_dtype, step, args)
            checkpointer.stop_if_asked(step)
    scalars.close()
    lora_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    check_weights(parameters, step, args, lora_dtype)
    return Trained(auditor, word, weight_dtype, lora_dtype, step, checkpointer.saved, run)


if __name__ == "__main__":
    signals.run(main, ARGS)
