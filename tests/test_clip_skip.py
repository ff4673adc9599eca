"""--clip_skip: diffusers' meaning, the same in bundle, training, pictures and words, and refused where they differ."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace.bundle import Bundle
from nullspace.checks import check_clip_skip
from nullspace.errors import NullSpaceError
from nullspace.families.stable_diffusion import encode_tokens, prompt_arguments
from nullspace.lora import load_lora
from nullspace.names import LORA_NAME, TEXT_ENCODER, TEXT_INPUT
from nullspace.protection import load_protection
from test_train import bundle1, command_line, drawing_in_two_steps, make_bundle, report, same, train  # noqa: F401


PROMPTS = ["a red star", "a blue heart on a white background"]


@pytest.fixture(scope="module")
def skipping(tiny_sd1, tmp_path_factory):
    """A bundle with --clip_skip 1, of the text encoder too."""
    folder = tmp_path_factory.mktemp("skipping") / "bundle"
    return make_bundle(tiny_sd1, folder, "--clip_skip", 1, "--with_text_encoder")


@pytest.fixture(scope="module")
def skipped(tiny_sd1, skipping, tmp_path_factory):
    """A run with it, its text encoder trained, with an extra prompt and validation."""
    folder = tmp_path_factory.mktemp("skipped") / "lora"
    flags = ("--clip_skip", 1, "--train_text_encoder", "--validation_steps", 2, "--checkpointing_steps", 2)
    train(tiny_sd1, skipping, folder, *flags, "--nullspace_extra_prompts", "a green star")
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    text_encoder = pipeline.text_encoder
    if not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)  # where diffusers looks for the norm
    return pipeline


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_embeddings_are_those_of_diffusers(skip, pipeline):
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=skip)[0]
    tokens = pipeline.tokenizer(
        PROMPTS, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
    )
    assert torch.equal(encode_tokens(pipeline.text_encoder, tokens.input_ids, clip_skip=skip), expected)
    if skip:
        assert torch.equal(prompt_arguments(pipeline, PROMPTS, skip)["prompt_embeds"], expected)
    else:
        assert prompt_arguments(pipeline, PROMPTS, skip) == {"prompt": PROMPTS}


def test_pictures_are_those_of_diffusers(pipeline):
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    one, other, plain = (
        pipeline(**settings, **how, generator=torch.Generator().manual_seed(0)).images
        for how in (
            {"prompt": PROMPTS[0], "clip_skip": 1},
            prompt_arguments(pipeline, PROMPTS[0], 1),
            {"prompt": PROMPTS[0]},
        )
    )
    assert torch.equal(one, other) and not torch.equal(one, plain)


def test_a_bundle_holds_what_those_prompts_give(skipping, bundle1, pipeline):  # noqa: F811
    """Its text input: the empty prompt of all layers as the negative one, and the prompts without the last."""
    bundle = Bundle.load(skipping)
    prompts = ["", "a red star", "a blue heart on a white background"]
    negative = pipeline.encode_prompt([""] * 3, "cpu", 1, False)[0]
    read = torch.cat([negative, prompt_arguments(pipeline, prompts, 1)["prompt_embeds"]]).flatten(0, 1).double()
    spectrum = bundle.spectra[TEXT_INPUT][TEXT_INPUT]
    expected = read.T @ read
    assert (spectrum.sum() - expected).norm() < 1e-3 * expected.norm()
    assert (Bundle.load(bundle1).spectra[TEXT_INPUT][TEXT_INPUT].sum() - expected).norm() > 1e-2 * expected.norm()


def test_it_is_recorded(skipping, skipped):
    assert json.loads((skipping / "nullspace_config.json").read_text())["clip_skip"] == 1
    assert "--clip_skip 1 \\\n" in (skipping / "README.md").read_text()
    assert "| clip skip | 1 |" in (skipping / "README.md").read_text()
    assert report(skipped)["training"]["clip_skip"] == 1
    card = (skipped / "README.md").read_text()
    assert "| clip skip | 1 |" in card and ", clip_skip=1).images[0]" in card


def test_training_keeps_the_guarantee_and_leaves_the_skipped_layers(skipped):
    assert report(skipped)["leakage"]["max"] < 1e-5 and not report(skipped)["unprotected"]
    layers = {name.partition("self_attn")[0] for name in load_lora(skipped) if name.startswith(TEXT_ENCODER)}
    assert layers == {f"{TEXT_ENCODER}.encoder.layers.0."}


def test_resuming_goes_on_with_it(tiny_sd1, skipping, skipped, tmp_path):
    flags = ("--clip_skip", 1, "--train_text_encoder", "--nullspace_extra_prompts", "a green star")
    resumed = train(tiny_sd1, skipping, tmp_path / "lora", *flags, "--resume_from_checkpoint", skipped / "checkpoint-2")
    assert same(resumed, load_file(skipped / LORA_NAME))


def test_in_half_precision(tiny_sd1, skipping, tmp_path):
    """Where the final norm's weights are of another precision than what it is given."""
    flags = ("--clip_skip", 1, "--train_text_encoder", "--mixed_precision", "bf16")
    train(tiny_sd1, skipping, tmp_path / "lora", *flags)
    assert report(tmp_path / "lora")["leakage"]["max"] < 1e-5


@pytest.mark.parametrize(
    ("flags", "built", "asked"), [((), 1, 0), (("--clip_skip", "2"), 1, 2), (("--clip_skip", "1"), 0, 1)]
)
def test_another_clip_skip_than_the_bundles_is_refused(flags, built, asked, skipping, bundle1, tmp_path):  # noqa: F811
    args = trainer.parse_args(command_line("nowhere", skipping if built else bundle1, tmp_path / "lora", *flags))
    with pytest.raises(NullSpaceError, match=f"--clip_skip {asked} is not the {built} that the bundle was built with"):
        load_protection(args)
    assert not (tmp_path / "lora").exists()


def test_a_bundle_that_names_none_has_none(bundle1):  # noqa: F811
    config = copy.deepcopy(Bundle.load(bundle1).config)
    del config["clip_skip"]
    Bundle(config).check_clip_skip(0)
    with pytest.raises(NullSpaceError):
        Bundle(config).check_clip_skip(1)


def test_bundles_of_two_clip_skips_are_not_merged(skipping, bundle1):  # noqa: F811
    bundles = [Bundle.load(folder, text_encoder=True, every_group=True) for folder in (skipping, bundle1)]
    with pytest.raises(NullSpaceError, match="their clip skip differ"):
        bundles[0].merge(bundles[1])


def test_more_layers_than_there_are_cannot_be_skipped(tiny_sd1, tmp_path):
    check_clip_skip(11, 12)
    with pytest.raises(NullSpaceError, match="--clip_skip 2 leaves nothing of the text encoder, which has 2 layers"):
        make_bundle(tiny_sd1, tmp_path / "bundle", "--clip_skip", 2)
    assert not (tmp_path / "bundle").exists()


def test_a_negative_clip_skip_is_refused(capsys):
    for script, argv in (
        (build_nullspace, ["--pretrained_model_name_or_path", "m", "--prompts_file", "p"]),
        (trainer, command_line("m", "b", "o")),
    ):
        with pytest.raises(SystemExit):
            script.parse_args([*argv, "--clip_skip", "-1"])
        assert "--clip_skip must be at least 0" in capsys.readouterr().err
