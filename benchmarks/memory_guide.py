"""What training a LoRA takes of a GPU's memory, computed without one: Stable Diffusion 1.5 at 512 x 512, SDXL at 1024.

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
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import CLIPTextConfig


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from nullspace import budget as budget_room  # noqa: E402
from nullspace import moments as moments_room  # noqa: E402
from nullspace import projector as projector_room  # noqa: E402
from nullspace.adapters import add_lora  # noqa: E402
from nullspace.budget import DriftBudget  # noqa: E402
from nullspace.families import get_family  # noqa: E402
from nullspace.families.stable_diffusion import diffusion_loss  # noqa: E402
from nullspace.latents import encode_pictures  # noqa: E402
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs  # noqa: E402
from nullspace.moments import SecondMoments  # noqa: E402
from nullspace.names import JOINT  # noqa: E402
from nullspace.optimizers import make_optimizer  # noqa: E402
from nullspace.preparation import save_memory  # noqa: E402
from nullspace.projector import NullSpaceProjector, Protected  # noqa: E402
from nullspace.spectrum import Spectrum  # noqa: E402
from nullspace.word import WordEmbedding  # noqa: E402
from train_dreambooth_nullspace import parse_args  # noqa: E402


class Sizes(NamedTuple):
    """Of a model, by its configurations: that of the UNet, and of each text encoder by its name."""

    unet: dict
    text_encoders: dict


# Of stable-diffusion-v1-5, the sizes of whose UNet are diffusers' own defaults, and of stable-diffusion-xl-base-1.0.
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE_TEXT = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
MODELS = {
    "sd": Sizes({"sample_size": 64, "cross_attention_dim": 768}, {"text_encoder": TEXT}),
    "sdxl": Sizes(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"text_encoder": TEXT, "text_encoder_2": {**LARGE_TEXT, "projection_dim": 1280}},
    ),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
PROTECTED = 0.05  # share of the directions that is closed: the projector holds all others
RANK = 4  # the trainer's default
SCHEDULER = DDPMScheduler()
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

FP16 = {"mixed_precision": "fp16"}
WORD = {"placeholder_token": "sks-dog", "initializer_token": "dog", "num_vectors": 4}
LAUNCHED = FP16 | WORD | {"cache_latents": True, "max_drift": 0.05}
FREED = {"pre_compute_text_embeddings": True, "cache_latents": True}  # the text encoder and the VAE go before training
SETTINGS = {
    "float32": {},
    "float32, batch 4": {"train_batch_size": 4},
    "launch line": LAUNCHED,
    "fp16": FP16,
    "fp16, models freed": FP16 | FREED,
    "fp16, models freed, checkpointing": FP16 | FREED | {"gradient_checkpointing": True},
    "fp16, text encoder trained": FP16 | {"train_text_encoder": True},
    "fp16, batch 4": FP16 | {"train_batch_size": 4},
    "fp16, batch 4, checkpointing": FP16 | {"train_batch_size": 4, "gradient_checkpointing": True},
    "fp16, batch 8": FP16 | {"train_batch_size": 8},
    "fp16, batch 16": FP16 | {"train_batch_size": 16},
}
XL_SETTINGS = {
    "launch line": LAUNCHED | {"gradient_checkpointing": True},
    "fp16": FP16,
    "fp16, models freed": FP16 | FREED,
    "fp16, checkpointing": FP16 | {"gradient_checkpointing": True},
    "fp16, models freed, checkpointing": FP16 | FREED | {"gradient_checkpointing": True},
    "fp16, text encoders trained, checkpointing": FP16 | {"train_text_encoder": True, "gradient_checkpointing": True},
    "fp16, models freed, batch 4, checkpointing": FP16
    | FREED
    | {"train_batch_size": 4, "gradient_checkpointing": True},
    "fp16, models freed, batch 4": FP16 | FREED | {"train_batch_size": 4},
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


@contextmanager
def without_values():
    """Let the library work on tensors that have shapes alone: the meta device has no autocast, and nothing to check."""
    with ExitStack() as patches:
        for room in (budget_room, moments_room, projector_room):
            patches.enter_context(patch.object(room, "tf32", lambda *_: nullcontext()))
        patches.enter_context(patch.object(NullSpaceProjector, "_check_state", lambda *_, **__: None))
        yield


def make_models(family, dtype):
    """UNet, VAE and text encoders (`dict`) of a family, as the trainer and the builder hold them."""
    sizes = MODELS[family.name]
    unet, vae = UNet2DConditionModel(**sizes.unet).to(dtype), AutoencoderKL(**VAE)
    vae.to(torch.float32 if dtype == torch.float16 and family.needs_float32(vae.config) else dtype)
    text_encoders = {
        name: kind(CLIPTextConfig(**sizes.text_encoders[name])).to(dtype) for name, kind in family.text_encoders.items()
    }
    return unet, vae, text_encoders


def tell(family, text_encoders, batch):
    """What the denoiser is told of a batch of prompts and pictures."""
    tokens = {name: {"input_ids": torch.zeros(batch, 77, dtype=torch.long)} for name in text_encoders}
    return family.encode(text_encoders, tokens) | family.place(torch.zeros(batch, 6))


def add_rows(text_encoder, count):
    """Give a text encoder the rows of a word, which are returned."""
    known = text_encoder.get_input_embeddings()
    embedding = WordEmbedding(known, known.num_embeddings, torch.empty(count, known.embedding_dim))
    text_encoder.set_input_embeddings(embedding)
    return embedding.added.weight


def bundle_of(sources, items):
    """What a budget asks of a bundle with such bases (`dict[str, Protected]`, by input), on no device to begin with."""
    with torch.device("cpu"):
        spectra = {source: Spectrum(torch.ones(len(item.basis)), item.basis, 1) for source, item in items.items()}
    modules = {name: {"input": source} for name, source in sources.items()}
    return SimpleNamespace(group=lambda _: spectra, modules=modules)


def memory(setting, family, projected=True):
    """Bytes (`dict`): the `models` that stay, the projector among them, and the peaks of each kind of work.

    In the trainer's order: pictures are encoded before there is a projector, and drawn when it is gone.
    """
    flags = {"rank": RANK, "train_batch_size": 1, "mixed_precision": "no", **setting}
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    line += ["--instance_prompt", "a sks-dog"]
    for name, value in flags.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    args = parse_args(line)
    dtype = DTYPES[args.mixed_precision]
    autocast = dtype if args.mixed_precision != "no" else None
    batch = args.train_batch_size

    with LiveBytes() as live, torch.device("meta"):
        unet, vae, text_encoders = make_models(family, dtype)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        side = unet.config.sample_size * scale
        for model in (*text_encoders.values(), vae, unet):
            model.requires_grad_(False)
        given = family.denoiser(unet, unet.config, None)

        def denoise(noisy, *rest, **conditions):  # as BatchLoss gives it
            return given(noisy.to(dtype), *rest, **conditions)

        live.peak = live.now
        with torch.no_grad(), as_on_a_gpu():
            moments = encode_pictures(vae, torch.empty(1 if args.cache_latents else batch, 3, side, side))
            conditions = tell(family, text_encoders, batch)
            encoding, live.peak = live.peak, live.now
            both = {key: torch.empty(2, *value.shape[1:], dtype=value.dtype) for key, value in conditions.items()}
            denoise(torch.empty(2, 4, side // scale, side // scale, dtype=dtype), 0, **both)  # with guidance
            vae.decode(torch.empty(1, 4, side // scale, side // scale, dtype=vae.dtype))
            del both
        drawing = live.peak
        if args.cache_latents:
            del vae
            moments = torch.empty(batch, *moments.shape[1:])
        adapted, sources = {"unet": unet}, attention_inputs(unet)
        if args.train_text_encoder:
            adapted |= text_encoders
            for name, text_encoder in text_encoders.items():
                sources |= text_encoder_inputs(text_encoder, name)
            del text_encoder
        parameters = add_lora(adapted, list(sources), args)
        if args.placeholder_token:
            parameters += [add_rows(text_encoder, args.num_vectors) for text_encoder in text_encoders.values()]
        save_memory(unet, text_encoders.values(), args)
        optimizer = make_optimizer(parameters, args)
        items = {}
        for name, source in sources.items():
            size = find_module(name, unet, **text_encoders).in_features
            closed = int(size * PROTECTED)
            gains = torch.full((size - closed,), 0.1, device="cpu")
            items.setdefault(source, Protected(torch.empty(size, size, device="cpu"), closed, gains))
        protected = {name: items[source] for name, source in sources.items() if projected}
        before = live.now
        projector = NullSpaceProjector(unet, protected, **text_encoders)
        held = live.now - before
        projector.attach(optimizer)
        if args.max_drift:
            DriftBudget(args.max_drift, bundle_of(sources, items), list(sources), adapted).attach(optimizer)
        budget = live.now - before - held

        if args.pre_compute_text_embeddings:
            text_encoders.clear()
        gc.collect()
        models, live.peak = live.now, live.now
        for model in adapted.values():
            model.train()
        for _ in range(2):  # the optimizer's states are there from the second step on
            latents, _ = moments.chunk(2, dim=1)
            timesteps = torch.zeros(batch, dtype=torch.long)
            with as_on_a_gpu(autocast):
                learned = args.train_text_encoder or args.placeholder_token
                told = tell(family, text_encoders, batch) if learned else conditions
                noise = torch.empty_like(latents)
                loss = diffusion_loss(denoise, SCHEDULER, latents, timesteps, noise, **told)
                loss.backward()  # in it, since checkpointing computes again what it did before
            projector.project_gradients()
            optimizer.step()
            optimizer.zero_grad()
            del loss, told
        held = {"projector": held, "budget": budget}
        return {"models": models, **held, "encoding": encoding, "training": live.peak, "drawing": drawing}


def memory_of_building(batch, family, dtype=torch.float16):
    """Bytes (`dict`): the models and sums that stay, and the peak of a step of build_nullspace.py's sampler."""
    with LiveBytes() as live, torch.device("meta"), torch.no_grad(), as_on_a_gpu():
        unet, vae, text_encoders = make_models(family, dtype)
        vae.to(dtype)  # it draws nothing to the end
        moments = SecondMoments(unet, attention_inputs(unet), {0: JOINT})
        conditions = tell(family, text_encoders, 2 * batch)
        side = unet.config.sample_size
        latents = torch.empty(2 * batch, 4, side, side, dtype=dtype)
        denoise = family.denoiser(unet, unet.config, None)
        gc.collect()
        with moments.collect():
            moments.start_batch()
            live.peak = live.now
            denoise(latents, 0, **conditions)
        del vae, text_encoders, conditions, latents
        return {"models": live.now, "drawing": live.peak}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    diffusers.utils.logging.set_verbosity_error()
    sd, xl = get_family("sd"), get_family("sdxl")
    jobs = {name: (setting, sd) for name, setting in SETTINGS.items()}
    jobs |= {f"SDXL, {name}": (setting, xl) for name, setting in XL_SETTINGS.items()}
    unprotected = FP16 | FREED, {"gradient_checkpointing": True}
    jobs["fp16, models freed, unprotected"] = unprotected[0], sd, False
    jobs["SDXL, fp16, models freed, checkpointing, unprotected"] = unprotected[0] | unprotected[1], xl, False
    with without_values():
        results = {name: memory(*job) for name, job in tqdm(jobs.items(), desc="Settings")}
        results |= {f"build, fp16, batch {batch}": memory_of_building(batch, sd) for batch in (1, 8)}
        results |= {f"SDXL, build, fp16, batch {batch}": memory_of_building(batch, xl) for batch in (1, 8)}
    for name, row in results.items():
        print(f"{name:52}", *(f"{key} {value / 2**30:.2f} GiB" for key, value in row.items()))
    (HERE / "results").mkdir(exist_ok=True)
    written = {"torch": torch.__version__, "rank": RANK, "bytes": results}
    (HERE / "results" / "memory_guide.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
