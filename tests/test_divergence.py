"""nullspace/divergence.py: a training that diverged stops within ten steps, says why, and leaves what there was."""

import gc
import logging
import math
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import train_dreambooth_nullspace as trainer
from nullspace import preparation, results
from nullspace.checkpoint import checkpoints
from nullspace.divergence import (
    MOST_SKIPPED,
    DivergedError,
    SkippedSteps,
    check_scalars,
    check_weights,
    overflows,
    run_in_float32,
    sound_vae,
)
from nullspace.families import stable_diffusion
from nullspace.hashes import sha256
from nullspace.names import LORA_NAME, REPORT_NAME
from test_train import ScalingAccelerator, bundle1, drawing_in_two_steps, same, train  # noqa: F401 (fixtures)


RATES = SimpleNamespace(word_only=False, learning_rate=1e-3, word_learning_rate=5e-3)


# ---- What is looked at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("latents", "the latents that the VAE made are not finite at step 7"),
        ("loss", "the loss is not finite at step 7"),
        ("grad_norm", "the gradients (grad_norm) are not finite at step 7"),
        ("grad_norm_projected", "the gradients (grad_norm_projected) are not finite at step 7"),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_its_step_and_what_mends_it(name, what, value):
    good = {"latents": 3.0, "loss": 1.0, "grad_norm": 0.0, "grad_norm_projected": 1e30}
    check_scalars(good, 7, RATES)
    with pytest.raises(DivergedError, match=re.escape(what)) as caught:
        check_scalars(good | {name: value}, 7, RATES)
    assert all(part in str(caught.value) for part in ("lower --learning_rate (it is 0.001)", "bf16", "VAE"))
    if name.startswith("grad"):
        check_scalars(good | {name: value}, 7, RATES, skipped=True)
    else:
        with pytest.raises(DivergedError):
            check_scalars(good | {name: value}, 7, RATES, skipped=True)


def test_where_a_word_alone_is_trained_its_rate_is_what_mends_it():
    with pytest.raises(DivergedError, match=r"lower --word_learning_rate \(it is 0\.005\)"):
        check_scalars({"loss": math.nan}, 7, SimpleNamespace(**vars(RATES) | {"word_only": True}))


def test_weights_are_finite_in_the_type_that_they_are_saved_in():
    parameters = [torch.ones(2, 3), torch.full((3, 2), 1e5)]
    check_weights(parameters, 4, RATES)
    check_weights(parameters, 4, RATES, torch.bfloat16)
    with pytest.raises(DivergedError, match="of 1 of the 2 trained matrices are not finite in float16 at step 4"):
        check_weights(parameters, 4, RATES, torch.float16)
    parameters[0][0, 0] = math.nan
    with pytest.raises(DivergedError, match="of 1 of the 2 trained matrices are not finite in float32"):
        check_weights(parameters, 4, RATES)


def test_twenty_skipped_steps_in_a_row_are_too_many():
    steps = SkippedSteps()
    for step in range(MOST_SKIPPED - 1):
        steps.add(True, step, RATES)
    steps.add(False, MOST_SKIPPED, RATES)
    for step in range(MOST_SKIPPED - 1):
        steps.add(True, step, RATES)
    with pytest.raises(DivergedError, match="infinite in 20 steps in a row, .* up to step 40"):
        steps.add(True, 40, RATES)


# ---- The trainer -----------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_leaves_the_lora_and_the_checkpoint_and_the_run_can_go_on(
    tiny_sd1,
    bundle1,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    """The loss is NaN from step 5 on; the checkpoint of step 4 stays, that of step 8 is not written."""
    output, flags = tmp_path / "lora", ("--checkpointing_steps", 4, "--max_train_steps", 30)
    train(tiny_sd1, bundle1, output)
    good = {name: sha256(output / name) for name in (LORA_NAME, "nullspace_report.json", "README.md")}
    steps, loss = [], stable_diffusion.diffusion_loss

    def spoiled(*args, **kwargs):
        steps.append(1)
        return loss(*args, **kwargs) * (math.nan if len(steps) >= 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(stable_diffusion, "diffusion_loss", spoiled)
        left = f"lora still holds {LORA_NAME} and checkpoint-4, left as before."
        with pytest.raises(DivergedError, match=f"the loss is not finite at step 5.*{left}$"):
            train(tiny_sd1, bundle1, output, *flags)
    assert len(steps) == 8
    assert good == {name: sha256(output / name) for name in good}
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]
    resumed = train(tiny_sd1, bundle1, output, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert same(resumed, train(tiny_sd1, bundle1, tmp_path / "whole", "--max_train_steps", 6))


def test_a_rate_that_is_far_too_high_stops_within_ten_steps(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    steps, loss = [], stable_diffusion.diffusion_loss
    monkeypatch.setattr(
        stable_diffusion, "diffusion_loss", lambda *args, **kwargs: (steps.append(1), loss(*args, **kwargs))[1]
    )
    with pytest.raises(DivergedError, match=r"at step [1-9]\b.* lower --learning_rate \(it is 1e\+30\)") as caught:
        train(tiny_sd1, bundle1, tmp_path / "lora", "--learning_rate", 1e30, "--max_train_steps", 100)
    assert str(caught.value).endswith("overflow in it.") and len(steps) <= 11
    assert not (tmp_path / "lora" / LORA_NAME).exists()


@pytest.mark.parametrize("flags", [[], ["--checkpointing_steps", 1]], ids=["at the end", "at a checkpoint"])
def test_weights_that_a_step_spoiled_are_not_saved(flags, tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    """Loss and gradients were those before the step, and finite."""
    make = trainer.make_optimizer

    def make_optimizer(groups, args):
        optimizer = make(groups, args)
        optimizer.register_step_post_hook(lambda *_: groups[0]["params"][1].data.fill_(math.inf))
        return optimizer

    monkeypatch.setattr(trainer, "make_optimizer", make_optimizer)
    with pytest.raises(DivergedError, match="weights of 1 of the .* are not finite in float32 at step 1"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--max_train_steps", 1, "--validation_steps", 9, *flags)
    assert not checkpoints(tmp_path / "lora") and not (tmp_path / "lora" / LORA_NAME).exists()


@pytest.mark.parametrize("earlier", [True, False])
def test_pictures_that_are_not_finite_put_the_earlier_lora_back(
    earlier,
    tiny_sd1,
    bundle1,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    """Finite weights, so large that what they draw is not; the last step is the one that made them so."""
    output, names = tmp_path / "lora", (LORA_NAME, REPORT_NAME, "README.md", "comparison.png")
    if earlier:
        train(tiny_sd1, bundle1, output)
    before = {name: sha256(output / name) for name in names if earlier}
    pushed, flags = [], ("--push_to_hub", "--validation_steps", 100)
    monkeypatch.setattr(results, "push_folder", lambda *args: pushed.append(args))
    monkeypatch.setattr(preparation, "hub_repository", lambda *args: "someone/lora")
    monkeypatch.setattr(preparation, "create_repository", lambda *args: None)
    with pytest.raises(DivergedError, match=r"latents of the pictures are not finite \(Drawing with the LoRA\)"):
        train(tiny_sd1, bundle1, output, "--learning_rate", 1e30, "--max_train_steps", 1, *flags)
    assert before == {name: sha256(output / name) for name in names if (output / name).exists()}
    assert not pushed and not list(output.glob("*partial*"))


@pytest.fixture(scope="module")
def undrawable(tiny_sd1, tmp_path_factory):
    """A model whose VAE encodes as it should, and decodes to NaN."""
    folder = tmp_path_factory.mktemp("undrawable") / "model"
    shutil.copytree(tiny_sd1, folder)
    vae = AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")
    vae.decoder.conv_out.weight.data.fill_(math.nan)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_decoder_that_gives_nan_is_refused_before_the_first_step(
    precision, undrawable, bundle1, tmp_path, monkeypatch
):  # noqa: F811
    monkeypatch.setattr(stable_diffusion, "diffusion_loss", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(DivergedError, match="of picture 1, or the picture of them, .* before the first step") as caught:
        train(undrawable, bundle1, tmp_path / "lora", "--mixed_precision", precision)
    assert ("in float32 too" in str(caught.value)) == (precision == "fp16")
    assert "still holds" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "where"),
    [(("--validation_steps", 100), "Drawing with the base model"), ((), "Validating, base")],
    ids=["at the end", "in training"],
)
def test_pictures_of_nan_leave_the_earlier_lora(flags, where, undrawable, tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    """As of a VAE that decodes the training pictures, but not what is drawn, in float32."""
    output = tmp_path / "lora"
    train(tiny_sd1, bundle1, output)
    names = (LORA_NAME, REPORT_NAME, "README.md", "comparison.png")
    before = {name: sha256(output / name) for name in names}
    monkeypatch.setattr(trainer, "sound_vae", lambda vae, *args: vae)
    with pytest.raises(DivergedError, match=re.escape(f"the pictures are not finite ({where})")) as caught:
        train(undrawable, bundle1, output, *flags)
    assert str(caught.value).endswith(f"; {output} still holds {LORA_NAME}, left as before.")
    assert before == {name: sha256(output / name) for name in names}


class OverflowingAccelerator(ScalingAccelerator):
    """One whose loss is scaled so that it never comes down to what fp16 holds."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)


def test_a_loss_scale_that_never_fits_counts(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(preparation, "Accelerator", OverflowingAccelerator)
    with pytest.raises(DivergedError, match="infinite in 20 steps in a row, which fp16's loss scaling skipped"):
        train(tiny_sd1, bundle1, tmp_path / "lora", "--mixed_precision", "fp16", "--max_train_steps", 30)


# ---- The VAE in fp16 -------------------------------------------------------------------------------------------------


def spoil(vae, factor=1e5):
    """Scale a convolution whose output is normed right after it: the same function, but for the range of float16."""
    convolution = vae.encoder.down_blocks[0].resnets[0].conv1
    convolution.weight.data *= factor
    convolution.bias.data *= factor
    return vae


@pytest.fixture(scope="module")
def overflowing(tiny_sd1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(tiny_sd1, folder)
    spoil(AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")).save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("flags", [[], ["--cache_latents", "--validation_epochs", 1]], ids=["plain", "cached"])
def test_a_vae_that_overflows_in_fp16_is_run_in_fp32(
    flags,
    overflowing,
    tiny_sd1,
    bundle1,
    tmp_path,
    caplog,
    monkeypatch,  # noqa: F811
):
    """The sentence is said, the latents are those in float32, and pictures are no black ones."""
    with caplog.at_level(logging.WARNING):
        tensors = train(overflowing, bundle1, tmp_path / "lora", "--mixed_precision", "fp16", *flags)
    assert "The VAE overflows in fp16: it is run in fp32, and the rest in fp16." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        plain = train(tiny_sd1, bundle1, tmp_path / "plain", "--mixed_precision", "fp16", *flags)
    assert "VAE" not in caplog.text
    for key in tensors:
        torch.testing.assert_close(tensors[key], plain[key], rtol=0.1, atol=2e-2)
    for name in ("comparison.png", "pictures/0.png"):
        first, second = (
            torch.frombuffer(bytearray(Image.open(tmp_path / run / name).tobytes()), dtype=torch.uint8).float()
            for run in ("lora", "plain")
        )
        assert (first - second).abs().mean() < 8


def test_a_vae_that_is_nowhere_finite_is_refused_before_the_first_step(overflowing, tmp_path):
    def anew():
        return AutoencoderKL.from_pretrained(overflowing, subfolder="vae")

    vae = anew().half()
    pictures = [torch.rand(3, 32, 32) * 2 - 1 for _ in range(2)]
    assert overflows(vae, pictures) == 0
    assert sound_vae(vae, lambda: iter(pictures), anew, RATES).dtype == torch.float32
    with pytest.raises(DivergedError, match="of picture 2.* before the first step, in float32 too"):
        sound_vae(vae, lambda: iter([pictures[0], pictures[1] * math.nan]), anew, RATES)


def test_a_decoder_that_overflows_counts_too(tiny_sd1):
    vae = AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")
    vae.decoder.up_blocks[0].resnets[0].conv1.weight.data *= 1e6
    vae.decoder.up_blocks[0].resnets[0].conv1.bias.data *= 1e6
    picture = torch.rand(3, 32, 32) * 2 - 1
    assert overflows(vae, [picture]) is None
    assert overflows(vae.half(), [picture]) == 0


def test_what_runs_in_float32_leaves_memory_at_once(overflowing):
    """Without a cycle of references, which would keep it until the next collection."""
    vae = run_in_float32(AutoencoderKL.from_pretrained(overflowing, subfolder="vae"))
    left = weakref.ref(vae)
    gc.disable()
    try:
        del vae
        assert left() is None
    finally:
        gc.enable()


def test_run_in_float32_holds_within_autocast(overflowing):
    vae = run_in_float32(AutoencoderKL.from_pretrained(overflowing, subfolder="vae"))
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        mean = vae.encode(torch.rand(1, 3, 32, 32).half()).latent_dist.mean
        assert mean.dtype == torch.float32 and mean.isfinite().all()
        assert vae.decode(mean.half(), return_dict=False)[0].dtype == torch.float32
