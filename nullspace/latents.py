"""Latents of pictures, and the noise that is laid on them."""

import torch


@torch.no_grad()
def encode_pictures(vae, pixel_values):
    """Mean and standard deviation (batch, 8, h, w) float32, stacked, of the latents of pictures (batch, 3, H, W)."""
    latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([latents.mean, latents.std], dim=1).float()


def draw_noise(latents, offset, generator):
    """Noise (batch, 4, h, w); with an offset, also that much of one value for each whole channel.

    N. Guttenberg, "Diffusion with Offset Noise", 2023: https://www.crosslabs.org/blog/diffusion-with-offset-noise
    """
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return noise.to(latents)
