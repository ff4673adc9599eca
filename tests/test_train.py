"""train_dreambooth_nullspace.py: the LoRA that it writes, its flags, resuming, and what it refuses."""

import json
import logging
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace_utils import CONFIG_NAME, JOINT, LORA_NAME, Bundle, NullSpaceError, attention_inputs, leakage, load_lora
from shapes import DEMO


INSTANCES = DEMO / "instance_images" / "star"


def make_bundle(model, folder, *flags):
    """A bundle of a few prompts, with three groups of timesteps, protecting half of the directions or so."""
    (folder.parent / "prompts.txt").write_text("a red star\na blue heart on a white background\n")
    argv = ["--pretrained_model_name_or_path", model, "--prompts_file", folder.parent / "prompts.txt"]
    argv += ["--num_inference_steps", 3, "--timestep_groups", "steps", "--output_dir", folder, *flags]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    return folder


@pytest.fixture(scope="session")
def bundle1(tiny_sd1, tmp_path_factory):
    return make_bundle(tiny_sd1, tmp_path_factory.mktemp("bundles") / "sd1")


@pytest.fixture(scope="session")
def bundle2(tiny_sd2, tmp_path_factory):
    return make_bundle(tiny_sd2, tmp_path_factory.mktemp("bundles") / "sd2")


def command_line(model, bundle, output_dir, *flags):
    argv = ["--pretrained_model_name_or_path", model, "--nullspace_name_or_path", bundle, "--output_dir", output_dir]
    argv += ["--instance_data_dir", INSTANCES, "--instance_prompt", "a photo of a sks star", "--resolution", 32]
    argv += ["--max_train_steps", 3, "--learning_rate", 1e-2, "--train_batch_size", 2, "--seed", 0, "--rank", 2]
    argv += ["--num_validation_images", 1, "--validation_prompt", "a sks star", "--report_to", "none", *flags]
    return [str(word) for word in argv]


def train(model, bundle, output_dir, *flags, without=()):
    """Train in this process, without some flags of the common command line, and return the tensors of the LoRA."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what accelerate shares within a process must not leak from one run to the next
    line = command_line(model, bundle, output_dir, *flags)
    for flag in without:
        del line[line.index(flag) : line.index(flag) + 2]
    trainer.main(trainer.parse_args(line))
    return load_file(output_dir / LORA_NAME)


def report(folder):
    return json.loads((folder / trainer.REPORT_NAME).read_text())


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
    assert not any(name.startswith("partial") for name in names)
    assert "Protecting 3 prompts of prompts.txt" in done.stderr and "directions protected" in done.stderr
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
    layers = {name.split(".lora_A")[0] for name, _ in pipeline.unet.named_parameters() if "lora_A" in name}
    assert layers == set(attention_inputs(pipeline.unet, "cross"))


def test_two_processes_agree_and_stay_in_the_null_space(run_script, tiny_sd1, bundle1, tmp_path):
    flags = ("--gradient_accumulation_steps", 2, "--nullspace_timesteps", "joint")
    line = command_line(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    run_script("train_dreambooth_nullspace.py", *line, processes=2)
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


# ---- The null space --------------------------------------------------------------------------------------------------


def test_lora_file_is_in_the_null_space(tiny_sd1, bundle1, tmp_path):
    """Read from the file with the bundle of the file, for more than the default threshold."""
    for criterion, threshold in (("energy", 0.9), ("eigenvalue", 0.5), ("percentile", 60)):
        output = tmp_path / criterion
        train(tiny_sd1, bundle1, output, "--nullspace_criterion", criterion, "--nullspace_threshold", threshold)
        protected = Bundle.load(bundle1).protected(JOINT, criterion, threshold)
        assert {item.rank for item in protected.values()} != {0}
        for name, layer in load_lora(output).items():
            assert not protected[name].rank or leakage(layer, protected[name]) < 1e-5
        assert report(output)["nullspace"]["criterion"] == criterion
        assert report(output)["nullspace"]["threshold"] == threshold


def test_threshold_zero_is_plain_dreambooth(tiny_sd1, bundle1, reference, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        plain = train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_threshold", 0)
    assert "Nothing is protected" in caplog.text
    assert not same(plain, reference)
    assert report(tmp_path / "lora")["leakage"] == {"max": None, "mean": None}
    protected = Bundle.load(bundle1).protected(JOINT, "energy", 0.999)
    assert max(leakage(layer, protected[name]) for name, layer in load_lora(tmp_path / "lora").items()) > 0.1


def test_nearest_protects_less_than_joint(tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_timesteps", "nearest", "--max_train_steps", 6)
    found = report(tmp_path / "lora")
    assert found["nullspace"]["timesteps"] == "nearest"
    assert found["leakage"]["max"] > 1e-3


def test_nearest_with_one_group_is_not_taken_for_joint(tiny_sd1, bundle1, tmp_path):
    """Steps outside of the range stay in the weights: what they learned is not projected away afterwards."""
    first = Bundle.load(bundle1).config["groups"][1]["range"]
    flags = ("--nullspace_timesteps", "nearest", "--nullspace_timestep_range", *first, "--max_train_steps", 6)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert report(tmp_path / "lora")["leakage"]["max"] > 1e-3


def test_timestep_range_protects_that_range(tiny_sd1, bundle1, tmp_path):
    config = Bundle.load(bundle1).config
    last = config["groups"][-1]
    train(tiny_sd1, bundle1, tmp_path / "lora", "--nullspace_timestep_range", *last["range"])
    inside = Bundle.load(bundle1, "nearest").protected(last["name"])
    everywhere = Bundle.load(bundle1).protected()
    layers = {name: layer for name, layer in load_lora(tmp_path / "lora").items() if "to_q" in name}
    # The groups are stored in float16, so the joint of one group, decomposed again, differs by that much.
    assert max(leakage(layer, inside[name]) for name, layer in layers.items()) < 0.05
    assert max(leakage(layer, everywhere[name]) for name, layer in layers.items()) > 0.05


def test_timestep_sampler_is_uniform_and_names_the_group():
    groups = [{"name": "early", "range": [700, 899]}, {"name": "late", "range": [0, 199]}]
    sampler = trainer.TimestepSampler(groups, 1000)
    assert sampler.intervals == [
        (0, 200, "late"), (200, 700, "unprotected"), (700, 900, "early"), (900, 1000, "unprotected")
    ]  # fmt: skip
    drawn = [sampler.group(trainer.seeded(0, step)) for step in range(2000)]
    share = sum(interval[2] == "late" for interval in drawn) / len(drawn)
    assert abs(share - 0.2) < 0.03
    assert trainer.TimestepSampler([], 1000).intervals == [(0, 1000, JOINT)]


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
        ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 10],
        ["--lr_scheduler", "polynomial", "--lr_warmup_steps", 0, "--lr_power", 3],
        ["--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", 0, "--lr_num_cycles", 2],
        ["--adam_beta1", 0.1],
        ["--adam_beta2", 0.1],
        ["--adam_weight_decay", 5.0],
        ["--adam_epsilon", 1e-2],
        ["--max_grad_norm", 1e-4, "--adam_epsilon", 1e-2],
        ["--resolution", 48],
        ["--mixed_precision", "bf16"],
        ["--instance_prompt", "a ohwx star"],
        ["--nullspace_threshold", 0.9],
        ["--nullspace_criterion", "percentile"],
    ],
    ids=lambda flags: "-".join(map(str, flags)).replace("--", ""),
)
def test_flag_changes_the_lora_and_keeps_the_guarantee(flags, tiny_sd1, bundle1, reference, tmp_path):
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert not same(tensors, reference)
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


def test_the_same_command_gives_the_same_lora(tiny_sd1, bundle1, reference, tmp_path):
    assert same(train(tiny_sd1, bundle1, tmp_path / "lora"), reference)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_sd1, bundle1, reference, tmp_path, monkeypatch):
    enabled = []
    original = trainer.UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        trainer.UNet2DConditionModel, "enable_gradient_checkpointing", lambda unet: (enabled.append(1), original(unet))
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
    picture = Image.open(tmp_path / "validated" / trainer.COMPARISON_NAME)
    assert picture.height == 60 + 4 * 160  # base and tuned for two seeds, below the titles
    undisturbed = train(tiny_sd1, bundle1, tmp_path / "undisturbed", *flags, without=["--validation_prompt"])
    assert not (tmp_path / "undisturbed" / "validation").exists()
    assert same(validated, undisturbed)
    assert all(tensor.dtype == torch.float32 for tensor in validated.values())


def test_rank(tiny_sd1, bundle1, tmp_path):
    tensors = train(tiny_sd1, bundle1, tmp_path / "lora", "--rank", 3)
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}


def test_num_train_epochs(tiny_sd1, bundle1, tmp_path):
    """Five pictures in batches of two are three steps an epoch."""
    train(tiny_sd1, bundle1, tmp_path / "lora", "--num_train_epochs", 2, without=["--max_train_steps"])
    assert report(tmp_path / "lora")["training"]["max_train_steps"] == 6


def dataset_of(picture, *flags):
    args = trainer.parse_args(command_line("m", "b", "o", *flags))
    return trainer.InstanceDataset([picture], [0], args)


def test_center_crop_and_random_crop():
    picture = Image.linear_gradient("L").resize((32, 64)).convert("RGB")
    centred, random = dataset_of(picture, "--center_crop"), dataset_of(picture)
    assert centred[0][0].shape == random[0][0].shape == (3, 32, 32)
    first = random[0][0]
    assert torch.equal(first, random[0][0])
    random.set_epoch(1)
    assert not torch.equal(first, random[0][0])
    expected = trainer.VaeImageProcessor(do_resize=False).preprocess(picture.crop((0, 16, 32, 48)))[0]
    assert torch.equal(centred[0][0], expected)
    assert centred[0][0].min() >= -1 and centred[0][0].max() <= 1


def test_defaults_are_those_of_the_reference():
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    args = vars(trainer.parse_args([*line, "--instance_prompt", "p"]))
    expected = {
        "resolution": 512, "train_batch_size": 4, "num_train_epochs": 1, "gradient_accumulation_steps": 1,
        "learning_rate": 5e-4, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "rank": 4, "checkpointing_steps": 500, "num_validation_images": 4, "validation_epochs": 50,
        "report_to": "tensorboard", "logging_dir": "logs", "nullspace_criterion": "energy",
        "nullspace_threshold": 0.999, "nullspace_timesteps": "joint", "nullspace_timestep_range": None,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [[], ["--nullspace_timesteps", "nearest"], ["--gradient_accumulation_steps", 2]], ids=str
)
def test_resuming_gives_what_an_undisturbed_run_gives(flags, tiny_sd1, bundle1, tmp_path):
    """Bit for bit, with a checkpoint in the middle of an epoch and a decaying learning rate."""
    flags = [*flags, "--checkpointing_steps", 4, "--lr_scheduler", "linear", "--max_train_steps", 8]
    undisturbed = train(tiny_sd1, bundle1, tmp_path / "whole", *flags)
    resumed_dir = tmp_path / "resumed"
    resumed_dir.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", resumed_dir / "checkpoint-4")
    resumed = train(tiny_sd1, bundle1, resumed_dir, *flags, "--resume_from_checkpoint", "latest")
    assert same(undisturbed, resumed)
    last = torch.load(tmp_path / "whole" / "checkpoint-8" / "optimizer.bin", weights_only=False)["state"]
    again = torch.load(resumed_dir / "checkpoint-8" / "optimizer.bin", weights_only=False)["state"]
    assert all(torch.equal(last[i][key], again[i][key]) for i in last for key in ("exp_avg", "exp_avg_sq", "step"))


def test_resuming_without_a_seed_goes_on_with_the_first_runs(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 2, "--max_train_steps", 4)
    whole = train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=["--seed"])
    shutil.rmtree(tmp_path / "lora" / "checkpoint-4")
    flags += ("--resume_from_checkpoint", "latest")
    assert same(train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=["--seed"]), whole)


def test_checkpoints_total_limit(tiny_sd1, bundle1, tmp_path):
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--max_train_steps", 4)
    assert [path.name for path in trainer.checkpoints(tmp_path / "lora")] == ["checkpoint-3", "checkpoint-4"]
    assert same(load_file(tmp_path / "lora" / "checkpoint-4" / LORA_NAME), load_file(tmp_path / "lora" / LORA_NAME))


def test_a_checkpoint_cut_short_is_not_taken(tmp_path):
    (tmp_path / "partial-checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9-old").mkdir()
    args = trainer.parse_args(command_line("m", "b", tmp_path, "--resume_from_checkpoint", "latest"))
    assert trainer.find_checkpoint(args) is None


def test_a_checkpoint_of_a_plain_run_is_projected(tiny_sd1, bundle1, tmp_path, caplog):
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output, "--nullspace_threshold", 0, "--checkpointing_steps", 2)
    with caplog.at_level(logging.WARNING):
        train(tiny_sd1, bundle1, output, "--resume_from_checkpoint", "checkpoint-2")
    assert "was not in this null space" in caplog.text
    assert report(output)["leakage"]["max"] < 1e-5


def test_a_checkpoint_of_another_rank_is_refused(tiny_sd1, bundle1, tmp_path):
    train(tiny_sd1, bundle1, tmp_path / "lora", "--checkpointing_steps", 3)
    with pytest.raises(NullSpaceError, match="--rank"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--resume_from_checkpoint", "latest", "--rank", 5)


# ---- Bad input -------------------------------------------------------------------------------------------------------

NOWHERE = "no/such/model"  # given with bad input that must be found before the model is looked for


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instance_data_dir", "{tmp}/none"], "is not a folder"),
        (["--instance_data_dir", "{tmp}/empty"], "holds no pictures"),
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
        ([], "cannot be had"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_bad_input_is_found_before_the_model_is_loaded(flags, message, tmp_path, bundle1):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("broken", "truncated"):
        shutil.copytree(INSTANCES, tmp_path / name)
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
        (["--nullspace_criterion", "percentile", "--nullspace_threshold", "101"], "out of range"),
        (["--nullspace_criterion", "magic"], "invalid choice"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--report_to", "wandb", "--hub_token", "secret"], "hf auth login"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.parse_args(command_line("m", "b", "o", *flags))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_ends_the_script_with_its_sentence_and_no_traceback(run_script, tmp_path):
    line = command_line(NOWHERE, tmp_path, tmp_path / "lora", "--instance_data_dir", tmp_path)
    done = run_script("train_dreambooth_nullspace.py", *line, check=False)
    assert done.returncode != 0
    assert "error: --instance_data_dir" in done.stderr and "NullSpaceError" not in done.stderr
