"""The loss of a batch of training."""

import torch

from nullspace.latents import draw_noise, encode_pictures


class BatchLoss:
    """The loss of a batch: latents and noise are drawn, and the family says what the denoiser made of them.

    The denoiser is given its own type; latents and noise are float32 all along, for 16 bits have no noise levels as
    low as those of the first timesteps.

    Args:
        family: of the model.
        unet (`Callable`): the model in training, whatever it is wrapped in.
        config (`dict`): its configuration.
        noise_scheduler (`SchedulerMixin`): the noise schedule; the family says which of its timesteps to train at.
        vae (`AutoencoderKL` or `None`): not needed where latents are cached.
        scaling_factor (`float`): of the VAE's latents.
        dtype (`torch.dtype`): that the models run in.
    """

    def __init__(self, family, unet, config, noise_scheduler, vae, scaling_factor, dtype, args):
        denoise = family.denoiser(unet, config, args.guidance_scale)
        self.denoise = lambda noisy, *rest, **conditions: denoise(noisy.to(dtype), *rest, **conditions)
        self.noise_scheduler, self.loss = noise_scheduler, family.loss(args)
        self.timesteps = torch.tensor(family.training_timesteps(noise_scheduler))
        self.vae, self.scaling_factor, self.noise_offset = vae, scaling_factor, args.noise_offset

    def __call__(self, batch, conditions, generator):
        """The loss, and the latents (batch, 4, h, w) as they are without noise.

        Args:
            batch (`Tensor`): pictures (batch, 3, H, W), or what `encode_pictures` made of them.
            conditions (`dict`): what the denoiser is told of the captions.
            generator (`torch.Generator`): draws everything.
        """
        posterior = batch if self.vae is None else encode_pictures(self.vae, batch)
        mean, std = posterior.chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        latents = latents * self.scaling_factor
        drawn = torch.randint(len(self.timesteps), (len(latents),), generator=generator)
        timesteps = self.timesteps[drawn].to(latents.device)
        noise = draw_noise(latents, self.noise_offset, generator)
        return self.loss(self.denoise, self.noise_scheduler, latents, timesteps, noise, **conditions), latents
