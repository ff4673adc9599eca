"""A base model in one file is the model that a folder with its weights is, to every script."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub_server import HubServer, User
from original_names import save_single_file
from safetensors.torch import load_file, save_file
from test_hub import seed

import nullspace_utils
from nullspace.bundle import read_config
from nullspace.errors import NullSpaceError
from nullspace.families import get_family, recognise
from nullspace.models import download_model
from nullspace.names import CARD_NAME
from test_train import bundle1, drawing_in_two_steps, make_bundle, report, same, train  # noqa: F401


NAME = "merged-v3.safetensors"
USUAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose configuration diffusers takes for such weights


@pytest.fixture(scope="module")
def sd_file(tiny_sd1, tmp_path_factory):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    return save_single_file(pipeline, tmp_path_factory.mktemp("downloads") / NAME)


@pytest.fixture
def configuration(tiny_sd1, tmp_path):
    """All of a model's folder but its weights."""
    return shutil.copytree(tiny_sd1, tmp_path / "configuration", ignore=shutil.ignore_patterns("*.safetensors"))


def command(*words):
    nullspace_utils.main(nullspace_utils.parse_args([str(word) for word in words]))


def spectra(bundle):
    """The sha256 of each file of a bundle that holds its projectors."""
    return {name: sha for name, sha in read_config(bundle)["files"].items() if name.endswith(".safetensors")}


def test_a_file_and_its_folder_are_one_model(sd_file, tiny_sd1, configuration, bundle1, tmp_path, monkeypatch):  # noqa: F811
    """Either trains with the other's bundle, to the same LoRA; what is written names the file, not where it lies."""
    flags, (bundle, file_lora, lora) = ("--single_file_config", configuration), map(tmp_path.joinpath, "bfl")
    words = ["build_nullspace.py", "--pretrained_model_name_or_path", str(sd_file), *map(str, flags)]
    monkeypatch.setattr("sys.argv", words)
    make_bundle(sd_file, bundle, "--with_text_encoder", *flags)
    config = read_config(bundle)
    assert spectra(bundle) == spectra(bundle1)
    assert config["base_model"] == read_config(bundle1)["base_model"] | {"id": NAME}
    assert f"--pretrained_model_name_or_path {NAME} " in config["command"]
    card = (bundle / CARD_NAME).read_text()
    assert f"The directions that the attention layers of `{NAME}` use" in card and str(sd_file.parent) not in card

    tensors = train(sd_file, bundle1, file_lora, *flags)
    for name, tensor in train(tiny_sd1, bundle, lora).items():
        # Equal weights at other places in memory are not multiplied to the same last bit
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-5)
    assert [report(folder)["base_model"]["id"] for folder in (file_lora, lora)] == [NAME, str(tiny_sd1)]
    card = (file_lora / CARD_NAME).read_text()
    where = f'"{NAME}", config="{Path(configuration).name}"'
    assert f"StableDiffusionPipeline.from_single_file({where}, torch_dtype=torch.float16)" in card
    assert "from diffusers import StableDiffusionPipeline\n" in card and "\nbase_model:" not in card
    assert str(sd_file.parent) not in card + json.dumps(report(file_lora))


def test_its_parts_are_those_of_its_folder(tiny_sd2, tmp_path):
    """Of Stable Diffusion 2, whose text encoder has OpenCLIP's names there."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2, safety_checker=None)
    path = save_single_file(pipeline, tmp_path / NAME)
    models = get_family("sd").load_models(download_model(path, config=tiny_sd2))
    assert models.keys() == {"text_encoder", "unet", "vae"}
    for name, model in models.items():
        assert same(model.state_dict(), getattr(pipeline, name).state_dict())


def test_the_commands_take_a_file(sd_file, configuration, bundle1, tmp_path, capsys):  # noqa: F811
    named = ("--pretrained_model_name_or_path", sd_file, "--single_file_config", configuration)
    command("verify", "--nullspace", bundle1, *named)
    assert "the bundle protects what it claims at all 19 inputs" in capsys.readouterr().out
    name = next(name for name in read_config(bundle1)["modules"] if name.endswith("to_k"))
    weights = {f"unet.{name}.lora.down.weight": torch.ones(1, 32), f"unet.{name}.lora.up.weight": torch.ones(16, 1)}
    save_file(weights, tmp_path / "lora.safetensors")
    command("audit", "--nullspace", bundle1, "--lora", tmp_path / "lora.safetensors", *named)
    assert "this LoRA changes its layers' outputs" in capsys.readouterr().out
    shutil.copytree(bundle1, tmp_path / "cache" / f"tiny-{'0' * 16}")
    command("find", "--nullspace_cache_dir", tmp_path / "cache", *named)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cache'}/tiny-0")


def test_its_configuration_is_found_on_the_hub(sd_file, tiny_sd1, tmp_path):
    """Without the weights there, and again from the cache; where it cannot be had, a sentence says what to pass."""
    files = {path.relative_to(tiny_sd1).as_posix(): path.read_bytes() for path in tiny_sd1.rglob("*") if path.is_file()}
    refused = rf"The configuration and tokenizers of .*{NAME} are to be those of {USUAL}, .*; pass --single_file_config"
    with HubServer(tmp_path / "hub", {"hf_w": User("ada")}) as hub:
        with hub.used_here(tmp_path / "cache"), pytest.raises(NullSpaceError, match=refused):
            download_model(sd_file)
        commit = seed(hub, "model", USUAL, files)
        with hub.used_here(tmp_path / "cache"):
            assert recognise(sd_file).name == "sd"
            model = download_model(sd_file)
            assert model.folder.name == commit and model.revision is None
            assert sum(request.bytes_sent for request in hub.requests) < len(files["text_encoder/model.safetensors"])
        with hub.used_here(tmp_path / "cache", HF_HUB_OFFLINE=True):
            assert download_model(sd_file) == model
        with hub.used_here(tmp_path / "empty", HF_HUB_OFFLINE=True), pytest.raises(NullSpaceError, match=refused):
            recognise(sd_file)
    assert not list(model.folder.rglob("*.safetensors"))
    assert get_family("sd").load_models(model, ["vae"])["vae"].config.latent_channels == 4


def spoil(change):
    """A file that is no base model, from one that is: its path."""

    def make(sd_file, tmp_path):
        path = tmp_path / "model.safetensors"
        tensors = load_file(sd_file)
        change(tensors)
        save_file(tensors, path)
        return path

    return make


def without(*prefixes):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefixes)]


def truncated(sd_file, tmp_path):
    path = shutil.copy(sd_file, tmp_path / "model.safetensors")
    os.truncate(path, 5000)
    return path


def written(name, content):
    def make(sd_file, tmp_path):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


def lora(sd_file, tmp_path):
    save_file({"lora_unet_mid_block_attentions_0.lora_down.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
NORM = f"{TEXT}transformer.text_model.final_layer_norm.weight"
NOT_READ = r"\S+ cannot be read .*: it is no safetensors file, or not a whole one; get it again"
MISFIT = r"\S+ does not fit the configuration in \S+ \(%s\); check the file, or pass --single_file_config"
REFUSED = {
    "missing": (lambda sd_file, tmp_path: tmp_path / "model.safetensors", r"There is no file \S+; name that of the"),
    "pickle": (written("model.ckpt", b"PK"), r"\S+model.ckpt is no .safetensors file, and no other is opened, since"),
    "another": (written("model.gguf", b"GGUF"), r"\S+model.gguf is no .safetensors file, and no other is opened"),
    "text": (written("model.safetensors", b"not a checkpoint"), NOT_READ),
    "empty": (written("model.safetensors", b""), NOT_READ),
    "truncated": (truncated, NOT_READ),
    "LoRA": (lora, r"\S+ is a LoRA; name the file of the base model that it is for"),
    "no VAE": (spoil(without(VAE)), r"\S+ has no weights of a VAE under their original names, so it is no whole"),
    "UNet alone": (spoil(without(VAE, TEXT)), r"\S+ has no weights of a VAE or text encoder under"),
    "weights missing": (spoil(without(f"{UNET}out.2")), MISFIT % "weights of its UNet or VAE are missing"),
    "norm missing": (spoil(without(NORM)), MISFIT % r"its text_encoder lacks the weights \S*final_layer_norm.weight"),
    "LCM": (
        spoil(lambda tensors: tensors.update({f"{UNET}time_embed.cond_proj.weight": torch.zeros(4, 4)})),
        MISFIT % r"its UNet has \d+ weights and not \d+",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_base_model_is_refused(kind, sd_file, tiny_sd1, tmp_path):
    make, sentence = REFUSED[kind]
    with pytest.raises(NullSpaceError) as error:
        model = download_model(make(sd_file, tmp_path), config=tiny_sd1)
        get_family("sd").load_models(model)
    assert re.match(sentence, str(error.value)) and ". " not in str(error.value), str(error.value)


def test_what_does_not_go_with_a_file_is_refused(sd_file, tiny_sd1, tiny_sd2, tmp_path):
    def refusal(*named, **options):
        with pytest.raises(NullSpaceError) as error:
            model = download_model(*named, **options)
            recognise(*named, config=options.get("config")) and get_family("sd").load_models(model)
        return str(error.value)

    assert "--variant fp16 chooses among files" in refusal(sd_file, variant="fp16")
    assert "--revision main chooses among files" in refusal(sd_file, revision="main")
    assert f"--revision main is of the Hub's files, and {tiny_sd1} is a folder" in refusal(tiny_sd1, revision="main")
    assert f"--single_file_config is for a base model in one .safetensors file, and {tiny_sd1} is" in refusal(
        tiny_sd1, config=tiny_sd1
    )
    assert f"{tmp_path} has no model_index.json, so it is no model to read" in refusal(sd_file, config=tmp_path)
    other = refusal(sd_file, config=tiny_sd2)
    assert re.search(r"does not fit the configuration in .* expected shape .*; check the file, or pass", other)
    predicts_velocity = spoil(lambda tensors: tensors.update(v_pred=torch.zeros(0)))(sd_file, tmp_path)
    assert "predicts velocities, which the usual configuration does not say" in refusal(predicts_velocity)
    assert download_model(predicts_velocity, config=tiny_sd1).name == "model.safetensors"
