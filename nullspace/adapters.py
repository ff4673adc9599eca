"""LoRA layers in models: adding, switching, saving and restoring them."""

import re
from collections import Counter

import torch
from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from nullspace.checks import rank_fault
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs, without_skipped
from nullspace.lora import load_lora
from nullspace.names import LORA_NAME, TEXT_ENCODERS
from nullspace.system import replacing, sort_header


logger = get_logger(__name__)


def lora_targets(unet, text_encoders, bundle, protected, args):
    """Names of the layers to train: the UNet's of the bundle's attention, or --lora_layers, and the text encoders'.

    Args:
        protected (`dict[str, Protected]` or `None`): from `protect`, where that is known by then.

    Raises:
        NullSpaceError: if --lora_layers names no layer, a layer is smaller than --rank, or, without
            --allow_unprotected, one is not covered or has no closed direction.
    """
    targets = layers_to_train(unet, text_encoders, bundle.config["attention"], args)
    unprotected = [name for name in targets if name not in bundle.modules]
    if protected is not None and args.nullspace_threshold:  # 0 closes nothing, as it says
        covered = [name for name in targets if name in bundle.modules]
        free = [name for name in covered if name not in protected or not protected[name].rank]
        if free and not args.allow_unprotected:
            raise NullSpaceError(
                f"--nullspace_criterion {args.nullspace_criterion} --nullspace_threshold {args.nullspace_threshold} "
                f"closes no direction of {len(free)} layers to train ({kinds_of(free)}); choose another threshold, or "
                "pass --allow_unprotected."
            )
        unprotected += free
    if unprotected and not args.allow_unprotected:
        raise NullSpaceError(
            f"The bundle leaves {len(unprotected)} layers to train unprotected ({kinds_of(unprotected)}); name others "
            "in --lora_layers, build the bundle with --attention all, or pass --allow_unprotected."
        )
    if unprotected and protected is not None:
        logger.warning(f"{len(unprotected)} of {len(targets)} layers train unprotected: {kinds_of(unprotected)}.")
    weights = {name: find_module(name, unet, **text_encoders).weight.flatten(1) for name in targets}
    if fault := rank_fault(args.rank, {name: tuple(weight.shape) for name, weight in weights.items()}):
        raise NullSpaceError(fault)
    return targets


def layers_to_train(unet, text_encoders, attention, args):
    """Names of the layers that flags choose: the UNet's of an attention, or --lora_layers, and the text encoders'.

    Args:
        attention (`str`): of `attention_inputs`.

    Raises:
        NullSpaceError: if --lora_layers names no layer.
    """
    if args.lora_layers is None:
        targets = dict.fromkeys(attention_inputs(unet, attention))
    else:
        linear = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        targets = {}
        for ending in args.lora_layers.split(","):
            found = [name for name in linear if f".{name}".endswith(f".{ending.strip()}")]
            if not ending.strip() or not found:
                raise NullSpaceError(f"--lora_layers names '{ending.strip()}', which no layer of the UNet ends with.")
            targets |= dict.fromkeys(found)
    if args.train_text_encoder:
        for encoder, model in text_encoders.items():
            unread = get_family(args.model_type).unread_layers(encoder, args.clip_skip)
            names = text_encoder_inputs(model, encoder)
            targets |= dict.fromkeys(without_skipped(names, unread, model.config.num_hidden_layers, encoder))
    return list(targets)


def kinds_of(names):
    """Layer names in short: the kinds of layer among them, and how many there are of each."""
    kinds = Counter(".".join(re.sub(r"\.\d+\b", "", name).split(".")[-2:]) for name in names)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items())


def add_lora(adapted, targets, args):
    """Put LoRA layers on the targets of the adapted models, and return their parameters, in float32."""
    for name, model in adapted.items():
        own = [target.removeprefix(f"{name}.") for target in targets if model_of(target) == name]
        # peft's own, since transformers' and diffusers' add_adapter ask for a peft of the same week
        inject_adapter_in_model(
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=own,
            ),
            model,
        )
        cast_training_params(model, torch.float32)
    return [parameter for model in adapted.values() for parameter in model.parameters() if parameter.requires_grad]


def model_of(layer):
    """The name of the model that has the layer of this name: "unet", or a text encoder's."""
    model = layer.partition(".")[0]
    return model if model in TEXT_ENCODERS else "unet"


def check_layers(where, layers, name, unet, text_encoders):
    """The modules that the layers of a LoRA, `dict[str, LoraLayer]`, change in a model: `dict[str, Module]`.

    Args:
        where (`str`), name (`str`): what the LoRA and the model are called in a sentence.

    Raises:
        NullSpaceError: if one is not there, or of another size.
    """
    modules = {}
    for layer_name, layer in layers.items():
        sizes = len(layer.up), *layer.down.shape[1:]
        try:
            modules[layer_name] = find_module(layer_name, unet, **text_encoders)
            found = tuple(modules[layer_name].weight.shape)
        except AttributeError:  # which is how torch says that there is no such module, or that it has no weight
            found = "missing"
        if found != sizes:
            raise NullSpaceError(
                f"{where} was made for another model: its {layer_name} is {sizes}, and in {name} it is {found}; give a "
                "LoRA of this model."
            )
    return modules


def save_lora(folder, unet, dtype=torch.float32, adapter="default", **text_encoders):
    """Write the LoRA of a UNet, and of text encoders that have one, in diffusers' format, whole or not at all.

    Args:
        adapter (`str`): its name.
    """
    state_dict = get_peft_model_state_dict(unet, adapter_name=adapter)
    layers = {"unet": _in_diffusers_names(state_dict)}
    adapted = {"unet": unet, **text_encoders}
    for name, text_encoder in text_encoders.items():
        state_dict = get_peft_model_state_dict(text_encoder, adapter_name=adapter, save_embedding_layers=False)
        # Files name the module that holds the layers, whether this version of transformers has it or not.
        prefix = "" if hasattr(text_encoder, "text_model") else "text_model."
        state_dict = {f"{prefix}{key}": value for key, value in state_dict.items()}
        layers[name] = convert_state_dict_to_diffusers(state_dict)
    layers = {model: {key: tensor.to(dtype) for key, tensor in each.items()} for model, each in layers.items()}
    # Of peft's configuration only what a reader needs and every version knows: an older peft refuses what it does not
    metadata = {
        f"{model}_lora_adapter_metadata": {
            "r": config.r, "lora_alpha": config.lora_alpha, "target_modules": _in_order(config.target_modules),
            # diffusers 0.36 looks for them
            "rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern,
            **({"use_rslora": True} if config.use_rslora else {}),
        }
        for model, config in ((model, adapted[model].peft_config[adapter]) for model in adapted)
    }  # fmt: skip
    _write(folder, layers, metadata)


def write_layers(folder, layers):
    """Write LoRA layers, `dict[str, LoraLayer]` without magnitudes, in diffusers' format, whole or not at all.

    Their scales go into B, so that every reader takes each layer's rank for its alpha, as it does where there is none.
    """
    of_model = {}
    for name, layer in layers.items():
        model = model_of(name)
        key = name if model == "unet" else f"text_model.{name.removeprefix(f'{model}.')}"
        pair = {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.scale * layer.up.float()}
        of_model.setdefault(model, {}).update(pair)
    _write(folder, {model: _in_diffusers_names(each) for model, each in of_model.items()}, {})


def _in_diffusers_names(state_dict):
    """A state dict of peft's as diffusers' scripts name it; as it is where layers are beyond attention.

    Those have no such names, and of both kinds in one file diffusers passes over one.
    """
    converted = convert_state_dict_to_diffusers(state_dict)
    return state_dict if any(".lora_A." in key for key in converted) else converted


def _write(folder, layers, metadata):
    """Write state dicts in diffusers' format, by model, and what peft is told of them."""
    size = sum(tensor.nbytes for state_dict in layers.values() for tensor in state_dict.values())
    named = {
        f"{model}_lora_layers": {key: state_dict[key].contiguous() for key in sorted(state_dict)}
        for model, state_dict in layers.items()
    }
    with replacing(folder / LORA_NAME, size) as partial:
        # Of all pipelines it knows the most models, and the files of those with fewer are as their own write them
        StableDiffusionXLPipeline.save_lora_weights(folder, weight_name=partial.name, **named, **metadata)
        sort_header(partial)


def _in_order(targets):
    """peft's target modules as they can be written: names, sorted, or one regular expression."""
    return targets if isinstance(targets, str) else sorted(targets)


def lora_modules(unet, **text_encoders):
    """The modules of models that have a LoRA, by the names that `load_lora` gives them: `dict[str, Module]`."""
    modules = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    for encoder, model in text_encoders.items():
        layers = {name: find_module(name, unet, **text_encoders) for name in text_encoder_inputs(model, encoder)}
        modules |= {name: layer for name, layer in layers.items() if hasattr(layer, "lora_A")}
    return modules


def set_lora(modules, layers):
    """Copy A (r, in) and B (out, r) of `dict[str, LoraLayer]` into `lora_modules` of the same shapes."""
    for name, module in modules.items():
        module.lora_A["default"].weight.data.copy_(layers[name].down)
        module.lora_B["default"].weight.data.copy_(layers[name].up)


@torch.no_grad()
def scale_lora(adapted, names, factor):
    """Scale what the LoRA layers of these names change, in the models that have them, by a factor."""
    for name in names:
        find_module(name, **adapted).lora_B["default"].weight.mul_(factor)


def restore_lora(folder, unet, **text_encoders):
    """Put the LoRA of a checkpoint back into models that have adapters on the same layers.

    Raises:
        NullSpaceError: if it cannot be read, or is on other layers or of another rank.
    """
    layers, modules = load_lora(folder), lora_modules(unet, **text_encoders)
    elsewhere = sorted(layers.keys() ^ modules.keys())
    if elsewhere:
        raise NullSpaceError(
            f"The checkpoint {folder} has LoRA layers in other places ({elsewhere[0]}); resume with the bundle, "
            "--lora_layers and --train_text_encoder that it was made with."
        )
    if any(layer.down.shape != modules[name].lora_A["default"].weight.shape for name, layer in layers.items()):
        raise NullSpaceError(f"The checkpoint {folder} does not fit; resume with the --rank it was made with.")
    set_lora(modules, layers)
