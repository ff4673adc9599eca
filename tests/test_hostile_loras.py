"""LoRAs of strangers that are none: each is refused in one sentence, whatever is done with it, and at once."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

import nullspace_utils
from nullspace.errors import NullSpaceError
from nullspace.lora import LoraLayer, read_lora
from nullspace.names import LORA_NAME, REPORT_NAME, WORD_NAME
from nullspace.repair import kept


NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP = f"unet.{NAME}.lora_A.weight", f"unet.{NAME}.lora_B.weight"


def peft(**settings):
    """The metadata that diffusers writes."""
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}


# Each is the tensors that are changed, the metadata, and what is said
HOSTILE = {
    "NaN": ({DOWN: torch.full((2, 8), math.nan)}, None, "holds NaN or infinity"),
    "infinity in one number": ({UP: torch.tensor([[1.0, math.inf]])}, None, "holds NaN or infinity"),
    "two ranks": ({UP: torch.ones(4, 3)}, None, r"is \(4, 3\) times \(2, 8\)"),
    "no rank": ({DOWN: torch.ones(0, 8), UP: torch.ones(4, 0)}, None, r"is \(4, 0\) times \(0, 8\)"),
    "a row": ({DOWN: torch.ones(16)}, None, r"times \(16,\)"),
    "a number": ({DOWN: torch.tensor(1.0)}, None, r"times \(\)"),
    "half a convolution": ({DOWN: torch.ones(2, 8, 1, 1)}, None, r"times \(2, 8, 1, 1\)"),
    "whole numbers": ({DOWN: torch.ones(2, 8, dtype=torch.int8)}, None, "is of int8 and float32"),
    "complex numbers": ({DOWN: torch.ones(2, 8, dtype=torch.complex64)}, None, "is of complex64"),
    "no alpha": ({}, peft(r=2), "no alphas"),
    "an infinite alpha": ({}, peft(lora_alpha=math.inf), "no alphas"),
    "an alpha in words": ({}, peft(lora_alpha="2"), "no alphas"),
    "a configuration that is a list": ({}, {"lora_adapter_metadata": "[1]"}, "no alphas"),
    "a pattern that never ends": (
        {}, peft(lora_alpha=2, alpha_pattern={r"(([a-z_0-9]+.?)+)+\\": 1}), "no alphas",
    ),
    "a pattern that is none": ({}, peft(lora_alpha=2, alpha_pattern={"((": 1}), "no alphas"),
    "a name that moves the cursor": (
        {"unet.\x1b[2J.lora_A.weight": torch.ones(2, 8), "unet.\x1b[2J.lora_B.weight": torch.ones(4, 2)}, None,
        r"not understood \(unet\.\\x1b\[2J\.lora_A\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lora_that_is_none_is_refused(name, tmp_path):
    changed, metadata, said = HOSTILE[name]
    path = tmp_path / "lora.safetensors"
    save_file({DOWN: torch.ones(2, 8), UP: torch.ones(4, 2)} | changed, path, metadata)
    words = ["export", "--lora", str(path), "--output", str(tmp_path / "out.safetensors")]
    start = time.perf_counter()
    with pytest.raises(NullSpaceError, match=said) as caught:
        nullspace_utils.main(nullspace_utils.parse_args(words))
    assert time.perf_counter() - start < 5 and "\x1b" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("token", "rows"),
    [
        ("../../up", torch.ones(1, 8)),
        ("\x1b[2J", torch.ones(1, 8)),
        ("sks", torch.ones(8)),
        ("sks", torch.ones(1, 8, dtype=torch.int32)),
        ("sks", torch.full((1, 8), math.nan)),
    ],
)
def test_a_word_that_is_none_is_refused(token, rows, tmp_path):
    save_file({DOWN: torch.ones(2, 8), UP: torch.ones(4, 2)}, tmp_path / LORA_NAME)
    save_file({token: rows}, tmp_path / WORD_NAME, {"placeholder_token": token})
    words = ["export", "--lora", str(tmp_path), "--output", str(tmp_path / "out.safetensors")]
    with pytest.raises(NullSpaceError, match=f"{WORD_NAME} is no embedding that the trainer wrote"):
        nullspace_utils.main(nullspace_utils.parse_args(words))


@pytest.mark.parametrize("report", ["[" * 10**5, '{"leakage": {"max": NaN}}', '"x"'])
def test_a_report_that_is_none_is_refused(report, tmp_path):
    save_file({DOWN: torch.ones(2, 8), UP: torch.ones(4, 2)}, tmp_path / LORA_NAME)
    (tmp_path / REPORT_NAME).write_text(report)
    words = ["export", "--lora", str(tmp_path), "--output", str(tmp_path / "out.safetensors")]
    with pytest.raises(NullSpaceError, match=f"{REPORT_NAME} is no report of the trainer"):
        nullspace_utils.main(nullspace_utils.parse_args(words))


def test_a_name_without_end_is_shown_in_part(tmp_path):
    save_file({f"unet.{'a' * 10**5}.lora_A.weight": torch.ones(2, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(NullSpaceError) as caught:
        nullspace_utils.load_lora(tmp_path / "lora.safetensors")
    assert len(str(caught.value)) < 1000


def test_an_honest_one_is_read_by_its_alphas(tmp_path):
    metadata = peft(r=2, lora_alpha=3, alpha_pattern={"^down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 5})
    save_file({DOWN: torch.ones(2, 8), UP: torch.ones(4, 2)}, tmp_path / "lora.safetensors", metadata)
    layers, unknown = read_lora(tmp_path / "lora.safetensors")
    assert (layers[NAME].scale, unknown) == (2.5, [])


def test_of_nothing_nothing_is_lost():
    nothing = LoraLayer(torch.zeros(2, 8), torch.ones(4, 2), 1.0)
    assert kept(nothing, nothing, torch.eye(8)) == 1
