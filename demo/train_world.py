"""Train the demo's Stable Diffusion from scratch on the world of `world.py`, and save it as an ordinary pipeline.

    python demo/train_world.py --output_dir demo/shapes-sd

First the VAE, then the UNet and the text encoder together over cached latents. Both resume from `--work_dir` when
the script was stopped and is run with the same flags again. Where only the saved pipeline is left, it goes on from
that, with a new optimizer:

    python demo/train_world.py --init_from demo/shapes-sd --train_steps 10000

Every `--validation_steps` it saves the pipeline with the averaged weights, and prints how many prompts of each kind
that draws right.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from world import DEMO, FOLDER, KINDS, RESOLUTION, kind_prompts, sample_world, vocabulary
from world_reader import judge


CONTEXT = 28  # tokens; the longest caption has 26
VAE_PICTURES = 8000  # the first ones of the world are enough for the VAE
DROPOUT = 0.14  # share of the captions of one object that are left empty, for guidance
MIN_SNR = 20.0  # steps with less noise than this signal-to-noise ratio says count less (arXiv 2303.09556)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO / "shapes-sd", help="Where the pipeline is saved.")
    parser.add_argument("--work_dir", type=Path, default=DEMO / "work", help="Where training states are kept.")
    parser.add_argument("--init_from", type=Path, help="Go on from this saved pipeline, if there is no training state.")
    parser.add_argument("--num_pictures", type=int, default=40000, help="Pictures rendered to train on.")
    parser.add_argument("--vae_steps", type=int, default=3000, help="Training steps of the VAE, batch 16.")
    parser.add_argument("--train_steps", type=int, default=25000, help="Training steps of UNet and text encoder.")
    parser.add_argument("--train_batch_size", type=int, default=64, help="Batch size of UNet and text encoder.")
    parser.add_argument("--learning_rate", type=float, default=1.2e-3, help="Learning rate until the last third.")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Save the training state every so often.")
    parser.add_argument("--validation_steps", type=int, default=2000, help="Count right pictures every so often.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the world and of the training.")
    return parser.parse_args()


# ---- The parts of the pipeline ---------------------------------------------------------------------------------------


def make_tokenizer(folder):
    """A CLIPTokenizer that has a token of its own for each word of the world, and letters for anything else."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
    # Byte-pair encoding of the words alone ends with one token for each: there is nothing else to merge.
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", special_tokens=list(letters) + [c + "</w>" for c in letters],
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(vocabulary(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, _ = bpe.model.save(str(folder))
    tokens = json.loads(Path(vocab_file).read_text())
    for token in ("<|startoftext|>", "<|endoftext|>"):
        tokens[token] = len(tokens)
    Path(vocab_file).write_text(json.dumps(tokens))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)


def make_vae():
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
    )


def make_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet():
    """No attention on the outer level: there it would cost more than three times as much as all the rest."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # in this config: the number of heads
        norm_num_groups=8,
    )


def make_scheduler():
    """Stable Diffusion's noise schedule, but for its end, where that one leaves the picture's mean colour to be seen.

    Drawing starts there with noise alone, which a model that has always seen the mean takes for a picture of medium
    brightness (arXiv 2305.08891): red and yellow were drawn too seldom.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def make_pipeline(vae, text_encoder, tokenizer, unet):
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save_pipeline(folder, vae, text_encoder, tokenizer, unet):
    """Half precision, but for the text encoder.

    Without a dtype named, transformers loads a model as it was saved and diffusers in float32: parts that go together
    need a text encoder in float32.
    """
    vae, unet = copy.deepcopy(vae).half(), copy.deepcopy(unet).half().to(memory_format=torch.contiguous_format)
    tokenizer.backend_tokenizer.no_padding()  # of the last call, which is no part of it
    tokenizer.backend_tokenizer.no_truncation()
    make_pipeline(vae, text_encoder, tokenizer, unet).save_pretrained(folder)
    shutil.copy(FOLDER / "general.txt", folder / "prompts.txt")  # what a bundle of it is built from


def without_path(model):
    """A model as it is, but for the folder that it came from, which its configuration would name when it is saved."""
    config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
    fresh = type(model).from_config(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


# ---- States ----------------------------------------------------------------------------------------------------------


def save_state(path, **state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path, settings):
    """What `save_state` wrote with these settings, or None if it wrote nothing."""
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu")
    if state["settings"] != settings:
        sys.exit(f"error: {path} was made with other settings; delete it, or choose another --work_dir.")
    return state


def learning_rate_at(step, steps, warmup):
    """Share of the peak learning rate: a warm-up, a plateau, and a cosine down over the last third."""
    decay = max(0.0, (step / steps - 2 / 3) * 3)
    return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * decay)) / 2


# ---- Training --------------------------------------------------------------------------------------------------------


def to_tensor(pictures):
    """uint8 pictures (n, h, w, 3) as (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(args):
    """Reconstruction in L1 and L2 with a light KL term; in bfloat16, which is enough for it and twice as fast."""
    path, settings = args.work_dir / "vae.pt", {"steps": args.vae_steps, "seed": args.seed}
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, args.vae_steps, 100))
    step = 0
    if state := load_state(path, settings):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    if step < args.vae_steps:
        pictures, *_ = sample_world(VAE_PICTURES, args.seed)
    progress = tqdm(range(step, args.vae_steps), desc="VAE", initial=step, total=args.vae_steps, mininterval=10)
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed + step)
        batch = to_tensor(pictures[torch.randint(len(pictures), (16,), generator=generator).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - batch
        loss = error.abs().mean() + 5 * error.square().mean() + 1e-5 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / error.square().mean().item())
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
            save_state(
                path, settings=settings, vae=vae.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), step=step + 1,
            )  # fmt: skip
    return certain(vae)


@torch.no_grad()
def certain(vae):
    """The VAE, ready for use: it gives the means of its latents as all that there is.

    The deviations with which it was trained are half of the latents' own. A UNet learns from the means, and who trains
    a LoRA draws samples, as of Stable Diffusion's VAE, whose deviations hardly matter.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0.0
    vae.quant_conv.bias[channels:] = -12.0  # the logarithm of the variance
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def make_data(args, vae, tokenizer):
    """Latents (n, 4, 16, 16), as the VAE gives them, and tokens (n, captions, CONTEXT); kept for the next start."""
    path, settings = args.work_dir / "data.pt", {"num_pictures": args.num_pictures, "seed": args.seed}
    data = load_state(path, settings)
    if not data:
        pictures, captions, single = sample_world(args.num_pictures, args.seed)
        means = []
        for start in tqdm(range(0, len(pictures), 100), desc="latents", mininterval=10):
            means.append(vae.encode(to_tensor(pictures[start : start + 100])).latent_dist.mean)
        padded = dict(padding="max_length", truncation=True, return_tensors="pt")
        tokens = tokenizer([each for group in captions for each in group], **padded).input_ids
        tokens = tokens.view(len(captions), -1, CONTEXT)
        data = dict(settings=settings, latents=torch.cat(means), tokens=tokens.short(), single=torch.tensor(single))
        save_state(path, **data)
    return data["latents"], data["tokens"].long(), data["single"]


def train_unet(args, pipeline_parts, latents, tokens, single):
    """Noise prediction as in Stable Diffusion, text encoder included; some captions are empty, for guidance.

    Only those of one object (`single`, (n,)) are: guidance leads away from what an empty caption draws, and away from
    pictures of two it leads to what they never show, large objects in the centre. `pipeline_parts` are VAE, text
    encoder, tokenizer and UNet.
    """
    _, text_encoder, tokenizer, unet = pipeline_parts
    path = args.work_dir / "unet.pt"
    settings = {name: str(vars(args)[name]) for name in ("train_steps", "train_batch_size", "learning_rate", "seed")}
    noise_scheduler = make_scheduler()
    unet.to(memory_format=torch.channels_last)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, args.train_steps, 300))
    ema = EMAModel(model.parameters(), decay=0.9995)
    step, seconds = 0, 0.0
    if state := load_state(path, settings):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    progress = tqdm(range(step, args.train_steps), desc="UNet", initial=step, total=args.train_steps, mininterval=10)
    losses, started = [], time.perf_counter() - seconds
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed + step)
        size = (args.train_batch_size,)
        chosen = torch.randint(len(latents), size, generator=generator)
        input_ids = tokens[chosen, torch.randint(tokens.shape[1], size, generator=generator)]
        input_ids[(torch.rand(size, generator=generator) < DROPOUT) & single[chosen]] = empty
        noise = torch.randn((*size, *latents.shape[1:]), generator=generator)
        # Evenly over the schedule, which the loss hangs on more than on anything else that is drawn
        timesteps = ((torch.arange(*size) + torch.rand(size, generator=generator)) * 1000 / size[0]).long()
        noisy = noise_scheduler.add_noise(latents[chosen], noise, timesteps).to(memory_format=torch.channels_last)
        prediction = unet(noisy, timesteps, text_encoder(input_ids)[0]).sample
        snr = compute_snr(noise_scheduler, timesteps)
        # As v-prediction weighs them: what the noise hides is decided where a small error of it is a large one of that
        weights = (snr.clamp(max=MIN_SNR) + 1) / snr
        loss = (F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3)) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-500:]):.4f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.train_steps:
            save_state(
                path, settings=settings, model=model.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), ema=ema.state_dict(), step=step + 1,
                seconds=time.perf_counter() - started,
            )  # fmt: skip
        if (step + 1) % args.validation_steps == 0 or step + 1 == args.train_steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            save_pipeline(args.output_dir, *pipeline_parts)
            scores = validate(make_pipeline(*pipeline_parts))
            ema.restore(model.parameters())
            minutes = (time.perf_counter() - started) / 60
            tqdm.write(f"step {step + 1}, {minutes:.0f} min, loss {np.mean(losses[-500:]):.4f}, right: {scores}")


# ---- Quality ---------------------------------------------------------------------------------------------------------


def draw(pipeline, prompts, num_inference_steps=25, guidance_scale=4.0, seed=0, batch_size=50):
    """Pictures (n, 64, 64, 3) in [0, 1]; each prompt's noise comes from its own seed."""
    pictures = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing", mininterval=10):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        pictures.append(
            pipeline(
                batch, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generators,
                output_type="np",
            ).images
        )  # fmt: skip
    return np.concatenate(pictures)


def validate(pipeline, count=25, **choices):
    """Shares of prompts of each kind that are drawn right, as text; `choices` are those of `draw`."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = {kind: kind_prompts(kind, count, seed=7) for kind in KINDS}
    pictures = draw(pipeline, sum(prompts.values(), []), **choices)
    right = np.array([not wrong for wrong in judge(sum(prompts.values(), []), pictures)]).reshape(len(KINDS), count)
    return ", ".join(f"{kind} {share:.0%}" for kind, share in zip(KINDS, right.mean(1), strict=True))


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    if args.init_from:
        saved = StableDiffusionPipeline.from_pretrained(args.init_from, torch_dtype=torch.float32, safety_checker=None)
        vae, unet = certain(without_path(saved.vae)), without_path(saved.unet)
        text_encoder, tokenizer = saved.text_encoder, saved.tokenizer
    else:
        vae = train_vae(args)
        tokenizer = make_tokenizer(args.work_dir / "tokenizer")
        text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    latents, tokens, single = make_data(args, vae, tokenizer)
    if not args.init_from:
        vae.register_to_config(scaling_factor=1 / latents.std().item())  # to unit deviation
    train_unet(args, (vae, text_encoder, tokenizer, unet), latents * vae.config.scaling_factor, tokens, single)


if __name__ == "__main__":
    main()
