"""Latent Consistency Models (arXiv 2310.04378), distilled from a Stable Diffusion and drawn with in a few steps."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from nullspace.errors import NullSpaceError
from nullspace.families.stable_diffusion import StableDiffusion
from nullspace.names import JOINT


HUBER = 1e-3  # losses are quadratic below this error of a latent, linear above, as in the distillation


class LatentConsistency(StableDiffusion):
    """The family of Latent Consistency Models; see `StableDiffusion` for what it is asked."""

    name = "lcm"
    title = "a Latent Consistency Model"
    evidence = "takes a guidance embedding (time_cond_proj_dim)"
    marks = ("LatentConsistencyModelPipeline", "LCMScheduler")
    pipeline = LatentConsistencyModelPipeline
    sampler = noise_scheduler = LCMScheduler
    num_inference_steps = 4
    collection = {
        "sampler": "lcm",
        "num_inference_steps": [1, 2, 4, 8],
        "guidance_scale": 8.5,
        "timestep_groups": JOINT,
    }
    samplers = ("lcm",)
    tags = ("latent-consistency-model", "lcm")

    def recognises(self, unet_config):
        return unet_config.get("time_cond_proj_dim") is not None and unet_config.get("addition_embed_type") is None

    def settle(self, args):
        args.lcm_loss = args.lcm_loss or "x0"
        if args.snr_gamma is not None and args.lcm_loss != "epsilon":
            raise NullSpaceError(
                "--snr_gamma weighs the errors of a noise prediction; an LCM is trained on those with --lcm_loss "
                f"epsilon only, and this is {args.lcm_loss}."
            )

    def training_timesteps(self, noise_scheduler):
        return solver_grid(noise_scheduler)

    def denoiser(self, unet, config, guidance_scale):
        guidance = embed_guidance(guidance_scale, config.time_cond_proj_dim)

        def denoise(noisy, timesteps, **conditions):
            return unet(noisy, timesteps, timestep_cond=guidance.to(noisy), **conditions)

        return denoise

    def loss(self, args):
        if args.lcm_loss == "epsilon":
            return super().loss(args)
        skipped = partial(consistency_loss, apart=self.num_inference_steps)
        return {"consistency": skipped, "x0": latents_loss}[args.lcm_loss]

    def call_arguments(self, guidance_scale):
        return f", num_inference_steps={self.num_inference_steps}, guidance_scale={guidance_scale:g}"


def solver_grid(noise_scheduler):
    """The timesteps that an LCM was distilled on, ascending: `original_inference_steps` of all, evenly spaced."""
    noise_scheduler.set_timesteps(noise_scheduler.config.original_inference_steps)
    return noise_scheduler.timesteps.flip(0).tolist()


def embed_guidance(guidance_scale, size):
    """The embedding (1, size) of a guidance scale that an LCM's UNet takes, as its pipeline computes it."""
    # The method uses nothing of the pipeline, which embeds one less than the scale that it is called with.
    embed = partial(LatentConsistencyModelPipeline.get_guidance_scale_embedding, None)
    return embed(torch.tensor([guidance_scale - 1.0]), size)


def consistency_function(denoise, noise_scheduler, noisy, timesteps, **conditions):
    """The clean latents at the end of the trajectory through noisy ones (batch, 4, h, w): f of arXiv 2310.04378, eq. 9.

    c_skip and c_out, as `LCMScheduler` samples with them, make it the identity at timestep 0.
    """
    prediction, noisy = denoise(noisy, timesteps, **conditions).sample.float(), noisy.float()
    alpha_bar = noise_scheduler.alphas_cumprod.to(noisy.device)[timesteps]
    scalings = noise_scheduler.get_scalings_for_boundary_condition_discrete(timesteps)
    keep, lose, c_skip, c_out = (
        each.view(-1, 1, 1, 1) for each in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), *scalings)
    )
    if noise_scheduler.config.prediction_type == "v_prediction":
        return c_skip * noisy + c_out * (keep * noisy - lose * prediction)
    return c_skip * noisy + c_out * (noisy - lose * prediction) / keep


def latents_loss(denoise, noise_scheduler, latents, timesteps, noise, **conditions):
    """Huber distance of the consistency function from the clean latents (batch, 4, h, w), as a scalar.

    It is `consistency_loss` with the clean latents in place of the answer from the earlier point, at whose timestep, 0,
    the consistency function is the identity. That choice is this project's; it takes one pass of the model, not two.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    answer = consistency_function(denoise, noise_scheduler, noisy, timesteps, **conditions)
    return F.smooth_l1_loss(answer, latents.float(), beta=HUBER)


def consistency_loss(denoise, noise_scheduler, latents, timesteps, noise, apart, **conditions):
    """Huber distance of the consistency function at two points of one trajectory, as a scalar.

    Latent Consistency Fine-tuning, arXiv 2310.04378, sec. 4.4: latents (batch, 4, h, w) are noised with one noise to
    two points of the solver grid, as far apart as those of sampling in `apart` steps; the answer from the noisier
    point is drawn to that from the other. The other carries no gradient and is the model's own, without an average
    over its past, which does not help (arXiv 2310.14189, sec. 3.2). Points before the grid's first are timestep 0.
    """
    config = noise_scheduler.config
    skipped = max(1, config.original_inference_steps // apart)  # k, in steps of the grid
    earlier = timesteps - skipped * (config.num_train_timesteps // config.original_inference_steps)
    earlier = earlier.clamp_min(0)
    with torch.no_grad():
        noisy = noise_scheduler.add_noise(latents, noise, earlier)
        target = consistency_function(denoise, noise_scheduler, noisy, earlier, **conditions)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    answer = consistency_function(denoise, noise_scheduler, noisy, timesteps, **conditions)
    return F.smooth_l1_loss(answer, target, beta=HUBER)
