"""What the null space costs a training step, and what prior preservation would.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

Stable Diffusion 1.x with random weights, 512 x 512, batch 1, float32, cached latents; the step is made of the trainer's
own functions. As with the trainer's defaults, few of the directions are closed (here a tenth) and all others held back.
Three kinds of step alternate in one process: protection off (what --nullspace_threshold 0 does), protection on, and off
with the batch of two that prior preservation trains on. Writes `results/step_overhead.json`.
"""

import time
from types import SimpleNamespace

import torch
from common import SIDE, alternate, inputs, median, ratio, sd1_unet, write
from torch.nn.utils import clip_grad_norm_, get_total_norm

from nullspace.adapters import add_lora
from nullspace.families.stable_diffusion import diffusion_loss
from nullspace.layers import attention_inputs
from nullspace.optimizers import make_optimizer
from nullspace.projector import NullSpaceProjector, Protected


RANKS = (4, 64)
ROUNDS = 6
STEPS, CLASS_PICTURES, SAMPLER_STEPS = 800, 200, 25  # of a whole personalisation
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


def trainer_steps(rank):
    """The kinds of step as functions of no arguments, and the seconds that projections took so far, as a list."""
    unet = sd1_unet()
    protected = protect(unet)
    parameters = add_lora({"unet": unet}, list(protected), SimpleNamespace(rank=rank, lora_alpha=rank, lora_dropout=0))
    settings = SimpleNamespace(**ADAM, adam_weight_decay=1e-2, adam_epsilon=1e-8)
    seconds = []

    def make_step(items, batch):
        optimizer = make_optimizer(parameters, settings)
        projector = NullSpaceProjector(unet, items)
        timed = projector._apply

        def apply(*args):
            start = time.process_time()
            timed(*args)
            seconds.append(time.process_time() - start)

        if items:
            projector._apply = apply
        projector.attach(optimizer)

        def step():
            diffusion_loss(unet, **inputs(batch)).backward()
            get_total_norm([parameter.grad for parameter in parameters])
            projector.project_gradients()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"plain": make_step({}, 1), "protected": make_step(protected, 1), "prior": make_step({}, 2)}

    @torch.no_grad()
    def sample():
        """One sampler step with guidance, as the class pictures of prior preservation are drawn."""
        unet(torch.randn(2, 4, SIDE, SIDE), 500, inputs(2)["prompt_embeds"])

    return steps | {"sample": sample}, seconds


def main():
    results = {}
    for rank in RANKS:
        steps, projections = trainer_steps(rank)
        if rank != RANKS[0]:  # the rank hardly changes these
            del steps["prior"], steps["sample"]
        runs = alternate(steps, ROUNDS)
        results[rank] = {
            "ratio": ratio(runs["protected"], runs["plain"]),
            "ratio_wall": ratio(runs["protected"], runs["plain"], "wall"),
            # Far less noisy than the difference of two steps: the projections' own time
            "projections_per_step": 1 + sum(projections) / (ROUNDS + 1) / median(runs["plain"]),
            "runs": runs,
        }
    runs = results[RANKS[0]]["runs"]
    whole = STEPS * median(runs["protected"])
    with_prior = STEPS * median(runs["prior"]) + CLASS_PICTURES * SAMPLER_STEPS * median(runs["sample"])
    write(
        "step_overhead",
        setting="512 x 512, batch 1, float32, latents cached, a tenth of the directions closed, the others held back; "
        "CPU seconds",
        ratio={f"rank {rank}": result["ratio"] for rank, result in results.items()},
        ratio_to_prior_preservation=ratio(runs["protected"], runs["prior"]),
        whole_personalisation={
            "ratio": whole / with_prior,
            "seconds": whole,
            "seconds_with_prior_preservation": with_prior,
            "composed": f"{STEPS} steps, against {STEPS} steps of two pictures and {CLASS_PICTURES} class pictures of "
            f"{SAMPLER_STEPS} sampler steps with guidance, from the medians below; the VAE is left out of both",
        },
        ranks=results,
    )


if __name__ == "__main__":
    main()
