"""Stable Diffusion XL (arXiv 2307.01952), and its relatives that draw in a few steps."""

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from nullspace.errors import NullSpaceError
from nullspace.families.latent_consistency import LatentConsistency
from nullspace.families.stable_diffusion import StableDiffusion
from nullspace.names import JOINT, TEXT_ENCODERS, TEXT_INPUT


class StableDiffusionXL(StableDiffusion):
    """The family of Stable Diffusion XL; see `StableDiffusion` for what it is asked.

    Its UNet reads two text encoders side by side, each from its last layer but one, and is told besides of the second
    one's pooled output and of the picture's size and crop (sec. 2.2).
    """

    name = "sdxl"
    title = "a Stable Diffusion XL model"
    evidence = "is told of the picture's size and takes no guidance embedding (addition_embed_type text_time)"
    marks = ("StableDiffusionXLPipeline",)
    pipeline = StableDiffusionXLPipeline
    pipeline_options = {"add_watermarker": False}  # which would be among what is compared
    sampler = EulerDiscreteScheduler
    collection = {"sampler": "euler", "num_inference_steps": [25], "guidance_scale": 5.0, "timestep_groups": JOINT}
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    text_encoders = dict(zip(TEXT_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True))

    def recognises(self, unet_config):
        return unet_config.get("addition_embed_type") == "text_time" and unet_config.get("time_cond_proj_dim") is None

    def needs_float32(self, vae_config):
        return vae_config.force_upcast

    def settle(self, args):
        super().settle(args)
        if args.tokenizer_name:
            raise NullSpaceError(
                f"--tokenizer_name names one tokenizer, and {args.pretrained_model_name_or_path} has two; leave it out."
            )
        if args.text_encoder_use_attention_mask:
            raise NullSpaceError(
                "--text_encoder_use_attention_mask hides the padding of prompts, which nothing that draws with "
                f"{self.title} does; leave it out."
            )

    def encode(self, text_encoders, tokens, clip_skip=0):
        """As `StableDiffusionXLPipeline.encode_prompt`: (batch, tokens, widths together) and (batch, projected)."""
        outputs = [
            text_encoder(**tokens[name], output_hidden_states=True) for name, text_encoder in text_encoders.items()
        ]
        embeddings = torch.cat([output.hidden_states[-(clip_skip + 2)] for output in outputs], dim=-1)
        return {TEXT_INPUT: embeddings, "text_embeds": outputs[-1].text_embeds}

    def unread_layers(self, encoder, clip_skip=0):
        pooled = list(self.text_encoders)[-1]  # of all layers
        return 0 if encoder == pooled else clip_skip + 1

    def place(self, framings):
        return {"time_ids": framings}

    def denoiser(self, unet, config, guidance_scale):
        def tell(noisy, timesteps, text_embeds, time_ids, **conditions):
            added = {"text_embeds": text_embeds, "time_ids": time_ids.to(noisy.device)}
            return unet(noisy, timesteps, added_cond_kwargs=added, **conditions)

        return super().denoiser(tell, config, guidance_scale)

    def prompt_arguments(self, pipeline, prompt, clip_skip=0):
        return {"prompt": prompt, **({"clip_skip": clip_skip} if clip_skip else {})}


class StableDiffusionXLTurbo(StableDiffusionXL):
    """Those that were distilled to draw in 1 to 4 steps without guidance (arXiv 2311.17042): they are not trained."""

    name = "sdxl-turbo"
    title = "an SDXL-Turbo"
    sampler = EulerAncestralDiscreteScheduler
    num_inference_steps = 4
    collection = {
        "sampler": "euler_a",
        "num_inference_steps": [1, 2, 4],
        "guidance_scale": 0.0,
        "timestep_groups": JOINT,
    }
    is_trainable = False

    def claims(self, scheduler_config):
        """Euler steps that end at the last timestep, which a model that was not distilled is not drawn with.

        But those that were trained with all noise at that timestep (arXiv 2305.08891) are.
        """
        kinds = (EulerDiscreteScheduler.__name__, EulerAncestralDiscreteScheduler.__name__)
        return (
            scheduler_config.get("_class_name") in kinds
            and scheduler_config.get("timestep_spacing") == "trailing"
            and not scheduler_config.get("rescale_betas_zero_snr")
        )

    def settle(self, args):
        raise NullSpaceError(
            f"{args.pretrained_model_name_or_path} is {self.title} by its scheduler, distilled by a loss that is not "
            "known here, and the plain one would undo it; train on the model that it was distilled from and load the "
            "LoRA here, or pass --model_type sdxl if it is not distilled."
        )

    def call_arguments(self, guidance_scale):
        return f", num_inference_steps={self.num_inference_steps}, guidance_scale={guidance_scale:g}"


class LatentConsistencyXL(StableDiffusionXL, LatentConsistency):
    """Latent Consistency Models that were distilled from a Stable Diffusion XL."""

    name = "sdxl-lcm"
    title = "a Latent Consistency Model of Stable Diffusion XL"
    evidence = "is told of the picture's size and takes a guidance embedding (time_cond_proj_dim)"
    marks = (*StableDiffusionXL.marks, "LCMScheduler")
    sampler = LatentConsistency.sampler
    collection = LatentConsistency.collection
    tags = (*StableDiffusionXL.tags, "lcm")

    def recognises(self, unet_config):
        return unet_config.get("addition_embed_type") == "text_time" and not super().recognises(unet_config)
