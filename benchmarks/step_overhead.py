"""What the null space costs a training step, and what prior preservation would.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

Random weights, batch 1, float32, cached latents; the step is made of the trainer's own functions. As with the trainer's
defaults, few of the directions are closed (here a tenth) and all others held back. Kinds of step alternate in one
process. Stable Diffusion 1.x at 512 x 512: protection off (what --nullspace_threshold 0 does), protection on, both with
a budget and a word as the README launches it, and off with the batch of two that prior preservation trains on. SDXL at
1024 x 1024, with its widths and one transformer layer where it has up to ten: protection off, on, and with a budget.
Writes `results/step_overhead.json`.
"""

import argparse
import time
from types import SimpleNamespace

import torch
from common import SIDE, TEXT, alternate, median, ratio, sd1_unet, write
from diffusers import DDPMScheduler, UNet2DConditionModel
from memory_guide import MODELS, add_rows, bundle_of
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import CLIPTextConfig, CLIPTextModel

from nullspace.adapters import add_lora
from nullspace.budget import DriftBudget
from nullspace.families import get_family
from nullspace.families.stable_diffusion import diffusion_loss
from nullspace.layers import attention_inputs
from nullspace.optimizers import make_optimizer
from nullspace.projector import NullSpaceProjector, Protected


RANKS = (4, 64)
ROUNDS, XL_ROUNDS = 5, 3
STEPS, CLASS_PICTURES, SAMPLER_STEPS = 800, 200, 25  # of a whole personalisation
LIMIT = 0.05  # of the budget, which takes as long whether it is kept or not
ADAM = {"optimizer": "adamw", "use_8bit_adam": False, "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999}


def protect(unet):
    """An orthonormal basis for each layer input, shared as the layers share it: a tenth closed, the rest held back."""
    shared = {}
    modules = attention_inputs(unet)
    for name, source in modules.items():
        if source not in shared:
            size = unet.get_submodule(name).in_features
            gains = torch.linspace(0.1, 1, size - size // 10)
            shared[source] = Protected(torch.linalg.qr(torch.randn(size, size)).Q, size // 10, gains)
    return {name: shared[source] for name, source in modules.items()}


class Trainee:
    """A UNet with LoRA, and its kinds of training step.

    Args:
        side (`int`): of the latents.
        told (`Callable`): what the denoiser is told of a batch of so many, but for the text: `dict`.

    Attributes:
        seconds (`list[float]`): that projections took so far.
    """

    def __init__(self, unet, family, rank, side, told=lambda batch: {}):
        self.unet, self.side, self.told, self.seconds = unet, side, told, []
        self.denoise = family.denoiser(unet, unet.config, None)
        self.protected = protect(unet)
        settings = SimpleNamespace(rank=rank, lora_alpha=rank, lora_dropout=0)
        self.parameters = add_lora({"unet": unet}, list(self.protected), settings)

    def text(self, batch):
        return torch.randn(batch, TEXT[0], self.unet.config.cross_attention_dim)

    def step(self, batch=1, protected=True, budget=False, text_encoder=None):
        """A step as a function of no arguments; with a text encoder it learns that one's rows of a word as well."""
        settings = SimpleNamespace(**ADAM, adam_weight_decay=1e-2, adam_epsilon=1e-8)
        rows = [] if text_encoder is None else [add_rows(text_encoder, 4)]
        parameters = self.parameters + rows
        optimizer = make_optimizer(parameters, settings)
        projector = NullSpaceProjector(self.unet, self.protected if protected else {})
        if protected and not budget:
            projector._apply = self._timed(projector._apply)
        projector.attach(optimizer)
        if budget:
            sources = attention_inputs(self.unet)
            items = {sources[name]: item for name, item in self.protected.items()}
            DriftBudget(LIMIT, bundle_of(sources, items), list(sources), {"unet": self.unet}).attach(optimizer)
        tokens = torch.randint(1000, (batch, TEXT[0]))

        def step():
            text = self.text(batch) if text_encoder is None else text_encoder(tokens)[0]
            latents = torch.randn(batch, 4, self.side, self.side)
            timesteps, noise = torch.randint(1000, (batch,)), torch.randn_like(latents)
            told = {"encoder_hidden_states": text, **self.told(batch)}
            diffusion_loss(self.denoise, DDPMScheduler(), latents, timesteps, noise, **told).backward()
            get_total_norm([parameter.grad for parameter in parameters])
            projector.project_gradients()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _timed(self, function):
        def timed(*args, **kwargs):
            start = time.process_time()
            function(*args, **kwargs)
            self.seconds.append(time.process_time() - start)

        return timed

    @torch.no_grad()
    def sample(self):
        """One sampler step with guidance, as the class pictures of prior preservation are drawn."""
        self.unet(torch.randn(2, 4, self.side, self.side), 500, self.text(2))


def compare(trainee, steps, rounds):
    """Alternate kinds of step; ratios of those that are protected to "plain", and the runs: `dict`."""
    runs = alternate(steps, rounds)
    result = {f"ratio, {name}": ratio(runs[name], runs["plain"]) for name in steps if name not in ("plain", "sample")}
    # Far less noisy than the difference of two steps: the projections' own time
    projections = 1 + sum(trainee.seconds) / (rounds + 1) / median(runs["plain"])
    return result | {"projections_per_step": projections, "runs": runs}


def stable_diffusion(rank, quick):
    """Steps of Stable Diffusion 1.x; the rank hardly changes what takes no part in it."""
    trainee = Trainee(sd1_unet(), get_family("sd"), rank, SIDE)
    steps = {"plain": trainee.step(protected=False), "protected": trainee.step()}
    if rank == RANKS[0]:
        encoder = CLIPTextModel(CLIPTextConfig(**MODELS["sd"].text_encoders["text_encoder"])).requires_grad_(False)
        steps |= {
            "launched": trainee.step(budget=True, text_encoder=encoder),
            "prior": trainee.step(batch=2, protected=False),
            "sample": trainee.sample,
        }
    return compare(trainee, steps, 1 if quick else ROUNDS)


def xl(rank, quick):
    """Steps of an SDXL of one transformer layer a block."""
    torch.manual_seed(0)
    family, config = get_family("sdxl"), MODELS["sdxl"].unet | {"transformer_layers_per_block": 1}
    unet = UNet2DConditionModel(**config).requires_grad_(False)

    def told(batch):
        return {"text_embeds": torch.randn(batch, 1280), **family.place(torch.zeros(batch, 6))}

    trainee = Trainee(unet, family, rank, unet.config.sample_size, told)
    steps = {"plain": trainee.step(protected=False), "protected": trainee.step(), "budget": trainee.step(budget=True)}
    return compare(trainee, steps, 1 if quick else XL_ROUNDS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One round of each; writes no result.")
    quick = parser.parse_args().quick
    ranks = {rank: stable_diffusion(rank, quick) for rank in RANKS}
    large = xl(RANKS[0], quick)
    runs = ranks[RANKS[0]]["runs"]
    whole = STEPS * median(runs["protected"])
    with_prior = STEPS * median(runs["prior"]) + CLASS_PICTURES * SAMPLER_STEPS * median(runs["sample"])
    if quick:
        return
    write(
        "step_overhead",
        setting="batch 1, float32, latents cached, a tenth of the directions closed, the others held back; CPU seconds",
        ratio={f"rank {rank}": result["ratio, protected"] for rank, result in ranks.items()},
        ratio_launched=ranks[RANKS[0]]["ratio, launched"],
        ratio_to_prior_preservation=ratio(runs["protected"], runs["prior"]),
        xl={key: value for key, value in large.items() if key != "runs"},
        whole_personalisation={
            "ratio": whole / with_prior,
            "seconds": whole,
            "seconds_with_prior_preservation": with_prior,
            "composed": f"{STEPS} steps, against {STEPS} steps of two pictures and {CLASS_PICTURES} class pictures of "
            f"{SAMPLER_STEPS} sampler steps with guidance, from the medians below; the VAE is left out of both",
        },
        ranks=ranks,
        xl_runs=large["runs"],
    )


if __name__ == "__main__":
    main()
