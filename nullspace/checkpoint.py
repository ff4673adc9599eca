"""Checkpoints of a training: what they record, which of them are whole, and which of them a run may go on from.

`training.json` is written last. It holds the step, the seed, all that the result depends on (`run`), the sha256 of the
checkpoint's other files (`files`) and its own (`sha256`), so that one that was cut short or altered is noticed.
"""

import hashlib
import json
import math
import re
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from nullspace.adapters import restore_lora, save_lora
from nullspace.captions import distinct_captions
from nullspace.errors import NullSpaceError, UnsoundError, listed
from nullspace.fingerprints import weights_sha256
from nullspace.flags import BY_CONTENT, COMPARED, READ_BY
from nullspace.hashes import config_sha256, sha256
from nullspace.names import CARD_NAME
from nullspace.signals import Stopped
from nullspace.system import put, replacing


logger = get_logger(__name__)

RECORD_NAME = "training.json"

# ---- What the result depends on --------------------------------------------------------------------------------------


def _flag(name):
    return f"--{name}"


def _named(what):
    """A content by what it is and the flags that choose it, the first two of them."""
    return f"{what} ({', '.join(map(_flag, BY_CONTENT[what][:2]))})"


def _hash(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def describe_run(args, pictures, captions, config, processes, precision, initial=None, stack=None):
    """All that the result depends on and that is known before a model is loaded: `dict`, by what a user calls it.

    The seed and the number of steps are left out where they are not given, and come later.

    Args:
        args: the trainer's flags.
        pictures (`list[Image]`): of the subject.
        captions (`list[list[str]]`): of each picture.
        config (`dict` or `None`): the bundle's, where it is known by then; `describe_bundle` adds it later.
        processes (`int`): their number.
        precision (`str`): "no", "fp16" or "bf16", whether it came from the flag or from accelerate's configuration.
        initial (`str` or `None`): what `describe_initial` says of --init_lora.
        stack (`str` or `None`): what `describe_stack` says of --base_lora.
    """
    late = [name for name in ("seed", "max_train_steps") if getattr(args, name) is None]
    run = {_flag(name): getattr(args, name) for name in COMPARED if name not in late}
    run[_flag("mixed_precision")] = precision
    run["the number of processes"] = processes
    if config is not None:
        run |= describe_bundle(config)
    run[_named("the LoRA gone on from")] = initial
    run[_named("the LoRAs stood on")] = stack
    digests = [_hash(picture.mode, picture.size, picture.tobytes()) for picture in pictures]  # decoded
    run[_named("the pictures")] = f"{len(pictures)} of them, sha256 {_hash(digests)}"
    distinct = distinct_captions(captions)
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    run[_named("the captions")] = f"{', '.join(map(repr, distinct[:3]))}{more}, sha256 {_hash(captions)}"
    return json.loads(json.dumps(run))  # as it is read back


def describe_bundle(config):
    """The same of the bundle, by its configuration."""
    # Without the card, which publishing a bundle writes anew
    files = {name: digest for name, digest in config["files"].items() if name != CARD_NAME}
    return {_named("the bundle"): f"sha256 {config_sha256({**config, 'files': files})}"}


def describe_models(models, noise_scheduler, tokenizers, prompts):
    """The same of the base model, once it is loaded and before its precision is changed.

    All weights count, the scheduler's noise levels and what it predicts, and what the tokenizers make of the prompts
    (`list[str]`). `models` and `tokenizers` (`dict`) are by their names in the pipeline.
    """
    described = {f"{_named('the model')}, {name}": f"sha256 {weights_sha256(model)}" for name, model in models.items()}
    levels = noise_scheduler.alphas_cumprod.double().tolist()
    prediction = noise_scheduler.config.prediction_type
    described[f"{_named('the model')}, scheduler"] = f"{prediction}, sha256 {_hash(levels)}"
    tokens = [part for each in tokenizers.values() for part in (each(prompts).input_ids, each.model_max_length)]
    described[_named("the tokenizer")] = f"sha256 {_hash(*tokens)}"
    return described


def dependent(run):
    """Those keys of a run whose values its result depends on: without the flags that its schedule does not read."""
    schedule = run[_flag("lr_scheduler")]
    ignored = {_flag(name) for name, reads in READ_BY.items() if not reads(schedule)}
    return [key for key in run if key not in ignored]


def check_same_run(folder, asked):
    """Raise `NullSpaceError`, with all differences, unless a checkpoint is one of the run that is asked for.

    Args:
        folder (`Path` or `None`): a whole checkpoint, or none to compare with.
        asked (`dict`): what is known of the run so far.
    """
    if folder is None:
        return
    record = read_record(folder)
    recorded, steps = record.get("run"), asked.get(_flag("max_train_steps"), math.inf)
    if recorded is None:
        raise NullSpaceError(
            f"{folder} is from an earlier version and does not record what its run depends on; start anew, without "
            "--resume_from_checkpoint."
        )
    differing = _differing(folder, asked)
    if differing:
        was = "; ".join(
            f"{key}: {_show(recorded.get(key))} in the checkpoint, {_show(asked[key])} asked for" for key in differing
        )
        fitting = checkpoints_of_run(folder.parent, asked)
        instead = f"name {fitting[-1].name}, which is of this run" if fitting else "give what it had, or start anew"
        raise NullSpaceError(f"{folder} is a checkpoint of another run: {was}; {instead}.")
    if record["step"] > steps:
        raise NullSpaceError(
            f"{folder} is beyond --max_train_steps {steps}; raise that, or resume from an earlier checkpoint."
        )


def checkpoints_of_run(folder, run, before=math.inf):
    """The whole checkpoints in a folder that are of a run and from before a step, oldest first."""
    earlier = [path for path in checkpoints(folder) if step_of(path) < before]
    return [path for path in earlier if not damage(path) and not _differing(path, run)]


def _differing(folder, asked):
    """Keys of what is asked for that a checkpoint has recorded otherwise."""
    recorded = read_record(folder).get("run") or {}
    return [key for key in dependent(asked) if recorded.get(key) != asked[key]]


def _show(value):
    """A value as a user would read it: hashes in short."""
    return "not given" if value is None else re.sub(r"(?<=sha256 )(\w{12})\w+", r"\1...", str(value))


# ---- Folders ---------------------------------------------------------------------------------------------------------


def checkpoints(folder):
    """Checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint):
    """The step (`int`) after which a checkpoint (`Path`) was written, by its name."""
    return int(checkpoint.name.split("-")[1])


def read_record(folder):
    """What `training.json` of a checkpoint says."""
    return json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))


def seal(folder, step, seed, run):
    """Write `training.json`, last: what it holds of the other files tells whether the checkpoint is whole."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    record = {"step": step, "seed": seed, "run": run, "files": {name: sha256(folder / name) for name in names}}
    record["sha256"] = config_sha256(record)
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def damage(folder):
    """What is wrong with a checkpoint, as the end of a sentence about it, or None where it is whole."""
    try:
        record = read_record(folder)
        if "files" in record and record["sha256"] != config_sha256(record):
            return f"whose {RECORD_NAME} is altered"
        for name, digest in record.get("files", {}).items():
            if not (folder / name).is_file():
                return f"which lacks {name}"
            if sha256(folder / name) != digest:
                return f"whose {name} is truncated or altered"
        dict(record.get("run") or {})
        if int(record["step"]) < 0:
            return f"whose {RECORD_NAME} is no record of a checkpoint"
    except FileNotFoundError:
        return f"which lacks {RECORD_NAME}"
    except OSError as error:
        return f"which cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"whose {RECORD_NAME} is no record of a checkpoint"
    return None


def save_checkpoint(accelerator, step, args, run):
    """Write `checkpoint-<step>`, whole or not at all, drop those beyond --checkpoints_total_limit; return its path."""
    final = args.output_dir / f"checkpoint-{step}"
    with replacing(final) if accelerator.is_main_process else nullcontext() as partial:
        write_state(accelerator, partial, step, args, run)
    if accelerator.is_main_process and args.checkpoints_total_limit:
        # What an earlier run left beyond this step goes first, for this one does not continue it
        found = sorted(checkpoints(args.output_dir), key=lambda path: step_of(path) <= step)
        for path in found[: -args.checkpoints_total_limit]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {final.name}")
    return final


def write_state(accelerator, folder, step, args, run):
    """Write the files of a checkpoint into a folder, of which the main process alone knows the name."""
    folder = broadcast_object_list([folder])[0]
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seal(folder, step, args.seed, run)


def how_to_go_on(folder, step):
    """A sentence on the checkpoint of a step, and what --resume_from_checkpoint says to go on from there."""
    name = f"checkpoint-{step}"
    # An earlier run may have left later ones
    return f"{folder / name} is written.", "latest" if checkpoints(folder)[-1].name == name else name


@contextmanager
def going_on_from(staged, output_dir, step):
    """Have a run that a signal ends within the block go on from its last step.

    Args:
        staged (`Path` or `None`): a folder with `checkpoint` in it, unless `checkpoint-<step>` is there already; None
            in all but the main process.
    """
    try:
        yield
    except Stopped as stopped:
        _put_checkpoint(staged, output_dir, step)
        raise Stopped(stopped.number, *how_to_go_on(output_dir, step)) from None


@contextmanager
def keeping_what_was_learned(staged, output_dir, step):
    """As `going_on_from`, in the main process, where something fails within the block; not if the result is unsound."""
    try:
        yield
    except UnsoundError:
        raise
    except Exception:
        _put_checkpoint(staged, output_dir, step)
        written, name = how_to_go_on(output_dir, step)
        logger.warning(f"{written} Once this is mended, go on from there with --resume_from_checkpoint {name}.")
        raise


def _put_checkpoint(staged, output_dir, step):
    if staged is not None and (staged / "checkpoint").is_dir():
        put(staged / "checkpoint", output_dir / f"checkpoint-{step}")


def find_checkpoint(args):
    """The checkpoint to resume from, or None; of the latest ones, those that are damaged are named and passed over.

    Raises:
        NullSpaceError: if a named one does not exist or is damaged, or all that there are are.
    """
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(args.output_dir)
        for path in reversed(found):
            wrong = damage(path)
            if wrong is None:
                return path
            logger.warning(f"Passing over {path}, {wrong}.")
        if found:
            names = ", ".join(path.name for path in found)
            raise NullSpaceError(
                f"--resume_from_checkpoint latest finds no whole checkpoint in {args.output_dir}: {names} are damaged; "
                "start anew, without it."
            )
        logger.warning(f"There is no checkpoint in {args.output_dir}: this run starts anew.")
    elif args.resume_from_checkpoint:
        for path in (Path(args.resume_from_checkpoint), args.output_dir / args.resume_from_checkpoint):
            if (path / RECORD_NAME).is_file():
                wrong = damage(path)
                if wrong is None:
                    return path
                raise NullSpaceError(
                    f"--resume_from_checkpoint names {path}, {wrong}; name an earlier one, or latest, which passes "
                    "over damaged ones."
                )
        there = listed(path.name for path in checkpoints(args.output_dir)) or "none"
        raise NullSpaceError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a checkpoint; of those in "
            f"{args.output_dir} name one ({there})."
        )
    return None


def keep_checkpoints_small(accelerator, adapted, word):
    """Have checkpoints hold LoRA and word in the published format; it is all there is to save of the models."""

    def save_model_hook(models, weights, folder):
        if accelerator.is_main_process and adapted:
            save_lora(Path(folder), **adapted)
        if accelerator.is_main_process and word:
            word.save(folder)
        weights.clear()

    def load_model_hook(models, folder):
        if adapted:
            restore_lora(folder, **adapted)
        if word:
            word.restore(Path(folder))
        models.clear()

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
