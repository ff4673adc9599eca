"""What each flag of the trainer is to a run that is resumed, and flags of several scripts."""

from nullspace.checks import hub_token
from nullspace.families import FAMILIES


# Every flag of the trainer belongs to one of these three. The result of a training depends on the value of these:
COMPARED = (
    "model_type", "variant", "tokenizer_max_length", "text_encoder_use_attention_mask", "clip_skip",
    "nullspace_criterion", "nullspace_threshold", "nullspace_softness", "nullspace_extra_prompts",
    "nullspace_timestep_range", "max_drift",
    "rank", "lora_alpha", "lora_dropout", "lora_layers", "train_text_encoder", "text_encoder_lr",
    "placeholder_token", "initializer_token", "num_vectors", "word_learning_rate", "word_only",
    "repeats", "resolution", "enable_bucket", "center_crop", "random_flip", "image_interpolation_mode",
    "seed", "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "allow_tf32",
    "enable_xformers_memory_efficient_attention", "cache_latents", "lcm_loss", "snr_gamma", "noise_offset",
    "optimizer", "use_8bit_adam", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
    "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "max_train_steps",
)  # fmt: skip
# It depends on what these name, whatever the place is called: that is what is hashed.
BY_CONTENT = {
    "the model": (
        "pretrained_model_name_or_path",
        "revision",
        "single_file_config",
        "pretrained_vae_model_name_or_path",
    ),
    "the tokenizer": ("tokenizer_name",),
    "the bundle": (
        "nullspace_name_or_path",
        "nullspace_revision",
        "nullspace_namespace",
        "nullspace_cache_dir",
    ),
    "the pictures": (
        "instance_data_dir",
        "dataset_name",
        "dataset_config_name",
        "image_column",
        "cache_dir",
        "background",
    ),
    "the captions": ("instance_prompt", "caption_column"),
    "the LoRA gone on from": ("init_lora",),
    "the LoRAs stood on": ("base_lora",),
}
# It does not depend on these, but for what `dependent` says of the number of steps.
FREE = {
    "how long it trains": ("num_train_epochs",),
    "validation": (
        "validation_prompt", "compare_with_base", "compare_checkpoints", "num_validation_images", "validation_epochs",
        "validation_steps",
    ),
    "checkpoints and logging": (
        "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_dir",
        "report_to", "config",
    ),
    "memory": (
        "gradient_checkpointing", "pre_compute_text_embeddings", "dataloader_num_workers", "local_rank",
    ),
    "saving and publishing": (
        "upcast_before_saving", "output_kohya_format", "allow_unprotected", "push_to_hub", "hub_model_id",
        "hub_private_repo", "hub_token",
    ),
}  # fmt: skip
# The schedules that read a flag; the others give the same with any value of it.
ENDLESS = ("constant", "constant_with_warmup")
READ_BY = {
    "max_train_steps": lambda schedule: schedule not in ENDLESS,
    "lr_warmup_steps": lambda schedule: schedule != "constant",
    "lr_num_cycles": lambda schedule: schedule == "cosine_with_restarts",
    "lr_power": lambda schedule: schedule == "polynomial",
}

SINGLE_FILE_CONFIG = (
    "For a base model in one .safetensors file, which has weights alone: folder or Hub id of a model of its kind, from "
    "which configurations, noise schedule, prediction type and tokenizers are taken (default: the model on the Hub "
    "that diffusers takes such weights for)."
)


def add_model_files(group):
    """Add the flags that choose among a base model's files."""
    group.add_argument("--revision", help="Revision of the base model on the Hub.")
    group.add_argument("--variant", help="Variant of the base model's files, for instance fp16.")


def add_model_type(group):
    """Add the flag that names a base model's family."""
    group.add_argument(
        "--model_type",
        choices=["auto", *FAMILIES],
        default="auto",
        help="Stable Diffusion, Stable Diffusion XL, or what was distilled from them; auto reads it from the model's "
        "UNet and scheduler (default: %(default)s).",
    )


def add_hub_token(group):
    """Add the flag of the secret."""
    group.add_argument("--hub_token", type=hub_token, help="Token to use instead of the one you are logged in with.")


def resume_help():
    """The help of --resume_from_checkpoint: what may differ from the run that wrote the checkpoint."""
    free = "; ".join(
        f"{what}: " + ", ".join(f"--{name}" for name in names if name not in ("output_dir", "resume_from_checkpoint"))
        for what, names in FREE.items()
    )
    return (
        "A checkpoint's folder, or latest for the last whole one in --output_dir. The run goes on as if it had never "
        "stopped, so all that its result depends on must be as it was. What may change is --max_train_steps, where "
        f"--lr_scheduler is {' or '.join(ENDLESS)}, since the others end with it; {free}."
    )
