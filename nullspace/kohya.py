"""A LoRA as kohya's trainer writes it, which is what AUTOMATIC1111, Forge and ComfyUI look for."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nullspace.errors import NullSpaceError
from nullspace.names import LORA_NAME, REPORT_NAME, TEXT_ENCODER, TEXT_ENCODERS
from nullspace.system import replacing, sort_header


VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # by the width of the text embeddings
WORD = "ss_nullspace_word"  # in the metadata of an embedding, its token
LAYERS_PER_BLOCK = 2  # of every UNet that kohya's trainer knows
ATTENTION = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(.*)")
# Only models with two text encoders have more than one transformer block in a row
OF_TWO = re.compile(rf"{TEXT_ENCODERS[1]}\.|.*\.transformer_blocks\.[1-9]")


def kohya_name(name, of_two=False):
    """What kohya's trainer calls a layer of `attention_inputs` or `text_encoder_inputs`.

    Args:
        of_two (`bool`): whether the model has two text encoders; its UNet's layers have the names of the original code.

    Raises:
        ValueError: if that has no name for it here.
    """
    model, _, rest = name.partition(".")
    if model in TEXT_ENCODERS:
        number = TEXT_ENCODERS.index(model) + 1
        name = f"te{number if of_two or number > 1 else ''}_text_model_{rest}"
    else:
        name = f"unet_{_original_name(name) if of_two else name}"
    return f"lora_{name.replace('.', '_')}"


def kohya_names(name):
    """All that kohya's trainer calls a layer, by model."""
    yield kohya_name(name)
    try:
        yield kohya_name(name, of_two=True)
    except ValueError:
        return


def _original_name(name):
    """The name in the original code of a layer within a UNet's attention.

    Raises:
        ValueError: if it is another layer.
    """
    match = ATTENTION.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no layer of an attention block")
    kind, block, index, rest = match.groups()
    if kind == "mid_block":
        return f"middle_block.1.{rest}"
    number = int(block) * (LAYERS_PER_BLOCK + 1) + int(index)
    return f"input_blocks.{number + 1}.1.{rest}" if kind == "down_blocks" else f"output_blocks.{number}.1.{rest}"


def kohya_alpha(layer):
    """The alpha () that a reader divides by the rank to get the layer's scale, to the last bit.

    float32 as kohya's are, and float64 where that would round it.
    """
    rank = len(layer.down)
    alpha = torch.tensor(layer.scale * rank, dtype=torch.float64)
    return alpha.float() if alpha.float().item() / rank == layer.scale else alpha


def kohya_tensors(layers):
    """The tensors of kohya's file for `dict[str, LoraLayer]`: down (r, in) and up (out, r) as they are, and alpha."""
    tensors, of_two = {}, _base_model_version(layers, {}) == VERSIONS[2048]
    try:
        keys = {name: kohya_name(name, of_two) for name in layers}
    except ValueError:  # a layer beyond attention; programs know today's names too, but not both kinds in one file
        keys = {name: kohya_name(name, of_two and name.startswith(f"{TEXT_ENCODER}.")) for name in layers}
    for name, layer in layers.items():
        key = keys[name]
        tensors[f"{key}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.contiguous()
        tensors[f"{key}.alpha"] = kohya_alpha(layer)
    return tensors


def _common(values):
    """The value that all share, as kohya's metadata have it, or its word for those that differ."""
    values = set(values)
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"


def _base_model_version(layers, report):
    """kohya's name of the kind of base model, by the width of the text that its layers read, or None."""
    widths = {layer.down.shape[1] for name, layer in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    widths |= {layer.down.shape[1] for name, layer in layers.items() if name.endswith("self_attn.q_proj")}
    if max(widths, default=0) == 2048 or any(OF_TWO.match(name) for name in layers):
        return VERSIONS[2048]
    version = VERSIONS.get(widths.pop()) if len(widths) == 1 else None
    return "sd_v2_v" if version == "sd_v2" and report.get("prediction_type") == "v_prediction" else version


def kohya_metadata(layers, report=None, name=None):
    """The `ss_*` metadata of kohya's file, `dict[str, str]`, and what is known of the null space.

    Args:
        layers (`dict[str, LoraLayer]`): of the LoRA.
        report (`dict`, *optional*): its `nullspace_report.json`.
        name (`str`, *optional*): of the file, without its ending.
    """
    report = report or {}
    version = _base_model_version(layers, report)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(len(layer.down) for layer in layers.values()),
        "ss_network_alpha": _common(kohya_alpha(layer).item() for layer in layers.values()),
        "ss_base_model_version": version,
        "ss_v2": version and str(version.startswith("sd_v2")),
        "ss_output_name": name,
        "modelspec.title": name,
    }
    if report:
        nullspace, leakage = report["nullspace"], report["leakage"]["max"]
        metadata |= {
            "ss_sd_model_name": Path(str(report["base_model"]["id"])).name,
            "ss_clip_skip": _clip_skip(report["training"].get("clip_skip")),
            "ss_nullspace_leakage": None if leakage is None else f"{leakage:.3e}",
            "ss_nullspace_bundle": _bundle_id(nullspace),
            "ss_nullspace_guarantee": report.get("guarantee"),
        }
    return {key: value for key, value in metadata.items() if value is not None}


def embedding_metadata(token):
    """The metadata of a word's own file, which is named after it: `dict[str, str]`."""
    return {"ss_output_name": token, "modelspec.title": token, WORD: token}


def _clip_skip(skipped):
    """diffusers' clip skip counts the layers left out, kohya's and the web UIs' the layer that is read from the end."""
    return None if skipped is None else str(skipped + 1)


def _bundle_id(nullspace):
    """A bundle by its name, its revision if it is of the Hub, and the hash of its prompts."""
    bundle = str(nullspace["bundle"])
    name = Path(bundle).name if nullspace.get("revision") is None else f"{bundle}@{nullspace['revision']}"
    return f"{name} (prompts sha256 {nullspace['prompts']['sha256']})"


def read_report(lora):
    """The report of a LoRA, given as its folder or file; None where there is none, or it is not of that file.

    Raises:
        NullSpaceError: if there is one that cannot be read.
    """
    lora = Path(lora)
    path = (lora if lora.is_dir() else lora.parent) / REPORT_NAME
    if not path.is_file() or not (lora.is_dir() or lora.name == LORA_NAME or is_ours(lora)):
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        kohya_metadata({}, report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NullSpaceError(f"{path} is no report of the trainer; mend it or move it away.") from error
    return report


def is_ours(path):
    """Whether a file is one that the trainer wrote under this very name, and so may replace or remove."""
    path = Path(path)
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):  # nothing of this kind
        return False
    is_trainers = not {"ss_nullspace_bundle", WORD}.isdisjoint(metadata)
    return is_trainers and metadata.get("ss_output_name") == path.stem


def check_replaceable(path):
    """Raise `NullSpaceError` if a file for web UIs would replace anything but an earlier one of the trainer's."""
    if path.is_dir():
        raise NullSpaceError(f"--output_kohya_format writes {path}, which is a folder; rename or remove it.")
    if path.exists() and not is_ours(path):
        raise NullSpaceError(
            f"--output_kohya_format would replace {path}, which no run of this --output_dir wrote; rename or remove it."
        )


def save_kohya(path, layers, report=None, embeddings=None):
    """Write a LoRA, `dict[str, LoraLayer]`, as kohya's file, whole or not at all.

    Args:
        report (`dict`, *optional*): its `nullspace_report.json`.
        embeddings (`dict[str, Tensor]`, *optional*): what the file bundles besides, see `embeddings.bundled`.

    Raises:
        NullSpaceError: if it cannot be written.
    """
    path, tensors = Path(path), kohya_tensors(layers) | (embeddings or {})
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial, kohya_metadata(layers, report, path.stem))
        sort_header(partial)
