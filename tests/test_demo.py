"""The demo's world, its scorer and its model; and the promise itself: the subject is learned, the rest moves less."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import StableDiffusionPipeline
from PIL import Image

import build_nullspace
import shapes
import train_dreambooth_nullspace as trainer
import train_shapes
from train_shapes import draw


MODEL = shapes.DEMO / "shapes-sd"
HELD_OUT = (shapes.DEMO / "heldout_prompts.txt").read_text().splitlines()
PROTECTED = (shapes.DEMO / "prompts.txt").read_text().splitlines()


def pipeline(lora=None):
    """The demo's model, with a LoRA from a folder."""
    loaded = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    if lora is not None:
        loaded.load_lora_weights(lora)
    return loaded


# ---- The world and the scorer ----------------------------------------------------------------------------------------


def test_scorer_reads_true_pictures_and_no_others():
    pictures, captions = shapes.sample_world(120, seed=11)
    assert shapes.matches([caption[0] for caption in captions], pictures).mean() >= 0.99
    shuffled = np.roll(pictures, 1, axis=0)
    assert shapes.matches([caption[0] for caption in captions], shuffled).mean() < 0.1
    noise = np.random.default_rng(0).uniform(size=(20, 32, 32, 3))
    assert not shapes.matches(["a circle"] * 20, noise).any()


@pytest.mark.parametrize("wrong", [("circle", "red", "white"), ("star", "blue", "white"), ("star", "red", "black")])
def test_scorer_sees_each_attribute(wrong):
    prompt = "a photo of a large red star on a white background"
    assert shapes.matches([prompt], shapes.render("star", "red", "white")[None]).all()
    assert not shapes.matches([prompt], shapes.render(*wrong)[None]).any()


def test_parse():
    assert shapes.parse("a small red star on white") == {"shape": "star", "colour": "red", "background": "white"}
    assert shapes.parse("a star on a red background") == {"shape": "star", "background": "red"}
    assert shapes.parse("a photo of a ring") == {"shape": "ring"}


@pytest.mark.parametrize("name", shapes.SUBJECTS)
def test_subject_distance(name):
    """True pictures are close wherever the subject stands, plain members of the class are not."""
    rng = np.random.default_rng(3)
    true = [shapes.render_subject(name, "red", *rng.uniform(-2, 2, 2), rng.uniform(8, 12)) for _ in range(4)]
    assert shapes.subject_distance(name, np.array(true)).max() < 0.2
    plain = [shapes.render(shapes.SUBJECTS[name].shape, colour, "red") for colour in ("yellow", "black", "green")]
    assert shapes.subject_distance(name, np.array(plain)).min() > 0.5


def test_instance_pictures_on_disk_are_the_worlds():
    for name in shapes.SUBJECTS:
        folder = shapes.DEMO / "instance_images" / name
        stored = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        assert len(stored) == 5
        for picture, expected in zip(stored, shapes.instance_pictures(name), strict=True):
            assert np.array_equal(picture, np.asarray(expected))


def test_prompts():
    assert len(set(PROTECTED)) >= 300 and len(set(HELD_OUT)) >= 200
    assert not set(PROTECTED) & set(HELD_OUT)
    assert PROTECTED == shapes.protected_prompts()
    for prompt in HELD_OUT:
        assert shapes.is_held_out(**shapes.parse(prompt))
    for prompt in PROTECTED:
        words = shapes.parse(prompt)
        assert len(words) < 3 or not shapes.is_held_out(**words)


# ---- The model -------------------------------------------------------------------------------------------------------


def test_a_training_goes_on_from_states_of_its_own_settings_alone(tmp_path):
    args = SimpleNamespace(seed=0, learning_rate=1e-3, work_dir=tmp_path, output_dir=tmp_path, checkpointing_steps=10)
    path, settings = tmp_path / "unet.pt", train_shapes.settings_of(args)
    assert train_shapes.load_state(path, "cpu", settings) is None
    train_shapes.save_state(path, settings=settings, step=7)
    args.checkpointing_steps = 20  # changes nothing of what is learned
    assert train_shapes.load_state(path, "cpu", train_shapes.settings_of(args))["step"] == 7
    args.seed = 1
    with pytest.raises(SystemExit, match="unet.pt is of a training with other settings"):
        train_shapes.load_state(path, "cpu", train_shapes.settings_of(args))


def test_model_draws_prompts_that_it_has_never_seen():
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 12e6
    prompts = HELD_OUT[:60]
    assert shapes.matches(prompts, draw(pipeline(), prompts, seed=1000)).mean() >= 0.9


def test_the_promise(tmp_path):
    """Same steps and seed with and without the null space: the subject is learned, held-out pictures move less.

    Held back, steps are shorter: each has the learning rate that the benchmark finds best for it at this rank.
    """
    argv = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", shapes.DEMO / "prompts.txt"]
    argv += ["--max_prompts", 100, "--num_inference_steps", 10, "--batch_size", 50, "--output_dir", tmp_path / "bundle"]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    for name, threshold, rate in (("plain", 0, 5e-4), ("protected", 0.9, 1e-2)):
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        argv = ["--pretrained_model_name_or_path", MODEL, "--nullspace_name_or_path", tmp_path / "bundle"]
        argv += ["--instance_data_dir", shapes.DEMO / "instance_images" / "star", "--resolution", 32]
        argv += ["--instance_prompt", "a photo of a sks star", "--output_dir", tmp_path / name, "--seed", 0]
        argv += ["--max_train_steps", 400, "--learning_rate", rate, "--rank", 8, "--train_batch_size", 5]
        argv += ["--lr_scheduler", "cosine", "--lr_warmup_steps", 0, "--num_validation_images", 1]
        argv += ["--nullspace_threshold", threshold, "--report_to", "none"]
        trainer.main(trainer.parse_args([str(word) for word in argv]))
    logging.getLogger().setLevel(logging.WARNING)

    others, subject = HELD_OUT[:32], ["a photo of a sks star"] * 16
    base = pipeline()
    base_others = draw(base, others, guidance_scale=2.5)
    distance = {"base": shapes.subject_distance("star", draw(base, subject, guidance_scale=2.5)).mean()}
    moved, right = {}, {}
    for name in ("plain", "protected"):
        tuned = pipeline(tmp_path / name)
        drawn = draw(tuned, others, guidance_scale=2.5)
        moved[name] = np.abs(drawn - base_others).mean()
        right[name] = shapes.matches(others, drawn).mean()
        distance[name] = shapes.subject_distance("star", draw(tuned, subject, guidance_scale=2.5)).mean()
    print(distance, moved, right)
    assert moved["protected"] < 0.6 * moved["plain"]
    assert right["protected"] >= right["plain"]
    assert distance["protected"] < 0.75 * distance["base"] and distance["protected"] < distance["plain"]
