"""The audit counts all that a file holds, or says that it does not know."""

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from nullspace.audit import verdict
from nullspace.errors import NullSpaceError
from nullspace.kohya import kohya_name
from nullspace.lora import load_lora, read_lora, with_magnitude
from nullspace.names import LORA_NAME
from nullspace_utils import main, parse_args
from test_train import bundle1, drawing_in_two_steps  # noqa: F401


@pytest.fixture
def dora(tiny_sd1, tmp_path):
    """A DoRA by peft on the tiny UNet: its folder, the base weights and those that peft merges."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet")
    base = {name: each.weight.detach().clone() for name, each in unet.named_modules() if name.endswith("attn2.to_k")}
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["attn2.to_k"], use_dora=True))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.rand_like(parameter)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = {"r": 2, "lora_alpha": 3, "target_modules": ["attn2.to_k"], "rank_pattern": {}, "alpha_pattern": {}}
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    unet.fuse_lora()
    return tmp_path, base, {name: unet.get_submodule(name).base_layer.weight.detach() for name in base}


def assert_merged(folder, base, merged):
    layers = load_lora(folder)
    assert layers.keys() == base.keys()
    for name, layer in layers.items():
        change = with_magnitude(layer, base[name])
        expected = (merged[name] - base[name]).double()
        assert (change.scale * change.up @ change.down - expected).norm() < 1e-5 * expected.norm()


def test_magnitudes_are_part_of_the_change(dora):
    assert_merged(*dora)


def test_magnitudes_of_kohyas_files(dora, tmp_path):
    folder, base, merged = dora
    tensors = {}
    for name, (down, up, scale, magnitude) in load_lora(folder).items():
        tensors |= {f"{kohya_name(name)}.lora_{kind}.weight": each for kind, each in (("down", down), ("up", up))}
        tensors[f"{kohya_name(name)}.alpha"] = torch.tensor(scale * len(down))
        tensors[f"{kohya_name(name)}.dora_scale"] = magnitude.reshape(-1, 1).clone()
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert_merged(tmp_path / "kohya.safetensors", base, merged)


@pytest.mark.parametrize(
    "key", ["lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1", "lora_unet_x.diff", "lora_unet_x.diff_b", "surprise",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_mid.weight",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.bias",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.bias"]
)  # fmt: skip
@pytest.mark.parametrize("kohya", [True, False])
def test_what_is_not_understood_is_named(dora, tmp_path, key, kohya):
    folder, _, _ = dora
    path = tmp_path / "strange.safetensors"
    tensors = load_file(folder / LORA_NAME)
    if kohya:
        tensors = {}
        for name, layer in load_lora(folder).items():
            tensors[f"{kohya_name(name)}.lora_down.weight"] = layer.down
            tensors[f"{kohya_name(name)}.lora_up.weight"] = layer.up
    elif key != "surprise":
        key = f"unet.{key}"
    save_file({**tensors, key: torch.ones(2)}, path)
    _, unknown = read_lora(path)
    assert key in unknown and "not known" in verdict({}, unknown)
    with pytest.raises(NullSpaceError, match="not understood"):
        load_lora(path)


def test_a_wrong_path_is_one_sentence(tmp_path, bundle1, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it would ask again and again
    (tmp_path / "lora" / "checkpoint-50").mkdir(parents=True)
    (tmp_path / "lora" / "checkpoint-50" / LORA_NAME).touch()
    with pytest.raises(NullSpaceError, match="lora has checkpoint-50$"):
        load_lora(tmp_path / "lora" / "checkpoint-100")
    for lora in (tmp_path / "missing", "no/such/lora", "mistyped.safetensors"):
        with pytest.raises(NullSpaceError, match="cannot be read as a LoRA") as caught:
            main(parse_args(["audit", "--lora", str(lora), "--nullspace", str(bundle1)]))
        assert "\n" not in str(caught.value)
