"""The demo's Latent Consistency Model: it draws in few steps, and `build_nullspace.py` samples it as what it is."""

import filecmp
import json

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

import build_nullspace
from distill_world import SOLVER_STEPS, consistency_function, guided_ddim_step, make_student, predict_original
from nullspace.bundle import Bundle
from nullspace.names import JOINT
from train_world import draw
from world import DEMO, FOLDER
from world_reader import judge


MODEL, TEACHER = DEMO / "shapes-lcm", DEMO / "shapes-sd"
HELD_OUT = (FOLDER / "heldout_combinations.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def pipeline():
    loaded = LatentConsistencyModelPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def teacher():
    loaded = StableDiffusionPipeline.from_pretrained(TEACHER, safety_checker=None).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def build(output_dir, *flags):
    """Build a bundle of the demo's LCM in this process, from a few prompts."""
    argv = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", FOLDER / "protected.txt"]
    argv += ["--max_prompts", 8, "--batch_size", 9, "--output_dir", output_dir, *flags]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    return json.loads((output_dir / "nullspace_config.json").read_text())


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---- The model -------------------------------------------------------------------------------------------------------


def test_the_folder_is_an_ordinary_lcm(pipeline):
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.original_inference_steps == SOLVER_STEPS
    assert pipeline.unet.config.time_cond_proj_dim
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 16e6


def test_all_but_the_unet_is_the_teachers():
    for part in ("vae", "text_encoder", "tokenizer"):
        names = sorted(path.name for path in (TEACHER / part).iterdir())
        assert names == sorted(path.name for path in (MODEL / part).iterdir())
        same, *others = filecmp.cmpfiles(TEACHER / part, MODEL / part, names, shallow=False)
        assert sorted(same) == names and others == [[], []]


@pytest.mark.parametrize("guidance_scale", [5.0, 8.5])
def test_four_steps_draw_prompts_that_it_has_never_seen(pipeline, guidance_scale):
    prompts = HELD_OUT[:24]
    wrong = judge(prompts, draw(pipeline, prompts, 4, guidance_scale=guidance_scale, seed=1000))
    assert sum(not parts for parts in wrong) >= 15


# ---- The distillation ------------------------------------------------------------------------------------------------


def test_the_solver_step_is_guided_ddim(teacher):
    """Against the teacher's own scheduler, with one timestep at a time."""
    scheduler = teacher.scheduler
    scheduler.set_timesteps(SOLVER_STEPS)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text, empty_text = teacher.encode_prompt(HELD_OUT[:2], "cpu", 1, True)
    guidance_scale = torch.tensor([3.0, 7.0])
    for timestep in (999, 499, 19):
        previous = max(timestep - scheduler.config.num_train_timesteps // SOLVER_STEPS, 0)
        alpha_bar, previous_alpha_bar = (
            scheduler.alphas_cumprod[at].expand(2).view(-1, 1, 1, 1) for at in (timestep, previous)
        )
        with torch.no_grad():
            actual = guided_ddim_step(
                teacher.unet, noisy, torch.tensor([timestep] * 2), alpha_bar, previous_alpha_bar, text, empty_text,
                guidance_scale,
            )  # fmt: skip
            for row, scale in enumerate(guidance_scale):
                one = noisy[row : row + 1]
                with_prompt = teacher.unet(one, timestep, text[row : row + 1]).sample
                without_prompt = teacher.unet(one, timestep, empty_text[row : row + 1]).sample
                epsilon = without_prompt + scale * (with_prompt - without_prompt)
                expected = scheduler.step(epsilon, timestep, one).prev_sample
                assert relative(actual[row : row + 1], expected) < 1e-4


def test_the_consistency_function_is_the_schedulers(pipeline, teacher):
    """One step of the LCM pipeline's scheduler gives its value; a new student answers as its teacher predicts."""
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text, _ = pipeline.encode_prompt(HELD_OUT[:2], "cpu", 1, False)
    guidance = pipeline.get_guidance_scale_embedding(torch.tensor([4.0, 7.5]), pipeline.unet.config.time_cond_proj_dim)
    conditions = {"encoder_hidden_states": text, "timestep_cond": guidance}
    scheduler, student = pipeline.scheduler, make_student(teacher.unet)
    for timestep in (999, 19, 0):
        timesteps = torch.tensor([timestep] * 2)
        alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        scheduler.set_timesteps(timesteps=[timestep or 19])  # 0 is the boundary and no point of its grid
        with torch.no_grad():
            actual = consistency_function(pipeline.unet, scheduler, noisy, timesteps, alpha_bar, **conditions)
            epsilon = pipeline.unet(noisy, timesteps, **conditions).sample
            first = consistency_function(student, scheduler, noisy, timesteps, alpha_bar, **conditions)
            predicted = predict_original(noisy, teacher.unet(noisy, timesteps, text).sample, alpha_bar)
        expected = scheduler.step(epsilon, timestep, noisy).denoised if timestep else noisy
        assert relative(actual, expected) < 1e-6
        assert relative(first, predicted if timestep else noisy) < 1e-4


# ---- Its bundle ------------------------------------------------------------------------------------------------------


def test_build_samples_it_as_an_lcm(pipeline, tmp_path):
    config = build(tmp_path / "bundle")
    assert (config["model_type"], config["sampler"], config["guidance_scale"]) == ("lcm", "lcm", 8.5)
    assert config["num_inference_steps"] == [1, 2, 4, 8]
    visited = set()
    for steps in config["num_inference_steps"]:
        pipeline.scheduler.set_timesteps(steps)
        visited |= set(pipeline.scheduler.timesteps.tolist())
    # Every timestep that any of the step counts visits, in one group
    assert [(group["name"], group["timesteps"]) for group in config["groups"]] == [(JOINT, sorted(visited))]
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    tokens = pipeline.unet.config.sample_size**2 // 16
    # One pass for each prompt and step, without a doubled batch
    assert config["tokens"][JOINT][name] == (1 + 2 + 4 + 8) * 9 * tokens
    Bundle.load(tmp_path / "bundle").check(pipeline.unet)


def test_the_guidance_scale_reaches_the_unet(tmp_path):
    """One step starts from the same noise: nothing but the guidance embedding can make the moments differ."""
    sums = []
    for guidance_scale in (8.5, 8.5, 1.0):
        folder = tmp_path / str(len(sums))
        build(folder, "--num_inference_steps", 1, "--guidance_scale", guidance_scale)
        sums.append({name: spectrum.sum() for name, spectrum in Bundle.load(folder).group(JOINT).items()})
    assert all(torch.equal(again, sums[0][name]) for name, again in sums[1].items())
    assert max(relative(other, sums[0][name]) for name, other in sums[2].items()) > 1e-3
