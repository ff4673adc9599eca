"""What of a base model is fetched and loaded: revisions, variants of some parts only, and another VAE."""

import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from hub_server import HubServer, User
from safetensors.torch import load_file, save_file
from test_divergence import spoil
from test_hub import contents, fetched, seed
from transformers import CLIPTextModel

import nullspace_utils
from nullspace.bundle import read_config
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.models import download_model
from nullspace.names import CARD_NAME, COMPARISON_NAME, LORA_NAME
from test_train import bundle1, drawing_in_two_steps, make_bundle, report, same, train  # noqa: F401


FAMILY = get_family("sd")
MODEL = "ada/tiny-model"
PLAIN, HALF = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def mixed(tiny_sd1, tmp_path_factory):
    """A model whose UNet alone has fp16 files, and no others; and a file without a dot in its name."""
    folder = shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("models") / "mixed")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet")
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    (folder / PLAIN).unlink()
    (folder / "vae" / "LICENSE").touch()
    return folder


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub", {"hf_w": User("ada")}) as hub, hub.used_here(tmp_path / "cache"):
        yield hub


def command(*words):
    nullspace_utils.main(nullspace_utils.parse_args([str(word) for word in words]))


def weights(model):
    return {f"{part}.{name}": each for part, loaded in FAMILY.load_models(model).items() for name, each in
            loaded.state_dict().items()}  # fmt: skip


def test_a_variant_of_some_parts(mixed, tiny_sd1, hub, tmp_path):
    """In a folder and on the Hub: the UNet's fp16 file and the others' plain ones, rounded and not."""
    seed(hub, "model", MODEL, contents(mixed) | {PLAIN: contents(tiny_sd1)[PLAIN]})
    plain, local = weights(download_model(tiny_sd1)), weights(download_model(mixed, variant="fp16"))
    assert same(local, {name: each.half().float() if name[:5] == "unet." else each for name, each in plain.items()})
    assert same(weights(download_model(MODEL, variant="fp16")), local)
    assert HALF in fetched(hub.requests, MODEL) and PLAIN not in fetched(hub.requests, MODEL)
    pipeline = FAMILY.load_pipeline(download_model(mixed, variant="fp16"))
    assert torch.equal(pipeline.unet.conv_in.weight, local["unet.conv_in.weight"])
    with pytest.raises(NullSpaceError, match=f"No part of {mixed} has files of --variant bf16; leave it out"):
        download_model(mixed, variant="bf16")
    with pytest.raises(NullSpaceError, match=f"The base model {MODEL} cannot be had .*variant=bf16"):
        download_model(MODEL, variant="bf16")


def test_an_older_revision_of_a_model(mixed, tiny_sd1, hub, tmp_path, capsys):
    """Built, trained and audited at a revision, with a variant, though `main` has gone on; and recorded."""
    commit = seed(hub, "model", MODEL, contents(mixed))
    seed(hub, "model", MODEL, {"README.md": b"Moved."})
    flags = ("--revision", commit, "--variant", "fp16")
    bundle = make_bundle(MODEL, tmp_path / "bundle", "--with_text_encoder", *flags)
    train(MODEL, bundle, tmp_path / "lora", "--train_text_encoder", *flags)
    base = {"id": MODEL, "revision": commit, "variant": "fp16"}
    for found in (read_config(bundle), report(tmp_path / "lora")):
        assert {key: found["base_model"][key] for key in base} == base
    card = (tmp_path / "lora" / CARD_NAME).read_text()
    where = f'"{MODEL}", revision="{commit}", variant="fp16"'
    assert f"DiffusionPipeline.from_pretrained({where}, torch_dtype=torch.float16)" in card
    assert f"base_model: {MODEL}\n" in card and f"revision `{commit}`" in (bundle / CARD_NAME).read_text()
    shutil.rmtree(tmp_path / "cache")
    del hub.requests[:]
    command("audit", "--lora", tmp_path / "lora" / LORA_NAME, "--nullspace", bundle)
    assert "this LoRA changes its layers' outputs" in capsys.readouterr().out
    files = fetched(hub.requests, MODEL)
    assert {HALF, "text_encoder/model.safetensors"} <= files.keys() and not any("vae" in name for name in files)
    # The same where a name is given that the bundle does not say the files of
    for named in ([], ["--pretrained_model_name_or_path", MODEL, *flags]):
        command("verify", "--nullspace", bundle, *named)
        assert "the bundle protects what it claims" in capsys.readouterr().out
    with pytest.raises(NullSpaceError, match=f"{MODEL} cannot be had .*model_index.json"):
        download_model(MODEL)


def test_parts_come_in_float32_whatever_their_files_hold(tiny_sd1, tmp_path):
    """Of transformers and of diffusers, so that what is added to them is not rounded."""
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    CLIPTextModel.from_pretrained(folder / "text_encoder").half().save_pretrained(folder / "text_encoder")
    models = FAMILY.load_models(download_model(folder))
    assert {parameter.dtype for model in models.values() for parameter in model.parameters()} == {torch.float32}


# ---- Another VAE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny_sd1, tmp_path_factory):
    """The model with a VAE that encodes and decodes otherwise, and overflows in float16."""
    folder = shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("models") / "other")
    vae = spoil(AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae"))
    vae.quant_conv.bias.data += 1
    vae.decoder.conv_out.bias.data += 0.5
    vae.save_pretrained(folder / "vae")
    return folder


def test_another_vae_encodes_and_decodes(other, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """In float16, where this one overflows and is loaded anew: all is as if it were the base model's own."""
    runs = {"own": (other,), "given": (tiny_sd1, "--pretrained_vae_model_name_or_path", other / "vae")}
    flags = ("--mixed_precision", "fp16", "--cache_latents")
    tensors = {name: train(model, bundle1, tmp_path / name, *more, *flags) for name, (model, *more) in runs.items()}
    assert same(tensors["own"], tensors["given"])
    assert len({(tmp_path / name / COMPARISON_NAME).read_bytes() for name in runs}) == 1
    key = "pretrained_vae_model_name_or_path"
    assert [report(tmp_path / name)["training"][key] for name in runs] == [None, "vae"]
    cards = [(tmp_path / name / CARD_NAME).read_text() for name in runs]
    assert ["| VAE | `vae` |" in card for card in cards] == [False, True]
    code = 'vae=AutoencoderKL.from_pretrained("vae", torch_dtype=torch.float16), torch_dtype=torch.float16)'
    assert [code in card for card in cards] == [False, True]


def test_no_bundle_depends_on_the_vae(other, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """With another the bundle is the same to the last bit; but it is loaded, and must be whole."""
    flags = ("--with_text_encoder", "--pretrained_vae_model_name_or_path", other)
    config, without = read_config(make_bundle(tiny_sd1, tmp_path / "bundle", *flags)), read_config(bundle1)
    assert config["files"]["joint.safetensors"] == without["files"]["joint.safetensors"]
    assert config["base_model"] == without["base_model"]
    folder = shutil.copytree(other / "vae", tmp_path / "cut")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    del tensors["quant_conv.bias"]
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NullSpaceError, match="the file of the VAE cut lacks the weights quant_conv.bias"):
        make_bundle(tiny_sd1, tmp_path / "none", flags[1], folder)


def test_a_vae_of_the_hub(other, tiny_sd1, hub):
    """By itself or in a pipeline, of which nothing else is fetched."""
    files = contents(other / "vae")
    seed(hub, "model", "ada/vae", files | {"diffusion_pytorch_model.bin": b"a pickle"})
    seed(hub, "model", MODEL, contents(other))
    expected = AutoencoderKL.from_pretrained(other / "vae").state_dict()
    for name in ("ada/vae", MODEL):
        model = download_model(tiny_sd1, vae=name)
        assert model.vae == name and same(FAMILY.load_vae(model).state_dict(), expected)
        assert same(FAMILY.load_pipeline(model).vae.state_dict(), expected)
        assert {path.rpartition("/")[2] for path in fetched(hub.requests, name)} == set(files)
    with pytest.raises(NullSpaceError, match="The VAE ada/none cannot be had .*; check its name"):
        download_model(tiny_sd1, vae="ada/none")


UNFIT = {
    "scale": ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, and that of the model's own is 0.18215"),
    "channels": ({"latent_channels": 16}, "its latent_channels is 16, and that of the model's own is 4"),
    "levels": ({"block_out_channels": (8, 16)}, "its number of levels is 2, and that of the model's own is 3"),
    "class": (None, r"The VAE \S+ is a AutoencoderTiny and not an AutoencoderKL"),
    "none": ({}, r"The VAE \S+ cannot be loaded .*config.json.*; name the folder or Hub id of a VAE"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_vae_that_does_not_fit_is_refused(kind, tiny_sd1, tmp_path):
    changes, sentence = UNFIT[kind]
    if changes is None:
        AutoencoderTiny().save_config(tmp_path)
    elif changes:
        config = dict(AutoencoderKL.load_config(tiny_sd1, subfolder="vae")) | changes
        if levels := len(changes.get("block_out_channels", ())):
            config |= {f"{way}_block_types": (f"{name}Block2D",) * levels for way, name in
                       (("down", "DownEncoder"), ("up", "UpDecoder"))}  # fmt: skip
        AutoencoderKL.from_config(config).save_config(tmp_path)
    with pytest.raises(NullSpaceError) as error:
        download_model(tiny_sd1, vae=tmp_path)
    assert re.search(sentence, str(error.value))
