"""Distil the demo's Stable Diffusion into a Latent Consistency Model that draws the world in a few steps.

    python demo/distill_world.py --pretrained_model_name_or_path demo/shapes-sd --output_dir demo/shapes-lcm

Latent consistency distillation (LCM paper, arXiv 2310.04378, algorithm 1) of the UNet over cached latents; VAE, text
encoder and tokenizer stay the teacher's. It resumes from `--work_dir` when it was stopped and is run with the same
flags again. Every `--validation_steps` it saves the pipeline, and prints how many prompts of each kind that draws right
in 2 and in 4 steps.
"""

import argparse
import copy
import hashlib
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from train_world import load_state, make_data, save_state, validate
from world import DEMO


SOLVER_STEPS = 50  # points of the grid that the student is distilled on: every 20th of the 1000 timesteps
GUIDANCE_EMBEDDING = 256  # channels of the guidance scale's embedding
HUBER = 1e-3  # below this error the pseudo-Huber loss is quadratic, above it linear


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", type=Path, default=DEMO / "shapes-sd", help="Folder of the teacher."
    )
    parser.add_argument("--output_dir", type=Path, default=DEMO / "shapes-lcm", help="Where the pipeline is saved.")
    parser.add_argument("--init_from", type=Path, help="Go on from this saved student, with a new optimizer.")
    parser.add_argument("--work_dir", type=Path, default=DEMO / "work", help="Where the training state is kept.")
    parser.add_argument("--num_pictures", type=int, default=40000, help="Pictures rendered to train on.")
    parser.add_argument("--train_steps", type=int, default=4000, help="Training steps.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Batch size.")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="Peak learning rate, decayed by a cosine.")
    parser.add_argument(
        "--guidance_range", type=float, nargs=2, default=(2.0, 8.0), help="Guidance scales that the student learns."
    )
    parser.add_argument("--checkpointing_steps", type=int, default=100, help="Save the training state every so often.")
    parser.add_argument("--validation_steps", type=int, default=1000, help="Count right pictures every so often.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the world and of the training.")
    return parser.parse_args()


# ---- The student -----------------------------------------------------------------------------------------------------


def make_student(teacher):
    """The teacher's UNet with one more input, the guidance scale's embedding, that starts without an effect."""
    config = {key: value for key, value in teacher.config.items() if key != "_name_or_path"}  # a path of this machine
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": GUIDANCE_EMBEDDING})
    unet.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    return unet


def predict_original(noisy, epsilon, alpha_bar):
    """The clean latents (n, 4, 16, 16) that the noise prediction implies: `x_0` of DDIM (arXiv 2010.02502, eq. 9)."""
    return (noisy - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()


def consistency_function(unet, scheduler, noisy, timesteps, alpha_bar, **conditions):
    """Where the trajectory through noisy latents (n, 4, 16, 16) ends, by the student: `f` of the LCM paper, eq. 9.

    `c_skip` and `c_out` make it the identity at timestep 0, as `LCMScheduler` does when it samples.
    """
    c_skip, c_out = (
        each.view(-1, 1, 1, 1) for each in scheduler.get_scalings_for_boundary_condition_discrete(timesteps)
    )
    epsilon = unet(noisy, timesteps, **conditions).sample
    return c_skip * noisy + c_out * predict_original(noisy, epsilon, alpha_bar)


def guided_ddim_step(unet, noisy, timesteps, alpha_bar, previous_alpha_bar, text, empty_text, guidance_scale):
    """One step of the teacher's guided DDIM from latents (n, 4, 16, 16) to the grid's next cleaner timestep.

    LCM paper, eq. 14, with its guidance scale `w` counted as pipelines do: theirs is one less than `guidance_scale`.
    """
    both = unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([text, empty_text])).sample
    with_prompt, without_prompt = both.chunk(2)
    epsilon = without_prompt + guidance_scale.view(-1, 1, 1, 1) * (with_prompt - without_prompt)
    original = predict_original(noisy, epsilon, alpha_bar)
    return previous_alpha_bar.sqrt() * original + (1 - previous_alpha_bar).sqrt() * epsilon


# ---- Training --------------------------------------------------------------------------------------------------------


def distil(args, teacher, pipeline, latents, tokens):
    """Train the student in `pipeline.unet` to end equally from both ends of each of the teacher's solver steps."""
    path = args.work_dir / "lcm.pt"
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.train_steps)
    ema = EMAModel(unet.parameters(), decay=0.995)
    step, seconds = 0, 0.0
    weights = args.pretrained_model_name_or_path / "unet" / "diffusion_pytorch_model.safetensors"
    names = ("init_from", "train_steps", "train_batch_size", "learning_rate", "guidance_range", "num_pictures", "seed")
    settings = {name: str(vars(args)[name]) for name in names}
    settings |= {"teacher": hashlib.sha256(weights.read_bytes()).hexdigest()}
    if state := load_state(path, settings):
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]

    scheduler.set_timesteps(SOLVER_STEPS)
    grid, skip = scheduler.timesteps, scheduler.config.num_train_timesteps // SOLVER_STEPS
    alphas_cumprod, size = scheduler.alphas_cumprod, args.train_batch_size
    with torch.no_grad():
        empty = teacher.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        empty_text = teacher.text_encoder(empty)[0].repeat(size, 1, 1)
    progress = tqdm(range(step, args.train_steps), desc="LCM", initial=step, total=args.train_steps, mininterval=10)
    losses, started = [], time.perf_counter() - seconds
    for step in progress:
        # A noised latent, its caption, and a guidance scale
        generator = torch.Generator().manual_seed(args.seed + step)
        chosen = torch.randint(len(latents), (size,), generator=generator)
        input_ids = tokens[chosen, torch.randint(tokens.shape[1], (size,), generator=generator)]
        timesteps = grid[torch.randint(SOLVER_STEPS, (size,), generator=generator)]
        noise = torch.randn((size, *latents.shape[1:]), generator=generator)
        low, high = args.guidance_range
        guidance_scale = low + (high - low) * torch.rand(size, generator=generator)

        previous_timesteps = (timesteps - skip).clamp_min(0)
        alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        previous_alpha_bar = alphas_cumprod[previous_timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents[chosen] + (1 - alpha_bar).sqrt() * noise
        noisy = noisy.to(memory_format=torch.channels_last)

        # The target: the student's own answer one solver step further along, without gradient
        with torch.no_grad():
            text = teacher.text_encoder(input_ids)[0]
            conditions = {
                "encoder_hidden_states": text,
                # The pipeline embeds one less than the scale that it is called with.
                "timestep_cond": pipeline.get_guidance_scale_embedding(guidance_scale - 1, GUIDANCE_EMBEDDING),
            }
            previous = guided_ddim_step(
                teacher.unet, noisy, timesteps, alpha_bar, previous_alpha_bar, text, empty_text, guidance_scale
            )
            target = consistency_function(
                unet, scheduler, previous, previous_timesteps, previous_alpha_bar, **conditions
            )

        answer = consistency_function(unet, scheduler, noisy, timesteps, alpha_bar, **conditions)
        loss = ((answer - target).square() + HUBER**2).sqrt().mean() - HUBER
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.train_steps:
            save_state(
                path, settings=settings, unet=unet.state_dict(), optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), ema=ema.state_dict(), step=step + 1,
                seconds=time.perf_counter() - started,
            )  # fmt: skip
        if (step + 1) % args.validation_steps == 0 or step + 1 == args.train_steps:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            save(args, pipeline)
            scores = "; ".join(f"in {count} steps {validate(pipeline, num_inference_steps=count)}" for count in (2, 4))
            ema.restore(unet.parameters())
            minutes = (time.perf_counter() - started) / 60
            tqdm.write(f"step {step + 1}, {minutes:.0f} min, loss {np.mean(losses[-500:]):.4f}, right: {scores}")
            scheduler.set_timesteps(SOLVER_STEPS)


def save(args, pipeline):
    """An ordinary pipeline, its UNet in half precision; what is the teacher's own is copied, not written anew."""
    unet = copy.deepcopy(pipeline.unet).half().to(memory_format=torch.contiguous_format)
    LatentConsistencyModelPipeline(
        **{**pipeline.components, "unet": unet}, requires_safety_checker=False
    ).save_pretrained(args.output_dir)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(args.output_dir / part)
        shutil.copytree(args.pretrained_model_name_or_path / part, args.output_dir / part)
    shutil.copy(args.pretrained_model_name_or_path / "prompts.txt", args.output_dir)


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # Load the teacher, and make the student's pipeline of its parts
    teacher = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, torch_dtype=torch.float32)
    teacher.set_progress_bar_config(disable=True)
    for part in (teacher.vae, teacher.text_encoder, teacher.unet):
        part.requires_grad_(False)
    teacher.unet.to(memory_format=torch.channels_last)
    student = make_student(teacher.unet)
    if args.init_from:
        student.load_state_dict(UNet2DConditionModel.from_pretrained(args.init_from, subfolder="unet").state_dict())
    pipeline = LatentConsistencyModelPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer,
        unet=student.to(memory_format=torch.channels_last),
        scheduler=LCMScheduler.from_config(teacher.scheduler.config, original_inference_steps=SOLVER_STEPS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    latents, tokens, _ = make_data(args, teacher.vae, teacher.tokenizer)
    distil(args, teacher, pipeline, latents * teacher.vae.config.scaling_factor, tokens)


if __name__ == "__main__":
    main()
