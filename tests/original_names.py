"""A pipeline as one file, under the names that the models were first published with: what web UIs load."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file


RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "time_embedding.cond_proj.": "time_embed.cond_proj.", "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.", "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}  # fmt: skip


def starting(name, table):
    """A name whose beginning is replaced as a table says."""
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), name)


def unet_name(name, config):
    """The original name of a weight of a UNet."""
    layers = config.layers_per_block
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = found.groups()
        place, is_resnet = 1 if kind == "attentions" else 2 * int(number), kind == "resnets"
        return f"middle_block.{place}.{starting(rest, RESNET) if is_resnet else rest}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    if not found:
        return starting(name, OUTER)
    way, block, kind, layer, rest = found.groups()
    block, layer = int(block), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{2 if has_attention else 1}.{rest}"
    place = block * (layers + 1) + layer + (way == "down")
    place = f"{'input' if way == 'down' else 'output'}_blocks.{place}"
    return f"{place}.0.{starting(rest, RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"


def vae_name(name, config):
    """The original name of a weight of a VAE."""
    last = len(config.block_out_channels) - 1
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{last - int(found[1])}", name).replace("down_blocks", "down")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = (
        name.replace("resnets", "block").replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    )
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name).replace("conv_norm_out", "norm_out")
    return (
        re.sub(r"\bto_([qkv])\b", r"\1", name).replace("to_out.0", "proj_out").replace("conv_shortcut", "nin_shortcut")
    )


def open_clip(weights):
    """The weights of a CLIP text encoder as OpenCLIP has them, query, key and value in one."""
    weights, made = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}, {}
    for name, tensor in weights.items():
        if found := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
            block, rest = f"transformer.resblocks.{found[1]}.", found[2]
            if rest.startswith("self_attn.q_proj."):
                kind = rest.rpartition(".")[2]
                three = [weights[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                made[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
            elif "k_proj" not in rest and "v_proj" not in rest:
                made[block + starting(rest, OPEN_CLIP)] = tensor
        elif name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        else:
            names = {
                "embeddings.": "",
                "position_embedding.weight": "positional_embedding",
                "final_layer_norm.": "ln_final.",
            }
            made[starting(starting(name, {"embeddings.": ""}), dict(list(names.items())[1:]))] = tensor
    return made


def original_weights(pipeline):
    """All weights of a Stable Diffusion 1, 2 or XL pipeline under their original names."""
    unet, vae, weights = pipeline.unet, pipeline.vae, {}
    for name, tensor in unet.state_dict().items():
        weights[f"model.diffusion_model.{unet_name(name, unet.config)}"] = tensor
    for name, tensor in vae.state_dict().items():
        in_attention = re.search(r"to_(q|k|v|out\.0)\.weight", name)  # 1 x 1 convolutions there
        weights[f"first_stage_model.{vae_name(name, vae.config)}"] = tensor[..., None, None] if in_attention else tensor
    clip = pipeline.text_encoder.state_dict()
    clip = {f"transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    if hasattr(pipeline, "text_encoder_2"):
        weights |= {f"conditioner.embedders.0.{name}": tensor for name, tensor in clip.items()}
        second = open_clip(pipeline.text_encoder_2.state_dict())
        return weights | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    if unet.config.use_linear_projection:  # Stable Diffusion 2
        clip = {f"model.{name}": tensor for name, tensor in open_clip(pipeline.text_encoder.state_dict()).items()}
    return weights | {f"cond_stage_model.{name}": tensor for name, tensor in clip.items()}


def save_single_file(pipeline, path, dtype=torch.float32) -> Path:
    """Write a pipeline as one file, with what training has left in such files."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in original_weights(pipeline).items()}
    tensors |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    return path
