"""What a training protects: the bundle, the user's own prompts besides, and what is closed in each layer."""

from accelerate.logging import get_logger
from accelerate.utils import reduce
from tqdm.auto import tqdm

from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.moments import SecondMoments
from nullspace.names import JOINT, TEXT_ENCODER, TEXT_ENCODERS
from nullspace.samplers import make_scheduler
from nullspace.timesteps import split_groups
from nullspace.validation import load_pipeline
from nullspace.word import check_not_protected


logger = get_logger(__name__)

PICTURES_PER_PROMPT = 8


def load_protection(args):
    """The bundle, and what `protect` makes of it.

    Raises:
        NullSpaceError: if it cannot be had, or does not protect what is to be trained.
    """
    bundle = Bundle.load(
        args.nullspace_name_or_path,
        args.nullspace_timestep_range,
        revision=args.nullspace_revision,
        token=args.hub_token,
        text_encoder=args.train_text_encoder,
    )
    bundle.check_clip_skip(args.clip_skip)
    if args.placeholder_token:
        check_not_protected(bundle.config["prompts"]["examples"], args.placeholder_token)
    if args.train_text_encoder and TEXT_ENCODER not in bundle.spectra and not args.allow_unprotected:
        raise NullSpaceError(
            "--train_text_encoder moves every prompt, and this bundle does not protect the text encoder; build one "
            "with build_nullspace.py --with_text_encoder, or pass --allow_unprotected."
        )
    return bundle, protect(bundle, args)


def read_protection(accelerator, args):
    """What `load_protection` gives; settles what depends on it: --compare_with_base, and the guidance scale.

    Raises:
        NullSpaceError: if the bundle cannot be had, or does not protect what is to be trained.
    """
    with accelerator.main_process_first():
        bundle, protected = load_protection(args)
    if args.compare_with_base is None:
        args.compare_with_base = closes_any(protected)
    args.guidance_scale = bundle.config["guidance_scale"]
    return bundle, protected


def protect(bundle, args):
    """What a bundle protects at all of its timesteps, as the flags have it: `dict[str, Protected]` by module name."""
    return bundle.protected(args.nullspace_criterion, args.nullspace_threshold, args.nullspace_softness)


def closes_any(protected):
    """Whether any direction of any layer is closed in what `protect` gave."""
    return any(item.rank for item in protected.values())


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
        groups = [bundle.joint]
    moments = moments_of(
        args.nullspace_extra_prompts, bundle, groups, pipeline, args.train_batch_size, "Protecting extra prompts",
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    # Every process drew the same; their sum is the same in all of them, to the last bit.
    moments.reduce(lambda tensor: reduce(tensor, "sum"))
    return bundle.emphasize(moments, groups)


def moments_of(prompts, bundle, groups, pipeline, batch_size, title, disable=False):
    """`SecondMoments` of what a model reads on prompts, several pictures of each, drawn as the bundle's own were.

    Args:
        groups (`list[dict]`): of timesteps, of the bundle's configuration.
        pipeline (`DiffusionPipeline`): with the bundle's sampler.
        title (`str`): of the progress bar, which `disable` keeps away.
    """
    config, family, read = bundle.config, get_family(bundle.config["model_type"]), bundle.group(JOINT)
    group_of = {timestep: group["name"] for group in groups for timestep in group["timesteps"]}
    inputs = {name: info["input"] for name, info in bundle.modules.items() if info["input"] in read}
    text_encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    moments = SecondMoments(pipeline.unet, inputs, group_of, **text_encoders)
    drawn = [prompt for prompt in prompts for _ in range(PICTURES_PER_PROMPT)]
    with moments.collect():
        for start in tqdm(range(0, len(drawn), batch_size), desc=title, unit="batch", disable=disable):
            batch = drawn[start : start + batch_size]
            moments.start_batch()
            family.sample(
                pipeline, batch, [config["seed"] + start + index for index in range(len(batch))],
                config["num_inference_steps"], config["guidance_scale"], config["resolution"],
                clip_skip=bundle.clip_skip,
            )  # fmt: skip
    return moments


def describe_setting(args):
    """The null-space flags in short."""
    setting = f"{args.nullspace_criterion} {args.nullspace_threshold:g}, softness {args.nullspace_softness:g}"
    return setting if args.max_drift is None else f"{setting}, drift at most {args.max_drift:g}"


def log_protection(bundle, protected, args):
    """Say what this run protects, or that it protects nothing."""
    if args.word_only:
        logger.info(f"No LoRA is trained: prompts without {args.placeholder_token} stay as they are.")
    elif closes_any(protected):
        for line in describe_protection(bundle, protected, args):
            logger.info(line)
        if not args.placeholder_token:
            logger.info(
                "The subject's class is not protected; with a --placeholder_token of its own it stays as it was."
            )
    else:
        logger.warning("Nothing is protected: this trains a plain DreamBooth LoRA.")


def describe_protection(bundle, protected, args):
    """The lines that say what this run protects, by what `protect` gave."""
    prompts = bundle.config["prompts"]
    extra = f" and {len(args.nullspace_extra_prompts)} of your own" if args.nullspace_extra_prompts else ""
    yield (
        f"Protecting {prompts['count']:,} prompts of {prompts['source']}{extra} at "
        f"{len(bundle.joint['timesteps'])} timesteps ({describe_setting(args)}):"
    )
    ranks_of = {}
    for name, item in protected.items():
        where = "text encoder layers" if name.partition(".")[0] in TEXT_ENCODERS else "layers"
        others = "free" if item.gains is None else "held back by their energy"
        ranks_of.setdefault((len(item.basis), where, others), []).append(item.rank)
    for (size, where, others), ranks in sorted(ranks_of.items()):
        kept = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        yield f"  {len(ranks)} {where} of input size {size}: {kept} directions closed, the others {others}"
