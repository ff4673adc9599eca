"""LoRA files: reading any that diffusers reads."""

import hashlib
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from peft.utils.other import get_pattern_key

from nullspace.embeddings import BUNDLED, bundled, words_beside
from nullspace.errors import NullSpaceError, kinds, listed, named, reason
from nullspace.kohya import LAYERS_PER_BLOCK, kohya_names
from nullspace.names import LORA_NAME, TEXT_ENCODERS
from nullspace.spectrum import in_double


KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
KOHYA_NEEDED = {"lora_down.weight", "lora_up.weight"}
KOHYA_OPTIONAL = {"alpha", "dora_scale"}
MODULE = re.compile(r"[\w.]{1,256}", re.ASCII)  # a layer's name
# Of peft's configuration in a file, a regular expression that layers are looked up by: without groups, whose
# repetitions may never end.
PATTERN = re.compile(r"[\w.^$|\\*+]{1,1000}", re.ASCII)


class LoraLayer(NamedTuple):
    """One layer of a LoRA file: dW = scale * up @ down, with down (r, in) and up (out, r).

    Where there is a magnitude (out,), of DoRA, dW depends on the base weight as well, see `with_magnitude`.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


def with_magnitude(layer, weight):
    """The same change without a magnitude, for a base weight W (out, in); DoRA, arXiv 2402.09353, eq. 5.

    dW = m / ||V|| V - W with V = W + scale * up @ down and the norm over each row, as peft has it.
    """
    if layer.magnitude is None:
        return layer
    weight = in_double(weight)
    turned = weight + layer.scale * layer.up.double() @ layer.down.double()
    magnitude = layer.magnitude.double().reshape(-1, 1)
    change = magnitude / turned.norm(dim=1, keepdim=True).clamp_min(1e-300) * turned - weight
    return LoraLayer(change, torch.eye(len(change), dtype=torch.float64), 1.0)


def load_lora(name_or_path, token=None):
    """The layers of a LoRA that holds nothing but such layers, see `read_lora`.

    Raises:
        NullSpaceError: if the file holds no LoRA layer of a UNet or a text encoder, or anything else.
    """
    layers, unknown = read_lora(name_or_path, token)
    if not layers:
        raise NullSpaceError(f"{name_or_path} holds no LoRA layer of a UNet or a text encoder.")
    if unknown:
        raise NullSpaceError(
            f"{name_or_path} holds what is not understood ({listed(unknown, 3)}); only LoRA and DoRA layers of a UNet "
            "and of text encoders are."
        )
    return layers


def digest(layers):
    """Hex digest of the weights of `dict[str, LoraLayer]`, whatever their file is called and however it names them."""
    whole = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        whole.update(f"{name} {layer.scale} {tuple(layer.down.shape)} {tuple(layer.up.shape)}".encode())
        for tensor in (layer.down, layer.up):
            whole.update(tensor.float().contiguous().numpy().tobytes())
    return whole.hexdigest()


def _split_kohya(state_dict):
    """A file's tensors that diffusers reads, DoRA magnitudes by kohya's layer, and the other keys.

    diffusers drops `dora_scale` of kohya's files, and refuses a file for one layer that is no LoRA.
    """
    if not any(key.startswith(KOHYA_PREFIXES) for key in state_dict):
        unknown = sorted(key for key in state_dict if "dora_scale" in key)
        return {key: value for key, value in state_dict.items() if key not in unknown}, {}, unknown
    of_layer = {}
    for key in state_dict:
        of_layer.setdefault(key.partition(".")[0], []).append(key)
    known, magnitudes, unknown = {}, {}, []
    for layer, keys in of_layer.items():
        kinds = {key.partition(".")[2] for key in keys}
        if not layer.startswith(KOHYA_PREFIXES) or not KOHYA_NEEDED <= kinds <= KOHYA_NEEDED | KOHYA_OPTIONAL:
            unknown += keys
            continue
        known |= {key: state_dict[key] for key in keys if not key.endswith(".dora_scale")}
        if "dora_scale" in kinds:
            magnitudes[layer] = state_dict[f"{layer}.dora_scale"]
    return known, magnitudes, sorted(unknown)


def digest_with_words(layers, words):
    """As `digest`, of the layers and the words, `list[Word]`, that come with them."""
    whole = hashlib.sha256(digest(layers).encode())
    for word in words:
        for encoder, rows in sorted(word.rows.items()):
            whole.update(f"{word.token} {encoder} {tuple(rows.shape)}".encode())
            whole.update(rows.float().contiguous().numpy().tobytes())
    return whole.hexdigest()


def _fetch(name_or_path, token=None):
    """The tensors of a LoRA's file, and peft's configuration in it, if any: of the name that diffusers gives it first.

    Beside that there may be one that failed its audit, which diffusers would as soon take; and of the Hub it asks for
    the names of files without the token.
    """
    from diffusers.loaders.lora_base import _fetch_state_dict  # slow to import, as above

    options = ("local_files_only", "cache_dir", "force_download", "proxies", "revision", "subfolder")
    fetch = partial(
        _fetch_state_dict,
        str(name_or_path),
        use_safetensors=True,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=True,
        token=token,
        **dict.fromkeys(options),
    )
    path = Path(name_or_path)
    if path.name.startswith("checkpoint-") and path.parent.is_dir() and not path.exists():  # no repository of the Hub
        there = sorted(each.parent.name for each in path.parent.glob(f"checkpoint-*/{LORA_NAME}"))
        raise FileNotFoundError(f"{path.parent} has {listed(there) if there else 'no checkpoint'}")
    if (path / LORA_NAME).is_file() or not path.exists():
        try:
            return fetch(weight_name=LORA_NAME)[:2]
        except OSError as error:
            if path.exists() or "EntryNotFoundError" not in kinds(error):
                raise
    return fetch(weight_name=None)[:2]


def read_embeddings(name_or_path, token=None):
    """The embeddings that come with a LoRA, bundled in its file or beside it, as `embeddings.bundled` gives them.

    Call it after `read_lora`, which says what is wrong with a file.

    Raises:
        NullSpaceError: if those beside it cannot be had.
    """
    tensors = {key: tensor for key, tensor in _fetch(name_or_path, token)[0].items() if key.startswith(BUNDLED)}
    path, words = Path(name_or_path), []
    if not tensors and (path.name == LORA_NAME or not path.is_file()):
        words = words_beside(path.parent if path.is_file() else name_or_path, token)
    return tensors | {key: rows for word in words for key, rows in bundled(word).items()}


def read_lora(name_or_path, token=None):
    """Read a LoRA in any format that diffusers reads: `dict[str, LoraLayer]` by module name, and what else it holds.

    Embeddings that are bundled with it are left to `read_embeddings`: they change no layer.

    Names are those of `attention_inputs` and `text_encoder_inputs`. The second is the list of the file's keys (as
    diffusers converts them) that are no part of these layers: LoHa, LoKr, anything. Biases are among them, for what
    they do to a layer's output depends on the mean of its inputs, which no bundle holds.

    Args:
        name_or_path (`str` or `Path`): a folder, a file or a Hub id.
        token (`str`, *optional*): of the Hub.

    Raises:
        NullSpaceError: if it cannot be read.
    """
    from diffusers import StableDiffusionPipeline  # takes seconds to import, and only this needs it
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    try:
        tensors, config_of_file = _fetch(name_or_path, token)
        _check_config(config_of_file or {})
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}
        tensors, magnitudes, unknown = _split_kohya(tensors)
        # By the configuration of the UNet it renames blocks that have the names of the original code
        unet_config = SimpleNamespace(layers_per_block=LAYERS_PER_BLOCK)
        lora_state_dict = partial(StableDiffusionPipeline.lora_state_dict, unet_config=unet_config)
        state_dict, alphas = lora_state_dict(tensors) if tensors else ({}, {})
    except Exception as error:  # whatever diffusers and the HTTP library raise for a wrong path or a strange file
        raise NullSpaceError(f"{named(name_or_path)} cannot be read as a LoRA: {reason(error)}") from error
    read, layers = (state_dict, alphas, config_of_file), {}
    models = ("unet", *TEXT_ENCODERS)
    unknown += sorted(key for key in state_dict if key.partition(".")[0] not in models)
    for model in models:
        prefix = f"{model}."
        state_dict, alphas, config = (
            {key.removeprefix(prefix): value for key, value in (part or {}).items() if key.startswith(prefix)}
            for part in read
        )
        convert = convert_unet_state_dict_to_peft if model == "unet" else _text_encoder_keys_to_peft
        state_dict, alphas = convert(state_dict), convert(alphas)
        used = set()
        for key, down in state_dict.items():
            name = key.removesuffix(".lora_A.weight")
            if name != key and f"{name}.lora_B.weight" in state_dict and MODULE.fullmatch(name):
                if fault := _pair_fault(down, state_dict[f"{name}.lora_B.weight"]):
                    raise NullSpaceError(f"{name_or_path} is no LoRA: {prefix}{name} {fault}; give another.")
                rank = len(down)
                alpha = alphas.get(f"{name}.alpha", alphas.get(f"{key}.alpha", rank))
                if config:  # of peft, which takes the place of the alphas
                    pattern = config.get("alpha_pattern") or {}
                    alpha = pattern.get(get_pattern_key(pattern, name), config["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                full_name = name if model == "unet" else f"{model}.{name}"
                up = state_dict[f"{name}.lora_B.weight"]
                vectors = {key: state_dict.get(key) for key in _magnitude_keys(name)}
                found = [*vectors.values(), *(magnitudes.pop(key, None) for key in kohya_names(full_name))]
                magnitude = next((each for each in found if each is not None), None)
                if magnitude is not None and magnitude.shape not in ((len(up),), (len(up), 1)):
                    unknown.append(f"magnitude of {full_name}, not of its {len(up)} outputs")
                    magnitude = None
                layers[full_name] = LoraLayer(down, up, scale, magnitude)
                used |= {key, f"{name}.lora_B.weight", *vectors}
        unknown += sorted(prefix + key for key in state_dict.keys() - used)
    return layers, unknown + sorted(f"{layer}.dora_scale" for layer in magnitudes)


def _check_config(config):
    """Raise `ValueError` unless what a file has of peft is what scales can be read from, for each model."""
    fault, parts = ValueError("the configuration of peft in it has no alphas by which it is scaled"), {}
    if not isinstance(config, dict):
        raise fault
    for key, value in config.items():
        model, _, name = key.partition(".")
        parts.setdefault(model, {})[name] = value
    for part in parts.values():
        patterns = part.get("alpha_pattern") or {}
        plain = isinstance(patterns, dict) and all(map(_is_plain, patterns))
        if not plain or not all(map(_is_finite, [part.get("lora_alpha"), *patterns.values()])):
            raise fault


def _is_plain(pattern):
    """Whether matching it ends soon: no groups to repeat, and few repetitions."""
    return PATTERN.fullmatch(pattern) and pattern.count("*") + pattern.count("+") <= 2


def _is_finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair_fault(down, up):
    """What keeps two tensors from being a layer of linear maps, or of convolutions, or None."""
    if not (down.is_floating_point() and up.is_floating_point()):
        return f"is of {str(down.dtype).removeprefix('torch.')} and {str(up.dtype).removeprefix('torch.')}"
    if down.dim() not in (2, 4) or up.dim() != down.dim() or len(down) != up.shape[1] or not down.numel() * up.numel():
        return f"is {tuple(up.shape)} times {tuple(down.shape)}"
    return None


def check_finite(layers, where):
    """Raise `NullSpaceError` if a LoRA's layers hold what is no number."""
    for layer in layers.values():
        tensors = [tensor for tensor in (layer.down, layer.up, layer.magnitude) if tensor is not None]
        if not (math.isfinite(layer.scale) and all(tensor.double().isfinite().all() for tensor in tensors)):
            raise NullSpaceError(f"{where} holds NaN or infinity; give one of a training that did not diverge.")


def _magnitude_keys(name):
    return [f"{name}.lora_magnitude_vector", f"{name}.lora_magnitude_vector.weight"]


def _text_encoder_keys_to_peft(state_dict):
    """Keys of a text encoder's LoRA as peft names them, from the module that holds the layers."""
    names = {".lora_linear_layer.down.": ".lora_A.", ".lora_linear_layer.up.": ".lora_B."}
    for kind in ("q", "k", "v", "out"):  # as diffusers reads kohya's files
        names |= {f".to_{kind}_lora.down.": f".{kind}_proj.lora_A.", f".to_{kind}_lora.up.": f".{kind}_proj.lora_B."}
    converted = {}
    for key, value in state_dict.items():
        for old, new in names.items():
            key = key.replace(old, new)
        converted[key.removeprefix("text_model.")] = value
    return converted
