"""Training on Latent Consistency Models: the guidance embedding, the solver grid, the losses and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file

import train_dreambooth_nullspace as trainer
from distill_world import make_student
from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.families import latent_consistency as lcm
from nullspace.families import recognise
from nullspace.fingerprints import fingerprint
from test_train import make_bundle, report, same, train


SOLVER_STEPS = 20  # not the 50 that the scheduler has by default
GRID = list(range(49, 1000, 50))


@pytest.fixture(scope="session")
def tiny_lcm(tiny_sd1, tmp_path_factory):
    """Folder of a Latent Consistency Model with the weights of `tiny_sd1` and a random guidance embedding."""
    folder = tmp_path_factory.mktemp("models") / "tiny-lcm"
    teacher = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    parts = {name: teacher.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    unet = make_student(teacher.unet)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    scheduler = LCMScheduler.from_config(teacher.scheduler.config, original_inference_steps=SOLVER_STEPS)
    LatentConsistencyModelPipeline(
        **parts, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def lcm_bundle(tiny_lcm, tmp_path_factory):
    return make_bundle(tiny_lcm, tmp_path_factory.mktemp("bundles") / "lcm")


@pytest.fixture(scope="session")
def sd_bundle(tiny_sd1, tmp_path_factory):
    return make_bundle(tiny_sd1, tmp_path_factory.mktemp("bundles") / "sd1")


@pytest.fixture(scope="module")
def reference(tiny_lcm, lcm_bundle, tmp_path_factory):
    """The LoRA of the plainest run, which others are compared with."""
    return train(tiny_lcm, lcm_bundle, tmp_path_factory.mktemp("reference") / "lora")


def load_pipeline(folder, kind=LatentConsistencyModelPipeline):
    pipeline = kind.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edited(model, folder, **changes):
    """A copy of a model with entries of its `model_index.json` changed."""
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Stub(torch.nn.Module):
    """A UNet that scales its input, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.calls = []

    def forward(self, noisy, timesteps):
        self.calls.append((timesteps.tolist(), torch.is_grad_enabled()))
        return SimpleNamespace(sample=self.scale * noisy)


def one_batch(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2)]


# ---- What a model is -------------------------------------------------------------------------------------------------


def test_the_unet_tells_the_type_of_a_model(tiny_sd1, tiny_lcm, tmp_path):
    assert recognise(tiny_sd1).name == recognise(tiny_sd1, wanted="sd").name == "sd"
    assert recognise(tiny_lcm).name == recognise(tiny_lcm, wanted="lcm").name == "lcm"
    # An LCM that was saved with Stable Diffusion's pipeline is one all the same.
    changes = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    assert recognise(edited(tiny_lcm, tmp_path / "in-sd", **changes)).name == "lcm"
    # A Stable Diffusion with an LCM's scheduler may be either; only the user can know.
    unclear = edited(tiny_sd1, tmp_path / "unclear", scheduler=["diffusers", "LCMScheduler"])
    for wanted in ("auto", "lcm"):
        with pytest.raises(NullSpaceError, match="has a LCMScheduler, but its UNet takes no guidance embedding"):
            recognise(unclear, wanted=wanted)
    assert recognise(unclear, wanted="sd").name == "sd"


def test_a_model_type_that_contradicts_the_model_is_refused_before_the_work(tiny_sd1, tiny_lcm, lcm_bundle, tmp_path):
    for model, wanted in ((tiny_sd1, "lcm"), (tiny_lcm, "sd")):
        with pytest.raises(NullSpaceError, match=f"--model_type {wanted} contradicts"):
            train(model, lcm_bundle, tmp_path / "lora", "--model_type", wanted)
        with pytest.raises(NullSpaceError, match=f"--model_type {wanted} contradicts"):
            make_bundle(model, tmp_path / "bundle", "--model_type", wanted)
    assert {path.name for path in tmp_path.iterdir()} - {".bundle.lock"} == {"prompts.txt"}
    assert (make_bundle(tiny_lcm, tmp_path / "bundle", "--model_type", "lcm") / "joint.safetensors").is_file()


def test_bundles_of_the_other_type_are_refused_though_all_weights_agree(
    tiny_sd1, tiny_lcm, sd_bundle, lcm_bundle, tmp_path
):
    bundles = {name: Bundle.load(folder) for name, folder in (("sd", sd_bundle), ("lcm", lcm_bundle))}
    assert bundles["sd"].config["modules"] == bundles["lcm"].config["modules"]
    unets = {name: load_pipeline(folder, kind).unet for name, folder, kind in (
        ("sd", tiny_sd1, StableDiffusionPipeline), ("lcm", tiny_lcm, LatentConsistencyModelPipeline)
    )}  # fmt: skip
    assert len({fingerprint(unet, bundles["sd"].config["modules"]) for unet in unets.values()}) == 1
    for model, bundle, named in ((tiny_sd1, lcm_bundle, "a Latent"), (tiny_lcm, sd_bundle, "a Stable Diffusion")):
        with pytest.raises(NullSpaceError, match=f"The bundle was built for {named}"):
            train(model, bundle, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    for name, other in (("sd", "lcm"), ("lcm", "sd")):
        bundles[name].check(unets[name])
        with pytest.raises(NullSpaceError, match="The bundle was built for a "):
            bundles[name].check(unets[other])
    with pytest.raises(NullSpaceError, match="cannot be merged: their model type differ"):
        bundles["sd"].merge(bundles["lcm"])


def test_flags_that_do_not_fit_the_model_are_refused(tiny_sd1, tiny_lcm, sd_bundle, lcm_bundle, tmp_path):
    with pytest.raises(NullSpaceError, match="--lcm_loss is not for a Stable Diffusion model"):
        train(tiny_sd1, sd_bundle, tmp_path / "lora", "--lcm_loss", "epsilon")
    for flags in ((), ("--lcm_loss", "x0")):
        with pytest.raises(NullSpaceError, match="--snr_gamma weighs"):
            train(tiny_lcm, lcm_bundle, tmp_path / "lora", "--snr_gamma", 5, *flags)
    with pytest.raises(NullSpaceError, match="--sampler lcm only, not euler"):
        make_bundle(tiny_lcm, tmp_path / "bundle", "--sampler", "euler")
    with pytest.raises(NullSpaceError, match="--num_inference_steps 21 is too many"):
        make_bundle(tiny_lcm, tmp_path / "bundle", "--num_inference_steps", 21)
    assert {path.name for path in tmp_path.iterdir()} - {".bundle.lock"} == {"prompts.txt"}


# ---- Guidance --------------------------------------------------------------------------------------------------------


def test_the_guidance_embedding_is_the_pipelines(tiny_lcm):
    pipeline, seen = load_pipeline(tiny_lcm), []
    pipeline.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: seen.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    pipeline("a star", num_inference_steps=1, guidance_scale=6.5, output_type="latent")
    assert torch.equal(seen[0], lcm.embed_guidance(6.5, pipeline.unet.config.time_cond_proj_dim))


@pytest.mark.parametrize("loss", ["consistency", "x0", "epsilon"])
def test_the_guidance_embedding_reaches_the_unet(loss, tiny_lcm, lcm_bundle, tmp_path, monkeypatch):
    """At the scale that the bundle was built at; a run with it zeroed differs."""
    embed, scales = lcm.embed_guidance, []
    monkeypatch.setattr(lcm, "embed_guidance", lambda *args: (scales.append(args[0]), embed(*args))[1])
    guided = train(tiny_lcm, lcm_bundle, tmp_path / "guided", "--lcm_loss", loss)
    assert scales == [8.5]
    monkeypatch.setattr(lcm, "embed_guidance", lambda *args: torch.zeros_like(embed(*args)))
    assert not same(guided, train(tiny_lcm, lcm_bundle, tmp_path / "zeroed", "--lcm_loss", loss))


# ---- Timesteps -------------------------------------------------------------------------------------------------------


def test_the_solver_grid_is_the_schedulers(tiny_lcm):
    scheduler = LCMScheduler.from_pretrained(tiny_lcm, subfolder="scheduler")
    assert lcm.solver_grid(scheduler) == GRID
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= set(GRID)


def test_drawn_timesteps_lie_on_the_grid(tiny_lcm, lcm_bundle, tmp_path, monkeypatch):
    drawn, loss = [], lcm.latents_loss

    def record(*args, **conditions):
        drawn.append(set(args[3].tolist()))
        return loss(*args, **conditions)

    monkeypatch.setattr(lcm, "latents_loss", record)
    train(tiny_lcm, lcm_bundle, tmp_path / "lora", "--max_train_steps", 12)
    assert len(set.union(*drawn)) > 5 and set.union(*drawn) <= set(GRID)
    assert report(tmp_path / "lora")["training"]["lcm_loss"] == "x0"  # by default
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_bundles_of_any_step_count_train(steps, tiny_lcm, tmp_path):
    bundle = make_bundle(tiny_lcm, tmp_path / "bundle", "--num_inference_steps", steps)
    config = Bundle.load(bundle).config
    assert len(config["groups"]) == (1 if steps == 1 else 4)
    assert set(config["groups"][0]["timesteps"]) <= set(GRID) and config["num_inference_steps"] == [steps]
    train(tiny_lcm, bundle, tmp_path / "lora")
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


def test_a_timestep_range_is_protected(tiny_lcm, lcm_bundle, tmp_path):
    first = Bundle.load(lcm_bundle).config["groups"][-1]["range"]
    train(tiny_lcm, lcm_bundle, tmp_path / "lora", "--nullspace_timestep_range", *first)
    found = report(tmp_path / "lora")
    assert found["nullspace"]["timestep_range"] == first and found["leakage"]["max"] < 1e-5


def test_extra_prompts_are_drawn_as_the_bundle_was(tiny_lcm, lcm_bundle, reference, tmp_path, monkeypatch):
    drawn = []
    call = LatentConsistencyModelPipeline.__call__

    def record(pipeline, prompt, **kwargs):
        drawn.append((kwargs["num_inference_steps"], kwargs["guidance_scale"], type(pipeline.scheduler)))
        return call(pipeline, prompt, **kwargs)

    monkeypatch.setattr(LatentConsistencyModelPipeline, "__call__", record)
    tensors = train(tiny_lcm, lcm_bundle, tmp_path / "lora", "--nullspace_extra_prompts", "a photo of a star")
    assert (3, 8.5, LCMScheduler) in drawn  # the bundle's steps; the others are validation's
    assert not same(tensors, reference)


# ---- The losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_consistency_function_is_what_the_scheduler_samples_with(kind):
    """c_skip, c_out and the boundary: its value is what one step of the scheduler denoises to."""
    scheduler = LCMScheduler(prediction_type=kind, timestep_scaling=0.01)  # neither of the two close to 0 or 1
    (noisy, _), unet = one_batch(), Stub()
    for timestep in (19, 499, 999):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert 0 < c_skip < 1 and 0 < c_out < 1
        scheduler.set_timesteps(timesteps=[timestep])
        expected = scheduler.step(0.7 * noisy, timestep, noisy).denoised
        actual = lcm.consistency_function(unet, scheduler, noisy, torch.tensor([timestep] * 3))
        torch.testing.assert_close(actual, expected)
    assert torch.equal(lcm.consistency_function(unet, scheduler, noisy, torch.tensor([0] * 3)), noisy)


def test_the_consistency_target_is_earlier_and_carries_no_gradient():
    scheduler = LCMScheduler(original_inference_steps=SOLVER_STEPS)
    (latents, noise), unet = one_batch(), Stub()
    timesteps = torch.tensor([49, 499, 999])
    lcm.consistency_loss(unet, scheduler, latents, timesteps, noise, apart=4).backward()
    earlier = torch.tensor([0, 249, 749])  # a quarter of the grid of 20 steps
    assert unet.calls == [(earlier.tolist(), False), (timesteps.tolist(), True)]
    actual, unet.scale.grad = unet.scale.grad.clone(), None

    def answer(at):
        return lcm.consistency_function(unet, scheduler, scheduler.add_noise(latents, noise, at), at)

    target = answer(earlier).detach()
    ((answer(timesteps) - target).abs() - lcm.HUBER / 2).mean().backward()  # few errors are as small as HUBER
    torch.testing.assert_close(actual, unet.scale.grad, rtol=1e-3, atol=0)


def test_the_x0_loss_is_the_distance_from_the_latents():
    """Nothing for the true noise; with the truth as prediction only the boundary's c_skip is left."""
    scheduler = LCMScheduler()
    latents, noise = one_batch()
    timesteps = torch.tensor([19, 499, 999])
    truth, blank = (lambda *_, sample=sample: SimpleNamespace(sample=sample) for sample in (noise, 0 * noise))
    assert lcm.latents_loss(truth, scheduler, latents, timesteps, noise) < 1e-3
    assert lcm.latents_loss(blank, scheduler, latents, timesteps, noise) > 0.1


@pytest.mark.parametrize("loss", ["consistency", "epsilon"])
def test_every_loss_gives_a_lora_of_its_own_in_the_null_space(loss, tiny_lcm, lcm_bundle, reference, tmp_path):
    tensors = train(tiny_lcm, lcm_bundle, tmp_path / "lora", "--lcm_loss", loss)
    assert not same(tensors, reference)
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5
    assert report(tmp_path / "lora")["training"]["lcm_loss"] == loss


def test_snr_gamma_weighs_the_epsilon_loss(tiny_lcm, lcm_bundle, tmp_path):
    plain, weighed = (
        train(tiny_lcm, lcm_bundle, tmp_path / str(len(flags)), "--lcm_loss", "epsilon", *flags)
        for flags in ((), ("--snr_gamma", 1))
    )
    assert not same(plain, weighed)


# ---- The whole run ---------------------------------------------------------------------------------------------------


def test_an_lcm_is_validated_and_used_in_four_steps(tiny_lcm, lcm_bundle, tmp_path, monkeypatch):
    drawn = []
    call = LatentConsistencyModelPipeline.__call__

    def record(pipeline, *args, **kwargs):
        drawn.append((type(pipeline.scheduler), kwargs["num_inference_steps"], kwargs["guidance_scale"]))
        return call(pipeline, *args, **kwargs)

    monkeypatch.setattr(trainer, "check_against_model", lambda *_: None)  # which draws, too
    monkeypatch.setattr(LatentConsistencyModelPipeline, "__call__", record)
    output = tmp_path / "lora"
    train(tiny_lcm, lcm_bundle, output, "--validation_epochs", 1, "--mixed_precision", "bf16")
    assert set(drawn) == {(LCMScheduler, 4, 8.5)} and len(drawn) == 4  # base and tuned, in training and at the end
    card = (output / "README.md").read_text()
    assert "- lcm\n" in card and "- stable-diffusion\n" not in card
    assert 'pipeline("a photo of a sks star", num_inference_steps=4, guidance_scale=8.5)' in card
    assert report(output)["model_type"] == "lcm" and report(output)["leakage"]["max"] < 1e-5

    pipeline = load_pipeline(tiny_lcm)
    draw = {"num_inference_steps": 4, "guidance_scale": 8.5, "output_type": "np"}
    before = pipeline("a sks star", generator=torch.Generator().manual_seed(0), **draw).images
    pipeline.load_lora_weights(output)
    after = pipeline("a sks star", generator=torch.Generator().manual_seed(0), **draw).images
    assert (before != after).any()


def test_resuming_gives_the_same_lora(tiny_lcm, lcm_bundle, tmp_path):
    flags = ("--checkpointing_steps", 2, "--lora_dropout", 0.1)
    whole = train(tiny_lcm, lcm_bundle, tmp_path / "whole", *flags, "--max_train_steps", 5)
    train(tiny_lcm, lcm_bundle, tmp_path / "parts", *flags, "--max_train_steps", 2)
    resumed = train(
        tiny_lcm, lcm_bundle, tmp_path / "parts", *flags, "--max_train_steps", 5, "--resume_from_checkpoint", "latest"
    )
    assert same(whole, resumed)


# ---- An LCM-LoRA on a Stable Diffusion -------------------------------------------------------------------------------


def lcm_lora(unet, path, rank=2):
    """A random LoRA on the layers, and in the format, of the published LCM-LoRAs of Stable Diffusion 1.x."""
    endings = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
    endings += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(endings):
            key = f"lora_unet_{name.replace('.', '_')}"
            shape = module.weight.shape
            down, up = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
            tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(down, generator=generator)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(up, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def test_a_null_space_lora_composes_with_an_lcm_lora(tiny_sd1, sd_bundle, tmp_path):
    """Both act at once; what text excites in the null-space LoRA stays the same, what hidden states excite does not."""
    train(tiny_sd1, sd_bundle, tmp_path / "lora", "--max_train_steps", 6)
    pipeline = load_pipeline(tiny_sd1, StableDiffusionPipeline)
    lcm_lora(pipeline.unet, tmp_path / "lcm.safetensors")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="subject")
    pipeline.load_lora_weights(tmp_path, weight_name="lcm.safetensors", adapter_name="lcm")

    def drawn(*names):
        pipeline.set_adapters(list(names))
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a sks star", num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="latent"
        ).images

    pictures = [drawn("subject"), drawn("lcm"), drawn("subject", "lcm")]
    assert all(torch.isfinite(picture).all() for picture in pictures)
    assert not any(torch.equal(picture, other) for picture, other in zip(pictures, pictures[1:], strict=False))

    # What the subject's LoRA adds to each layer's output, relative to the base model's output
    changes, found = {}, []
    for name, module in pipeline.unet.named_modules():
        if "subject" in getattr(module, "lora_A", {}):

            def measure(module, args, output, name=name):
                change = module.lora_B["subject"](module.lora_A["subject"](args[0]))
                changes.setdefault(name, []).append((change.norm() / module.base_layer(args[0]).norm()).item())

            module.register_forward_hook(measure)
    for names in (["subject"], ["subject", "lcm"]):
        with torch.no_grad():
            drawn(*names)
        found.append({name: torch.tensor(values) for name, values in changes.items()})
        changes.clear()
    for name, alone in found[0].items():
        moved = (found[1][name] / alone - 1).abs().max()
        # The text encoder's output, which to_k and to_v read, is the same with the other LoRA; hidden states are not.
        assert moved < 1e-4 if name.endswith(("to_k", "to_v")) else moved > 1e-3
