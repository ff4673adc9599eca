"""What lies beside a trained LoRA, and what of it is published."""

import glob
import shlex

from accelerate.logging import get_logger

from nullspace.dataset_card import model_name
from nullspace.hub import push_folder
from nullspace.kohya import is_ours, save_kohya
from nullspace.logs import log_picture
from nullspace.lora import load_lora
from nullspace.model_card import write_model_card
from nullspace.names import CARD_NAME, COMPARISON_NAME, LORA_NAME, REPORT_NAME, UNPROTECTED_NAME, kohya_path
from nullspace.pictures import comparison_grid, save_picture
from nullspace.report import make_report, write_json


logger = get_logger(__name__)
SMALL_FILES = 2**20  # bytes of report, card and logs, more or less


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


def needed_space(parameters, step, args):
    """Bytes that a run still writes at most, more or less: LoRA, checkpoints and pictures, each twice for a moment.

    Args:
        parameters (`list[Tensor]`): of the LoRA.
        step (`int`): that the run goes on from.
    """
    lora = 4 * sum(parameter.numel() for parameter in parameters)
    checkpoint = lora * (5 if args.optimizer == "prodigy" else 3)  # with what the optimizer keeps of each number
    later = args.max_train_steps // args.checkpointing_steps - step // args.checkpointing_steps
    kept = min(later, args.checkpoints_total_limit or later)
    picture = 3 * args.resolution**2 * args.num_validation_images
    prompts = len(args.validation_prompt or ["its own", *["the bundle's"] * 3])
    return 3 * lora + (kept + 2) * checkpoint + 3 * prompts * picture + SMALL_FILES


def report_of(found, bundle, lora_dtype, args):
    """The report of a run of the trainer, see `make_report`."""
    setting = {
        key: getattr(args, f"nullspace_{key}")
        for key in ("criterion", "threshold", "softness", "extra_prompts", "timesteps", "timestep_range")
    }
    training = {
        key: getattr(args, key)
        for key in (
            "instance_prompt", "rank", "lora_alpha", "lora_dropout", "lora_layers", "train_text_encoder",
            "lcm_loss", "max_train_steps", "optimizer", "learning_rate", "train_batch_size", "seed",
            "mixed_precision", "clip_skip",
        )
    }  # fmt: skip
    training["pretrained_vae_model_name_or_path"] = args.base_model.vae
    report = make_report(found, bundle, lora_dtype, args.nullspace_name_or_path, setting, training)
    return report | {"base_model": report["base_model"] | args.base_model.record()}  # the bundle may name it otherwise


def write_results(accelerator, found, bundle, lora_dtype, prompts, rows, step, args):
    """Write what goes with the saved LoRA: report, the web UIs' file, comparison and card.

    Returns:
        The names (`list[str]`) in --output_dir of all that, and of the LoRA.
    """
    (args.output_dir / UNPROTECTED_NAME).unlink(missing_ok=True)  # of an earlier run, whose place this one takes
    report = report_of(found, bundle, lora_dtype, args)
    write_json(args.output_dir / REPORT_NAME, report)
    write_kohya(report, args)
    picture = comparison_grid(rows, prompts, args.seed, step)
    save_picture(picture, args.output_dir / COMPARISON_NAME)
    log_picture(accelerator, "comparison", picture, step)
    pictures = write_model_card(bundle, report, prompts, rows["tuned"][0], args)
    logger.info(f"Wrote {LORA_NAME}, {REPORT_NAME} and {COMPARISON_NAME} to {args.output_dir}")
    kohya = [kohya_path(args.output_dir).name] if args.output_kohya_format else []
    return [LORA_NAME, CARD_NAME, REPORT_NAME, COMPARISON_NAME, *pictures, *kohya]


def log_files(args):
    """Size and time of each log in --output_dir, by its name there: `dict[str, tuple[int, int]]`."""
    return {
        path.relative_to(args.output_dir).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted((args.output_dir / args.logging_dir).rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def push(written, earlier_logs, args):
    """Publish what this run wrote.

    Args:
        written (`list[str]`): from `write_results`.
        earlier_logs: from `log_files`, before the run; those that are as they were are not its own.
    """
    logs = log_files(args)
    hidden = {name for name in logs if any(part.startswith(".") for part in name.split("/"))}
    published = [*written, *(name for name in logs.keys() - hidden if logs[name] != earlier_logs.get(name))]
    words = ["hf", "upload", args.hub_model_id, str(args.output_dir), "."]
    words += ["--private"] * args.hub_private_repo
    words += [word for name in sorted(published) for word in ("--include", glob.escape(name))]
    base = model_name({"base_model": args.base_model.record()})
    said = push_folder(
        args.hub_model_id,
        "model",
        args.output_dir,
        published,
        f"Null-space DreamBooth LoRA of {base}: {args.instance_prompt[0]}",
        shlex.join(words),
        args.hub_token,
    )
    logger.info(said)
