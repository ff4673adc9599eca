"""Does --max_drift hold what is measured, too, and does a budget learn more than a LoRA that is scaled down to it?

    OMP_NUM_THREADS=1 python benchmarks/budget.py            # 3 subjects, 6 budgets
    OMP_NUM_THREADS=1 python benchmarks/budget.py --quick    # one subject, two budgets, few steps; writes no result

On the demo's world the trainer teaches each subject with a word, as the README's launch line does, without a budget and
with each of the budgets, from one seed. The LoRA without one is then scaled down to the predicted drift of each of the
others. Measured of all: the change of the noise that is predicted on held-out prompts, the training loss at fixed noise
and timesteps, and the distance of pictures to the subject. Writes `results/budget.json` and `results/budget.png`.
"""

import argparse
import json
from statistics import mean
from types import SimpleNamespace

import diffusers
import matplotlib
import numpy as np
import torch
import transformers
from common import HERE, call, write
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

import train_dreambooth_nullspace as trainer  # noqa: E402
from nullspace.adapters import add_lora, lora_modules, set_lora  # noqa: E402
from nullspace.families.stable_diffusion import diffusion_loss  # noqa: E402
from nullspace.lora import load_lora  # noqa: E402
from nullspace.names import REPORT_NAME  # noqa: E402
from train_world import draw  # noqa: E402
from world import DEMO, FOLDER, RESOLUTION  # noqa: E402
from world_reader import subject_distance  # noqa: E402


MODEL, WORK = DEMO / "shapes-sd", HERE / "output" / "budget"
KINDS = ("combinations", "scenes", "unlike")  # of prompts that no bundle sees
PROBE_TIMESTEPS = (50, 250, 500, 750, 950)
RATE, SEED = 1e-2, 0
SUBJECTS, BUDGETS = ("heart", "moon", "mushroom"), (0.004, 0.008, 0.015, 0.03, 0.045, 0.06)
FULL = {"subjects": SUBJECTS, "budgets": BUDGETS, "steps": 800, "pictures": 20, "draws": 400, "probed": 10}
QUICK = {"subjects": SUBJECTS[:1], "budgets": BUDGETS[:2], "steps": 20, "pictures": 2, "draws": 20, "probed": 2}
SCALED, HELD, FREE = "scaled down", "held", "no budget"


def instance_prompt(subject):
    return f"a photo of a sks-{subject}"


def train(subject, budget, steps):
    """Train a subject, and return the folder and the predicted drift of its report."""
    folder = WORK / f"{subject}-{budget or 'free'}-{steps}"
    call(
        trainer, pretrained_model_name_or_path=MODEL, nullspace_cache_dir=WORK / "bundles",
        instance_data_dir=FOLDER / subject, instance_prompt=instance_prompt(subject), caption_column="word",
        placeholder_token=f"sks-{subject}", initializer_token=subject, num_vectors=4, output_dir=folder,
        resolution=RESOLUTION, cache_latents=True, train_batch_size=5, learning_rate=RATE, max_train_steps=steps,
        seed=SEED, checkpointing_steps=10_000, num_validation_images=1, validation_prompt=instance_prompt(subject),
        validation_epochs=10_000, report_to="none", **({"max_drift": budget} if budget else {}),
    )  # fmt: skip
    return folder, json.loads((folder / REPORT_NAME).read_text())["predicted_drift"]["rms"]


class Scorer:
    """Scores LoRAs of the demo's model, of which all of a run have the same layers.

    Args:
        layers (`dict[str, LoraLayer]`): one of these LoRAs.
        size (`dict`): how much is drawn and probed, as in `FULL`.
    """

    def __init__(self, layers, size):
        self.size = size
        self.pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        held_out = [(FOLDER / f"heldout_{kind}.txt").read_text().splitlines() for kind in KINDS]
        prompts = [prompt for lines in held_out for prompt in lines[: size["probed"]]]
        latents = self.latents(draw(self.pipeline, prompts, seed=900))
        timesteps = torch.tensor(PROBE_TIMESTEPS).repeat_interleave(len(prompts))
        latents = latents.repeat(len(PROBE_TIMESTEPS), 1, 1, 1)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        self.probe = noisy, timesteps, self.encode(prompts).repeat(len(PROBE_TIMESTEPS), 1, 1)
        self.unchanged = self.predict()
        rank = len(next(iter(layers.values())).down)
        args = SimpleNamespace(rank=rank, lora_alpha=rank, lora_dropout=0.0)
        add_lora({"unet": self.pipeline.unet.requires_grad_(False)}, list(layers), args)

    @torch.no_grad()
    def latents(self, pictures):
        """Means of the latents (n, 4, h, w), scaled, of pictures (n, H, W, 3) in [0, 1]."""
        pixels = self.pipeline.image_processor.preprocess(np.asarray(pictures, np.float32))
        return self.pipeline.vae.encode(pixels).latent_dist.mean * self.pipeline.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, prompts):
        """Prompt embeddings (n, tokens, width)."""
        return self.pipeline.encode_prompt(prompts, "cpu", 1, False)[0]

    @torch.no_grad()
    def predict(self):
        """The predicted noise on the held-out prompts."""
        return self.pipeline.unet(*self.probe).sample

    @torch.no_grad()
    def loss(self, subject):
        """The training loss, over pictures, evenly spread timesteps and noise that are the same for all."""
        paths = sorted((FOLDER / subject).glob("*.png"))
        pictures = [np.asarray(Image.open(path).convert("RGB")) / 255 for path in paths]
        count, generator = self.size["draws"], torch.Generator().manual_seed(1)
        latents = self.latents(pictures)[torch.arange(count) % len(pictures)]
        timesteps = (torch.arange(count) * 1000 // count)[torch.randperm(count, generator=generator)]
        noise = torch.randn(latents.shape, generator=generator)
        embedding = self.encode([instance_prompt(subject)])
        batches = zip(*(each.split(50) for each in (latents, timesteps, noise)), strict=True)
        unet, schedule = self.pipeline.unet, self.noise_scheduler
        total = sum(
            len(batch[0])
            * diffusion_loss(unet, schedule, *batch, encoder_hidden_states=embedding.expand(len(batch[0]), -1, -1))
            for batch in batches
        )
        return total.item() / count

    def score(self, subject, folder, layers):
        """What a LoRA with a folder's word measures, as numbers by name; drifts are roots, as predicted ones are."""
        self.pipeline.unload_textual_inversion()
        self.pipeline.load_textual_inversion(folder)
        set_lora(lora_modules(self.pipeline.unet), layers)
        changed = (self.predict() - self.unchanged).square().sum() / self.unchanged.square().sum()
        drawn = draw(self.pipeline, [instance_prompt(subject)] * self.size["pictures"], seed=SEED)
        return {
            "measured": changed.sqrt().item(),
            "loss": self.loss(subject),
            "distance": float(subject_distance(subject, drawn).mean()),
        }


# ---- The comparison --------------------------------------------------------------------------------------------------


def measure(size):
    """All runs of a size, as rows: subject, method, budget, predicted drift, and what `Scorer` measures."""
    rows, scorer = [], None
    for subject in size["subjects"]:
        own, drift = train(subject, None, size["steps"])
        free = load_lora(own)
        scorer = scorer or Scorer(free, size)
        measured = [(FREE, None, drift, own, free)]
        for budget in size["budgets"]:
            folder, held = train(subject, budget, size["steps"])
            measured.append((HELD, budget, held, folder, load_lora(folder)))
            factor = min(1.0, budget / drift)  # the drift is linear in B
            scaled = {name: layer._replace(up=layer.up * factor) for name, layer in free.items()}
            measured.append((SCALED, budget, factor * drift, own, scaled))
        for method, budget, predicted, folder, layers in measured:
            row = {"subject": subject, "method": method, "budget": budget, "predicted": predicted}
            rows.append(row | scorer.score(subject, folder, layers))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def summarize(rows):
    """By budget: what was predicted and measured, and loss and distance of both ways to meet it, means of subjects.

    Also for how many subjects the LoRA that was held to it came nearer, and had the lower loss.
    """
    table = {}
    for budget in sorted({row["budget"] for row in rows} - {None}):
        held, scaled = ([row for row in rows if (row["method"], row["budget"]) == (m, budget)] for m in (HELD, SCALED))
        table[f"{budget:g}"] = {
            "predicted_at_most": max(row["predicted"] for row in held),
            "measured": mean(row["measured"] for row in held),
            "measured_scaled_down": mean(row["measured"] for row in scaled),
            **{
                f"{key}{suffix}": mean(row[key] for row in of_method)
                for key in ("loss", "distance")
                for suffix, of_method in (("", held), ("_scaled_down", scaled))
            },
            "nearer": sum(a["distance"] < b["distance"] for a, b in zip(held, scaled, strict=True)),
            "lower_loss": sum(a["loss"] < b["loss"] for a, b in zip(held, scaled, strict=True)),
            "subjects": len(held),
        }
    return table


def plot(rows, path):
    """Measured drift against the budget, and what was learned with it, a colour for each subject."""
    panels = {"measured": "change of the noise on held-out prompts", "loss": "training loss", "distance": "distance"}
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4), layout="constrained")
    for number, subject in enumerate(dict.fromkeys(row["subject"] for row in rows)):
        own = [row for row in rows if row["subject"] == subject]
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            for method, style in ((HELD, "o-"), (SCALED, "x--")):
                points = [(row["budget"], row[key]) for row in own if row["method"] == method]
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{subject}, {method}")
            axis.axhline(own[0][key], color=f"C{number}", linestyle=":", linewidth=0.8)  # without a budget
            axis.set(title=title, xlabel="--max_drift", xscale="log")
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A small run, whose picture goes to benchmarks/output.")
    quick = parser.parse_args().quick
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    size = QUICK if quick else FULL
    WORK.mkdir(parents=True, exist_ok=True)
    rows = measure(size)
    table = summarize(rows)
    print(json.dumps(table, indent=1))
    plot(rows, (WORK if quick else HERE / "results") / "budget.png")
    if not quick:
        setting = f"demo/shapes-sd, a word of 4 rows, {size['steps']} steps of 5 pictures, rate {RATE:g}, seed {SEED}"
        write("budget", setting=setting, budgets=table, runs=rows)


if __name__ == "__main__":
    main()
