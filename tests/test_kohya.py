"""The file for AUTOMATIC1111, Forge and ComfyUI: kohya's names, the LoRA to the last bit, and what its metadata say."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import nullspace_utils
from nullspace.errors import NullSpaceError
from nullspace.families import stable_diffusion
from nullspace.kohya import check_replaceable, kohya_metadata, kohya_name, read_report, save_kohya
from nullspace.lora import LoraLayer, load_lora
from nullspace.names import LORA_NAME
from nullspace.results import write_kohya
from test_train import bundle1, drawing_in_two_steps, report, train  # noqa: F401
from train_dreambooth_nullspace import parse_args


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def export(*flags):
    nullspace_utils.main(nullspace_utils.parse_args(["export", *map(str, flags)]))


def assert_same_lora(found, expected):
    """Every tensor and scale, bit for bit, and so every dW."""
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].down, layer.down) and torch.equal(found[name].up, layer.up)
        assert found[name].down.dtype == layer.down.dtype and found[name].scale == layer.scale
        change = [each.scale * each.up.double() @ each.down.double() for each in (found[name], layer)]
        assert torch.equal(*change)


@pytest.fixture(scope="module")
def trained(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """A run with the flag, the text encoder trained and alpha other than the rank: its folder."""
    folder = tmp_path_factory.mktemp("kohya") / "sks-dog"
    train(tiny_sd1, bundle1, folder, "--train_text_encoder", "--lora_alpha", 3, "--output_kohya_format")
    return folder


def test_the_trainer_writes_it_as_well(trained, tiny_sd1, bundle1):  # noqa: F811
    path = trained / "sks-dog.safetensors"
    layers, tensors = load_lora(trained), load_file(path)
    assert len(tensors) == 3 * len(layers)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight" in tensors
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    assert {tensors[f"{kohya_name(name)}.alpha"].item() for name in layers} == {3}
    assert any(layer.up.any() for layer in layers.values())
    assert_same_lora(load_lora(path), layers)
    found, written = metadata(path), report(trained)
    assert found["ss_network_module"] == "networks.lora" and found["ss_network_dim"] == "2"
    assert found["ss_network_alpha"] == "3"
    assert "ss_base_model_version" not in found and "ss_v2" not in found  # of a width that is no Stable Diffusion's
    assert found["ss_sd_model_name"] == tiny_sd1.name and found["ss_clip_skip"] == "1"
    assert float(found["ss_nullspace_leakage"]) == pytest.approx(written["leakage"]["max"], rel=1e-3)
    assert written["nullspace"]["prompts"]["sha256"] in found["ss_nullspace_bundle"]
    assert found["ss_nullspace_bundle"].startswith(f"{bundle1.name} ")


def test_a_report_is_given_to_no_other_file(trained, tmp_path):
    """A LoRA that lies in the folder of another has none: its guarantee is not that one's."""
    folder = shutil.copytree(trained, tmp_path / "lora")
    shutil.copy(folder / LORA_NAME, folder / "other.safetensors")
    export("--lora", folder / "other.safetensors", "--output", tmp_path / "exported.safetensors")
    with safe_open(tmp_path / "exported.safetensors", "pt") as file:
        assert "ss_nullspace_bundle" not in file.metadata()
    assert read_report(folder / "other.safetensors") is None
    for own in (folder, folder / LORA_NAME, folder / "sks-dog.safetensors"):
        assert read_report(own) is not None


def test_export_is_the_same_file_and_reproducible(trained, tmp_path):
    for name in ("a/sks-dog.safetensors", "b/sks-dog.safetensors"):
        (tmp_path / name).parent.mkdir()
        export("--lora", trained, "--format", "kohya", "--output", tmp_path / name)
        assert (tmp_path / name).read_bytes() == (trained / "sks-dog.safetensors").read_bytes()
        assert [path.name for path in (tmp_path / name).parent.iterdir()] == ["sks-dog.safetensors"]


def test_a_later_run_without_it_leaves_no_file_of_an_earlier_lora(trained, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    args = Namespace(output_dir=folder, output_kohya_format=False, placeholder_token=None)
    ours, other = (trained / "sks-dog.safetensors").read_bytes(), (trained / LORA_NAME).read_bytes()
    (folder / "lora.safetensors").write_bytes(other)
    write_kohya(None, args)
    assert (folder / "lora.safetensors").is_file()  # somebody else's
    (folder / "lora.safetensors").write_bytes(ours)
    write_kohya(None, args)
    assert (folder / "lora.safetensors").is_file()  # that of another run, copied here
    save_kohya(folder / "lora.safetensors", load_lora(trained), report(trained))
    write_kohya(None, args)
    assert not (folder / "lora.safetensors").exists()
    (folder / "lora.safetensors").mkdir()
    write_kohya(None, args)
    assert (folder / "lora.safetensors").is_dir()


@pytest.mark.parametrize("what", ["a folder", "another LoRA", "no LoRA"])
def test_what_stands_in_its_place_is_noticed_before_the_work(what, trained, tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "lora" / "lora.safetensors"
    path.parent.mkdir()
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes((trained / LORA_NAME).read_bytes() if what == "another LoRA" else b"kept")
    before = path.is_file() and path.read_bytes()
    monkeypatch.setattr(stable_diffusion, "load_whole", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(
        NullSpaceError, match=r"^--output_kohya_format \w.*lora\.safetensors, which .*rename or remove it\.$"
    ):
        train(tiny_sd1, bundle1, path.parent, "--output_kohya_format")
    assert list(path.parent.iterdir()) == [path] and (path.is_file() and path.read_bytes()) == before


def test_its_own_earlier_file_may_be_replaced(trained):
    check_replaceable(trained / "sks-dog.safetensors")
    check_replaceable(trained / "new.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1 / 3, 2 / 3**0.5, 1.0, 1e-3])
def test_scales_that_float32_would_round(tmp_path, scale, dtype):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layers = {name: LoraLayer(torch.randn(3, 8, dtype=dtype), torch.randn(6, 3, dtype=dtype), scale)}
    save_kohya(tmp_path / "lora.safetensors", layers)
    assert_same_lora(load_lora(tmp_path / "lora.safetensors"), layers)


def test_the_kind_of_base_model():
    name, report = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", {"prediction_type": "v_prediction"}
    report |= {"base_model": {"id": "a/b"}, "training": {"clip_skip": 1}, "leakage": {"max": None}}
    report["nullspace"] = {"bundle": "a/c", "revision": "f00", "prompts": {"sha256": "1"}}
    versions = [(768, {}, "sd_v1"), (512, {}, None), (2048, {}, "sdxl_base_v1-0")]
    versions += [(1024, {}, "sd_v2"), (1024, report, "sd_v2_v")]
    for width, given, version in versions:
        layers = {name: LoraLayer(torch.ones(2, width), torch.ones(3, 2), 1.0)}
        found = kohya_metadata(layers, given, "x")
        assert found.get("ss_base_model_version") == version
        assert found.get("ss_v2") == (version and str("sd_v2" in version))
    own = {name.replace("attn2", "attn1"): LoraLayer(torch.ones(2, 1024), torch.ones(3, 2), 1.0)}
    assert "ss_base_model_version" not in kohya_metadata(own)  # reads no text
    found = kohya_metadata(layers, report, "x")
    assert found["ss_clip_skip"] == "2" and "ss_nullspace_leakage" not in found
    assert found["ss_nullspace_bundle"].startswith("a/c@f00")


def test_it_is_published_and_cannot_be_taken_for_the_lora(tmp_path, capsys):
    words = "--pretrained_model_name_or_path m --nullspace_name_or_path n --instance_data_dir d --instance_prompt p"
    folders = tmp_path / "sks-dog", tmp_path / "pytorch_lora_weights"
    first, second = ([*words.split(), "--output_kohya_format", "--output_dir", str(folder)] for folder in folders)
    assert parse_args(first).output_kohya_format
    with pytest.raises(SystemExit):
        parse_args(second)
    assert "--output_kohya_format writes a file named after --output_dir" in capsys.readouterr().err


def test_export_refusals(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export("--lora", trained, "--output", tmp_path / "lora.bin")
    assert "must end in .safetensors" in capsys.readouterr().err
    with pytest.raises(NullSpaceError, match="lies in a folder that is not there"):
        export("--lora", trained, "--output", tmp_path / "missing" / "lora.safetensors")
    with pytest.raises(NullSpaceError, match="is the LoRA itself"):
        export("--lora", trained, "--output", trained / LORA_NAME)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_NAME).write_bytes((trained / LORA_NAME).read_bytes())
    (tmp_path / "lora" / "nullspace_report.json").write_text(json.dumps({"training": 3}))
    with pytest.raises(NullSpaceError, match="is no report of the trainer"):
        export("--lora", tmp_path / "lora", "--output", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
