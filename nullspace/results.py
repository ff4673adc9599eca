"""What a training leaves: LoRA and word, read back and drawn with, what lies beside them, and what is published."""

import glob
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import free_memory

from nullspace.audit import Auditor
from nullspace.checkpoint import going_on_from, keeping_what_was_learned, write_state
from nullspace.dataset_card import model_name
from nullspace.embeddings import bundled, is_word, read_word, save_embedding
from nullspace.hub import push_folder
from nullspace.kohya import embedding_metadata, is_ours, save_kohya
from nullspace.logs import log_audit, log_picture
from nullspace.lora import load_lora
from nullspace.model_card import in_web_uis, usage_code, write_model_card
from nullspace.names import (
    CARD_NAME,
    CHECKPOINTS_NAME,
    COMPARISON_NAME,
    EMBEDDINGS,
    FLAGS_NAME,
    LORA_NAME,
    REPORT_NAME,
    UNPROTECTED_NAME,
    WORD_NAME,
    embedding_path,
    kohya_path,
)
from nullspace.pictures import checkpoint_grid, comparison_grid, save_picture
from nullspace.prompts import spread
from nullspace.report import describe_drift, describe_word, make_report, save_audited, write_json
from nullspace.system import make_inside, put, staging, write_text
from nullspace.terminal import printable
from nullspace.validation import draw_checkpoints, draw_saved, while_memory_suffices
from nullspace.word import NewWord


logger = get_logger(__name__)
DEFAULT_PROMPTS = 4  # that are drawn at the end, at most, where none are named
SMALL_FILES = 2**20  # bytes of report, card and logs, more or less


class Trained(NamedTuple):
    """What saving needs of a training; all else that it held is freed with `train`, to make room for pictures."""

    auditor: Auditor  # of the models that have a LoRA, and the bundle; of none, where a word is trained alone
    word: NewWord | None
    dtype: torch.dtype  # that the models ran in
    lora_dtype: torch.dtype  # that the LoRA is saved in
    step: int
    saved: int | None  # the step of the last checkpoint
    run: dict  # what the result depends on


def save(accelerator, trained, earlier_logs, args):
    """Save LoRA and word, read them back, show what they did, and publish them.

    Args:
        trained (`Trained`): its models are let go of before pictures are drawn.
        earlier_logs: from `log_files`, before the run.

    Raises:
        NullSpaceError: if the LoRA leaks, the word has moved what is not its own, or something cannot be written.
        DivergedError: if what is drawn is not finite.
    """
    step, device = trained.step, accelerator.device
    # They take their place, and that of earlier ones, only once the files and their pictures turn out sound
    with staging(args.output_dir / "lora") if accelerator.is_main_process else nullcontext() as staged:
        if trained.saved != step:  # for a signal that comes while pictures are drawn, without what training needs
            write_state(accelerator, staged and staged / "checkpoint", step, args, trained.run)
        with going_on_from(staged, args.output_dir, step):
            if accelerator.is_main_process:
                with keeping_what_was_learned(staged, args.output_dir, step):
                    found = save_trained(accelerator, staged, trained, args)
                    trained.auditor.models.clear()
                    accelerator.free_memory()  # it keeps what it prepared
                    free_memory()
                    prompts = args.validation_prompt or default_prompts(trained.auditor.bundle, args)
                    rows, compared = draw_results(staged, trained, prompts, device, args)
                    put_in_place(staged, args)
                written = write_results(accelerator, trained, found, prompts, rows, compared, args)
            accelerator.end_training()
            if args.push_to_hub and accelerator.is_main_process:
                push(written, earlier_logs, args)
            if accelerator.is_main_process:
                tell_how_to_use(device, compared, args)


def default_prompts(bundle, args):
    """Prompts that show what was learned and what was kept: `list[str]`.

    The subject's, the same with the class that its word began as, and some that the bundle protects, if there is one.
    """
    prompts = args.instance_prompt[:1]
    if args.placeholder_token:
        word, initial = re.escape(args.placeholder_token), args.initializer_token
        prompts.append(re.sub(word, lambda _: initial, prompts[0], flags=re.IGNORECASE))
    others = bundle.config["prompts"]["examples"] if bundle else []
    return prompts + spread(others, DEFAULT_PROMPTS - len(prompts))


def draw_results(staged, trained, prompts, device, args):
    """What `draw_saved` and `draw_checkpoints` give, each empty where memory does not suffice for it.

    Drawing can take more than training did, and nothing that was trained is lost for want of its pictures.
    """
    rows, compared = {}, {}
    with while_memory_suffices("drawing: what was trained is saved without pictures of it."):
        rows = draw_saved(staged, prompts, device, trained.dtype, args)
    free_memory()
    with while_memory_suffices("drawing with the checkpoints: there is no sheet of them."):
        compared = draw_checkpoints(trained.run, trained.step, prompts, device, trained.dtype, args)
    return rows, compared


def tell_how_to_use(device, compared, args):
    """Print what to paste and where to put files: not logged, since the log escapes the ends of lines."""
    told = ["", "To use it:", "", *usage_code(device.type, args).splitlines(), "", *in_web_uis(args)]
    if compared:
        earlier = args.output_dir / list(compared)[-1]
        file = f"{args.output_dir.resolve().name}-{earlier.name.rpartition('-')[2]}.safetensors"
        command = ["python", "nullspace_utils.py", "export", "--lora", str(earlier), "--output", file]
        told.append(f"An earlier step: load {earlier} in place of {args.output_dir}; for web UIs {shlex.join(command)}")
    print(*map(printable, told), sep="\n", flush=True)


def save_trained(accelerator, staged, trained, args):
    """Write LoRA and word into a folder, read them back, and tell and return what `audit_file` found."""
    if trained.word:
        trained.word.save(staged)
    found = save_audited(
        staged, trained.auditor, trained.lora_dtype, args.output_dir / UNPROTECTED_NAME, max_drift=args.max_drift
    )
    log_audit(accelerator, found, trained.step)
    for key in ("leakage", "predicted_drift"):
        if found[key]["max"] is not None:
            logger.info(f"{key}: at most {found[key]['max']:.2e}, mean {found[key]['mean']:.2e}")
    if args.max_drift:
        logger.info(describe_drift(found, args.max_drift))
    return found


def for_web_uis(args):
    """The files for the web UIs that this run writes: that of the LoRA, and that of the word, where there are any."""
    if not args.output_kohya_format:
        return []
    word = [embedding_path(args.output_dir, args.placeholder_token)] if args.placeholder_token else []
    return ([] if args.word_only else [kohya_path(args.output_dir)]) + word


def write_kohya(report, args):
    """Write the saved LoRA and word for the web UIs as well, if asked for; those of an earlier run do not stay.

    Raises:
        NullSpaceError: if they cannot be written.
    """
    lora, asked = kohya_path(args.output_dir), for_web_uis(args)
    word = read_word(args.output_dir / WORD_NAME) if args.placeholder_token else None
    for path in [lora, *sorted((args.output_dir / EMBEDDINGS).glob("*.safetensors"))]:
        if path not in asked and is_ours(path):
            path.unlink()
    for path in asked:
        if path == lora:
            save_kohya(path, load_lora(args.output_dir), report, {} if word is None else bundled(word))
        else:
            make_inside(path.parent)
            save_embedding(path, word, embedding_metadata(word.token))


def needed_space(parameters, step, args):
    """Bytes that a run still writes at most, more or less: LoRA, checkpoints and pictures, each twice for a moment.

    Args:
        parameters (`list[Tensor]`): all that is trained.
        step (`int`): that the run goes on from.
    """
    lora = 4 * sum(parameter.numel() for parameter in parameters)
    checkpoint = lora * (5 if args.optimizer == "prodigy" else 3)  # with what the optimizer keeps of each number
    later = args.max_train_steps // args.checkpointing_steps - step // args.checkpointing_steps
    kept = min(later, args.checkpoints_total_limit or later)
    picture = 3 * args.resolution**2 * args.num_validation_images
    prompts = len(args.validation_prompt or range(DEFAULT_PROMPTS))
    compared = 3 * args.resolution**2 * prompts * (kept + 2) if args.compare_checkpoints else 0
    return 3 * lora + (kept + 2) * checkpoint + 3 * prompts * picture + compared + SMALL_FILES


def report_of(found, bundle, lora_dtype, args):
    """The report of a run of the trainer, see `make_report`; of a word alone, what it has of that without a bundle."""
    setting = {
        key: getattr(args, f"nullspace_{key}")
        for key in ("criterion", "threshold", "softness", "extra_prompts", "timestep_range")
    }
    setting["max_drift"] = args.max_drift
    initial = args.init_lora and (Path(args.init_lora).name if Path(args.init_lora).exists() else args.init_lora)
    training = {
        key: getattr(args, key)
        for key in (
            "instance_prompt", "rank", "lora_alpha", "lora_dropout", "lora_layers", "train_text_encoder",
            "placeholder_token", "initializer_token", "num_vectors", "word_learning_rate", "word_only",
            "lcm_loss", "max_train_steps", "optimizer", "learning_rate", "text_encoder_lr", "train_batch_size", "seed",
            "mixed_precision", "clip_skip",
        )
    }  # fmt: skip
    training |= {"init_lora": initial, "pretrained_vae_model_name_or_path": args.base_model.vae}
    word = describe_word(args.placeholder_token, args.num_vectors, args.word_only) if args.placeholder_token else None
    if args.word_only:
        base = args.base_model.record()
        return {"guarantee": word, "base_model": base, "model_type": args.model_type, "training": training, **found}
    report = make_report(found, bundle, lora_dtype, args.nullspace_name_or_path, setting, training)
    report["base_model"] |= args.base_model.record()  # the bundle may name it otherwise
    drift = describe_drift(found, args.max_drift) if args.max_drift else None
    report["guarantee"] = " ".join(filter(None, (report["guarantee"], drift, word)))
    return report


def put_in_place(staged, args):
    """Move what was saved, LoRA or word or both, to --output_dir; what an earlier run left there does not stay."""
    for name in (LORA_NAME, WORD_NAME):
        if (staged / name).is_file():
            put(staged / name, args.output_dir / name)
        elif name == LORA_NAME or is_word(args.output_dir / name):
            (args.output_dir / name).unlink(missing_ok=True)


def write_results(accelerator, trained, found, prompts, rows, compared, args):
    """Write what goes with saved LoRA and word: report, the web UIs' files, comparisons and card.

    Args:
        found (`dict`): from `save_trained`.
        rows, compared (`dict`): from `draw_results`; either may be empty.

    Returns:
        The names (`list[str]`) in --output_dir of all that, and of LoRA and word.
    """
    bundle, step = trained.auditor.bundle, trained.step
    (args.output_dir / UNPROTECTED_NAME).unlink(missing_ok=True)  # of an earlier run, whose place this one takes
    report = report_of(found, bundle, trained.lora_dtype, args)
    write_json(args.output_dir / REPORT_NAME, report)
    write_text(args.output_dir / FLAGS_NAME, args.config)  # not published: it names folders of this machine
    write_kohya(report, args)
    sheets = {}
    if rows:
        sheets[COMPARISON_NAME] = comparison_grid(rows, prompts, args.seed, step)
    if compared:
        columns = {"base": rows["base"][0]} if "base" in rows else {}
        columns |= {**compared, f"step {step}, the result": rows["tuned"][0]}
        sheets[CHECKPOINTS_NAME] = checkpoint_grid(columns, prompts, args.seed)
    for name in (COMPARISON_NAME, CHECKPOINTS_NAME):
        (args.output_dir / name).unlink(missing_ok=True)
    for name, picture in sheets.items():
        save_picture(picture, args.output_dir / name)
        log_picture(accelerator, Path(name).stem, picture, step)
    pictures = write_model_card(bundle, report, prompts, rows["tuned"][0] if rows else [], args)
    weights = [] if args.word_only else [LORA_NAME]
    weights += [WORD_NAME] if args.placeholder_token else []
    more = [path.relative_to(args.output_dir).as_posix() for path in for_web_uis(args)]
    *names, last = [*weights, *more, REPORT_NAME, FLAGS_NAME, *sheets]
    logger.info(f"Wrote {', '.join(names)} and {last} to {args.output_dir}")
    return [*weights, CARD_NAME, REPORT_NAME, *sheets, *pictures, *more]


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
        f"{'Textual inversion' if args.word_only else 'Null-space DreamBooth LoRA'} of {base}: "
        f"{args.instance_prompt[0]}",
        shlex.join(words),
        args.hub_token,
    )
    logger.info(said)
