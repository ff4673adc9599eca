"""A training loop of one's own, with diffusers and peft alone, that three lines keep in the null space of a bundle.

    pip install . && python examples/own_trainer.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --bundle <your-username>/nullspace-sd15 --pictures pictures --prompt "a photo of a sks dog" --output lora
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import load_image
from peft import LoraConfig

from nullspace import NullSpace


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--bundle", "--pictures", "--prompt", "--output"):
        parser.add_argument(flag, required=True)
    for flag, value in (("--steps", 800), ("--size", 512), ("--rank", 4), ("--learning_rate", 1e-3)):
        parser.add_argument(flag, type=type(value), default=value)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None).to(device)
    schedule, unet = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.unet
    for model in (unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False)
    cross_attention = r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=cross_attention))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)

    nullspace = NullSpace(args.bundle)
    nullspace.attach(unet, optimizer)

    pictures = [load_image(str(path)) for path in sorted(Path(args.pictures).iterdir())]
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(pictures, args.size, args.size).to(device)
        skip = nullspace.bundle.clip_skip or None
        text, _ = pipeline.encode_prompt(args.prompt, device, 1, False, clip_skip=skip)
        latents = [pipeline.vae.encode(each[None]).latent_dist for each in pixels]
    for _ in range(args.steps):
        clean = random.choice(latents).sample() * pipeline.vae.config.scaling_factor
        noise, timestep = torch.randn_like(clean), torch.randint(len(schedule), (1,), device=device)
        prediction = unet(schedule.add_noise(clean, noise, timestep), timestep, text).sample
        is_velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(clean, noise, timestep) if is_velocity else noise
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(nullspace.save(args.output, training={"max_train_steps": args.steps})["guarantee"])


if __name__ == "__main__":
    main()
