"""train_dreambooth_nullspace.py: the LoRA that it writes, its flags, resuming, and what it refuses."""

import ast
import csv
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel, CLIPTokenizer

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace import adapters, batch_loss, logs, model_card, optimizers, preparation, results, settling, validation
from nullspace import dataset as dataset_room
from nullspace.audit import audit, leakage
from nullspace.bundle import Bundle
from nullspace.checkpoint import checkpoints, find_checkpoint, read_record
from nullspace.errors import NullSpaceError
from nullspace.families import stable_diffusion
from nullspace.families.stable_diffusion import StableDiffusion, diffusion_loss
from nullspace.latents import draw_noise
from nullspace.layers import attention_inputs, find_module
from nullspace.lora import load_lora
from nullspace.names import (
    CHECKPOINTS_NAME,
    COMPARISON_NAME,
    CONFIG_NAME,
    DEFAULT_SOFTNESS,
    JOINT,
    LORA_NAME,
    REPORT_NAME,
    TEXT_INPUT,
)
from nullspace.pictures import read_instances
from nullspace.samplers import make_scheduler
from world import DEMO, FOLDER


INSTANCES = FOLDER / "star"
BESIDE = shutil.ignore_patterns("*.txt", "*.jsonl")  # what lies there beside the pictures
README = DEMO.parent / "README.md"
SD_STEPS = StableDiffusion.num_inference_steps


@pytest.fixture(scope="module", autouse=True)
def drawing_in_two_steps():
    """Rather than 25, which take most of the time of trainings this short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "num_inference_steps", 2)
        yield


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def make_bundle(model, folder, *flags):
    """A bundle of a few prompts, with three groups of timesteps, protecting half of the directions or so."""
    (folder.parent / "prompts.txt").write_text("a red star\na blue heart on a white background\n")
    argv = ["--pretrained_model_name_or_path", model, "--prompts_file", folder.parent / "prompts.txt"]
    argv += ["--num_inference_steps", 3, "--timestep_groups", "steps", "--output_dir", folder, *flags]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    return folder


@pytest.fixture(scope="session")
def bundle1(tiny_sd1, tmp_path_factory):
    return make_bundle(tiny_sd1, tmp_path_factory.mktemp("bundles") / "sd1", "--with_text_encoder")


@pytest.fixture(scope="session")
def roomy_bundle1(tiny_sd1, tmp_path_factory):
    """One of which more may be closed than by default."""
    flags = ("--nullspace_criterion", "percentile", "--nullspace_threshold", 30)
    return make_bundle(tiny_sd1, tmp_path_factory.mktemp("bundles") / "roomy", *flags)


@pytest.fixture(scope="session")
def bundle2(tiny_sd2, tmp_path_factory):
    return make_bundle(tiny_sd2, tmp_path_factory.mktemp("bundles") / "sd2")


def command_line(model, bundle, output_dir, *flags, without=()):
    """What a user types: the common flags, without some of them, and those of a test."""
    argv = ["--pretrained_model_name_or_path", model, "--nullspace_name_or_path", bundle, "--output_dir", output_dir]
    argv += ["--instance_data_dir", INSTANCES, "--instance_prompt", "a photo of a sks star", "--resolution", 32]
    argv += ["--max_train_steps", 3, "--learning_rate", 1e-2, "--train_batch_size", 2, "--seed", 0, "--rank", 2]
    argv += ["--num_validation_images", 1, "--validation_prompt", "a sks star", "--report_to", "none", *flags]
    for flag in without:
        start = argv.index(flag)
        del argv[start : start + 2]
    return [str(word) for word in argv]


def train(model, bundle, output_dir, *flags, without=()):
    """Train in this process, without some flags of the common command line, and return the tensors of the LoRA."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what accelerate shares within a process must not leak from one run to the next
    trainer.main(trainer.parse_args(command_line(model, bundle, output_dir, *flags, without=without)))
    return load_file(output_dir / LORA_NAME)


def report(folder):
    return json.loads((folder / REPORT_NAME).read_text())


@pytest.fixture(scope="module")
def reference(tiny_sd1, bundle1, tmp_path_factory):
    """The LoRA of the plainest run, which others are compared with."""
    return train(tiny_sd1, bundle1, tmp_path_factory.mktemp("reference") / "lora")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- As a user does --------------------------------------------------------------------------------------------------


def test_launched_as_a_user_does(run_script, tiny_sd2, bundle2, tmp_path):
    """On a v-prediction model, with TensorBoard, checkpoints and validation."""
    output = tmp_path / "lora"
    flags = ("--checkpointing_steps", 2, "--report_to", "tensorboard", "--validation_epochs", 1)
    done = run_script("train_dreambooth_nullspace.py", *command_line(tiny_sd2, bundle2, output, *flags))
    names = {path.name for path in output.iterdir()}
    assert {LORA_NAME, "nullspace_report.json", "comparison.png", "README.md", "checkpoint-2", "logs"} <= names
    assert not any("partial" in name for name in names)
    assert (
        "Protecting 3 prompts of prompts.txt" in done.stderr
        and "directions closed, the others held back" in done.stderr
    )
    assert "Training" in done.stderr  # the progress bar
    assert list((output / "logs").rglob("events.*")) and list((output / "validation").glob("*.png"))
    assert 0 < report(output)["predicted_drift"]["mean"] <= report(output)["predicted_drift"]["max"]
    assert report(output)["leakage"]["max"] < 1e-5
    assert len(report(output)["layers"]) == len(Bundle.load(bundle2).config["modules"])

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    draw = dict(num_inference_steps=2, output_type="np", guidance_scale=1.0)
    before = pipeline("a sks star", generator=torch.Generator().manual_seed(0), **draw).images
    pipeline.load_lora_weights(output)
    after = pipeline("a sks star", generator=torch.Generator().manual_seed(0), **draw).images
    assert (before != after).any()
    assert all(key.startswith("unet.") and ".lora." in key for key in load_file(output / LORA_NAME))
    layers = {name.split(".lora_A")[0] for name, _ in pipeline.unet.named_parameters() if "lora_A" in name}
    assert layers == set(attention_inputs(pipeline.unet, "cross"))


RECORDER = """
import os, sys
import torch
sys.path.insert(0, {root!r})
import train_dreambooth_nullspace as trainer

class Recorder(trainer.NullSpaceProjector):
    steps = []

    def __init__(self, unet, *args, trained, **text_encoders):
        super().__init__(unet, *args, trained=trained, **text_encoders)
        self.models = [unet, *text_encoders.values()]

    def gradients(self):
        return {{name: parameter.grad.clone() for name, parameter in self.parameters.items()}}

    def project_gradients(self):
        step = {{"before": self.gradients()}}
        super().project_gradients()
        learning = {{n: p for model in self.models for n, p in model.named_parameters() if p.requires_grad}}
        learning = {{n: p.detach().clone() for n, p in learning.items()}}
        self.steps.append(step | {{"after": self.gradients(), "learning": learning}})
        torch.save(self.steps, {folder!r} + "/" + os.environ["RANK"])

trainer.NullSpaceProjector = Recorder
trainer.main(trainer.parse_args())
"""


def test_two_processes_agree_and_project_what_both_found(run_script, tiny_sd1, bundle1, tmp_path):
    """After the all-reduce, which is, projections being linear, as if each had projected its own gradient before.

    They learn a word besides, and have a budget of drift.
    """
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER.format(root=str(Path(trainer.__file__).parent), folder=str(tmp_path)))
    flags = ("--gradient_accumulation_steps", 2, "--max_train_steps", 6)
    flags += ("--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", "a sks-star")
    flags += ("--nullspace_softness", DEFAULT_SOFTNESS, "--max_drift", 0.002)
    run_script(script, *command_line(tiny_sd1, bundle1, tmp_path / "lora", *flags), processes=2)
    first, second = (torch.load(tmp_path / rank) for rank in "01")
    assert len(first) == len(second) == 6
    for mine, theirs in zip(first, second, strict=True):
        for what in ("before", "after", "learning"):
            assert same(mine[what], theirs[what])
    rows = [[each for name, each in step["learning"].items() if name.endswith("added.weight")] for step in first]
    assert all(len(each) == 1 for each in rows)
    assert not any(torch.equal(*pair) for pair in zip(sum(rows[1:], []), sum(rows, []), strict=False))
    protected = Bundle.load(bundle1).protected()
    for step in first[1:]:  # B is zero in the first step, and so is the gradient of A
        for name, before in step["before"].items():
            free = protected[name].basis[:, protected[name].rank :]
            expected = before @ free * protected[name].gains @ free.T
            assert before.norm() > 0 and (step["after"][name] - expected).norm() < 1e-3 * before.norm()
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5
    assert 0.00199 < report(tmp_path / "lora")["predicted_drift"]["rms"] <= 0.002


# ---- The null space --------------------------------------------------------------------------------------------------


def test_lora_file_is_in_the_null_space(tiny_sd1, roomy_bundle1, tmp_path):
    """Read from the file with the bundle of the file, for more than the default threshold."""
    for criterion, threshold in (("energy", 0.95), ("eigenvalue", 0.5), ("percentile", 60)):
        output = tmp_path / criterion
        train(tiny_sd1, roomy_bundle1, output, "--nullspace_criterion", criterion, "--nullspace_threshold", threshold)
        protected = Bundle.load(roomy_bundle1).protected(criterion, threshold)
        assert all(item.rank for item in protected.values())
        for name, layer in load_lora(output).items():
            assert leakage(layer, protected[name]) < 1e-5
        assert report(output)["nullspace"]["criterion"] == criterion
        assert report(output)["nullspace"]["threshold"] == threshold


def test_softness_is_told(tiny_sd1, bundle1, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tiny_sd1, bundle1, tmp_path / "soft", "--max_train_steps", 1)
        assert "softness 1e-05" in caplog.text and "the others held back by their energy" in caplog.text
        caplog.clear()
        train(tiny_sd1, bundle1, tmp_path / "hard", "--max_train_steps", 1, "--nullspace_softness", "inf")
        assert "softness inf" in caplog.text and "the others free" in caplog.text
    assert report(tmp_path / "soft")["nullspace"]["softness"] == 1e-5
    assert report(tmp_path / "hard")["nullspace"]["softness"] is None
    assert "softness 1e-05" in (tmp_path / "soft" / "README.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [(), ("--nullspace_timestep_range", 0, 499, "--train_text_encoder")],
    ids=["joint", "range and text encoder"],
)
def test_extra_prompts_are_drawn_as_the_bundle_was(flags, tiny_sd1, bundle1, tmp_path, monkeypatch, caplog):
    """What is added are the moments that a bundle of these prompts alone would have, whatever the training batch."""
    prompts, added = ["a photo of a star", "a circle"], []
    emphasize = Bundle.emphasize
    monkeypatch.setattr(Bundle, "emphasize", lambda *args: added.append(args) or emphasize(*args))
    words = ("--nullspace_extra_prompts", prompts[0], "--nullspace_extra_prompts", prompts[1], "--max_train_steps", 1)
    words += ("--no-compare_with_base",)
    with caplog.at_level(logging.INFO):
        train(tiny_sd1, bundle1, tmp_path / "lora", *words, *flags, "--train_batch_size", 5)
    ((bundle, moments, groups),) = added
    extra = Bundle.from_moments(moments, groups, bundle.config)
    assert set(bundle.spectra) == set(extra.spectra)
    assert "Protecting 3 prompts of prompts.txt and 2 of your own" in caplog.text
    assert report(tmp_path / "lora")["nullspace"]["extra_prompts"] == prompts

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config)
    layer = next(name for name in bundle.config["modules"] if name.endswith("to_out.0"))
    seen, now = {}, {}  # input and timestep -> what was read

    def reader(name):
        def read(module, args):
            seen.setdefault((name, now["timestep"]), []).append(args[0].reshape(-1, args[0].shape[-1]))

        return read

    pipeline.unet.register_forward_pre_hook(lambda unet, args: now.update(timestep=round(float(args[1]))))
    pipeline.unet.get_submodule(layer).register_forward_pre_hook(reader(layer))
    pipeline.unet.get_submodule(layer.replace("to_out.0", "to_k")).register_forward_pre_hook(reader(TEXT_INPUT))
    for number in range(16):
        generator = torch.Generator().manual_seed(number)
        pipeline(prompts[number // 8], num_inference_steps=3, generator=generator, output_type="latent")
    for group in bundle.config["groups"]:
        if group["name"] in bundle.spectra:
            for name, timesteps in ((layer, group["timesteps"]), (TEXT_INPUT, [now["timestep"]])):
                x = torch.cat([part for timestep in timesteps for part in seen[name, timestep]]).double()
                assert (extra.group(group["name"])[name].sum() - x.T @ x).norm() < 2e-3 * (x.T @ x).norm()


def test_extra_prompts_are_protected(tiny_sd1, bundle1, tmp_path, caplog):
    """A direction that only they use is open without them and closed with them."""
    open_, closed = Bundle.load(bundle1), []
    emphasize = Bundle.emphasize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "emphasize", lambda *args: closed.append(emphasize(*args)) or closed[-1])
        with caplog.at_level(logging.INFO):
            train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_extra_prompts", "a ohwx sks zwx")
    told = re.findall(r"(\d+) layers of input size (\d+): (\d+(?: to \d+)?) directions closed", caplog.text)
    ranks = {}
    for name, item in closed[0].protected().items():
        if name in closed[0].config["modules"]:
            ranks.setdefault(len(item.basis), []).append(item.rank)
    for count, size, shown in told:
        least, most = min(ranks[int(size)]), max(ranks[int(size)])
        assert int(count) == len(ranks[int(size)]) and shown == (f"{least}" if least == most else f"{least} to {most}")
    assert len(told) == len(ranks)
    layers, worst = load_lora(tmp_path / "lora"), {}
    for label, bundle in (("without", open_), ("with", closed[0])):
        protected = bundle.protected()
        worst[label] = max(leakage(layer, protected[name]) for name, layer in layers.items())
    assert worst["with"] < 1e-5 < 1e-3 < worst["without"]


def test_threshold_zero_is_plain_dreambooth(tiny_sd1, bundle1, reference, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        plain = train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_threshold", 0)
    assert "Nothing is protected" in caplog.text
    assert "Protecting" not in caplog.text and "directions closed" not in caplog.text
    assert not same(plain, reference)
    assert report(tmp_path / "lora")["leakage"] == {"max": None, "mean": None, "rms": None}
    protected = Bundle.load(bundle1).protected()
    assert max(leakage(layer, protected[name]) for name, layer in load_lora(tmp_path / "lora").items()) > 0.1


def test_timestep_range_protects_that_range(tiny_sd1, bundle1, tmp_path):
    config = Bundle.load(bundle1).config
    last = config["groups"][-1]
    train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_timestep_range", *last["range"])
    alone = Bundle.load(bundle1, every_group=True)
    alone.spectra[JOINT] = alone.spectra[last["name"]]
    inside = alone.protected()
    everywhere = Bundle.load(bundle1).protected()
    layers = {name: layer for name, layer in load_lora(tmp_path / "lora").items() if "to_q" in name}
    # The groups are stored in float16, so the joint of one group, decomposed again, differs by that much.
    assert max(leakage(layer, inside[name]) for name, layer in layers.items()) < 0.05
    assert max(leakage(layer, everywhere[name]) for name, layer in layers.items()) > 0.05


def test_timesteps_are_drawn_uniformly_from_the_familys():
    timesteps, drawn = [49, 99, 499, 949, 999], []
    family = SimpleNamespace(
        denoiser=lambda *_: None,
        loss=lambda args: lambda denoise, noise_scheduler, latents, timesteps, noise: drawn.extend(timesteps.tolist()),
        training_timesteps=lambda noise_scheduler: timesteps,
    )
    args = SimpleNamespace(guidance_scale=None, noise_offset=0)
    batch_loss = trainer.BatchLoss(family, None, None, None, None, 1.0, torch.float32, args)
    batch_loss(torch.zeros(2000, 8, 1, 1), {}, trainer.seeded(0))
    assert len(drawn) == 2000 and set(drawn) == set(timesteps)
    assert all(abs(drawn.count(timestep) / 2000 - 0.2) < 0.03 for timestep in timesteps)


# ---- Flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 1],
        ["--learning_rate", 2e-2],
        ["--scale_lr"],
        ["--train_batch_size", 3],
        ["--gradient_accumulation_steps", 2],
        ["--lr_scheduler", "linear", "--lr_warmup_steps", 0],
        ["--adam_beta1", 0.1],
        ["--adam_beta2", 0.1],
        ["--adam_weight_decay", 5.0],
        ["--adam_epsilon", 1e-2],
        ["--resolution", 48],
        ["--mixed_precision", "bf16"],
        ["--instance_prompt", "a ohwx star"],
        ["--instance_prompt", "a photo of a sks star", "a sks star", "a picture of a sks star"],
        ["--nullspace_threshold", 0.5],
        ["--nullspace_softness", 9e-3],
        ["--nullspace_softness", "inf"],
        ["--nullspace_extra_prompts", "a photo of a star"],
        ["--nullspace_criterion", "percentile", "--nullspace_threshold", 97],
        ["--lora_dropout", 0.5],
        ["--random_flip"],
        ["--repeats", 2],
        ["--snr_gamma", 1],
        ["--noise_offset", 0.5],
        ["--text_encoder_use_attention_mask"],
        ["--lora_layers", "attn2.to_k, attn2.to_v"],
        pytest.param(["--optimizer", "prodigy"], marks=needs("prodigyopt")),
        pytest.param(["--use_8bit_adam"], marks=needs("bitsandbytes")),
    ],
    ids=lambda flags: "-".join(map(str, flags)).replace("--", ""),
)
def test_flag_changes_the_lora_and_keeps_the_guarantee(flags, tiny_sd1, bundle1, reference, tmp_path):
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert not same(tensors, reference)
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


@pytest.mark.parametrize(
    ("shared", "flag"),
    [
        (["--lr_scheduler", "constant_with_warmup"], ["--lr_warmup_steps", 10]),
        (["--lr_scheduler", "polynomial", "--lr_warmup_steps", 0], ["--lr_power", 3]),
        (["--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", 0], ["--lr_num_cycles", 2]),
        (["--adam_epsilon", 1e-2], ["--max_grad_norm", 1e-4]),  # with less, Adam makes up for a clipped gradient
    ],
    ids=lambda flags: flags[0].replace("--", ""),
)
def test_flag_changes_what_another_one_gives(shared, flag, tiny_sd1, bundle1, tmp_path):
    without = train(tiny_sd1, bundle1, tmp_path / "without", *shared)
    assert not same(train(tiny_sd1, bundle1, tmp_path / "with", *shared, *flag), without)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--use_8bit_adam"], marks=needs("bitsandbytes")),
        pytest.param(["--optimizer", "prodigy"], marks=needs("prodigyopt")),
    ],
    ids=["adamw", "8-bit-adamw", "prodigy"],
)
def test_every_optimizer_takes_its_settings(flags):
    flags = [*flags, "--learning_rate", 0.5, "--adam_beta1", 0.1, "--adam_beta2", 0.2]
    args = trainer.parse_args(command_line("m", "b", "o", *flags, "--adam_weight_decay", 0.3, "--adam_epsilon", 0.4))
    (group,) = trainer.make_optimizer([torch.nn.Parameter(torch.zeros(2))], args).param_groups
    assert [group["lr"], *group["betas"], group["weight_decay"], group["eps"]] == [0.5, 0.1, 0.2, 0.3, 0.4]


def test_revision_and_variant(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    """What is asked of the Hub, and that the variant's files are read: here they alone are there, rounded."""
    asked = {}

    def answer_config(load_config):
        def answer(name, **options):
            asked.setdefault(str(name), []).append(options)
            return load_config(tiny_sd1 if name == "some/model" else name, **options)

        return answer

    def answer_files(name, **options):
        asked.setdefault(str(name), []).append(options)
        return tmp_path / "model"

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None).to(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    for kind in (DiffusionPipeline, UNet2DConditionModel):
        monkeypatch.setattr(kind, "load_config", answer_config(kind.load_config))
    monkeypatch.setattr(DiffusionPipeline, "download", answer_files)
    monkeypatch.setattr(model_card, "base_license", lambda *_: None)
    rounded = train("some/model", bundle1, tmp_path / "lora", "--revision", "v2", "--variant", "fp16")
    *configs, files = asked["some/model"]
    assert {options["revision"] for options in asked["some/model"]} == {"v2"} and files["variant"] == "fp16"
    assert len(configs) == 2  # the pipeline's and the UNet's, which tell the type of the model
    assert not same(rounded, reference)


def test_allow_tf32(tiny_sd1, bundle1, reference, tmp_path):
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32  # which runs without the flag left as it was
    try:
        assert same(train(tiny_sd1, bundle1, tmp_path / "lora", "--allow_tf32"), reference)  # it is for GPUs
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False


def test_the_same_command_gives_the_same_lora(tiny_sd1, bundle1, reference, tmp_path):
    assert same(train(tiny_sd1, bundle1, tmp_path / "lora"), reference)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    enabled = []
    original = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda unet: (enabled.append(1), original(unet))
    )
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--gradient_checkpointing")
    assert enabled
    for key in tensors:
        torch.testing.assert_close(tensors[key], reference[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_does_not_disturb_training(precision, tiny_sd1, bundle1, tmp_path):
    flags = ("--mixed_precision", precision, "--max_train_steps", 6, "--num_validation_images", 2)
    validated = train(tiny_sd1, bundle1, tmp_path / "validated", *flags, "--validation_epochs", 1)
    assert len(list((tmp_path / "validated" / "validation").glob("*.png"))) == 2
    picture = Image.open(tmp_path / "validated" / COMPARISON_NAME)
    assert 4 * 256 < picture.height < 5 * 256  # base and tuned for two seeds, below the titles
    undisturbed = train(tiny_sd1, bundle1, tmp_path / "undisturbed", *flags, without=["--validation_prompt"])
    assert not (tmp_path / "undisturbed" / "validation").exists()
    assert same(validated, undisturbed)
    assert all(tensor.dtype == torch.float32 for tensor in validated.values())


def test_nothing_that_was_learned_is_lost_for_want_of_memory_to_draw(
    tiny_sd1, bundle1, reference, tmp_path, monkeypatch, caplog
):
    """Neither in training nor at the end; report and card are there, without pictures."""
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output, "--max_train_steps", 1)
    assert (output / COMPARISON_NAME).exists()

    of_mps = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    known = [of_mps] * should_reduce_batch_size(of_mps)  # not to earlier versions of accelerate
    kinds = cycle([torch.OutOfMemoryError("no room"), *known])

    def no_room(*args, **kwargs):
        raise next(kinds)

    monkeypatch.setattr(validation, "draw", no_room)
    assert same(train(tiny_sd1, bundle1, output, "--validation_epochs", 1), reference)
    assert "Memory does not suffice for drawing at step" in caplog.text and "saved without pictures" in caplog.text
    assert not (output / COMPARISON_NAME).exists() and (output / REPORT_NAME).exists()
    card = (output / "README.md").read_text()
    assert "![" not in card and "Gallery" not in card and "widget" not in card and "# lora\n" in card


def test_checkpoints_that_cannot_be_drawn_cost_their_sheet_alone(tiny_sd1, bundle1, tmp_path, monkeypatch, caplog):
    def draw(pipeline, prompts, args, description, count=None):
        if "checkpoint" in description:
            raise torch.OutOfMemoryError("no room")
        return drawn(pipeline, prompts, args, description, count)

    drawn = validation.draw
    monkeypatch.setattr(validation, "draw", draw)
    train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 2, "--compare_checkpoints")
    assert "there is no sheet of them" in caplog.text
    assert (tmp_path / "lora" / COMPARISON_NAME).exists() and not (tmp_path / "lora" / CHECKPOINTS_NAME).exists()


def test_other_faults_in_drawing_are_no_want_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), validation.while_memory_suffices("drawing"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_what_was_learned_is_kept_where_its_pictures_fail(tiny_sd1, bundle1, reference, tmp_path, monkeypatch, caplog):
    """A checkpoint of the last step is there, and drawing is all that is left to do from it."""
    output, steps = tmp_path / "lora", []

    def fail(*args, **kwargs):
        raise OSError("a library's own fault")

    with monkeypatch.context() as patch:
        patch.setattr(validation, "draw", fail)
        with pytest.raises(OSError, match="a library's own fault"):
            train(tiny_sd1, bundle1, output, without=["--validation_prompt"])
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3"] and not (output / LORA_NAME).exists()
    assert "checkpoint-3 is written. Once this is mended, go on from there with" in caplog.text
    monkeypatch.setattr(stable_diffusion, "diffusion_loss", lambda *args, **kwargs: steps.append(1))
    assert same(train(tiny_sd1, bundle1, output, "--resume_from_checkpoint", "latest"), reference) and not steps


def test_pictures_are_drawn_in_25_steps_as_the_bundle_was(tiny_sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "num_inference_steps", SD_STEPS)
    drawn, call = [], StableDiffusionPipeline.__call__

    def record(pipeline, *args, **kwargs):
        drawn.append((type(pipeline.scheduler), kwargs["num_inference_steps"], kwargs["guidance_scale"]))
        return call(pipeline, *args, **kwargs)

    bundle = make_bundle(tiny_sd1, tmp_path / "bundle", "--guidance_scale", 3)
    monkeypatch.setattr(trainer, "check_against_model", lambda *_: None)  # which draws, too
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", record)
    train(tiny_sd1, bundle, tmp_path / "lora", "--validation_epochs", 1)
    assert drawn == [(DPMSolverMultistepScheduler, 25, 3)] * 4  # base and tuned, in training and at the end


def test_rank(tiny_sd1, bundle1, tmp_path):
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--rank", 3)
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}


def test_num_train_epochs(tiny_sd1, bundle1, tmp_path):
    """Five pictures in batches of two are three steps an epoch."""
    train(tiny_sd1, bundle1, tmp_path / "lora", "--num_train_epochs", 2, without=["--max_train_steps"])
    assert report(tmp_path / "lora")["training"]["max_train_steps"] == 6


def dataset_of(picture, *flags, captions=(0,)):
    args = trainer.parse_args(command_line("m", "b", "o", *flags))
    return trainer.InstanceDataset([picture], [captions], args)


def test_center_crop_and_random_crop():
    picture = Image.linear_gradient("L").resize((32, 64)).convert("RGB")
    centred, random = dataset_of(picture, "--center_crop"), dataset_of(picture)
    assert centred[0][0].shape == random[0][0].shape == (3, 32, 32)
    first = random[0][0]
    assert torch.equal(first, random[0][0])
    random.set_epoch(1)
    assert not torch.equal(first, random[0][0])
    expected = VaeImageProcessor(do_resize=False).preprocess(picture.crop((0, 16, 32, 48)))[0]
    assert torch.equal(centred[0][0], expected)
    assert centred[0][0].min() >= -1 and centred[0][0].max() <= 1


def test_instance_prompts_take_turns():
    """Each repeat of a picture in each epoch draws one, the same whenever it is asked."""
    picture = Image.new("RGB", (32, 32))
    one, several = (dataset_of(picture, "--repeats", 100, captions=captions) for captions in ([4], [4, 7, 9]))
    assert {one[index][1] for index in range(100)} == {4}
    drawn = [several[index][1] for index in range(100)]
    assert all(20 < drawn.count(caption) < 50 for caption in (4, 7, 9))
    assert drawn == [several[index][1] for index in range(100)]
    several.set_epoch(1)
    assert drawn != [several[index][1] for index in range(100)]
    several.cache(lambda pixel_values: pixel_values)
    assert {several[index][1] for index in range(100)} == {4, 7, 9}


def test_defaults_are_those_of_the_reference():
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    args = vars(trainer.parse_args([*line, "--instance_prompt", "p"]))
    expected = {
        "resolution": None, "train_batch_size": 4, "num_train_epochs": 1, "gradient_accumulation_steps": 1,
        "learning_rate": 5e-4, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "rank": 4, "checkpointing_steps": 500, "num_validation_images": 4, "validation_epochs": 50,
        "report_to": "tensorboard", "logging_dir": "logs", "nullspace_criterion": "energy",
        "nullspace_threshold": 0.9, "nullspace_softness": 1e-5, "nullspace_extra_prompts": None,
        "nullspace_timestep_range": None,
        "revision": None, "variant": None, "tokenizer_name": None, "validation_prompt": None, "seed": None,
        "center_crop": False, "train_text_encoder": False, "max_train_steps": None, "checkpoints_total_limit": None,
        "resume_from_checkpoint": None, "gradient_checkpointing": False, "scale_lr": False,
        "dataloader_num_workers": 0, "use_8bit_adam": False, "push_to_hub": False, "hub_token": None,
        "hub_model_id": None, "allow_tf32": False, "mixed_precision": None, "local_rank": -1,
        "enable_xformers_memory_efficient_attention": False, "pre_compute_text_embeddings": False,
        "tokenizer_max_length": None, "text_encoder_use_attention_mask": False, "lora_dropout": 0.0,
        "image_interpolation_mode": "lanczos", "lora_alpha": 4, "optimizer": "adamw", "repeats": 1,
        "upcast_before_saving": True,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


def test_help_is_grouped_and_fits_in_100_columns(capsys):
    with pytest.raises(SystemExit):
        trainer.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {"null space:", "LoRA:", "pictures:", "training:", "publishing:"} <= set(lines)
    first = lines[lines.index("what most trainings name:") : lines.index("model:")]
    assert sum(line.startswith("  --") for line in first) == 10
    assert not any(flag in line for flag in settling.REPLACED for line in lines)


@pytest.mark.parametrize("script", ["train_dreambooth_nullspace.py", "build_nullspace.py"])
def test_the_header_for_uv_names_what_the_script_imports(script):
    """PEP 723; of what is imported only where a flag asks for it, `require` tells."""
    (header,) = re.findall(r"^# /// script\n(.*?)^# ///$", (README.parent / script).read_text(), re.S | re.M)
    declared = set(re.findall(r'"([a-z_]+)[^"]*"', header))
    imported, waiting, own = set(), {Path(script).stem}, {"nullspace", "nullspace_utils", "build_nullspace"}
    while waiting:
        module = waiting.pop()
        imported.add(module)
        path = README.parent / f"{module.replace('.', '/')}.py"
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if path.is_file() and (module.partition(".")[0] in own or module == Path(script).stem):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
                waiting |= set(names) - imported
    imported = {name.partition(".")[0].replace("PIL", "pillow").replace("yaml", "pyyaml") for name in imported}
    imported -= {
        *sys.stdlib_module_names,
        *own,
        Path(script).stem,
        "bitsandbytes",
        "prodigyopt",
        "wandb",
        "pillow_heif",
    }
    assert declared - {"tensorboard"} == imported  # that is what accelerate logs to by default


@pytest.mark.parametrize("flag", settling.REPLACED)
def test_flags_of_prior_preservation_name_their_replacement(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.parse_args(command_line("m", "b", "o", flag, "1"))
    assert caught.value.code == 1
    assert f"{flag} belongs to prior preservation" in capsys.readouterr().err
    assert settling.REPLACED[flag].startswith("--")


def test_image_interpolation_mode_random_flip_and_repeats():
    picture = Image.linear_gradient("L").rotate(90).resize((40, 40)).convert("RGB")
    pictures = {mode: dataset_of(picture, "--image_interpolation_mode", mode)[0][0] for mode in trainer.INTERPOLATION}
    assert not torch.equal(pictures["lanczos"], pictures["nearest"])
    assert torch.equal(pictures["nearest"], pictures["nearest_exact"])
    assert torch.equal(pictures["lanczos"], dataset_of(picture)[0][0])
    mirrored = dataset_of(picture, "--random_flip", "--repeats", 40)
    assert len(mirrored) == 40
    flips = sum(torch.equal(mirrored[index][0], pictures["lanczos"].flip(-1)) for index in range(40))
    assert flips + sum(torch.equal(mirrored[index][0], pictures["lanczos"]) for index in range(40)) == 40
    assert 10 <= flips <= 30


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_snr_gamma_weighs_the_loss(kind):
    """Against min(SNR, gamma) / SNR, or / (SNR + 1), on a model that predicts nothing."""
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timesteps = torch.tensor([10, 500, 990])
    unet = lambda noisy, timesteps: SimpleNamespace(sample=torch.zeros_like(noisy))  # noqa: E731
    actual = diffusion_loss(unet, scheduler, latents, timesteps, noise, snr_gamma=5.0)
    kept = scheduler.alphas_cumprod[timesteps].double()
    snr = kept / (1 - kept)
    assert snr.max() > 5 > snr.min()
    keep, lose = kept.sqrt().view(3, 1, 1, 1), (1 - kept).sqrt().view(3, 1, 1, 1)
    target = noise if kind == "epsilon" else keep * noise - lose * latents
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    expected = (target.double().pow(2).mean(dim=(1, 2, 3)) * weights).mean()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0)


def test_noise_offset_moves_whole_channels():
    latents = torch.zeros(200, 4, 8, 8)
    plain, moved = (draw_noise(latents, offset, trainer.seeded(0)) for offset in (0, 2.0))
    difference = moved - plain
    assert (difference - difference[:, :, :1, :1]).abs().max() < 1e-5
    assert abs(difference[:, :, 0, 0].std().item() - 2) < 0.2


def test_lora_alpha_scales_the_lora_wherever_it_is_read(tiny_sd1, bundle1, reference, tmp_path):
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--lora_alpha", 8)
    assert not same(tensors, reference)
    assert {layer.scale for layer in load_lora(tmp_path / "lora").values()} == {4.0}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lora")
    layers = [module for module in pipeline.unet.modules() if hasattr(module, "lora_A")]
    assert layers and all(list(module.scaling.values()) == [4.0] for module in layers)


def test_tokenizer_name_and_tokenizer_max_length(tiny_sd1, bundle1, reference, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd1, subfolder="tokenizer", model_max_length=8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = train(tiny_sd1, bundle1, tmp_path / "named", "--tokenizer_name", tmp_path / "tokenizer")
    assert not same(named, reference)
    assert same(named, train(tiny_sd1, bundle1, tmp_path / "short", "--tokenizer_max_length", 8))
    for flags, message in (
        (("--tokenizer_name", tmp_path / "none"), "--tokenizer_name .* cannot be had"),
        (("--tokenizer_max_length", 1000), "more than the text encoder's"),
    ):
        with pytest.raises(NullSpaceError, match=message):
            train(tiny_sd1, bundle1, tmp_path / "lora", *flags)


@pytest.mark.parametrize("missing", ["unet/diffusion_pytorch_model.safetensors", "text_encoder", "scheduler"])
def test_a_damaged_model_is_refused(tiny_sd1, bundle1, tmp_path, missing):
    model = shutil.copytree(tiny_sd1, tmp_path / "model")
    (model / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(NullSpaceError, match=f"The base model {model} cannot be loaded"):
        train(model, bundle1, tmp_path / "lora")


def test_dataloader_num_workers_load_the_same(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    made = []

    class Recorded(dataset_room.DataLoader):
        def __init__(self, *args, **kwargs):
            made.append(kwargs["num_workers"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(dataset_room, "DataLoader", Recorded)
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--dataloader_num_workers", 2)
    assert made == [2]
    assert same(tensors, reference)
    train(tiny_sd1, bundle1, tmp_path / "lora", "--dataloader_num_workers", 2, "--cache_latents")
    assert made == [2, 0]


def test_base_and_lora_are_drawn_with_one_vae(tiny_sd1, bundle1, tmp_path, monkeypatch):
    """With a word, which the base model's own tokenizer does not know, and a VAE that training has let go of."""
    made, load = [], validation.load_pipeline

    def load_pipeline(*args, **kwargs):
        made.append(load(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(validation, "load_pipeline", load_pipeline)
    flags = ("--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", "a sks-star")
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--cache_latents", "--validation_epochs", 1)
    tuned, base = made[:2]
    assert tuned.vae is base.vae and tuned.tokenizer is not base.tokenizer


def test_what_is_encoded_before_training_frees_its_model(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    """--pre_compute_text_embeddings and --cache_latents: validation has to load the models anew."""
    kept, encoded, loaded = [], [], {}
    load_whole = stable_diffusion.load_whole

    def load(kind, *args, **kwargs):
        model = load_whole(kind, *args, **kwargs)
        loaded[kind.__name__] = weakref.ref(model)
        return model

    monkeypatch.setattr(stable_diffusion, "load_whole", load)

    def alive():
        return {name for name, model in loaded.items() if model() is not None}

    in_training, in_drawing, get_scheduler, draw_saved = [], [], optimizers.get_scheduler, results.draw_saved
    monkeypatch.setattr(
        optimizers,
        "get_scheduler",
        lambda *args, **kwargs: in_training.append(alive()) or get_scheduler(*args, **kwargs),
    )
    monkeypatch.setattr(results, "draw_saved", lambda *args: in_drawing.append(alive()) or draw_saved(*args))
    load_pipeline, encode = validation.load_pipeline, trainer.encode_pictures
    monkeypatch.setattr(
        validation,
        "load_pipeline",
        lambda *args, **kwargs: (kept.append(set(kwargs)), load_pipeline(*args, **kwargs))[1],
    )
    for room in (trainer, batch_loss):
        monkeypatch.setattr(room, "encode_pictures", lambda *args: (encoded.append(1), encode(*args))[1])
    flags = ("--validation_epochs", 1, "--center_crop")
    plain = train(tiny_sd1, bundle1, tmp_path / "plain", *flags)
    assert same(plain, reference)
    assert kept == [{"unet", "tokenizer", "text_encoder", "vae"}, set()] and len(encoded) == 3  # one a step
    kept.clear(), encoded.clear()
    freed = train(tiny_sd1, bundle1, tmp_path / "freed", *flags, "--pre_compute_text_embeddings")
    assert same(freed, reference)
    assert kept == [{"unet", "vae"}, set()]
    kept.clear(), encoded.clear()
    cached = train(tiny_sd1, bundle1, tmp_path / "cached", *flags, "--cache_latents", "--max_train_steps", 3)
    assert kept == [{"unet", "tokenizer", "text_encoder"}, set()] and len(encoded) == 5  # one a picture
    for key in cached:  # encoded one by one rather than in batches, so not bit for bit
        torch.testing.assert_close(cached[key], reference[key], rtol=1e-2, atol=1e-4)
    both = ("--pre_compute_text_embeddings", "--cache_latents", "--nullspace_extra_prompts", "a star")
    train(tiny_sd1, bundle1, tmp_path / "both", *flags, *both)
    unet, text_encoder, vae = "UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"
    assert in_training == [{unet, text_encoder, vae}, {unet, vae}, {unet, text_encoder}, {unet}]
    assert in_drawing == [set()] * 4


def test_what_is_unusual_is_said(tiny_sd1, bundle1, reference, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert same(train(tiny_sd1, bundle1, tmp_path / "usual"), reference)
    said = (
        "--resolution 64 is far from the 32",
        "--num_train_epochs 1 is 3 steps here",
        "holds checkpoint-7 of an earlier",
    )
    assert not any(sentence in caplog.text for sentence in said)
    assert "5 pictures of 256 x 256 pixels, trained at 32 x 32." in caplog.text
    assert "1 prompt: 'a photo of a sks star'" in caplog.text
    (tmp_path / "lora" / "checkpoint-7").mkdir(parents=True)
    train(tiny_sd1, bundle1, tmp_path / "lora", "--resolution", 64, without=["--max_train_steps"])
    assert all(sentence in caplog.text for sentence in said)
    train(tiny_sd1, bundle1, tmp_path / "more", "--checkpointing_steps", 3)
    assert "Saved checkpoint-3" in caplog.text and "left to train" not in caplog.text
    assert same(train(tiny_sd1, bundle1, tmp_path / "more", "--resume_from_checkpoint", "latest"), reference)
    assert "Nothing is left to train" in caplog.text and "partial" not in caplog.text


@pytest.mark.parametrize("flags", [[], ["--cache_latents"]], ids=["encoded", "cached"])
def test_noise_levels_are_not_rounded_to_16_bits(flags, tiny_sd1, bundle1, tmp_path, monkeypatch):
    """In bfloat16 the first timesteps would have no noise at all."""
    seen, denoised, loss = [], [], stable_diffusion.diffusion_loss

    def record(denoise, noise_scheduler, latents, timesteps, noise, **others):
        seen.append({latents.dtype, noise.dtype})
        return loss(denoise, noise_scheduler, latents, timesteps, noise, **others)

    def look(unet, given, *rest, original=UNet2DConditionModel.forward, **others):
        denoised.append(given.dtype)
        return original(unet, given, *rest, **others)

    monkeypatch.setattr(stable_diffusion, "diffusion_loss", record)
    monkeypatch.setattr(UNet2DConditionModel, "forward", look)
    monkeypatch.setattr(results, "draw_saved", lambda *args: {})
    line = ("--mixed_precision", "bf16", "--max_train_steps", 1)
    train(tiny_sd1, bundle1, tmp_path / "lora", *line, *flags, without=["--validation_prompt"])
    assert seen == [{torch.float32}] and set(denoised) == {torch.bfloat16}


def test_local_rank_stands_in_for_the_environments(monkeypatch):
    def stop(**kwargs):
        raise ValueError("far enough")

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(preparation, "Accelerator", stop)
    for before, after in (("1", "1"), (None, "3")):
        os.environ.pop("LOCAL_RANK") if before is None else os.environ.update(LOCAL_RANK=before)
        with pytest.raises(NullSpaceError, match="far enough"):
            trainer.main(trainer.parse_args(command_line("m", "b", "o", "--local_rank", 3)))
        assert os.environ["LOCAL_RANK"] == after


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--use_8bit_adam"], "bitsandbytes"),
        (["--optimizer", "prodigy"], "prodigyopt"),
        (["--enable_xformers_memory_efficient_attention"], "xformers"),
        (["--report_to", "wandb"], "wandb"),
    ],
)
def test_a_missing_package_is_named_before_the_work(flags, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(name, *rest) if name != package else None)
    with pytest.raises(NullSpaceError, match=f"{flags[0]}.* needs {package}.*pip install {package}"):
        trainer.main(trainer.parse_args(command_line(NOWHERE, "b", "o", *flags)))


def test_xformers_is_turned_on(tiny_sd1, bundle1, tmp_path, monkeypatch):
    """With stand-ins, since the package needs a GPU to run; where it does not run, an error says so."""
    turned_on = []
    monkeypatch.setattr(preparation, "require", lambda package, flag: None)

    def turn_on(unet):
        turned_on.append(unet)
        if len(turned_on) > 1:
            raise ValueError("only available for GPU")

    monkeypatch.setattr(UNet2DConditionModel, "enable_xformers_memory_efficient_attention", turn_on)
    train(tiny_sd1, bundle1, tmp_path / "lora", "--enable_xformers_memory_efficient_attention")
    assert len(turned_on) == 1
    with pytest.raises(NullSpaceError, match="fails here .only available for GPU"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--enable_xformers_memory_efficient_attention")


def test_validation_prompts_steps_and_comparison(tiny_sd1, bundle1, tmp_path):
    output = tmp_path / "lora"
    flags = ("--validation_prompt", "a ring", "a moon", "--validation_steps", 2, "--max_train_steps", 5)
    train(tiny_sd1, bundle1, output, *flags, "--no-compare_with_base")
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["000002.png", "000004.png"]
    pictures = [output / "validation" / "000004.png", output / COMPARISON_NAME]
    for picture, step in zip(map(Image.open, pictures), "45", strict=True):  # three prompts, the tuned model alone
        assert picture.width > 3 * 256 and 256 < picture.height < 2 * 256
        assert picture.info["seed"] == "0" and picture.info["step"] == step
    assert "base" not in trainer.parse_args(command_line("m", "b", "o")).validation_prompt


def test_trackers_get_losses_norms_and_leakage(tiny_sd1, bundle1, tmp_path):
    flags = ("--report_to", "tensorboard", "--checkpointing_steps", 2, "--max_train_steps", 3)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--logging_dir", "events")
    events = EventAccumulator(str(next((tmp_path / "lora" / "events").rglob("events.*")).parent)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("loss", "lr", "grad_norm", "grad_norm_projected"):
        assert steps[tag] == [1, 2, 3]
    for tag in ("leakage/max", "leakage/mean", "predicted_drift/max", "predicted_drift/mean", "unprotected_layers"):
        assert steps[tag] == [2, 3]  # a checkpoint, and the end
    before, after = ([event.value for event in events.Scalars(tag)] for tag in ("grad_norm", "grad_norm_projected"))
    assert all(0 < allowed <= norm * (1 + 1e-6) for norm, allowed in zip(before, after, strict=True))
    assert after[-1] < before[-1]
    assert events.Scalars("leakage/max")[-1].value == pytest.approx(report(tmp_path / "lora")["leakage"]["max"])
    assert set(events.Tags()["images"]) == {"validation", "comparison"}
    # They are published with the rest, and name no folder of this machine
    logs = [path for path in (tmp_path / "lora" / "events").rglob("*") if path.is_file()]
    assert any(path.name == "hparams.yml" for path in logs)
    assert not any(bytes(folder.parent) in path.read_bytes() for path in logs for folder in (tmp_path, tiny_sd1))


def test_the_progress_bar_has_leakage_and_drift(tiny_sd1, bundle1, tmp_path, capsys):
    """Those of the last checkpoint, as its LoRA's audit has them."""
    train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 2, "--max_train_steps", 3)
    said = capsys.readouterr().err
    leakage, drift = map(float, re.findall("loss=[^,]*, lr=[^,]*, leakage=([^,]+), drift=([^]]+)]", said)[-1])
    bundle, checkpoint = Bundle.load(bundle1), load_lora(tmp_path / "lora" / "checkpoint-2")
    found = audit(checkpoint, bundle, UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet"))
    assert leakage == pytest.approx(found["leakage"]["max"], rel=0.1)
    assert drift == pytest.approx(found["predicted_drift"]["rms"], rel=0.1)


def test_wandb_gets_the_pictures(monkeypatch):
    """With stand-ins for the package and the tracker that accelerate makes of it."""
    logged, picture = [], Image.new("RGB", (4, 4))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda picture: ("wandb", picture)))
    tracker = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
    logs.log_picture(SimpleNamespace(trackers=[tracker]), "validation", picture, 7)
    assert logged == [({"validation": ("wandb", picture)}, 7)]


# ---- A dataset -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A folder of pictures with captions, one of them missing, and a configuration with only one picture."""
    folder = tmp_path / "dataset"
    shutil.copytree(INSTANCES, folder / "data", ignore=BESIDE)
    names = sorted(path.name for path in (folder / "data").glob("*.png"))
    rows = [["file_name", "caption"], *[[name, f"sks number {name}"] for name in names[:-1]], [names[-1], ""]]
    with open(folder / "data" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "single").mkdir()
    shutil.copy(INSTANCES / "0.png", folder / "single")
    configs = [("all", "data/*"), ("one", "single/*")]
    lines = [f"- config_name: {name}\n  data_files: {json.dumps(files)}" for name, files in configs]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    return folder


def test_a_dataset_with_captions(dataset, tiny_sd1, bundle1, reference, tmp_path):
    flags = ["--dataset_name", dataset, "--dataset_config_name", "all", "--cache_dir", tmp_path / "cache"]
    without = ["--instance_data_dir"]
    line = command_line("m", "b", "o", *flags, "--caption_column", "caption", without=without)
    pictures, captions = read_instances(trainer.parse_args(line))
    assert len(pictures) == 5 and captions[:2] == [["sks number 0.png"], ["sks number 1.png"]]
    assert captions[-1] == ["a photo of a sks star"]  # the instance prompt, for want of a caption
    assert any((tmp_path / "cache").iterdir())
    captioned = train(tiny_sd1, bundle1, tmp_path / "captioned", *flags, "--caption_column", "caption", without=without)
    assert not same(captioned, reference)
    assert report(tmp_path / "captioned")["leakage"]["max"] < 1e-5
    assert same(train(tiny_sd1, bundle1, tmp_path / "plain", *flags, without=without), reference)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_config_name", "all", "--image_column", "photo"], "no column 'photo'; choose a --image_column"),
        (["--dataset_config_name", "all", "--caption_column", "text"], "no column 'text'; choose a --caption_column"),
        (["--dataset_config_name", "all", "--image_column", "caption"], "not a picture"),
        (["--dataset_config_name", "none"], "cannot be read"),
        (["--dataset_name", "{tmp}/nothing"], "cannot be read"),
    ],
)
def test_a_dataset_that_does_not_fit(flags, message, dataset, tmp_path):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    flags = ["--dataset_name", dataset, "--cache_dir", tmp_path / "cache", *flags]
    line = command_line(NOWHERE, "b", "o", *flags, without=["--instance_data_dir"])
    with pytest.raises(NullSpaceError, match=message) as caught:
        trainer.main(trainer.parse_args(line))
    assert "\n" not in str(caught.value)


def test_dataset_config_name_chooses_the_pictures(dataset, tmp_path):
    flags = ["--dataset_name", dataset, "--dataset_config_name", "one", "--cache_dir", tmp_path / "cache"]
    args = trainer.parse_args(command_line("m", "b", "o", *flags, without=["--instance_data_dir"]))
    assert len(read_instances(args)[0]) == 1


# ---- The text encoder, and layers that no bundle covers --------------------------------------------------------------


@pytest.fixture(scope="module")
def with_text_encoder(tiny_sd1, bundle1, tmp_path_factory):
    """A run that trains the text encoder too: its folder."""
    folder = tmp_path_factory.mktemp("with-text-encoder") / "lora"
    train(tiny_sd1, bundle1, folder, "--train_text_encoder", "--validation_epochs", 1)
    return folder


def embed(pipeline, prompt):
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def test_train_text_encoder_leaves_protected_prompts(with_text_encoder, tiny_sd1, bundle1, tmp_path):
    """As the loaded pipeline encodes them, far less than without protection; the file is one that diffusers reads."""
    keys = load_file(with_text_encoder / LORA_NAME).keys()
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight" in keys
    layers = load_lora(with_text_encoder)
    protected = Bundle.load(bundle1, text_encoder=True).protected()
    assert sum(name.startswith("text_encoder.") for name in layers) == 8
    assert layers.keys() == protected.keys()
    assert max(leakage(layer, protected[name]) for name, layer in layers.items()) < 1e-5
    assert len(report(with_text_encoder)["layers"]) == len(layers) and not report(with_text_encoder)["unprotected"]
    train(tiny_sd1, bundle1, tmp_path / "plain", "--train_text_encoder", "--nullspace_threshold", 0)

    changes = []
    for folder in (None, with_text_encoder, tmp_path / "plain"):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
        if folder is not None:
            pipeline.load_lora_weights(folder)
        changes.append([embed(pipeline, "a red star"), embed(pipeline, "a photo of a sks star")])
    base, kept, plain = changes
    drift = [((tuned[0] - base[0]).norm() / base[0].norm()).item() for tuned in (kept, plain)]
    assert drift[0] < 0.05 * drift[1], drift
    assert (kept[1] - base[1]).norm() > 0  # the subject's prompt does move


def test_train_text_encoder_with_gradient_checkpointing(with_text_encoder, tiny_sd1, bundle1, tmp_path, monkeypatch):
    turned_on = []
    enable = CLIPTextModel.gradient_checkpointing_enable
    monkeypatch.setattr(
        CLIPTextModel,
        "gradient_checkpointing_enable",
        lambda model, *args: (turned_on.append(1), enable(model, *args))[1],
    )
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--train_text_encoder", "--gradient_checkpointing")
    assert turned_on
    expected = load_file(with_text_encoder / LORA_NAME)
    for key in tensors:
        torch.testing.assert_close(tensors[key], expected[key], rtol=1e-2, atol=1e-4)


def test_the_text_encoders_file_is_read_only_where_it_is_needed(tiny_sd1, bundle1, reference, tmp_path):
    shutil.copytree(bundle1, tmp_path / "bundle")
    (tmp_path / "bundle" / "text_encoder.safetensors").unlink()
    assert same(train(tiny_sd1, tmp_path / "bundle", tmp_path / "lora"), reference)
    with pytest.raises(NullSpaceError, match="has no text_encoder.safetensors"):
        train(tiny_sd1, tmp_path / "bundle", tmp_path / "lora", "--train_text_encoder")


def test_a_bundle_of_another_text_encoder_is_refused(tiny_sd1, bundle1, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    find_module("text_encoder.encoder.layers.1.self_attn.v_proj", None, text_encoder=pipeline.text_encoder).weight.data[
        0, 0
    ] += 1
    pipeline.save_pretrained(tmp_path / "finetuned")
    with pytest.raises(NullSpaceError, match="fingerprints differ"):
        train(tmp_path / "finetuned", bundle1, tmp_path / "lora", "--train_text_encoder")


def test_an_unprotected_text_encoder_is_trained_only_on_demand(tiny_sd2, bundle2, tmp_path):
    line = command_line(NOWHERE, bundle2, tmp_path / "lora", "--train_text_encoder")
    with pytest.raises(NullSpaceError, match="--with_text_encoder, or pass --allow_unprotected"):
        trainer.main(trainer.parse_args(line))
    train(tiny_sd2, bundle2, tmp_path / "lora", "--train_text_encoder", "--allow_unprotected")
    found = report(tmp_path / "lora")
    assert len(found["unprotected"]) == 8 and all(name.startswith("text_encoder.") for name in found["unprotected"])
    assert found["leakage"]["max"] < 1e-5  # of the layers that the bundle covers
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "partly unprotected" in card and "self_attn.q_proj (2)" in card


def test_lora_layers(tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "covered", "--lora_layers", "attn2.to_k,attn2.to_v")
    assert {name.rpartition(".")[2] for name in load_lora(tmp_path / "covered")} == {"to_k", "to_v"}
    for ending, message in (("to_q", "to train unprotected .attn1.to_q"), ("to_x", "no layer of the UNet ends with")):
        with pytest.raises(NullSpaceError, match=message):
            train(tiny_sd1, bundle1, tmp_path / "lora", "--lora_layers", ending)
    flags = ("--lora_layers", "to_q,proj_in", "--allow_unprotected")
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    found = report(tmp_path / "lora")
    covered = set(Bundle.load(bundle1).config["modules"])
    trained = {row["module"] for row in found["layers"]}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert {name for name, module in pipeline.unet.named_modules() if hasattr(module, "lora_A")} == trained
    assert set(found["unprotected"]) == trained - covered != set() and trained & covered
    assert found["leakage"]["max"] < 1e-5
    assert f"{len(found['unprotected'])} are" in (tmp_path / "lora" / "README.md").read_text()


def test_lora_layers_that_are_all_unprotected(tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "lora", "--lora_layers", "attn1.to_q", "--allow_unprotected")
    assert report(tmp_path / "lora")["leakage"]["max"] is None
    assert "without protection" in (tmp_path / "lora" / "README.md").read_text()


# ---- Precisions and compilation --------------------------------------------------------------------------------------


def test_a_lora_saved_in_half_precision_leaks_by_its_rounding(tiny_sd1, bundle1, tmp_path):
    flags = ("--mixed_precision", "bf16", "--no-upcast_before_saving", "--train_text_encoder")
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 1e-5 < report(tmp_path / "lora")["leakage"]["max"] < 2**-8  # the unit roundoff of bfloat16


def worst_leakage(folder, bundle):
    """Of all layers of a saved LoRA, each of which must have moved: one that did not would not leak anyhow."""
    protected, layers = Bundle.load(bundle, text_encoder=True).protected(), load_lora(folder)
    assert all(layer.up.any() for layer in layers.values())
    return max(leakage(layer, protected[name]) for name, layer in layers.items())


@pytest.fixture
def any_rank(monkeypatch):
    """The tiny model's layers are too small for as many numbers as 8-bit optimizers begin at."""
    monkeypatch.setattr(adapters, "rank_fault", lambda rank, shapes: None)


OPTIMIZERS = {
    "adamw": [],
    # Only from 4,096 numbers on are its states of 8 bits
    "8-bit-adamw": ["--use_8bit_adam", "--rank", 128],
    "prodigy": ["--optimizer", "prodigy", "--learning_rate", 1],
}


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        pytest.param("8-bit-adamw", marks=needs("bitsandbytes")),
        pytest.param("prodigy", marks=needs("prodigyopt")),
    ],
)
def test_every_optimizer_in_every_precision_keeps_the_guarantee(
    optimizer, precision, tiny_sd1, bundle1, tmp_path, any_rank, caplog
):
    """UNet and text encoder, from the file; the checkpoint shows that the optimizer was that one.

    Without a GPU, accelerate's fp16 does not scale the loss: the next test does.
    """
    flags = ("--mixed_precision", precision, "--train_text_encoder", "--max_train_steps", 6, "--checkpointing_steps", 6)
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output, *flags, *OPTIMIZERS[optimizer])
    assert ("many times slower in fp16" in caplog.text) == (precision == "fp16")
    assert worst_leakage(output, bundle1) < 1e-5
    state = torch.load(output / "checkpoint-6" / "optimizer.bin", weights_only=False)
    tensors = [leaf for leaf in tree_leaves(state["state"]) if torch.is_tensor(leaf)]
    assert (torch.uint8 in {tensor.dtype for tensor in tensors}) == (optimizer == "8-bit-adamw")
    assert ("d" in state["param_groups"][0]) == (optimizer == "prodigy")


class ScalingAccelerator(Accelerator):
    """Casts and scales the loss for fp16 as on a GPU, which accelerate leaves out on a CPU, though torch can do it."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**22)


def test_fp16_with_a_scaled_loss_keeps_the_guarantee(tiny_sd1, bundle1, tmp_path, monkeypatch):
    """Over steps that overflow and are skipped, and over a resumption."""
    monkeypatch.setattr(preparation, "Accelerator", ScalingAccelerator)
    flags = ("--mixed_precision", "fp16", "--train_text_encoder", "--max_train_steps", 8, "--checkpointing_steps", 4)
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert worst_leakage(tmp_path / "lora", bundle1) < 1e-5
    scales = [torch.load(tmp_path / "lora" / f"checkpoint-{step}" / "scaler.pt")["scale"] for step in (4, 8)]
    assert 2**14 < scales[1] <= scales[0] < 2**22  # halved by each step that was skipped, by some of them
    assert same(
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--resume_from_checkpoint", "checkpoint-4"), tensors
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_checkpointing"],
        ["--gradient_accumulation_steps", 2, "--repeats", 2],
        ["--lora_dropout", 0.5],
        ["--gradient_checkpointing", "--gradient_accumulation_steps", 2, "--lora_dropout", 0.5]
        + ["--mixed_precision", "fp16", "--cache_latents", "--snr_gamma", 5, "--noise_offset", 0.1],
    ],
    ids=lambda flags: "-".join(map(str, flags)).replace("--", ""),
)
def test_every_mode_keeps_the_guarantee(flags, tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "lora", "--train_text_encoder", "--max_train_steps", 6, *flags)
    assert worst_leakage(tmp_path / "lora", bundle1) < 1e-5


def test_a_compiled_unet_stays_in_the_null_space(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    """Wrapped as accelerate's dynamo configuration does, without generating code, which takes minutes."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = []
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: (compiled.append(1), compile_model(model, **how))[1])
    flags = ("--checkpointing_steps", 2, "--validation_epochs", 1)
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert compiled
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5
    for key in tensors:
        torch.testing.assert_close(tensors[key], reference[key], rtol=1e-2, atol=1e-4)
    resumed = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--resume_from_checkpoint", "checkpoint-2")
    assert same(resumed, tensors)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gradient_accumulation_steps", 2],
        ["--train_text_encoder", "--lora_dropout", 0.3, "--random_flip", "--noise_offset", 0.1, "--snr_gamma", 5],
        ["--cache_latents", "--random_flip", "--repeats", 2, "--dataloader_num_workers", 1],
        pytest.param(["--optimizer", "prodigy"], marks=needs("prodigyopt")),
        # Only from 4,096 numbers on are its states of 8 bits
        pytest.param(["--use_8bit_adam", "--rank", 128], marks=needs("bitsandbytes")),
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_resuming_gives_what_an_undisturbed_run_gives(flags, tiny_sd1, bundle1, tmp_path, any_rank):
    """Bit for bit, with a checkpoint in the middle of an epoch and a decaying learning rate."""
    flags = [*flags, "--checkpointing_steps", 4, "--lr_scheduler", "linear", "--max_train_steps", 8]
    undisturbed = train(tiny_sd1, bundle1, tmp_path / "whole", *flags)
    resumed_dir = tmp_path / "resumed"
    resumed_dir.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", resumed_dir / "checkpoint-4")
    resumed = train(tiny_sd1, bundle1, resumed_dir, *flags, "--resume_from_checkpoint", "latest")
    assert same(undisturbed, resumed)
    folders = (tmp_path / "whole", resumed_dir)
    last, again = (torch.load(folder / "checkpoint-8" / "optimizer.bin", weights_only=False) for folder in folders)
    states = list(zip(tree_leaves(last["state"]), tree_leaves(again["state"]), strict=True))
    assert states and all(torch.equal(*pair) for pair in states if torch.is_tensor(pair[0]))
    assert report(resumed_dir)["leakage"]["max"] < 1e-5


def test_resuming_within_a_later_epoch_with_an_older_accelerate(tiny_sd1, bundle1, tmp_path, monkeypatch):
    """Before 1.15 the loader that skips batches began at epoch 0, whatever it was made of."""
    flags = ("--checkpointing_steps", 4, "--max_train_steps", 8, "--random_flip")
    whole = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    skip, skipped = Accelerator.skip_first_batches, []

    def skip_at_epoch_0(self, dataloader, num_batches=0):
        batches = skip(self, dataloader, num_batches)
        batches.iteration = 0
        skipped.append(num_batches)
        return batches

    monkeypatch.setattr(Accelerator, "skip_first_batches", skip_at_epoch_0)
    resumed = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--resume_from_checkpoint", "checkpoint-4")
    assert same(resumed, whole) and skipped == [1]


def test_killed_and_resumed_is_what_an_undisturbed_run_gives(kill_script, tiny_sd1, bundle1, tmp_path):
    """Killed by SIGKILL: the LoRA is the same bit for bit, and so are all files of the last checkpoint."""
    flags = ("--checkpointing_steps", 5, "--max_train_steps", 30, "--lr_scheduler", "linear", "--random_flip")
    train(tiny_sd1, bundle1, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    line = command_line(tiny_sd1, bundle1, killed, *flags)
    kill_script(killed / "checkpoint-5", "train_dreambooth_nullspace.py", *line)
    assert not (killed / "checkpoint-30").exists() and not (killed / LORA_NAME).exists()
    train(tiny_sd1, bundle1, killed, *flags, "--resume_from_checkpoint", "latest")
    for folder in (".", "checkpoint-30"):  # as tensors, for safetensors puts what else it holds in any order
        assert same(*(load_file(tmp_path / run / folder / LORA_NAME) for run in ("whole", "killed")))
    digests = [
        {
            name: digest
            for name, digest in read_record(tmp_path / run / "checkpoint-30")["files"].items()
            if name != LORA_NAME
        }
        for run in ("whole", "killed")
    ]
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl"} <= set(digests[0])
    assert digests[0] == digests[1]


def test_resuming_without_a_seed_goes_on_with_the_first_runs(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 2, "--max_train_steps", 4)
    whole = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=["--seed"])
    shutil.rmtree(tmp_path / "lora" / "checkpoint-4")
    flags += ("--resume_from_checkpoint", "latest")
    assert same(train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=["--seed"]), whole)


def test_checkpoints_total_limit(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 4)
    assert [path.name for path in checkpoints(tmp_path / "lora")] == ["checkpoint-3", "checkpoint-4"]
    assert same(load_file(tmp_path / "lora" / "checkpoint-4" / LORA_NAME), load_file(tmp_path / "lora" / LORA_NAME))


def test_resuming_keeps_the_limit(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 2, "--learning_rate", 1e-3)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 6)
    assert [path.name for path in checkpoints(tmp_path / "lora")] == [f"checkpoint-{n}" for n in (2, 4, 6)]
    flags += ("--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 8)
    assert [path.name for path in checkpoints(tmp_path / "lora")] == ["checkpoint-6", "checkpoint-8"]


def test_the_limit_drops_first_what_this_run_does_not_continue(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 6)
    flags += ("--resume_from_checkpoint", "checkpoint-2", "--checkpoints_total_limit", 1)
    again = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 4)
    assert [path.name for path in checkpoints(tmp_path / "lora")] == ["checkpoint-4"]
    assert same(load_file(tmp_path / "lora" / "checkpoint-4" / LORA_NAME), again)


def test_resuming_what_was_finished_trains_no_further(tiny_sd1, bundle1, tmp_path):
    """As after a run that was killed while it drew its last pictures; four steps end in the middle of an epoch."""
    finished = train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 4, "--max_train_steps", 4)
    (tmp_path / "lora" / LORA_NAME).unlink()
    flags = ("--resume_from_checkpoint", "latest", "--max_train_steps")
    assert same(train(tiny_sd1, bundle1, tmp_path / "lora", *flags, 4), finished)
    with pytest.raises(NullSpaceError, match="checkpoint-4 is beyond --max_train_steps 3"):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags, 3)


def test_a_checkpoint_cut_short_is_not_taken(tmp_path):
    (tmp_path / "checkpoint-9.partial-123").mkdir()
    (tmp_path / "checkpoint-9-old").mkdir()
    args = trainer.parse_args(command_line("m", "b", tmp_path, "--resume_from_checkpoint", "latest"))
    assert find_checkpoint(args) is None


def test_a_checkpoint_of_another_rank_is_refused(tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 3)
    with pytest.raises(NullSpaceError, match="--rank"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--resume_from_checkpoint", "latest", "--rank", 5)


# ---- Bad input -------------------------------------------------------------------------------------------------------

NOWHERE = "no/such/model"  # given with bad input that must be found before the model is looked for


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instance_data_dir", "{tmp}/none"], "is not a folder: it is not there"),
        (["--instance_data_dir", "{tmp}/file"], "is not a folder: it is a file; name the folder"),
        (["--instance_data_dir", "{tmp}/empty"], "holds no pictures; put 3 to 5"),
        (["--instance_data_dir", "{tmp}/broken"], "bad.png cannot be read"),
        (["--instance_data_dir", "{tmp}/truncated"], "cut.png cannot be read"),
        (["--output_dir", "{tmp}/file/lora"], "cannot be written"),
        (["--resume_from_checkpoint", "checkpoint-7"], "is not a checkpoint"),
        (["--nullspace_name_or_path", "{tmp}/empty"], f"has no {CONFIG_NAME}"),
        (["--nullspace_name_or_path", "{tmp}/newer"], "format 99"),
        (["--nullspace_name_or_path", "{tmp}/altered"], "truncated or altered"),
        (["--nullspace_name_or_path", "{tmp}/cut"], "truncated or altered"),
        (["--nullspace_timestep_range", "900", "901"], "No timestep"),
        (["--nullspace_criterion", "percentile", "--nullspace_threshold", "0.1"], "no free direction"),
        (["--nullspace_threshold", "0.99"], "in 16 bits; choose a lower .*, or build .* --nullspace_threshold 0.9"),
        ([], "cannot be had"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_bad_input_is_found_before_the_model_is_loaded(flags, message, tmp_path, bundle1):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("broken", "truncated"):
        shutil.copytree(INSTANCES, tmp_path / name, ignore=BESIDE)
    (tmp_path / "broken" / "bad.png").write_text("not a picture")
    (tmp_path / "truncated" / "cut.png").write_bytes((INSTANCES / "0.png").read_bytes()[:200])
    for name in ("newer", "altered", "cut"):
        shutil.copytree(bundle1, tmp_path / name)
    config = json.loads((bundle1 / CONFIG_NAME).read_text()) | {"format_version": 99}
    (tmp_path / "newer" / CONFIG_NAME).write_text(json.dumps(config))
    data = bytearray((bundle1 / "joint.safetensors").read_bytes())
    (tmp_path / "cut" / "joint.safetensors").write_bytes(data[:-100])
    data[-10] ^= 1
    (tmp_path / "altered" / "joint.safetensors").write_bytes(data)
    line = command_line(NOWHERE, bundle1, tmp_path / "lora", *[flag.format(tmp=tmp_path) for flag in flags])
    with pytest.raises(NullSpaceError, match=message) as caught:
        trainer.main(trainer.parse_args(line))
    assert "\n" not in str(caught.value).strip()


def test_a_bundle_of_another_model_is_refused(tiny_sd1, tiny_sd2, bundle1, bundle2, tmp_path):
    with pytest.raises(NullSpaceError, match="was built for"):
        train(tiny_sd1, bundle2, tmp_path / "lora")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.data[0, 0] += 1
    pipeline.save_pretrained(tmp_path / "finetuned")
    with pytest.raises(NullSpaceError, match="fingerprints differ"):
        train(tmp_path / "finetuned", bundle1, tmp_path / "lora")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nullspace_threshold", "1"], "out of range"),
        (["--nullspace_threshold", "-0.1"], "out of range"),
        (["--nullspace_softness", "0"], "must be above 0"),
        (["--nullspace_criterion", "percentile", "--nullspace_threshold", "101"], "out of range"),
        (["--nullspace_criterion", "magic"], "invalid choice"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--report_to", "wandb", "--hub_token", "secret"], "hf auth login"),
        (["--dataset_name", "d"], "either --instance_data_dir or --dataset_name"),
        (["--image_column", "photo"], "--image_column is read with --dataset_name alone; give that too"),
        (["--cache_dir", "c"], "--cache_dir is read with --dataset_name alone"),
        (["--hub_model_id", "me/lora"], "--hub_model_id is read with --push_to_hub alone"),
        (["--hub_private_repo"], "--hub_private_repo is read with --push_to_hub alone"),
        (["--pre_compute_text_embeddings", "--train_text_encoder"], "which --train_text_encoder trains"),
        (["--use_8bit_adam", "--optimizer", "prodigy"], "is for --optimizer adamw"),
        (["--lora_dropout", "1"], "--lora_dropout must be"),
        (["--snr_gamma", "0"], "--snr_gamma must be"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--image_interpolation_mode", "magic"], "invalid choice"),
        (["--lr_scheduler", "piecewise_constant"], "invalid choice"),  # it needs rules, for which there is no flag
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.parse_args(command_line("m", "b", "o", *flags))
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_an_error_ends_the_script_with_its_sentence_and_no_traceback(run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    line = command_line(NOWHERE, tmp_path, tmp_path / "lora", "--instance_data_dir", tmp_path / "empty")
    done = run_script("train_dreambooth_nullspace.py", *line, check=False)
    assert done.returncode != 0
    assert "error: --instance_data_dir" in done.stderr and "NullSpaceError" not in done.stderr


SAVE = """
import torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from nullspace.adapters import save_lora

unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet")
targets = [name for name, _ in unet.named_modules() if name.endswith(("attn2.to_q", "attn2.to_k"))]
torch.manual_seed(0)
inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False), unet)
save_lora(Path({folder!r}), unet)
"""


def test_the_same_lora_is_the_same_file_and_says_little(tiny_sd1, tmp_path):
    """Whatever Python and Rust shuffle at their start; peft's whole configuration is for nobody else to read."""
    files = []
    for seed in "123":
        folder = tmp_path / seed
        folder.mkdir()
        code = SAVE.format(model=str(tiny_sd1), folder=str(folder))
        subprocess.run(
            [sys.executable, "-c", code], cwd=README.parent, check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        files.append((folder / LORA_NAME).read_bytes())
    assert files[0] == files[1] == files[2]
    with safe_open(tmp_path / "1" / LORA_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    names = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    assert metadata.keys() == {f"unet.{name}" for name in names}
    assert metadata["unet.target_modules"] == sorted(metadata["unet.target_modules"])
    assert {layer.scale for layer in load_lora(tmp_path / "1").values()} == {1.5}  # alpha over rank
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "1")
    assert {layer.scaling["default_0"] for layer in pipeline.unet.modules() if hasattr(layer, "lora_A")} == {1.5}
