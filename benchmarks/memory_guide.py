"""What training a Stable Diffusion 1.5 LoRA at 512 x 512 takes of a GPU's memory, computed without one.

    python benchmarks/memory_guide.py

The trainer's own step runs on tensors that have shapes and no values (torch's meta device), and every storage that is
alive is counted: weights, LoRA, gradients, optimizer states, projector and activations. What a GPU does differently is
put in place of the functions concerned: fused attention, and autocast, with norms in float32. What CUDA itself, its
libraries and the gaps between allocations take is not in it. Writes `results/memory_guide.json`.
"""

import argparse
import gc
import json
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from nullspace.families.stable_diffusion import diffusion_loss


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_dreambooth_nullspace as trainer  # noqa: E402
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs  # noqa: E402
from nullspace.moments import SecondMoments  # noqa: E402
from nullspace.names import JOINT, TEXT_ENCODER  # noqa: E402
from nullspace.projector import NullSpaceProjector, Protected  # noqa: E402


# The sizes of stable-diffusion-v1-5, from its configuration; diffusers' own defaults are those of its UNet.
UNET = {"sample_size": 64, "cross_attention_dim": 768}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PROTECTED = 0.05  # share of the directions that is closed: the projector holds all others
RANK = 4  # the trainer's default
SCHEDULER = DDPMScheduler()
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

FP16 = {"mixed_precision": "fp16"}
FREED = {"pre_compute_text_embeddings": True, "cache_latents": True}  # the text encoder and the VAE go before training
SETTINGS = {
    "float32": {},
    "float32, batch 4": {"train_batch_size": 4},
    "fp16": FP16,
    "fp16, models freed": FP16 | FREED,
    "fp16, models freed, checkpointing": FP16 | FREED | {"gradient_checkpointing": True},
    "fp16, text encoder trained": FP16 | {"train_text_encoder": True},
    "fp16, batch 4": FP16 | {"train_batch_size": 4},
    "fp16, batch 4, checkpointing": FP16 | {"train_batch_size": 4, "gradient_checkpointing": True},
    "fp16, batch 8": FP16 | {"train_batch_size": 8},
    "fp16, batch 16": FP16 | {"train_batch_size": 16},
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self.remove, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, size):
        self.now -= size


@contextmanager
def as_on_a_gpu(dtype=None):
    """Attention that keeps no matrix of (tokens, tokens); with a dtype, what torch.autocast does there with it."""

    def cast(name, to):
        original = getattr(F, name)

        def run(*args, **how):
            args = [part.to(to) if torch.is_tensor(part) and part.is_floating_point() else part for part in args]
            how = {key: part.to(to) if torch.is_tensor(part) else part for key, part in how.items()}
            return original(*args, **how)

        return run

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
        if dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal)[0]

    replaced = {"scaled_dot_product_attention": attend}
    if dtype:
        replaced |= {name: cast(name, dtype) for name in ("linear", "conv2d")}
        replaced |= {name: cast(name, torch.float32) for name in ("layer_norm", "group_norm")}
    originals = {name: getattr(F, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(F, name, function)


def memory(setting):
    """Bytes (`dict`): the `models` that stay, and the peaks of `encoding`, `training` and `drawing`."""
    flags = {"rank": RANK, "train_batch_size": 1, "mixed_precision": "no", **setting}
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    line += ["--instance_prompt", "p"]
    for name, value in flags.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    args = trainer.parse_args(line)
    dtype = DTYPES[args.mixed_precision]
    autocast = dtype if args.mixed_precision != "no" else None
    batch = args.train_batch_size

    with LiveBytes() as live, torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET).to(dtype), AutoencoderKL(**VAE).to(dtype)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).to(dtype)
        for model in (unet, vae, text_encoder):
            model.requires_grad_(False)
        adapted = {"unet": unet} | ({TEXT_ENCODER: text_encoder} if args.train_text_encoder else {})
        sources = attention_inputs(unet) | (text_encoder_inputs(text_encoder) if args.train_text_encoder else {})
        parameters = trainer.add_lora(adapted, list(sources), args)
        trainer.save_memory(unet, text_encoder, args)
        optimizer = trainer.make_optimizer(parameters, args)
        items = {}
        for name, source in sources.items():
            size = find_module(name, unet, text_encoder=text_encoder).in_features
            closed = int(size * PROTECTED)
            gains = torch.empty(size - closed, device="cpu")
            items.setdefault(source, Protected(torch.empty(size, size, device="cpu"), closed, gains))
        protected = {JOINT: {name: items[source] for name, source in sources.items()}}
        projector = NullSpaceProjector(unet, protected, text_encoder=text_encoder)
        projector.attach(optimizer)

        numbers = torch.zeros(batch, 77, dtype=torch.long)
        live.peak = live.now
        with torch.no_grad(), as_on_a_gpu():
            moments = trainer.encode_pictures(vae, torch.empty(1 if args.cache_latents else batch, 3, 512, 512))
            embeddings = text_encoder(numbers)[0]
            encoding, live.peak = live.peak, live.now
            unet(
                torch.empty(2, 4, 64, 64, dtype=dtype), 0, torch.empty(2, *embeddings.shape[1:], dtype=dtype)
            )  # with guidance
            vae.decode(torch.empty(1, 4, 64, 64, dtype=dtype))
        drawing = live.peak
        if args.cache_latents:
            del vae
            moments = torch.empty(batch, *moments.shape[1:])
        if args.pre_compute_text_embeddings:
            del text_encoder, model
        gc.collect()
        models, live.peak = live.now, live.now
        for model in adapted.values():
            model.train()
        for _ in range(2):  # the optimizer's states are there from the second step on
            latents, _ = moments.chunk(2, dim=1)
            timesteps = torch.zeros(batch, dtype=torch.long)
            with as_on_a_gpu(autocast):
                embeds = text_encoder(numbers)[0] if args.train_text_encoder else embeddings
                noise = torch.empty_like(latents)
                loss = diffusion_loss(unet, SCHEDULER, latents, timesteps, noise, encoder_hidden_states=embeds)
                loss.backward()  # in it, since checkpointing computes again what it did before
            projector.project_gradients()
            optimizer.step()
            optimizer.zero_grad()
            del loss, embeds
        return {"models": models, "encoding": encoding, "training": live.peak, "drawing": drawing}


def memory_of_building(batch, dtype=torch.float16):
    """Bytes (`dict`): the models and sums that stay, and the peak of a step of build_nullspace.py's sampler."""
    with LiveBytes() as live, torch.device("meta"), torch.no_grad(), as_on_a_gpu():
        unet, vae = UNet2DConditionModel(**UNET).to(dtype), AutoencoderKL(**VAE).to(dtype)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).to(dtype)
        moments = SecondMoments(unet, attention_inputs(unet), {0: JOINT})
        embeddings = torch.empty(2 * batch, 77, 768, dtype=dtype)
        latents = torch.empty(2 * batch, 4, 64, 64, dtype=dtype)
        with moments.collect():
            moments.start_batch()
            live.peak = live.now
            unet(latents, timestep=0, encoder_hidden_states=embeddings)
        del vae, text_encoder, embeddings, latents
        return {"models": live.now, "drawing": live.peak}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    diffusers.utils.logging.set_verbosity_error()
    results = {name: memory(setting) for name, setting in tqdm(SETTINGS.items(), desc="Settings")}
    results |= {f"build, fp16, batch {batch}": memory_of_building(batch) for batch in (1, 8)}
    for name, row in results.items():
        print(f"{name:40}", *(f"{key} {value / 2**30:.2f} GiB" for key, value in row.items()))
    (HERE / "results").mkdir(exist_ok=True)
    written = {"torch": torch.__version__, "resolution": 512, "rank": RANK, "bytes": results}
    (HERE / "results" / "memory_guide.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
