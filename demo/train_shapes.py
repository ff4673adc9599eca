"""Train the demo's Stable Diffusion from scratch on the world of `shapes.py`, and save it as an ordinary pipeline.

    python demo/train_shapes.py --output_dir demo/shapes-sd

First the VAE, then the UNet and the text encoder together over cached latents. Both resume from `--work_dir` when
the script was stopped and is run with the same flags again. It ends with the share of held-out prompts drawn right and
a grid of pictures to look at.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from shapes import COLOURS, DEMO, RARE_TOKENS, RESOLUTION, SHAPES, SIZES, TEMPLATES, matches, sample_world
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


CONTEXT = 16  # tokens; the longest caption has 13


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO / "shapes-sd", help="Where the pipeline is saved.")
    parser.add_argument("--work_dir", type=Path, default=DEMO / "work", help="Where training states are kept.")
    parser.add_argument("--num_pictures", type=int, default=12000, help="Pictures rendered to train on.")
    parser.add_argument("--vae_steps", type=int, default=2500, help="Training steps of the VAE, batch 32.")
    parser.add_argument("--train_steps", type=int, default=6000, help="Training steps of UNet and text encoder.")
    parser.add_argument("--train_batch_size", type=int, default=64, help="Batch size of UNet and text encoder.")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="Peak learning rate, decayed by a cosine.")
    parser.add_argument("--checkpointing_steps", type=int, default=250, help="Save the training state every so often.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the world and of the training.")
    return parser.parse_args()


# ---- The parts of the pipeline ---------------------------------------------------------------------------------------


def make_tokenizer(folder):
    """A CLIPTokenizer that has a token of its own for each word of the world, and letters for anything else."""
    words = {word for template in TEMPLATES for word in template.split() if "{" not in word}
    words |= {"an", "the", "of", "and", "one", "two", *SHAPES, *COLOURS, *SIZES, *RARE_TOKENS}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
    # Byte-pair encoding of the words alone ends with one token for each: there is nothing else to merge.
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", special_tokens=list(letters) + [c + "</w>" for c in letters]
    )
    bpe.train_from_iterator(sorted(words), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, _ = bpe.model.save(str(folder))
    vocabulary = json.loads(Path(vocab_file).read_text())
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    Path(vocab_file).write_text(json.dumps(vocabulary))
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
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # in this config: the number of heads
        norm_num_groups=8,
    )


def make_scheduler():
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


# ---- Training --------------------------------------------------------------------------------------------------------


def settings_of(args):
    """All flags that a training depends on: what a state was made with, to go on from it."""
    free = ("output_dir", "work_dir", "checkpointing_steps")
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def save_state(path, **state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path, device, settings):
    """What `save_state` wrote of a training with these settings, or None if it wrote nothing."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=device)
    if state.get("settings") != settings:
        sys.exit(f"error: {path} is of a training with other settings; delete it, or choose another --work_dir.")
    return state


def to_tensor(pictures):
    """uint8 pictures (n, h, w, 3) as (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(args, pictures, device):
    """Reconstruction in L1 and L2 with a light KL term; trained in bfloat16, which is enough for it."""
    path = args.work_dir / "vae.pt"
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.vae_steps)
    step, settings = 0, settings_of(args)
    if state := load_state(path, device, settings):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    progress = tqdm(range(step, args.vae_steps), desc="VAE", initial=step, total=args.vae_steps)
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed + step)
        batch = pictures[torch.randint(len(pictures), (32,), generator=generator)].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - batch
        loss = error.abs().mean() + 5 * error.square().mean() + 1e-5 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
            save_state(
                path, settings=settings, vae=vae.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), step=step + 1,
            )  # fmt: skip
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encode(vae, pictures, device):
    """Latents (n, 4, 8, 8) of all pictures, and sets the VAE's scaling factor to one over their deviation."""
    means = [vae.encode(batch.to(device)).latent_dist.mean for batch in tqdm(pictures.split(256), desc="latents")]
    latents = torch.cat(means)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def train_unet(args, latents, captions, tokenizer, device):
    """Noise prediction as in Stable Diffusion, text encoder included; one caption in ten is empty, for guidance."""
    path = args.work_dir / "unet.pt"
    text_encoder, unet, noise_scheduler = (
        make_text_encoder(tokenizer).to(device),
        make_unet().to(device),
        make_scheduler(),
    )
    unet.to(memory_format=torch.channels_last)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=args.train_steps)
    ema = EMAModel(model.parameters(), decay=0.999)
    step, settings = 0, settings_of(args)
    if state := load_state(path, device, settings):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
    tokens = tokenizer(
        [caption for group in captions for caption in group], padding="max_length", return_tensors="pt"
    ).input_ids.view(len(captions), len(TEMPLATES), CONTEXT)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    progress = tqdm(range(step, args.train_steps), desc="UNet", initial=step, total=args.train_steps)
    losses = []
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed + step)
        size = (args.train_batch_size,)
        chosen = torch.randint(len(latents), size, generator=generator)
        input_ids = tokens[chosen, torch.randint(len(TEMPLATES), size, generator=generator)]
        input_ids[torch.rand(size, generator=generator) < 0.1] = empty
        noise = torch.randn((*size, *latents.shape[1:]), generator=generator).to(device)
        timesteps = torch.randint(1000, size, generator=generator).to(device)
        noisy = noise_scheduler.add_noise(latents[chosen.to(device)], noise, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(input_ids.to(device))[0]).sample
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.train_steps:
            save_state(
                path, settings=settings, model=model.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), ema=ema.state_dict(), step=step + 1,
            )  # fmt: skip
    ema.copy_to(model.parameters())
    return text_encoder.eval(), unet.to(memory_format=torch.contiguous_format).eval(), noise_scheduler


# ---- Quality ---------------------------------------------------------------------------------------------------------


def draw(pipeline, prompts, num_inference_steps=25, guidance_scale=5.0, seed=0, batch_size=50):
    """Pictures (n, 32, 32, 3) in [0, 1]; each prompt's noise comes from its own seed."""
    pictures = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing"):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        pictures.append(
            pipeline(
                batch, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generators,
                output_type="np",
            ).images
        )  # fmt: skip
    return np.concatenate(pictures)


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    # Render the world
    pictures, captions = sample_world(args.num_pictures, args.seed)
    pictures = to_tensor(pictures)

    # Train
    vae = train_vae(args, pictures, device)
    latents = encode(vae, pictures, device)
    tokenizer = make_tokenizer(args.work_dir / "tokenizer")
    text_encoder, unet, noise_scheduler = train_unet(args, latents, captions, tokenizer, device)

    # Save an ordinary pipeline
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=noise_scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(args.output_dir)

    # Look at what it learned
    pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = (DEMO / "heldout_prompts.txt").read_text().split("\n")[:200]
    drawn = draw(pipeline, prompts)
    print(f"{matches(prompts, drawn).mean():.1%} of {len(prompts)} held-out prompts drawn right in 25 steps")
    grid = make_image_grid([image.resize((96, 96), 0) for image in pipeline.numpy_to_pil(drawn[:96])], 8, 12)
    grid.save(args.work_dir / "held_out.png")


if __name__ == "__main__":
    main()
