"""nullspace/checkpoint.py: what a checkpoint records, which ones are whole, and which a run may go on from."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import train_dreambooth_nullspace as trainer
from nullspace import checkpoint as room
from nullspace import flags, results, settling
from nullspace.errors import NullSpaceError
from nullspace.hashes import sha256
from nullspace.names import CARD_NAME, CHECKPOINTS_NAME, LORA_NAME
from test_train import bundle1, command_line, drawing_in_two_steps, same, train, worst_leakage  # noqa: F401 (fixtures)
from world import FOLDER


CONFIG = {"files": {"joint.safetensors": "1" * 64, CARD_NAME: "2" * 64}, "groups": [], "sha256": "3" * 64}
OTHERS = {"lr_scheduler": "cosine", "optimizer": "prodigy", "lcm_loss": "epsilon", "mixed_precision": "bf16"}


def parse(*flags, folder="o"):
    return trainer.parse_args(command_line("m", "b", folder, *flags))


def describe(args, shade=0, captions=("a sks star",), config=CONFIG, processes=1):
    picture = Image.new("RGB", (8, 8), (shade, 0, 0))
    precision = args.mixed_precision or "no"
    return room.describe_run(args, [picture], [list(captions)], config, processes, precision)


def make_checkpoint(folder, step, run):
    """A whole checkpoint of two files."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("optimizer.bin", LORA_NAME):
        (path / name).write_bytes(f"{name} {step}".encode())
    room.seal(path, step, 0, run)
    return path


# ---- What is compared ------------------------------------------------------------------------------------------------


def test_every_flag_is_in_one_class():
    """A new flag is put where it belongs: does the result depend on it, on what it names, or neither?"""
    classes = [*flags.COMPARED]
    for names in (*flags.BY_CONTENT.values(), *flags.FREE.values()):
        classes += names
    known = vars(parse()).keys() - {flag.removeprefix("--") for flag in settling.REPLACED}
    assert not known - set(classes), "add them to COMPARED, BY_CONTENT or FREE of nullspace/flags.py"
    assert not set(classes) - known, "these are gone: take them out of nullspace/flags.py"
    assert len(classes) == len(set(classes))


def test_the_help_lists_what_may_change(capsys):
    with pytest.raises(SystemExit):
        trainer.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    free = {name for names in flags.FREE.values() for name in names} - {"resume_from_checkpoint"}
    text = re.search(r"A checkpoint's folder, or latest.*?--hub_token\.", shown).group()
    assert set(re.findall(r"--\w+", text)) == {f"--{name}" for name in (*free, "max_train_steps", "lr_scheduler")}


@pytest.mark.parametrize("name", flags.COMPARED)
def test_another_value_of_a_flag_is_named_with_both(name, tmp_path):
    args = parse("--lr_scheduler", "cosine_with_restarts" if name == "lr_num_cycles" else "polynomial")
    folder = make_checkpoint(tmp_path, 2, describe(args))
    room.check_same_run(folder, describe(args))
    before = getattr(args, name)
    after = OTHERS.get(name, "x" if before is None or isinstance(before, str) else before + 1)
    setattr(args, name, after)
    shown = "no" if name == "mixed_precision" else "not given" if before is None else before
    with pytest.raises(NullSpaceError, match=re.escape(f"--{name}: {shown} in the checkpoint, {after} asked for")):
        room.check_same_run(folder, describe(args))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"shade": 1}, r"the pictures \(--instance_data_dir, .*: 1 of them, sha256 \w{12}\.{3} in the checkpoint, 1"),
        ({"captions": ["a zwx heart"]}, r"the captions \(--instance_prompt, .*: 'a sks star', .*, 'a zwx heart', sha"),
        ({"processes": 2}, "the number of processes: 1 in the checkpoint, 2 asked for"),
        (
            {"config": CONFIG | {"files": CONFIG["files"] | {"joint.safetensors": "4" * 64}}},
            r"the bundle \(--nullspace_name_or_path, .*: sha256 \w{12}\.\.\. in the checkpoint, sha256",
        ),
    ],
)
def test_what_flags_name_is_compared_by_its_content(changed, name, tmp_path):
    folder = make_checkpoint(tmp_path, 2, describe(parse()))
    with pytest.raises(NullSpaceError, match=name):
        room.check_same_run(folder, describe(parse(), **changed))


def test_a_bundle_stays_itself_when_it_is_published(tmp_path):
    folder = make_checkpoint(tmp_path, 2, describe(parse()))
    config = CONFIG | {"files": CONFIG["files"] | {CARD_NAME: "5" * 64}, "sha256": "6" * 64}
    room.check_same_run(folder, describe(parse(), config=config))


@pytest.mark.parametrize("schedule", trainer.SCHEDULES)
def test_more_steps_only_where_the_schedule_does_not_end_with_them(schedule, tmp_path):
    args = parse("--lr_scheduler", schedule)
    folder = make_checkpoint(tmp_path, 2, describe(args))
    args.max_train_steps = 9
    if schedule in ("constant", "constant_with_warmup"):
        room.check_same_run(folder, describe(args))
    else:
        with pytest.raises(NullSpaceError, match="--max_train_steps: 3 in the checkpoint, 9 asked for"):
            room.check_same_run(folder, describe(args))


def test_flags_that_the_schedule_does_not_read_may_change(tmp_path):
    folder = make_checkpoint(tmp_path, 2, describe(parse()))
    flags = ("--lr_warmup_steps", 7, "--lr_num_cycles", 7, "--lr_power", 7)
    room.check_same_run(folder, describe(parse(*flags)))


def test_a_checkpoint_without_a_record_is_refused(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / room.RECORD_NAME).write_text('{"step": 2, "seed": 0}')
    assert room.damage(tmp_path / "checkpoint-2") is None
    with pytest.raises(NullSpaceError, match="does not record what its run depends on; start anew"):
        room.check_same_run(tmp_path / "checkpoint-2", describe(parse()))


def test_every_part_of_the_model_is_compared(tiny_sd1, tiny_sd2):
    def load(folder):
        kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
        kinds |= {"scheduler": DDPMScheduler, "tokenizer": CLIPTokenizer}
        return {name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()}

    def describe_models(parts):
        models = {name: parts[name] for name in ("unet", "text_encoder", "vae")}
        return room.describe_models(models, parts["scheduler"], {"tokenizer": parts["tokenizer"]}, ["a red star"])

    parts, others = load(tiny_sd1), load(tiny_sd2)
    before = describe_models(parts)
    assert before == describe_models(load(tiny_sd1)) and len(before) == 5
    for name, key in zip(list(parts)[:4], before, strict=False):
        changed = describe_models(parts | {name: others[name]})
        assert [name for name in before if changed[name] != before[name]] == [key]
    parts["tokenizer"].add_tokens("star")
    changed = describe_models(parts)
    assert [name for name in before if changed[name] != before[name]] == ["the tokenizer (--tokenizer_name)"]


# ---- Damage ----------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def forge(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 3}))


def reseal(folder, **changed):
    """Sign a checkpoint for what its files are by now."""
    record = room.read_record(folder) | changed
    (folder / room.RECORD_NAME).unlink()
    room.seal(folder, record["step"], record["seed"], record["run"])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("optimizer.bin", cut, "whose optimizer.bin is truncated or altered"),
        (LORA_NAME, flip, f"whose {LORA_NAME} is truncated or altered"),
        ("optimizer.bin", lambda path: path.unlink(), "which lacks optimizer.bin"),
        (room.RECORD_NAME, lambda path: path.unlink(), f"which lacks {room.RECORD_NAME}"),
        (room.RECORD_NAME, cut, f"whose {room.RECORD_NAME} is no record"),
        (room.RECORD_NAME, forge, f"whose {room.RECORD_NAME} is altered"),
        (room.RECORD_NAME, lambda path: path.write_text("[" * 10**5), f"whose {room.RECORD_NAME} is no record"),
        (room.RECORD_NAME, lambda path: reseal(path.parent, run=[1]), f"whose {room.RECORD_NAME} is no record"),
        (room.RECORD_NAME, lambda path: reseal(path.parent, step=-5), f"whose {room.RECORD_NAME} is no record"),
        (room.RECORD_NAME, lambda path: path.write_text("[]"), f"whose {room.RECORD_NAME} is no record"),
        (room.RECORD_NAME, lambda path: path.write_bytes(b"\xff\x00"), f"whose {room.RECORD_NAME} is no record"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(name, harm, message, tmp_path, caplog):
    PartialState()
    before, last = (make_checkpoint(tmp_path, step, describe(parse())) for step in (2, 10))
    (tmp_path / "checkpoint-12.partial-1").mkdir()
    args = parse("--resume_from_checkpoint", "latest", folder=tmp_path)
    assert room.find_checkpoint(args) == last
    harm(last / name)
    with caplog.at_level(logging.WARNING):
        assert room.find_checkpoint(args) == before
    assert f"Passing over {last}, {message}" in caplog.text
    with pytest.raises(NullSpaceError, match="checkpoint-10"):
        room.find_checkpoint(parse("--resume_from_checkpoint", "checkpoint-10", folder=tmp_path))
    flip(before / LORA_NAME)
    with pytest.raises(NullSpaceError, match="finds no whole checkpoint in"):
        room.find_checkpoint(args)


# ---- The trainer -----------------------------------------------------------------------------------------------------


def test_what_is_no_state_is_one_sentence(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output, "--checkpointing_steps", 2)
    checkpoint = output / "checkpoint-2"
    # The last is what resuming on another machine lacks: in fp16 GPUs scale the loss and keep its scale, CPUs do not
    for harm in (lambda path: torch.save({}, path), cut, Path.unlink):
        harm(checkpoint / "optimizer.bin")
        reseal(checkpoint)
        with pytest.raises(NullSpaceError, match=f"{checkpoint} cannot be gone on from .*; name another, or start"):
            train(tiny_sd1, bundle1, output, "--resume_from_checkpoint", "checkpoint-2")


def test_memory_that_is_short_is_not_laid_on_a_checkpoint(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 2)

    def load_state(self, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Accelerator, "load_state", load_state)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--resume_from_checkpoint", "latest")


def test_latest_of_another_subject_is_refused_before_a_model_is_loaded(
    tiny_sd1,
    bundle1,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    """An earlier run on another subject went further; the sentence names the checkpoint of this one."""
    output, heart = tmp_path / "lora", ("--instance_data_dir", FOLDER / "heart")
    heart += ("--instance_prompt", "a zwx heart", "--checkpointing_steps", 2)
    train(tiny_sd1, bundle1, output, "--checkpointing_steps", 2, "--max_train_steps", 4)
    train(tiny_sd1, bundle1, output, *heart, "--max_train_steps", 3)
    digests = {path: sha256(path) for path in output.rglob("*") if path.is_file()}

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "from_pretrained", load)
        with pytest.raises(NullSpaceError, match="checkpoint-4 is a checkpoint of another run") as caught:
            train(tiny_sd1, bundle1, output, *heart, "--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    for part in ("the pictures", "'a photo of a sks star'", "'a zwx heart'", "name checkpoint-2, which is of this run"):
        assert part in str(caught.value)
    assert digests == {path: sha256(path) for path in output.rglob("*") if path.is_file()}
    resumed = train(
        tiny_sd1, bundle1, output, *heart, "--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", 5
    )
    assert same(resumed, train(tiny_sd1, bundle1, tmp_path / "whole", *heart, "--max_train_steps", 5))


def test_a_changed_vae_and_a_moved_model(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """The place of a model may change, its weights may not, those included that no bundle covers."""
    output, flags = tmp_path / "lora", ("--checkpointing_steps", 2)
    train(tiny_sd1, bundle1, output, *flags)
    flags += ("--resume_from_checkpoint", "latest")
    shutil.copytree(tiny_sd1, tmp_path / "moved")
    train(tmp_path / "moved", bundle1, output, *flags)
    vae = AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    vae.save_pretrained(tmp_path / "moved" / "vae")
    with pytest.raises(NullSpaceError, match=r"the model \(--pretrained_model_name_or_path, --revision\), vae: sha256"):
        train(tmp_path / "moved", bundle1, output, *flags)


def test_what_of_an_earlier_run_is_replaced_and_what_stays_is_said(tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
        assert f"There is no checkpoint in {tmp_path / 'lora'}: this run starts anew" in caplog.text
        assert "of an earlier run" not in caplog.text
        train(tiny_sd1, bundle1, tmp_path / "lora", "--max_train_steps", 1)
    assert f"{tmp_path / 'lora'} holds {LORA_NAME} of an earlier run, which this one replaces at its end" in caplog.text
    assert "holds checkpoint-2" in caplog.text and "each stays until this run writes one of its number" in caplog.text


def test_checkpoints_are_loras_and_a_sheet_compares_them(tiny_sd1, bundle1, tmp_path, monkeypatch, caplog):  # noqa: F811
    """All of this run that are kept, when it is over too; without them there is no sheet, nor one of an earlier run."""
    output, sheets, grid = tmp_path / "lora", [], results.checkpoint_grid
    monkeypatch.setattr(results, "checkpoint_grid", lambda *args: sheets.append(args) or grid(*args))
    prompts = ["a sks star", "a circle"]
    flags = ["--checkpointing_steps", 2, "--max_train_steps", 6, "--validation_steps", 100]
    flags += ["--validation_prompt", prompts[1]]  # besides that of the common command line
    make_checkpoint(output, 1, describe(parse("--rank", 7)))
    tensors = train(tiny_sd1, bundle1, output, *flags)
    assert not sheets and not (output / CHECKPOINTS_NAME).exists()
    flags += ["--resume_from_checkpoint", "latest", "--compare_checkpoints"]
    assert same(train(tiny_sd1, bundle1, output, *flags), tensors)
    ((columns, told, seed),) = sheets
    assert list(columns) == ["base", "checkpoint-2", "checkpoint-4", "step 6, the result"]
    assert told == prompts and seed == 0
    assert Image.open(output / CHECKPOINTS_NAME).tobytes() == grid(columns, told, seed).tobytes()
    assert f"]({CHECKPOINTS_NAME})" in (output / "README.md").read_text()

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for (name, pictures), folder in zip(columns.items(), (None, "checkpoint-2", "checkpoint-4", "."), strict=True):
        pipeline.unload_lora_weights()
        if folder is not None:
            pipeline.load_lora_weights(output / folder)
            assert worst_leakage(output / folder, bundle1) < 1e-5
        for prompt, picture in zip(prompts, pictures, strict=True):
            generator = torch.Generator().manual_seed(0)
            again = pipeline(prompt, height=32, width=32, num_inference_steps=2, generator=generator).images[0]
            assert again.tobytes() == picture.tobytes(), (name, prompt)
    assert len({pictures[0].tobytes() for pictures in columns.values()}) == 4

    shutil.rmtree(output / "checkpoint-2")
    cut(output / "checkpoint-4" / LORA_NAME)
    train(tiny_sd1, bundle1, output, *flags)
    assert "No checkpoint from before step 6 is kept" in caplog.text and not (output / CHECKPOINTS_NAME).exists()
    assert CHECKPOINTS_NAME not in (output / "README.md").read_text()


def test_no_checkpoint_to_compare_is_found_before_the_training(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    with pytest.raises(NullSpaceError, match="--checkpointing_steps 500 writes no checkpoint before the last step, 3"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--compare_checkpoints")
