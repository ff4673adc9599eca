"""Pictures that show what a LoRA does, beside the base model's."""

from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory
from diffusers.utils import set_adapter_layers
from tqdm.auto import tqdm

from nullspace import signals
from nullspace.checkpoint import checkpoints_of_run
from nullspace.divergence import Drawn, run_in_float32
from nullspace.embeddings import load_words, words_beside
from nullspace.families import get_family
from nullspace.logs import log_picture
from nullspace.names import CHECKPOINTS_NAME, LORA_NAME
from nullspace.pictures import comparison_grid, save_picture
from nullspace.prompt_encoder import load_tokenizers


logger = get_logger(__name__)


def load_pipeline(args, dtype, device, **components):
    """The base model's pipeline with the sampler that its family is validated with.

    Components that are given, which may be in training, are left as they are.
    """
    if args.tokenizer_name:
        components = load_tokenizers(args) | components
    family = get_family(args.model_type)
    pipeline = family.load_pipeline(args.base_model, **components)
    pipeline.scheduler = family.sampler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in components:
            component.to(device, dtype)
    if "vae" not in components and args.vae_in_float32:
        pipeline.vae = family.load_vae(args.base_model)
        run_in_float32(pipeline.vae.to(device))
    return pipeline


def draw(pipeline, prompts, args, description, count=None):
    """So many pictures of each prompt, or --num_validation_images, each from a seed of its own: a list of rows.

    They are drawn in the family's number of steps, at the guidance scale that the bundle was built at.
    """
    family = get_family(args.model_type)
    rows, drawn = [], Drawn()
    for index in tqdm(range(count or args.num_validation_images), desc=description, unit="row"):
        seed = args.seed + index
        with drawn.decoding(pipeline.vae):
            rows.append(
                [
                    pipeline(
                        **family.prompt_arguments(pipeline, prompt, args.clip_skip),
                        height=args.resolution, width=args.resolution, num_inference_steps=family.num_inference_steps,
                        guidance_scale=args.guidance_scale, generator=torch.Generator().manual_seed(seed),
                        callback_on_step_end=drawn,
                    ).images[0]
                    for prompt in prompts
                ]
            )  # fmt: skip
        drawn.check(description, args)
    return rows


def validate(accelerator, scalars, adapted, kept, dtype, step, args):
    """Draw the validation prompts, save the picture and send it to the trackers; a signal cuts that short.

    Where memory does not suffice for it the training goes on without.

    Args:
        scalars (`ScalarLog`): flushed first, so that nothing is drawn by a training that has diverged.
        adapted (`dict`): the models in training, by name, with a LoRA or without.
        kept (`dict`): other components of the pipeline, which need not be loaded again.
        dtype (`torch.dtype`): that the models run in.
    """
    if accelerator.is_main_process and not signals.asked():
        scalars.flush()
        with signals.cut_short(), while_memory_suffices(f"drawing at step {step}; the training goes on."):
            picture = draw_in_training(accelerator, adapted, kept, dtype, step, args)
            save_picture(picture, args.output_dir / "validation" / f"{step:06d}.png")
            log_picture(accelerator, "validation", picture, step)
        free_memory()  # only now has nothing a hold on what was drawn with


@contextmanager
def while_memory_suffices(what):
    """Leave the block when memory runs out, and warn that it does not suffice for `what`, the rest of a sentence."""
    try:
        yield
    except RuntimeError as error:  # as which some devices and libraries say so
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        logger.warning(f"Memory does not suffice for {what}")


def draw_in_training(accelerator, adapted, kept, dtype, step, args):
    """Draw the validation prompts with the models in training, and without their LoRA: one picture."""
    components, rows = {**kept, **adapted}, {}
    pipeline = base = load_pipeline(args, dtype, accelerator.device, **components)
    if args.placeholder_token and args.compare_with_base:  # the base model does not know the token
        components |= {"vae": pipeline.vae, **load_tokenizers(args)}
        base = load_pipeline(args, dtype, accelerator.device, **components)

    def enable_lora(enabled):
        for model in adapted.values():
            set_adapter_layers(model, enabled)

    for model in adapted.values():
        model.eval()
    try:
        with accelerator.autocast():
            if args.compare_with_base:
                enable_lora(False)
                rows["base"] = draw(base, args.validation_prompt, args, "Validating, base")
                enable_lora(True)
            rows["tuned"] = draw(pipeline, args.validation_prompt, args, "Validating")
    finally:
        enable_lora(True)
        for model in adapted.values():
            model.train()
    return comparison_grid(rows, args.validation_prompt, args.seed, step)


def draw_saved(folder, prompts, device, dtype, args):
    """Draw prompts with the base model, and with LoRA and word in a folder: `dict[str, list[list[Image]]]`."""
    pipeline = load_pipeline(args, dtype, device)
    rows = {"base": draw(pipeline, prompts, args, "Drawing with the base model")} if args.compare_with_base else {}
    load_trained(pipeline, folder)
    return rows | {"tuned": draw(pipeline, prompts, args, "Drawing with the LoRA")}


def load_trained(pipeline, folder):
    """Load what a folder has, LoRA or word or both, into a pipeline."""
    if (folder / LORA_NAME).is_file():
        pipeline.load_lora_weights(folder)
    load_words(pipeline, words_beside(folder))


def draw_checkpoints(run, step, prompts, device, dtype, args):
    """Draw each prompt once with the LoRA of every checkpoint of a run from before its last step.

    Returns:
        `dict[str, list[Image]]`: by the checkpoint's name; empty without --compare_checkpoints, or where none is kept.
    """
    folders = checkpoints_of_run(args.output_dir, run, step) if args.compare_checkpoints else []
    if not folders:
        if args.compare_checkpoints:
            logger.warning(f"No checkpoint from before step {step} is kept, so there is no {CHECKPOINTS_NAME}.")
        return {}
    pipeline, drawn = None, {}
    for folder in folders:
        if pipeline is None or args.placeholder_token:  # of which a pipeline takes one only
            pipeline = None
            free_memory()
            pipeline = load_pipeline(args, dtype, device)
        load_trained(pipeline, folder)
        (drawn[folder.name],) = draw(pipeline, prompts, args, f"Drawing with {folder.name}", 1)
        pipeline.unload_lora_weights()
    return drawn
