"""What the trainer does before it trains: it finds out what is there, and whether all of it fits together."""

import os
import pickle
import random
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers import AutoencoderKL, UNet2DConditionModel

from nullspace.adapters import lora_targets
from nullspace.buckets import bucket_sizes, common_multiple
from nullspace.captions import counted, distinct_captions, trained_prompts
from nullspace.checkpoint import (
    check_same_run,
    checkpoints,
    describe_run,
    find_checkpoint,
    keep_checkpoints_small,
    read_record,
)
from nullspace.checks import (
    check_clip_skip,
    check_writable,
    output_folder_fault,
    own_resolution,
    require,
    resolution_fault,
    resolution_warning,
)
from nullspace.errors import NullSpaceError, listed, reason
from nullspace.families import recognise
from nullspace.finding import Wanted, find_or_build
from nullspace.hub import create_repository, hub_repository
from nullspace.initial import describe_initial
from nullspace.kohya import check_replaceable
from nullspace.launch import PROCESS_TIMEOUT, check_launcher, share_cores
from nullspace.layers import is_trained
from nullspace.logs import start_trackers
from nullspace.models import download_model, load_config, loading
from nullspace.names import CARD_NAME, CHECKPOINTS_NAME, COMPARISON_NAME, LORA_NAME, REPORT_NAME, WORD_NAME
from nullspace.pictures import describe_sizes, fit, read_instances
from nullspace.prompt_encoder import load_tokenizers
from nullspace.prompts import prompt_warnings, tokenizer_fault
from nullspace.protection import read_protection
from nullspace.results import for_web_uis, needed_space
from nullspace.stack import check_bundle, describe_stack, load_checked, read_stack, unnamed_subjects
from nullspace.system import check_space, in_bytes
from nullspace.word import add_token, check_named, check_window, spelled


logger = get_logger(__name__)

# ---- The surroundings ------------------------------------------------------------------------------------------------


def make_accelerator(args):
    """The `Accelerator`.

    Raises:
        NullSpaceError: if something that a flag asks for is not there, or the launcher shards gradients.
    """
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    for wanted, package, flag in (
        (args.enable_xformers_memory_efficient_attention, "xformers", "--enable_xformers_memory_efficient_attention"),
        (args.use_8bit_adam, "bitsandbytes", "--use_8bit_adam"),
        (args.optimizer == "prodigy", "prodigyopt", "--optimizer prodigy"),
        (args.report_to in ("tensorboard", "wandb", "comet_ml"), args.report_to, f"--report_to {args.report_to}"),
    ):
        if wanted:
            require(package, flag)
    check_launcher()
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, args.output_dir / args.logging_dir),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True,
                data_seed=args.seed,
                even_batches=not args.enable_bucket,  # which sees to that itself
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    except ValueError as error:  # a tracker that is not installed, a precision that the device does not have
        raise NullSpaceError(reason(error)) from error
    check_launcher(accelerator.distributed_type)
    share_cores(accelerator.device)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        logger.warning("CPUs are many times slower in fp16: train with --mixed_precision no here.")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_output(args):
    """Raise `NullSpaceError` unless the results can be written to --output_dir."""
    if fault := output_folder_fault(args.output_dir, args.instance_data_dir, args.dataset_name):
        raise NullSpaceError(fault)
    if not args.output_dir.is_dir():
        check_writable(args.output_dir)
    files = (LORA_NAME, WORD_NAME, REPORT_NAME, CARD_NAME, COMPARISON_NAME, CHECKPOINTS_NAME)
    if folder := next((path for path in map(args.output_dir.joinpath, files) if path.is_dir()), None):
        raise NullSpaceError(f"{folder} is a folder, where a file is to be written; rename it.")
    for path in for_web_uis(args):
        check_replaceable(path)


# ---- What is asked for -----------------------------------------------------------------------------------------------


def read_subject(accelerator, args):
    """The subject's pictures (`list[Image]`), captions of each (`list[list[str]]`), sizes, --instance_prompt as given.

    Sizes, (width, height) each, are those that `fit` chooses from for each picture. --instance_prompt is from then on
    what is trained, and --resolution that of the base model where it is not given.
    """
    if args.resolution is None:
        vae, unet = part_configs(args)
        args.resolution = own_resolution(unet, vae)
    sizes = training_sizes(args)
    with accelerator.main_process_first():
        pictures, captions = read_instances(
            args,
            args.background,
            keep=partial(fit, sizes=sizes, interpolation=args.image_interpolation_mode),
            tell=logger.info,
            need_captions=True,
        )
    for line in describe_sizes(pictures, sizes):
        logger.info(line)
    prompts = [repr(prompt) for prompt in distinct_captions(captions)]
    logger.info(f"{counted(len(prompts), 'prompt')}: {listed(prompts, 2)}")
    check_named(captions, args)
    given, args.instance_prompt = args.instance_prompt, trained_prompts(captions, args.instance_prompt)
    return pictures, captions, sizes, given


def training_sizes(args):
    """The sizes that pictures are trained at, (width, height) each: --resolution, or the buckets of its area.

    Raises:
        NullSpaceError: if the base model cannot be had, or --resolution is too small for buckets.
    """
    if not args.enable_bucket:
        return [(args.resolution, args.resolution)]
    multiple = common_multiple(*(config["block_out_channels"] for config in part_configs(args)))
    return bucket_sizes(args.resolution, multiple)


def part_configs(args):
    """The configurations of the base model's VAE and UNet, without their weights.

    Raises:
        NullSpaceError: if the base model cannot be had.
    """
    where = args.pretrained_model_name_or_path, args.revision, args.hub_token, args.single_file_config
    return [load_config(kind, part, *where) for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel))]


def find_out(accelerator, captions, pictures, initial, args):
    """Meet all that can go wrong before the work, and settle the flags that depend on model, bundle and checkpoint.

    Args:
        initial (`Initial` or `None`): from `read_initial`.

    Returns:
        The family, the checkpoint to go on from or None, the bundle, what it protects (both None where no bundle is
        named; nothing, where none is needed), and what is known of the run so far.

    Raises:
        NullSpaceError: if something is wrong.
    """
    checkpoint = find_checkpoint(args)
    with accelerator.main_process_first():
        loras = read_stack(args.base_lora, args.hub_token, args.placeholder_token)
    if args.tokenizer_name and any(lora.words for lora in loras):
        raise NullSpaceError(
            "--tokenizer_name would give the words of --base_lora other numbers than the model's own tokenizer does; "
            "leave it out."
        )
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = hub_repository(args.hub_model_id, args.output_dir, "model", args.hub_token)
    bundle, protected = read_protection(accelerator, args) if args.nullspace_name_or_path else (None, None)
    if bundle:
        check_bundle(bundle.config, args.nullspace_name_or_path, loras)
    family = settle_family(bundle, args)
    if args.word_only:
        protected = settle_word_only(family, args)
    config = bundle.config if bundle else None
    processes, precision = accelerator.num_processes, accelerator.mixed_precision
    described = describe_initial(initial), describe_stack(loras)
    run = describe_run(args, pictures, captions, config, processes, precision, *described)
    check_same_run(checkpoint, run)
    if args.push_to_hub and accelerator.is_main_process:
        create_repository(args.hub_model_id, "model", args.hub_private_repo, args.hub_token)
    with accelerator.main_process_first():  # all of it, so that nothing is left to download after the training
        args.base_model = download_model(
            args.pretrained_model_name_or_path,
            args.revision,
            args.variant,
            args.hub_token,
            args.single_file_config,
            args.pretrained_vae_model_name_or_path,
        )._replace(loras=loras)
    if sentence := unnamed_subjects(loras):
        logger.warning(sentence)
    settle_seed(accelerator, checkpoint, args)
    run["--seed"] = args.seed
    if args.scale_lr:  # what a checkpoint is compared with is the rate as given
        factor = args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
        for name in ("learning_rate", "text_encoder_lr", "word_learning_rate"):
            if getattr(args, name) is not None:
                setattr(args, name, getattr(args, name) * factor)
    return family, checkpoint, bundle, protected, run


def find_family(args):
    """The base model's family, by what it is and --model_type."""
    return recognise(
        args.pretrained_model_name_or_path, args.revision, args.hub_token, args.model_type, args.single_file_config
    )


def settle_family(bundle, args):
    """The base model's family; settles --model_type and its family's own flags.

    Raises:
        NullSpaceError: if a flag contradicts the model, or the bundle, where one is named, is of another family's.
    """
    family = find_family(args)
    family.settle(args)
    if bundle:
        bundle.check_model_type(family.name)
    args.model_type = family.name
    return family


def settle_word_only(family, args):
    """Set what `read_protection` would read from a bundle, and return what it would protect: nothing."""
    args.guidance_scale = family.collection["guidance_scale"]
    if args.compare_with_base is None:
        args.compare_with_base = True
    return {}


def settle_seed(accelerator, checkpoint, args):
    """Set --seed, where it is not given, to that of the checkpoint, or to one that all processes agree on."""
    if args.seed is None:
        saved = read_record(checkpoint)["seed"] if checkpoint else None
        args.seed = broadcast_object_list([random.randrange(2**31) if saved is None else saved])[0]
        accelerator.dataloader_config.data_seed = args.seed
    set_seed(args.seed)


# ---- The model -------------------------------------------------------------------------------------------------------


def load_models(family, captions, given_prompts, args):
    """Tokenizers and models of the base model, by their names in a pipeline, whole and in float32; its noise schedule.

    Raises:
        NullSpaceError: if a part is missing, or a flag does not fit the model.
    """
    with loading(args.pretrained_model_name_or_path):
        vae_config = AutoencoderKL.load_config(args.base_model.folder, subfolder="vae")
    if fault := resolution_fault(args.resolution, vae_config["block_out_channels"]):
        raise NullSpaceError(fault)
    tokenizers = load_sound_tokenizers(args)
    *_, tokenizer = tokenizers.values()
    if args.placeholder_token:  # in others than those that the bundle is of
        reading = load_sound_tokenizers(args)
        add_token(reading, args)
        check_window(reading, captions, args)
        *_, tokenizer = reading.values()
        captions = [spelled(several, tokenizer) for several in captions]
        given_prompts = given_prompts and spelled(given_prompts, tokenizer)
    for sentence in prompt_warnings(tokenizer, captions, given_prompts, args):
        logger.warning(sentence)
    with loading(args.pretrained_model_name_or_path):
        models = load_checked(family, args.base_model)
        noise_scheduler = family.load_noise_scheduler(args.base_model.folder)
    if sentence := resolution_warning(args.resolution, models["unet"].config, vae_config):
        logger.warning(sentence)
    for name in family.text_encoders:
        check_clip_skip(args.clip_skip, models[name].config.num_hidden_layers, family.unread_layers(name))
    return tokenizers, models, noise_scheduler


def load_sound_tokenizers(args):
    """What `load_tokenizers` gives.

    Raises:
        NullSpaceError: if one has no vocabulary.
    """
    tokenizers = load_tokenizers(args)
    for tokenizer in tokenizers.values():
        if fault := tokenizer_fault(tokenizer, args.tokenizer_name or args.pretrained_model_name_or_path):
            raise NullSpaceError(fault)
    return tokenizers


def find_protection(accelerator, family, parts, vae, args):
    """What `read_protection` gives of a bundle that nobody named: one that is found for a model, or built from it.

    A build casts the models to the precision of the training.

    Args:
        parts (`dict`): `unet`, text encoders, tokenizers and `noise_scheduler`, which a bundle is bound to.
        vae (`AutoencoderKL`): draws with them.

    Raises:
        NullSpaceError: if --lora_layers names none of the model's layers, or the bundle does not serve.
    """
    wanted = Wanted(family, {**parts, "vae": vae}, args)
    lora_targets(parts["unet"], {name: parts[name] for name in family.text_encoders}, wanted, None, args)
    is_new = find_or_build(wanted, accelerator, args)
    bundle, protected = read_protection(accelerator, args)
    if not is_new:  # built from these very models, which have been cast since
        bundle.check(**parts)
    return bundle, protected


def save_memory(unet, text_encoders, args):
    """Turn on what trades time for memory.

    Raises:
        NullSpaceError: if xformers cannot be used here.
    """
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:  # no GPU, or an xformers built for another torch
            raise NullSpaceError(
                f"--enable_xformers_memory_efficient_attention fails here ({reason(error)})."
            ) from error
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for text_encoder in filter(is_trained, text_encoders):
            # The reentrant kind would need gradients of the text encoder's inputs, which are none.
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})


# ---- The start -------------------------------------------------------------------------------------------------------


def start_or_resume(accelerator, checkpoint, adapted, word, parameters, count, args):
    """Start the trackers and, from a checkpoint, go on: the number of steps already made.

    Args:
        checkpoint (`Path` or `None`): what to go on from.
        adapted (`dict`): the models that have a LoRA, by name; it is all that checkpoints hold of the models,
        word (`NewWord` or `None`): and this.
        parameters (`list[Tensor]`): all that is trained.
        count (`int`): of pictures, which is told.

    Raises:
        NullSpaceError: if the disk has no room for what the run will write, the checkpoint does not fit, or there will
            be none to compare.
    """
    keep_checkpoints_small(accelerator, adapted, word)
    start_trackers(accelerator, args)
    step = read_record(checkpoint)["step"] if checkpoint else 0
    if args.compare_checkpoints and not step and args.checkpointing_steps >= args.max_train_steps:
        raise NullSpaceError(
            f"--compare_checkpoints has nothing to compare: --checkpointing_steps {args.checkpointing_steps} writes no "
            f"checkpoint before the last step, {args.max_train_steps}; choose fewer."
        )
    space = needed_space(parameters, step, args)
    check_space(args.output_dir, space, "what this run will write")
    if not checkpoint and (left := [path.name for path in checkpoints(args.output_dir)]):
        logger.warning(
            f"{args.output_dir} holds {listed(left, 3)} of an earlier run; each stays until this run writes one of its "
            "number."
        )
    if not checkpoint and (left := [name for name in (LORA_NAME, WORD_NAME) if (args.output_dir / name).exists()]):
        logger.warning(
            f"{args.output_dir} holds {' and '.join(left)} of an earlier run, which this one replaces at its end; name "
            "another --output_dir to keep them."
        )
    if checkpoint:
        try:
            accelerator.load_state(checkpoint)
        except (NullSpaceError, torch.OutOfMemoryError):  # the latter is a RuntimeError, too
            raise
        except (RuntimeError, ValueError, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise NullSpaceError(
                f"{checkpoint} cannot be gone on from ({reason(error)}); name another, or start anew, without "
                "--resume_from_checkpoint."
            ) from error
        logger.info(f"Resuming from {checkpoint} at step {step}")
    if step >= args.max_train_steps:
        logger.info("Nothing is left to train: what is drawn and written at the end is so again.")
    logger.info(
        f"Training on {counted(count, 'picture')} for {counted(args.max_train_steps, 'step')}, "
        f"{counted(args.num_train_epochs, 'epoch')}, "
        f"batch {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} accumulated: {sum(each.numel() for each in parameters):,} trained "
        f"parameters; up to {in_bytes(space)} are written"
    )
    return step
