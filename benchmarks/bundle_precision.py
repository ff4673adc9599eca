"""What a bundle's precision does to a LoRA: drift and likeness on the demo's model, by the way its vectors are stored.

    python benchmarks/bundle_precision.py

The base model draws some of the demo's prompts once; the spectra of what its layers read are stored in each of the
ways of `bundle_size.py`; and the subject is learned in the null space of each at three degrees of softness, with equal
seeds. Drift is the root mean square of the predicted drifts, against the float32 spectra; likeness is the share of a
plain LoRA's gain in the loss on the subject's pictures at fixed noise. Writes `results/bundle_precision.json`.
"""

import copy
import math
from types import SimpleNamespace

import torch
from bundle_size import SOFTNESSES, WAYS, mean_of_the_others
from common import write
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.nn.utils import clip_grad_norm_

from nullspace.adapters import add_lora
from nullspace.audit import predicted_drift
from nullspace.bundle import Bundle
from nullspace.families.stable_diffusion import diffusion_loss, encode_tokens
from nullspace.layers import attention_inputs, find_module
from nullspace.lora import LoraLayer
from nullspace.moments import SecondMoments
from nullspace.names import JOINT, TEXT_INPUT
from nullspace.projector import NullSpaceProjector
from shapes import DEMO


PROMPTS, SAMPLER_STEPS, BATCH = 24, 4, 12
STEPS, RANK, RATE = 80, 8, 1e-2
KEPT = [way for way in WAYS if WAYS[way] is not mean_of_the_others]  # which needs other gains


def collect(pipeline):
    """The spectra of the model's inputs on some of the demo's prompts: `dict[str, dict[str, Spectrum]]` by group."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(SAMPLER_STEPS)
    moments = SecondMoments(
        pipeline.unet, attention_inputs(pipeline.unet), dict.fromkeys(pipeline.scheduler.timesteps.tolist(), JOINT)
    )
    prompts = [line for line in (DEMO / "prompts.txt").read_text().splitlines() if line]
    prompts = prompts[:: len(prompts) // PROMPTS][:PROMPTS]
    with moments.collect():
        for start in range(0, len(prompts), BATCH):
            moments.start_batch()
            generator = torch.Generator().manual_seed(start)
            pipeline(
                prompts[start : start + BATCH], num_inference_steps=SAMPLER_STEPS, output_type="latent",
                generator=generator,
            )  # fmt: skip
    modules = {name: {"input": source} for name, source in attention_inputs(pipeline.unet).items()}
    return Bundle.from_moments(moments, [{"name": JOINT, "timesteps": [0], "range": [0, 999]}], {"modules": modules})


def subject(pipeline):
    """Latents of the subject's pictures (5, 4, h, w), and the embeddings of its prompt."""
    pictures = [Image.open(path) for path in sorted((DEMO / "instance_images" / "star").glob("*.png"))]
    side = pipeline.vae.config.sample_size
    pixels = VaeImageProcessor().preprocess(pictures, height=side, width=side)
    tokens = pipeline.tokenizer(
        "a photo of a sks star", padding="max_length", max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        return latents, encode_tokens(pipeline.text_encoder, tokens)


def loss_at(unet, schedule, latents, text, generator):
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    return diffusion_loss(
        unet, schedule, latents, timesteps, noise, encoder_hidden_states=text.expand(len(latents), -1, -1)
    )


def final_loss(unet, schedule, latents, text):
    with torch.no_grad():
        draws = [loss_at(unet, schedule, latents, text, torch.Generator().manual_seed(10**6 + i)) for i in range(20)]
    return torch.stack(draws).mean().item()


def train(pipeline, protected, latents, text, exact):
    """Drift and loss of a LoRA that was trained in a null space."""
    torch.manual_seed(0)
    unet, schedule = (
        copy.deepcopy(pipeline.unet).requires_grad_(False),
        DDPMScheduler.from_config(pipeline.scheduler.config),
    )
    args = SimpleNamespace(rank=RANK, lora_alpha=RANK, lora_dropout=0.0)
    parameters = add_lora({"unet": unet}, list(exact.modules), args)
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    projector = NullSpaceProjector(unet, {JOINT: protected})
    projector.attach(optimizer)
    for step in range(STEPS):
        loss_at(unet, schedule, latents, text, torch.Generator().manual_seed(step)).backward()
        projector.project_gradients()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    drifts = []
    for name, info in exact.modules.items():
        layer = find_module(name, unet)
        down, up = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        weight = layer.base_layer.weight
        drifts.append(predicted_drift(LoraLayer(down, up, 1.0), weight, exact.group(JOINT)[info["input"]]))
    rms = math.sqrt(sum(drift**2 for drift in drifts) / len(drifts))
    return rms, final_loss(unet, schedule, latents, text)


def main():
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "shapes-sd", safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents, text = subject(pipeline)
    exact = collect(pipeline)
    before = final_loss(pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config), latents, text)
    plain_drift, plain_loss = train(pipeline, exact.protected(threshold=0), latents, text, exact)
    print("plain LoRA", plain_drift, before, plain_loss, flush=True)
    packed = {source: item.pack() for source, item in exact.group(JOINT).items()}
    rows = []
    for softness in reversed(SOFTNESSES):  # the lowest first, at which precision matters most
        for way in KEPT:
            stored = {source: WAYS[way](item, packed[source]) for source, item in exact.group(JOINT).items()}
            spectra = {
                source: item._replace(eigenvectors=stored[source][0].contiguous())
                for source, item in exact.group(JOINT).items()
            }
            groups = {name: {key: spectra[key] for key in exact.spectra[name]} for name in (JOINT, TEXT_INPUT)}
            protected = Bundle(exact.config, groups).protected(softness=softness)
            drift, loss = train(pipeline, protected, latents, text, exact)
            row = {"softness": softness, "way": way, "bytes": sum(size for _, size in stored.values())}
            row |= {"drift": drift, "likeness": (before - loss) / (before - plain_loss)}
            rows.append(row)
            print(row, flush=True)
    write("bundle_precision", plain={"drift": plain_drift, "loss": plain_loss, "loss_before": before}, runs=rows)


if __name__ == "__main__":
    main()
