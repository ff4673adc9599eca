"""The demo's model, and the promise itself: with the null space, what the subject's pictures do not show moves less."""

import logging

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import StableDiffusionPipeline

import build_nullspace
import train_dreambooth_nullspace as trainer
import train_world
from train_world import draw
from world import DEMO, FOLDER, RESOLUTION
from world_reader import judge


MODEL = DEMO / "shapes-sd"
HELD_OUT = {
    kind: (FOLDER / f"heldout_{kind}.txt").read_text().splitlines() for kind in ("combinations", "scenes", "unlike")
}


def pipeline(lora=None):
    """The demo's model, with a LoRA from a folder."""
    loaded = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    if lora is not None:
        loaded.load_lora_weights(lora)
    return loaded


def test_a_training_goes_on_from_states_of_its_own_settings_alone(tmp_path):
    path = tmp_path / "unet.pt"
    assert train_world.load_state(path, {"seed": 0}) is None
    train_world.save_state(path, settings={"seed": 0}, step=7)
    assert train_world.load_state(path, {"seed": 0})["step"] == 7
    with pytest.raises(SystemExit, match="unet.pt was made with other settings"):
        train_world.load_state(path, {"seed": 1})


def test_the_vae_gives_the_means_of_its_latents():
    for vae in (train_world.certain(train_world.make_vae()), pipeline().vae):
        posterior = vae.encode(torch.zeros(1, 3, RESOLUTION, RESOLUTION)).latent_dist
        assert posterior.std.max() < 0.01


def test_a_folder_draws_with_no_type_named():
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 16e6
    loaded = StableDiffusionPipeline.from_pretrained(MODEL)
    picture = loaded("a red star", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, RESOLUTION, RESOLUTION, 3) and np.isfinite(picture).all()


def test_the_model_draws_prompts_that_it_has_never_seen():
    prompts = HELD_OUT["combinations"][:24]
    wrong = judge(prompts, draw(pipeline(), prompts, seed=1000))
    assert sum(not parts for parts in wrong) >= 18


def test_the_promise(tmp_path):
    """Same steps, rate and seed with and without the null space: pictures of held-out prompts move much less."""
    argv = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", FOLDER / "protected.txt"]
    argv += ["--max_prompts", 50, "--num_inference_steps", 4, "--batch_size", 50, "--output_dir", tmp_path / "bundle"]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    for name, threshold in (("plain", 0), ("protected", 0.9)):
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        argv = ["--pretrained_model_name_or_path", MODEL, "--nullspace_name_or_path", tmp_path / "bundle"]
        argv += ["--instance_data_dir", FOLDER / "star", "--resolution", RESOLUTION, "--train_batch_size", 2]
        argv += ["--instance_prompt", "a photo of a sks star", "--output_dir", tmp_path / name, "--seed", 0]
        argv += ["--max_train_steps", 60, "--learning_rate", 5e-3, "--pre_compute_text_embeddings"]
        argv += ["--lr_scheduler", "constant", "--num_validation_images", 1, "--no-compare_with_base"]
        argv += ["--nullspace_threshold", threshold, "--report_to", "none", "--validation_prompt", "a star"]
        trainer.main(trainer.parse_args([str(word) for word in argv]))
    logging.getLogger().setLevel(logging.WARNING)

    others, subject = [each for prompts in HELD_OUT.values() for each in prompts[:3]], ["a photo of a sks star"] * 3
    drawn = {
        name: draw(pipeline(name and tmp_path / name), others + subject, 12) for name in (None, "plain", "protected")
    }
    moved = {name: np.abs(drawn[name] - drawn[None]).mean((1, 2, 3)) for name in ("plain", "protected")}
    print(moved)
    assert moved["protected"][:9].mean() < 0.3 * moved["plain"][:9].mean()
    assert moved["protected"][9:].mean() > 2 * moved["protected"][:9].mean()  # it is the subject that it changes
