"""Which layers of a model are attention projections, and which of them share an input."""

from nullspace.names import TEXT_ENCODER, TEXT_INPUT


def attention_inputs(unet, attention="cross"):
    """Map each attention projection of a UNet to the name of its input.

    to_k and to_v of every cross-attention layer read the text encoder's output, one input for all of them; to_q, to_k
    and to_v of a self-attention layer read the same hidden states. An input of its own is named after its layer.

    Args:
        unet (`UNet2DConditionModel`): the model, with or without LoRA layers.
        attention (`str`): "cross", "self" or "all".

    Returns:
        `dict[str, str]`: module name -> input name, in the order of the model's modules.
    """
    kinds = {"cross": ("attn2",), "self": ("attn1",), "all": ("attn1", "attn2")}[attention]
    inputs = {}
    for name, module in unet.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in kinds or not hasattr(module, "to_q"):
            continue
        shared = TEXT_INPUT if kind == "attn2" else f"{name}.to_q"
        inputs |= {f"{name}.to_q": f"{name}.to_q", f"{name}.to_k": shared, f"{name}.to_v": shared}
        inputs[f"{name}.to_out.0"] = f"{name}.to_out.0"
    return inputs


def text_encoder_inputs(text_encoder, encoder=TEXT_ENCODER):
    """Map each attention projection of a CLIP text encoder to the name of its input, as `attention_inputs` does.

    q_proj, k_proj and v_proj of a layer read the same hidden states. Names begin with the text encoder's own in its
    pipeline, `encoder`, and a dot, and go on from the module that holds the layers.
    """
    inputs = {}
    for name, module in text_layers(text_encoder).named_modules():
        if hasattr(module, "q_proj"):
            name = f"{encoder}.{name}"
            inputs |= {f"{name}.{kind}": f"{name}.q_proj" for kind in ("q_proj", "k_proj", "v_proj")}
            inputs[f"{name}.out_proj"] = f"{name}.out_proj"
    return inputs


def find_module(name, unet, **text_encoders):
    """The module of a name that `attention_inputs` or `text_encoder_inputs` gave.

    Raises:
        AttributeError: if there is no such module.
    """
    model, _, rest = name.partition(".")
    if model in text_encoders:
        return text_layers(text_encoders[model]).get_submodule(rest)
    return unet.get_submodule(name)


def text_layers(text_encoder):
    """The module that holds a text encoder's layers: itself or its `text_model`, by class and version."""
    return getattr(text_encoder, "text_model", text_encoder)


def base_layer(module):
    """The linear layer itself, below the LoRA layer that peft may have wrapped around it."""
    return getattr(module, "base_layer", module)


def is_trained(model):
    """Whether anything in a model learns."""
    return any(parameter.requires_grad for parameter in model.parameters())


def without_skipped(names, skipped, layers, encoder=TEXT_ENCODER):
    """The names of a text encoder's modules that lie in none of its last `skipped` layers, of so many."""
    skipped = tuple(f"{encoder}.encoder.layers.{index}." for index in range(layers - skipped, layers))
    return [name for name in names if not name.startswith(skipped)]
