"""Building a bundle: the base model draws the prompts, and what its layers read is summed on the way."""

import json
import math
import platform
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path

import accelerate
import diffusers
import peft
import torch
import transformers
from accelerate.utils import reduce
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from nullspace import signals
from nullspace.checks import check_clip_skip, drawing_fault, own_resolution, resolution_fault
from nullspace.errors import NullSpaceError, StaleError, reason
from nullspace.families import get_family
from nullspace.fingerprints import fingerprints, weights_sha256
from nullspace.launch import without_token
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs
from nullspace.models import loading
from nullspace.moments import SecondMoments
from nullspace.names import JOINT, TEXT_ENCODERS, TEXT_INPUT, tokenizer_of
from nullspace.prompts import length_warnings, tokenizer_fault
from nullspace.samplers import make_scheduler
from nullspace.stack import load_checked
from nullspace.system import check_space, make_inside, replacing
from nullspace.timesteps import timestep_groups


STAGES = 4
SMALL_FILES = 2**20  # bytes of a bundle's card, picture and tables, more or less
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision


def checkpoint_folder(output_dir):
    """Where the state of a build is kept: beside the bundle."""
    output_dir = Path(output_dir).resolve()
    return output_dir.with_name(f"{output_dir.name}.checkpoint")


class Checkpoint:
    """What this process has summed so far, in a folder beside the bundle.

    Sums, counts and the number of batches are in one file, which is renamed into place, so that they always agree.

    Args:
        output_dir (`Path`): the bundle's folder.
        settings (`dict`): all that determines the result; a checkpoint of others is refused.
        state (`PartialState`): names the process.
    """

    def __init__(self, output_dir, settings, state):
        self.folder = checkpoint_folder(output_dir)
        self.path = self.folder / f"process-{state.process_index}.safetensors"
        self.settings = json.loads(json.dumps(settings))
        self.device = state.device

    def save(self, moments, batches):
        """Record what `moments` hold after so many batches."""
        make_inside(self.folder)
        metadata = {
            "batches": str(batches),
            "settings": json.dumps(self.settings),
            # A list, for the order in which the inputs were first seen is that of the bundle's files
            "tokens": json.dumps([[*key, count] for key, count in moments.tokens.items()]),
        }
        tensors = {f"{group} {source}": total for (group, source), total in moments.sums.items()}
        with replacing(self.path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
            save_file(tensors, partial, metadata=metadata)

    def load(self, moments):
        """Put what was recorded, if anything, into `moments`, and return the number of batches that it holds.

        Raises:
            StaleError: if it was recorded with other settings, or cannot be read.
        """
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:  # on the CPU: not every name of a device is one that it takes
                metadata = file.metadata()
                settings = json.loads(metadata["settings"])
                differing = [key for key in self.settings if settings.get(key) != self.settings[key]]
                if differing:
                    raise StaleError(
                        f"{self.folder} is the checkpoint of another build ({', '.join(differing)}); run that "
                        "command again, or delete the folder to start anew.",
                        self.folder,
                    )
                for group, source, tokens in json.loads(metadata["tokens"]):
                    # Copied, for products in memory that is aligned otherwise may differ in the last bit
                    moments.sums[group, source] = file.get_tensor(f"{group} {source}").to(self.device, copy=True)
                    moments.tokens[group, source] = tokens
        except (OSError, SafetensorError) as error:
            raise StaleError(f"{self.path} cannot be read ({error}); delete it to start anew.", self.folder) from error
        return int(metadata["batches"])

    def remove(self):
        """Remove it, with those of the other processes."""
        shutil.rmtree(self.folder, ignore_errors=True)


def collect_moments(pipeline, prompts, groups, checkpoint, args, state):
    """Draw this process's share of the prompts and return the `SecondMoments` over all processes.

    Args:
        pipeline (`DiffusionPipeline`): of the base model, with the sampler; it is moved to the device and cast to
            --mixed_precision, once the checkpoint is known to be this build's.
        prompts (`Prompts`): all of them; prompt i is drawn from --seed + i.
        groups (`list[dict]`): of timesteps, from `timestep_groups`.
        checkpoint (`Checkpoint`): from which it goes on, and which it writes.
        state (`PartialState`): says which share is this process's.

    Raises:
        StaleError: if the checkpoint is of another build; the models are then as they were.
        NullSpaceError: if it cannot be written.
        Stopped: at a signal, once the checkpoint is written.
    """
    group_of = {timestep: group["name"] for group in groups for timestep in group["timesteps"]}
    inputs = attention_inputs(pipeline.unet, args.attention)
    family = get_family(args.model_type)
    text_encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    if args.with_text_encoder:
        for name, text_encoder in text_encoders.items():
            inputs |= text_encoder_inputs(text_encoder, name)
    moments = SecondMoments(pipeline.unet, inputs, group_of, **text_encoders)
    done = checkpoint.load(moments)
    pipeline.to(state.device, PRECISIONS[args.mixed_precision])
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
    last = math.ceil(len(share) / args.batch_size)
    with moments.collect(), signals.waiting():
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
            signal_number = signals.asked()
            if number % args.checkpointing_steps == 0 or number == last or signal_number:
                checkpoint.save(moments, number)
            if signal_number:
                progress.close()  # which would write over the sentence that follows
                raise signals.Stopped(signal_number, f"{number} of {last} batches are in {checkpoint.folder}.")
    progress.close()
    if state.num_processes == 1:  # one that builds alone must not wait for others, which wait for it
        return moments
    try:
        moments.reduce(lambda tensor: reduce(tensor, "sum"))
    except RuntimeError as error:
        if signals.asked():  # another process has stopped in the middle of its share, and cannot be waited for
            raise signals.Stopped(signals.asked(), f"All {last} batches are in {checkpoint.folder}.") from error
        raise
    return moments


def describe(pipeline, prompts, model, args):
    """The bundle's configuration: all that one needs to know to use it or to build it again."""
    unet = pipeline.unet
    text_encoders = {name: getattr(pipeline, name) for name in get_family(args.model_type).text_encoders}
    tokenizers = {name: getattr(pipeline, name) for name in map(tokenizer_of, text_encoders)}
    inputs = attention_inputs(unet, args.attention)

    def describe_modules(inputs):
        layers = {name: find_module(name, unet, **text_encoders) for name in inputs}
        return {
            name: {"input": inputs[name], "in_features": layer.in_features, "out_features": layer.out_features}
            for name, layer in layers.items()
        }

    covered = {"modules": describe_modules(inputs)}
    if args.with_text_encoder:
        for name, text_encoder in text_encoders.items():
            covered[name] = {"modules": describe_modules(text_encoder_inputs(text_encoder, name))}
    source = args.prompts_file.name if args.prompts_file else args.prompts_dataset_name
    source = " + ".join([source, *(lora.record()["id"] for lora in model.loras)])  # whose prompts are among them
    words = without_token(sys.argv[1:])
    if model.file:  # where it lies is nobody else's business
        words = [word.replace(str(model.file), model.name) for word in words]
    return {
        "base_model": {
            **model.record(),
            "fingerprint": fingerprints(unet=unet, **text_encoders, **tokenizers, noise_scheduler=pipeline.scheduler),
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
        "command": shlex.join(["accelerate", "launch", Path(sys.argv[0]).name, *words]),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, diffusers, transformers, accelerate, peft)},
        },
    }


def settle_sampling(family, args):
    """Set --model_type, and those of the builder's flags that were not given, to what is the family's own.

    Raises:
        NullSpaceError: if the family is not drawn with --sampler.
    """
    if family.samplers and args.sampler not in (None, *family.samplers):
        title = family.title[0].upper() + family.title[1:]
        raise NullSpaceError(
            f"{title} is drawn with --sampler {' or '.join(family.samplers)} only, not {args.sampler}."
        )
    args.model_type = family.name
    for name, value in family.collection.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def load_collected(family, model, prompts, tell, args):
    """The pipeline of a `BaseModel`, whole and in float32; `tell` is called with warnings.

    Raises:
        NullSpaceError: if a part is missing, or a flag does not fit the model.
    """
    with loading(model.name):
        vae_config = AutoencoderKL.load_config(model.folder, subfolder="vae")
    if args.resolution and (fault := resolution_fault(args.resolution, vae_config["block_out_channels"])):
        raise NullSpaceError(fault)
    with loading(model.name):
        tokenizers = family.load_tokenizers(model)
    for tokenizer in tokenizers.values():
        if fault := tokenizer_fault(tokenizer, model.name):
            raise NullSpaceError(fault)
    for sentence in length_warnings(tokenizer, prompts, "the prompts"):
        tell(sentence)
    with loading(model.name):
        pipeline = family.load_pipeline(model, **tokenizers, **load_checked(family, model))
    if args.resolution and (fault := drawing_fault(args.resolution, pipeline.unet.config.sample_size)):
        raise NullSpaceError(f"--resolution is {fault}; choose a smaller one.")
    for name in family.text_encoders:
        layers = getattr(pipeline, name).config.num_hidden_layers
        check_clip_skip(args.clip_skip, layers, family.unread_layers(name))
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def needed_space(config, groups, processes):
    """Bytes that a build writes at most: each process's checkpoint twice, as it is replaced, and the bundle."""
    layers = [info for name in TEXT_ENCODERS for info in config.get(name, {}).get("modules", {}).values()]
    timeless = {info["input"]: info["in_features"] for info in layers}
    timed = {info["input"]: info["in_features"] for info in config["modules"].values()}
    timeless |= {name: timed.pop(name) for name in list(timed) if name == TEXT_INPUT}

    def size(groups):
        return 4 * sum(
            count * width**2 for inputs, count in ((timed, groups), (timeless, 1)) for width in inputs.values()
        )

    return 2 * processes * size(groups) + size(groups + 1) + SMALL_FILES


def collect(pipeline, prompts, model, args, state):
    """Draw the prompts and sum what the layers read.

    Args:
        model (`BaseModel`): that the pipeline is of.

    Returns:
        The `SecondMoments` over all processes, their groups, the bundle's configuration, and the `Checkpoint`.

    Raises:
        NullSpaceError: if the sampler has fewer steps than asked for.
        StaleError: if there is another build's checkpoint; the models are then as they were.
    """
    pipeline.scheduler = make_scheduler(args.sampler, pipeline.scheduler.config)
    args.resolution = args.resolution or own_resolution(pipeline.unet.config, pipeline.vae.config)
    config = describe(pipeline, prompts, model, args)
    names = get_family(args.model_type).text_encoders
    weights = {name: weights_sha256(getattr(pipeline, name)) for name in ("unet", *names)}
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
    needed = needed_space(config, len(groups), state.num_processes)
    check_space(args.output_dir, needed, "the bundle and the checkpoint of its build")
    checkpoint = Checkpoint(args.output_dir, settings, state)
    return collect_moments(pipeline, prompts, groups, checkpoint, args, state), groups, config, checkpoint
