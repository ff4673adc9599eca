"""What a bundle is bound to: the weights of a model, the vocabulary of its tokenizer and its noise schedule.

The inputs of a layer come from all weights before it and from the text encoder, so that each of them, changed, makes
what a bundle protects another model's.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from nullspace.hashes import hash_json
from nullspace.layers import base_layer, find_module


# What makes the noise schedule in a scheduler's configuration; the rest of it is how to sample.
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
PIECE = 2**18  # elements, of a tensor, rounded at once


def fingerprints(**components):
    """Hash the components of a pipeline, `dict[str, str]` by part: `fingerprints(unet=unet, tokenizer=tokenizer)`.

    A model and a tokenizer make the part of their own name; a scheduler makes "prediction_type", in plain words, and
    "noise_schedule".
    """
    parts = {}
    for name, component in components.items():
        if isinstance(component, nn.Module):
            parts[name] = hash_weights(component)
        elif hasattr(component, "get_vocab"):
            parts[name] = hash_json(component.get_vocab())
        else:
            config = _plain_schedule(component.config)
            parts["prediction_type"] = config["prediction_type"]
            parts["noise_schedule"] = hash_json({key: config[key] for key in SCHEDULE})
    return parts


def hash_weights(model):
    """Hex digest of all parameters of a model, not its buffers, each rounded to float16.

    So a model and its fp16 variant, which is that model rounded, agree, and one rounded to bfloat16 does not. Names
    count, but neither LoRA layers nor what peft and versions of transformers put into the names.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not any(part.startswith("lora_") for part in name.split(".")):
            tensors[name.replace(".base_layer.", ".").removeprefix("text_model.")] = parameter.detach()
    # Rounding and hashing let go of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True))
    return hash_json({name: [list(tensors[name].shape), digest] for name, digest in digests.items()})


def _hash_tensor(tensor):
    """Hex digest of a tensor in float16, rounded piece by piece: each is then hashed while the cache still holds it."""
    flat, digest = tensor.reshape(-1), hashlib.sha256()
    with torch.inference_mode():
        rounded = torch.empty(min(PIECE, len(flat)), dtype=torch.float16)
        for piece in flat.split(PIECE):
            digest.update(rounded[: len(piece)].copy_(piece).numpy())
    return digest.hexdigest()


def weights_sha256(model):
    """Hex digest of all weights of a model in float32, what their rounding to float16 does not show included.

    Checkpoints are bound to it: they go on to the same bits.
    """

    def digest(item):
        name, tensor = item
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return f"{name} {hashlib.sha256(tensor.contiguous().numpy()).hexdigest()}"

    with ThreadPoolExecutor() as pool:  # hashing takes longer than reading
        return hash_json(sorted(pool.map(digest, model.state_dict().items())))


def _plain_schedule(config):
    """A scheduler's configuration with all that a model is trained with, what it leaves out by default included."""
    from diffusers import DDPMScheduler  # takes seconds to import

    return DDPMScheduler.from_config(config).config


def fingerprint(unet, modules, **text_encoders):
    """Hash the weights of the named modules, (out, in) each, as bundles of format 1 did; today's is `fingerprints`."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        weight = base_layer(find_module(name, unet, **text_encoders)).weight
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
