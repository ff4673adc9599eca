"""Does the null space keep its promise? Every way to personalise the demo model, scored as a curve over training.

    python benchmarks/preservation.py            # all of it; goes on where it stopped
    python benchmarks/preservation.py --quick    # one seed of one subject, fewer methods

Each method trains LoRAs (or another adapter) on the same pictures, from the same seeds, at a constant learning rate,
and is scored at several step counts: how near its pictures come to the subject, and how far all else moved. The
headline compares methods at equal likeness of the subject. Writes `results/preservation.json`, the curves and the
picture beside it.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import median

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, OSFConfig, PsoftConfig, inject_adapter_in_model
from peft.tuners.lora.config import CordaConfig
from PIL import Image
from tqdm.auto import tqdm

from nullspace.families import get_family


HERE = Path(__file__).resolve().parent
ROOT, DEMO, WORK = HERE.parent, HERE.parent / "demo", HERE / "output"
sys.path[:0] = [str(ROOT), str(DEMO)]
from nullspace.audit import predicted_drift  # noqa: E402
from nullspace.bundle import Bundle  # noqa: E402
from nullspace.families.stable_diffusion import diffusion_loss  # noqa: E402
from nullspace.layers import attention_inputs, base_layer  # noqa: E402
from nullspace.lora import LoraLayer  # noqa: E402
from nullspace.moments import SecondMoments  # noqa: E402
from nullspace.names import DEFAULT_SOFTNESS, DEFAULT_THRESHOLDS, JOINT  # noqa: E402
from nullspace.pictures import comparison_grid  # noqa: E402
from nullspace.projector import NullSpaceProjector  # noqa: E402
from nullspace.protection import PICTURES_PER_PROMPT  # noqa: E402
from nullspace.samplers import make_scheduler  # noqa: E402
from nullspace.timesteps import split_groups  # noqa: E402
from shapes import COLOURS, RESOLUTION, SUBJECTS, matches, parse, read_pictures, subject_distance  # noqa: E402


MODEL = DEMO / "shapes-sd"
BUNDLE = WORK / "bundle"
TOKEN = "sks"
SEEDS, TUNING_SUBJECT, TUNING_SEED = (0, 1, 2), "star", 100
MARKS = (200, 400, 800, 1600)  # steps after which a run is scored
GUIDANCE, DRAWING_STEPS = 2.5, 12  # more guidance exaggerates what a model this small has just learned
HELD_OUT = (DEMO / "heldout_prompts.txt").read_text().splitlines()
DRAWN, PROBED = HELD_OUT[:40], HELD_OUT[40:72]  # those that are drawn, and those whose predicted noise is compared
PROBE_TIMESTEPS = (50, 250, 500, 750, 950)
CLASS_PICTURES = 100  # of prior preservation: diffusers' default


# What the pictures are captioned with in training: the first, or for some methods any of them, as the templates of
# textual inversion (arXiv 2208.01618) do
INSTANCE_PROMPTS = ("a photo of a {}", "a {}", "a picture of a {}", "the {}", "a good photo of a {}")


def prompts_of(subject):
    """What is asked of a personalised model: the subject bare and on every background, its class, and other things."""
    backgrounds = [colour for colour in COLOURS for _ in range(2)]
    return {
        "subject": [f"a photo of a {TOKEN} {subject}"] * 24,
        "subject_placed": [f"a {TOKEN} {subject} on a {colour} background" for colour in backgrounds],
        "class": [f"a photo of a {subject}"] * 24,
        "others": DRAWN,
        "class_placed": [f"a {subject} on a {colour} background" for colour in backgrounds],
    }


# ---- The model and its scores ----------------------------------------------------------------------------------------


class World:
    """The base model, the bundles that protect it, and what it draws before anything is taught.

    Args:
        bundle (`Path`): folder of a bundle with one group for each sampled timestep.
    """

    def __init__(self, bundle):
        self.pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.unet = self.pipeline.unet.requires_grad_(False)
        self.weights = {name: self.unet.get_submodule(name).weight for name in attention_inputs(self.unet)}
        self.bundle_folder = bundle
        self.bundle = Bundle.load(bundle)
        self.probe = self._probe()
        self.base = {}  # what the base model draws, by subject

    def encode(self, prompts):
        """Prompt embeddings (n, tokens, width)."""
        with torch.no_grad():
            return self.pipeline.encode_prompt(prompts, "cpu", 1, False)[0]

    @torch.no_grad()
    def latents(self, pictures):
        """Means of the latents (n, 4, h, w), scaled, of pictures (n, H, W, 3) in [0, 1]."""
        pixels = self.pipeline.image_processor.preprocess(np.asarray(pictures, np.float32))
        latents = self.pipeline.vae.encode(pixels.contiguous()).latent_dist.mean
        return latents.contiguous() * self.pipeline.vae.config.scaling_factor

    def draw(self, unet, prompts, seed, steps=DRAWING_STEPS, guidance_scale=GUIDANCE, sampler="dpmpp_2m"):
        """Pictures (n, H, W, 3) in [0, 1], each from a seed of its own."""
        pipeline = copy.copy(self.pipeline)
        pipeline.unet = unet
        pipeline.scheduler = make_scheduler(sampler, self.pipeline.scheduler.config)
        pictures = []
        for start in range(0, len(prompts), 50):
            batch = prompts[start : start + 50]
            generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
            drawn = pipeline(
                batch,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="np",
            )
            pictures.append(drawn.images)
        return np.concatenate(pictures)

    def _probe(self):
        """Noisy latents of held-out pictures, their timesteps and prompts, and the noise the base model predicts."""
        latents = self.latents(self.draw(self.unet, PROBED, seed=900, guidance_scale=5.0))
        latents = latents.repeat(len(PROBE_TIMESTEPS), 1, 1, 1)
        timesteps = torch.tensor(PROBE_TIMESTEPS).repeat_interleave(len(PROBED))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        inputs = noisy, timesteps, self.encode(PROBED).repeat(len(PROBE_TIMESTEPS), 1, 1)
        with torch.no_grad():
            return inputs, self.unet(*inputs).sample

    def noise_drift(self, unet):
        """Relative squared change of the noise that a model predicts on held-out prompts."""
        inputs, expected = self.probe
        with torch.no_grad():
            return float((unet(*inputs).sample - expected).square().sum() / expected.square().sum())

    def base_pictures(self, subject):
        if subject not in self.base:
            self.base[subject] = self.draw_all(self.unet, subject)
        return self.base[subject]

    def draw_all(self, unet, subject):
        """Pictures of all `prompts_of` a subject, by kind."""
        return {
            kind: self.draw(unet, prompts, seed=1000 * number)
            for number, (kind, prompts) in enumerate(prompts_of(subject).items())
        }

    def base_scores(self, subject):
        return self.score(self.unet, subject)

    def score(self, unet, subject):
        """What a model's pictures show, and how far it is from the base model: a `dict` of numbers.

        - subject, class: mean distance of pictures to the subject (0 is the subject itself, about 1 nothing of it).
        - subject_placed, class_placed: the same where a prompt puts them on a background.
        - subject_anywhere: mean of subject and subject_placed.
        - placed_right: share of the subject's prompts drawn with the shape and background that they name; even a
          perfect picture of the circle reads as a ring on six of eight backgrounds, and of the heart as a cross on one.
        - others_right, others_moved: held-out prompts drawn right; mean change of their pixels at equal seeds.
        - noise_drift: relative squared change of the predicted noise on other held-out prompts.
        - diversity: mean distance between pictures of the class.
        """
        base, prompts, drawn = self.base_pictures(subject), prompts_of(subject), self.draw_all(unet, subject)
        wanted = [parse(prompt) for prompt in prompts["subject_placed"]]
        pairs = list(zip(wanted, read_pictures(drawn["subject_placed"]), strict=True))
        distances = {
            kind: float(subject_distance(subject, drawn[kind]).mean())
            for kind in ("subject", "subject_placed", "class", "class_placed")
        }
        flat = drawn["class"].reshape(len(drawn["class"]), -1)
        apart = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1))
        return {
            **distances,
            "subject_anywhere": (distances["subject"] + distances["subject_placed"]) / 2,
            "placed_right": float(
                np.mean([all(show[key] == value for key, value in want.items()) for want, show in pairs])
            ),
            "others_right": float(matches(DRAWN, drawn["others"]).mean()),
            "others_moved": float(np.abs(drawn["others"] - base["others"]).mean()),
            "noise_drift": self.noise_drift(unet),
            "diversity": float(apart.sum() / (len(flat) * (len(flat) - 1))),
        }


# ---- The methods -----------------------------------------------------------------------------------------------------

# `rates` are the learning rates that tuning tries, `prior` is whether class pictures are learned along, `energy` the
# share of it that is closed (None: no protection), `class_prompt` whether the class is an extra prompt, `prompts` how
# many of `INSTANCE_PROMPTS` take turns. Those that the null space is compared with have the rank that serves them
# better; what is varied about the null space itself is varied at rank 8, beside "null space, rank 8".
RATES = (5e-4, 1e-3, 2e-3)
LORA = {"adapter": "lora", "rank": 8, "prior": False, "energy": None, "prompts": 1, "rates": RATES}
NULL_SPACE = LORA | {
    "rank": 4, "energy": DEFAULT_THRESHOLDS["energy"], "softness": DEFAULT_SOFTNESS, "nearest": False,
    "class_prompt": False, "rates": (5e-3, 1e-2),
}  # fmt: skip
RANK_8 = NULL_SPACE | {"rank": 8}
HARD = RANK_8 | {"softness": math.inf}
SHIPPED = "null space"  # the trainer's defaults
CLASS_PROMPT, FIVE_PROMPTS = f"{SHIPPED}, class prompt", f"{SHIPPED}, class prompt, five prompts"
PICTURED = ("plain LoRA", "prior preservation", SHIPPED)
COMPARED = {
    "plain LoRA": LORA,
    "prior preservation": LORA | {"prior": True},
    SHIPPED: NULL_SPACE,
    CLASS_PROMPT: NULL_SPACE | {"class_prompt": True},
    FIVE_PROMPTS: NULL_SPACE | {"class_prompt": True, "prompts": 5},
    "hard, energy 0.999": HARD | {"energy": 0.999},
    "plain LoRA, small rate": LORA | {"rates": (2.5e-4,)},
}
OTHERS = {
    "plain LoRA, five prompts": LORA | {"prompts": 5},
    "prior preservation, five prompts": LORA | {"prior": True, "prompts": 5},
    **{f"{name}, rank 4": COMPARED[name] | {"rank": 4} for name in ("plain LoRA", "prior preservation")},
    "null space, rank 2": NULL_SPACE | {"rank": 2, "rates": (1e-2, 2e-2)},
    **{f"{name}, rank 8": COMPARED[name] | {"rank": 8} for name in (SHIPPED, CLASS_PROMPT, FIVE_PROMPTS)},
    "softness 1e-4": RANK_8 | {"softness": 1e-4},
    "softness 1e-6": RANK_8 | {"softness": 1e-6},
    "hard, energy 0.99": HARD | {"energy": 0.99},
    "hard, energy 0.9999": HARD | {"energy": 0.9999},
    "nearest": RANK_8 | {"nearest": True},
    "DoRA": LORA | {"adapter": "dora"},
    "OFT": LORA | {"adapter": "oft", "rates": (*RATES, 5e-3, 1e-2)},
    "BOFT": LORA | {"adapter": "boft", "rates": (*RATES, 5e-3, 1e-2)},
    "HRA": LORA | {"adapter": "hra", "rates": (*RATES, 5e-3, 1e-2)},
    "PSOFT": LORA | {"adapter": "psoft"},
    "OSF": LORA | {"adapter": "osf"},
    "CorDA, knowledge-preserved": LORA | {"adapter": "corda"},
}
METHODS = COMPARED | OTHERS


def add_adapter(world, unet, method, seed):
    """Put a method's adapter on a copy of the UNet; return its parameters."""
    torch.manual_seed(seed)
    common, rank = {"target_modules": list(world.weights)}, method["rank"]
    lora = {"r": rank, "lora_alpha": rank, **common}
    kind = method["adapter"]
    if kind == "lora":
        config = LoraConfig(**lora, init_lora_weights="gaussian")
    elif kind == "dora":
        config = LoraConfig(**lora, init_lora_weights="gaussian", use_dora=True)
    elif kind == "oft":
        config = OFTConfig(oft_block_size=rank, **common)
    elif kind == "boft":
        config = BOFTConfig(boft_block_size=rank, boft_n_butterfly_factor=2, **common)
    elif kind == "hra":
        config = HRAConfig(r=rank, **common)
    elif kind == "psoft":
        config = PsoftConfig(r=rank, psoft_alpha=rank, **common)
    elif kind == "osf":
        config = OSFConfig(**common)
    elif kind == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which peft does not install

        config = LoraConfig(**lora, init_lora_weights="corda")
        with tempfile.TemporaryDirectory() as folder:  # what CorDA wants to know is what the bundle holds
            spectra = world.bundle.group(JOINT)
            moments = {name: spectra[world.bundle.modules[name]["input"]] for name in world.weights}
            file = f"{folder}/covariance.pt"
            torch.save({name: (spectrum.sum() / spectrum.tokens).float() for name, spectrum in moments.items()}, file)
            config.corda_config = CordaConfig(corda_method="kpm", covariance_file=file)
            preprocess_corda(unet, config)
            inject_adapter_in_model(config, unet)
    if kind != "corda":
        inject_adapter_in_model(config, unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def protections(world, method, subject):
    """The bundle that a method uses, and what each group of timesteps protects, by `Bundle.protected`."""
    bundle, names = world.bundle, [JOINT]
    if method["nearest"]:
        bundle = Bundle.load(world.bundle_folder, timesteps="nearest")
        names = [group["name"] for group in split_groups(bundle.config)]
    if method["class_prompt"]:
        bundle = bundle.emphasize(class_moments(world, f"a photo of a {subject}"))
    return bundle, {name: bundle.protected(name, "energy", method["energy"], method["softness"]) for name in names}


def class_moments(world, prompt):
    """What the trainer samples for `--nullspace_extra_prompts`."""
    config, pipeline = world.bundle.config, copy.copy(world.pipeline)
    pipeline.scheduler = make_scheduler(config["sampler"], pipeline.scheduler.config)
    groups = [group for group in config["groups"] if group["name"] == JOINT]
    moments = SecondMoments(world.unet, attention_inputs(world.unet), dict.fromkeys(groups[0]["timesteps"], JOINT))
    with moments.collect():
        moments.start_batch()
        get_family("sd").sample(
            pipeline, [prompt] * PICTURES_PER_PROMPT, list(range(PICTURES_PER_PROMPT)),
            config["num_inference_steps"], config["guidance_scale"], config["resolution"],
        )  # fmt: skip
    return Bundle.from_moments(moments, groups, config)


def train(world, method, subject, seed, rate, marks):
    """Teach a subject; yield (step, seconds of the personalisation up to it, UNet) at each of the marks."""
    start = time.perf_counter()
    random_numbers = torch.Generator().manual_seed(seed)
    pictures = [Image.open(path) for path in sorted((DEMO / "instance_images" / subject).glob("*.png"))]
    side = (RESOLUTION, RESOLUTION)
    pixels = [np.asarray(picture.convert("RGB").resize(side, Image.Resampling.LANCZOS)) / 255 for picture in pictures]
    latents = world.latents(pixels)
    prompts = [prompt.format(f"{TOKEN} {subject}") for prompt in INSTANCE_PROMPTS[: method["prompts"]]]
    embeddings = world.encode(prompts)
    if method["prior"]:
        prompt = f"a photo of a {subject}"
        drawn = world.draw(world.unet, [prompt] * CLASS_PICTURES, seed=10_000 + seed, steps=25, guidance_scale=7.5)
        class_latents, class_embeddings = world.latents(drawn), world.encode([prompt])
    unet = copy.deepcopy(world.unet)
    parameters = add_adapter(world, unet, method, seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    groups = []
    projector = None
    if method["energy"] is not None:
        bundle, protected = protections(world, method, subject)
        projector = NullSpaceProjector(unet, protected)
        projector.attach(optimizer)
        groups = split_groups(bundle.config) if method["nearest"] else []
    unet.train()
    for step in range(1, max(marks) + 1):
        first, last = 0, world.noise_scheduler.config.num_train_timesteps - 1
        if groups:
            timestep = torch.randint(last + 1, (1,), generator=random_numbers).item()
            group = next(group for group in groups if group["range"][0] <= timestep <= group["range"][1])
            first, last = group["range"]
            projector.select(group["name"])
        captions = torch.zeros(len(latents), dtype=torch.long)
        if len(prompts) > 1:
            captions = torch.randint(len(prompts), (len(latents),), generator=random_numbers)
        batch, conditions = latents, embeddings[captions]
        if method["prior"]:
            chosen = torch.randint(len(class_latents), (len(latents),), generator=random_numbers)
            batch = torch.cat([latents, class_latents[chosen]])
            conditions = torch.cat([conditions, class_embeddings.expand(len(chosen), -1, -1)])
        timesteps = torch.randint(first, last + 1, (len(batch),), generator=random_numbers)
        noise = torch.randn(batch.shape, generator=random_numbers)
        # A mean over halves of equal size: twice it gives pictures and class a weight of 1 each, as diffusers does
        loss = diffusion_loss(unet, world.noise_scheduler, batch, timesteps, noise, encoder_hidden_states=conditions)
        (loss * (2 if method["prior"] else 1)).backward()
        if projector:
            projector.project_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            seconds = time.perf_counter() - start
            unet.eval()
            yield step, seconds, unet
            unet.train()
            start = time.perf_counter() - seconds  # scoring is not training


@torch.no_grad()
def predicted_drifts(world, unet):
    """The closed-form drift of every layer that an adapter changes, whichever it is: by its answer to the identity."""
    spectra, drifts = world.bundle.group(JOINT), []
    for name, weight in world.weights.items():
        module = unet.get_submodule(name)
        if module is base_layer(module):
            continue
        size = weight.shape[1]
        answer = module(torch.eye(size)[None])[0] - (0 if base_layer(module).bias is None else base_layer(module).bias)
        change = LoraLayer(torch.eye(size), answer.T - weight, 1.0)
        drifts.append(predicted_drift(change, weight, spectra[world.bundle.modules[name]["input"]]))
    return drifts


def run(world, name, subject, seed, rate):
    """Train and score one method: its settings and a point for each of `MARKS`."""
    points = []
    for step, seconds, unet in train(world, METHODS[name], subject, seed, rate, MARKS):
        drifts = predicted_drifts(world, unet)
        root_mean_square = math.sqrt(sum(drift**2 for drift in drifts) / len(drifts))
        points.append(
            {"step": step, "seconds": seconds, "predicted_drift": root_mean_square} | world.score(unet, subject)
        )
    return {"method": name, "subject": subject, "seed": seed, "rate": rate, "points": points}


# ---- The headline: methods at equal likeness of the subject ----------------------------------------------------------

LEVELS = (0.75, 0.9, 0.95)
LIKENESS = {"levels": "subject", "levels_anywhere": "subject_anywhere"}  # with the trained prompt; in new places, too
COSTS = ("noise_drift", "class_leak", "others_moved", "predicted_drift", "seconds")


def at_level(run, base, level, likeness="subject"):
    """What a run had cost when its pictures had come this near to the subject: a `dict`, or None if they never did.

    Between two scored steps everything is interpolated in proportion to the distance to the subject.
    """
    before = {likeness: base[likeness], "step": 0} | dict.fromkeys(COSTS, 0.0)
    for point in run["points"]:
        point = point | {"class_leak": (base["class"] - point["class"]) / base["class"]}
        if point[likeness] <= level:
            share = (before[likeness] - level) / (before[likeness] - point[likeness])
            return {key: before[key] + share * (point[key] - before[key]) for key in ("step", *COSTS)}
        before = point
    return None


def relative(key, cost, other):
    """A cost as a ratio to another method's; class leak, which may be nothing or less, as the difference."""
    return cost[key] - other[key] if key == "class_leak" else cost[key] / other[key]


def levels_of(runs, base, likeness="subject"):
    """The distance to the subject at each share of the best gain of the plain LoRA, by subject: `dict[str, dict]`."""
    levels = {}
    for subject in {run["subject"] for run in runs}:
        start = base[subject][likeness]
        nearest = min(
            median(run["points"][index][likeness] for run in plain)
            for plain in [[run for run in runs if run["method"] == "plain LoRA" and run["subject"] == subject]]
            for index in range(len(plain[0]["points"]))
        )
        levels[subject] = {level: start - level * (start - nearest) for level in LEVELS}
    return levels


def compare(runs, base, likeness="subject"):
    """At each level, each method's costs: medians over subjects and seeds, and of the ratios to two of the methods.

    A method that reaches a level in fewer than half of its runs does not get there, and nothing is compared with it:
    None.
    """
    levels, table = levels_of(runs, base, likeness), {}
    for level in LEVELS:
        costs = {}  # by method, then by subject and seed
        for run in runs:
            cost = at_level(run, base[run["subject"]], levels[run["subject"]][level], likeness)
            costs.setdefault(run["method"], {})[run["subject"], run["seed"]] = cost
        there = {method: {key: cost for key, cost in mine.items() if cost} for method, mine in costs.items()}
        arrived = {method for method, mine in costs.items() if 2 * len(there[method]) >= len(mine)}
        rows = table[str(level)] = {}
        for method, mine in there.items():
            row = rows[method] = {"reached": len(mine), "runs": len(costs[method])}
            if method not in arrived:
                row |= dict.fromkeys(COSTS)
                continue
            row |= {key: median(cost[key] for cost in mine.values()) for key in COSTS}
            row["spread"] = {
                key: [min(cost[key] for cost in mine.values()), max(cost[key] for cost in mine.values())]
                for key in COSTS
            }
            for other, name in (("plain LoRA", "vs_plain"), ("prior preservation", "vs_prior")):
                both = [(cost, there[other][key]) for key, cost in mine.items() if key in there.get(other, {})]
                row[name] = None
                if both and other in arrived:
                    row[name] = {"pairs": len(both)}
                    row[name] |= {key: median(relative(key, a, b) for a, b in both) for key in COSTS}
    return table


def tune(runs, base):
    """Each method's learning rate from the runs of the tuning seed: the one that costs the least drift at 90%.

    Where none gets there, the one that comes nearest to the subject.
    """
    chosen = {}
    plain = [run for run in runs if run["method"] == "plain LoRA"]
    start = base["subject"]
    nearest = min(point["subject"] for run in plain for point in run["points"])
    level = start - 0.9 * (start - nearest)
    for method in dict.fromkeys(run["method"] for run in runs):
        candidates = [run for run in runs if run["method"] == method]
        costs = {run["rate"]: at_level(run, base, level) for run in candidates}
        there = {rate: cost["noise_drift"] for rate, cost in costs.items() if cost}
        near = {run["rate"]: min(point["subject"] for point in run["points"]) for run in candidates}
        chosen[method] = min(there, key=there.get) if there else min(near, key=near.get)
    return chosen


def headline(rows):
    """At 90% of the plain LoRA's gain: drift and time of the shipped defaults as ratios, class leak as difference."""
    row = rows[SHIPPED]
    versus = {name: row.get(name) or dict.fromkeys(COSTS) for name in ("vs_plain", "vs_prior")}
    return {
        "drift_vs_plain": versus["vs_plain"]["noise_drift"],
        "drift_vs_prior": versus["vs_prior"]["noise_drift"],
        "class_leak_vs_prior": versus["vs_prior"]["class_leak"],
        "time_vs_prior": versus["vs_prior"]["seconds"],
    }


def rank_correlation(runs):
    """Spearman's correlation of predicted drift with measured noise drift, over every scored point of the runs.

    Also within each method, as the median over methods, the least and the most: methods differ by more than the
    points of any one of them, which alone makes the correlation of all of them high.
    """

    def spearman(runs):
        points = [point for run in runs for point in run["points"]]
        ranks = [np.argsort(np.argsort([point[key] for point in points])) for key in ("predicted_drift", "noise_drift")]
        return float(np.corrcoef(*ranks)[0, 1])

    by_method = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    within = [spearman(mine) for mine in by_method.values()]
    return {
        "spearman": spearman(runs),
        "points": sum(len(run["points"]) for run in runs),
        "within_methods": {"median": median(within), "least": min(within), "most": max(within), "methods": len(within)},
    }


# ---- What people see -------------------------------------------------------------------------------------------------


def plot(runs, base, path):
    """Each method's curves: what it costs against how near it came to the subject, a line for each run's median.

    Above those that the README compares, below the others, if there are any, beside the shipped defaults.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "noise_drift": "change of the predicted noise (squared, relative)",
        "others_right": "held-out prompts drawn right",
        "class": "distance of the class to the subject",
    }
    present = list(dict.fromkeys(run["method"] for run in runs))
    rows = [[method for method in methods if method in present] for methods in (COMPARED, [SHIPPED, *OTHERS])]
    rows = [methods for methods in rows if methods != [SHIPPED]]
    figure, axes = plt.subplots(
        len(rows), len(shown), figsize=(16, 5.5 * len(rows)), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab20")
    for methods, panels in zip(rows, axes, strict=True):
        for number, method in enumerate(methods):
            mine = [run for run in runs if run["method"] == method]
            curve = [
                {key: median(run["points"][index][key] for run in mine) for key in ("subject", *shown)}
                for index in range(len(MARKS))
            ]
            for axis, key in zip(panels, shown, strict=True):
                x, y = [point["subject"] for point in curve], [point[key] for point in curve]
                look = {"color": "black", "zorder": 3} if method == SHIPPED else {"color": colours(number % 20)}
                axis.plot(x, y, "o-", label=method, markersize=4, **look)
        for axis, (key, title) in zip(panels, shown.items(), strict=True):
            if key != "noise_drift":  # which is nothing, and has no place on a logarithmic scale
                axis.axhline(median(scores[key] for scores in base.values()), color="grey", linestyle=":")
            axis.set(xlabel="distance to the subject (nearer is to the right)", title=title)
            axis.invert_xaxis()
        panels[0].set_yscale("log")
        panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_picture(runs, rates, base, path):
    """Base model and methods next to each other, equal seeds, each as soon as it was near enough to the subject."""
    start_worker()
    subject, seed = TUNING_SUBJECT, SEEDS[0]
    level = levels_of(list(runs.values()), base)[subject][0.9]
    prompts = [f"a photo of a {TOKEN} {subject}", f"a {TOKEN} {subject} on a green background"]
    prompts += [f"a small {TOKEN} {subject} on white", f"a photo of a {subject}"]
    prompts += ["a blue heart on a yellow background", "a large red ring on black"]
    rows = {"base model": _world.draw(_world.unet, prompts, seed=7)}
    for method in PICTURED:
        points = runs[f"{method}/{subject}/{seed}"]["points"]
        step = next((point["step"] for point in points if point["subject"] <= level), MARKS[-1])
        for _, _, unet in train(_world, METHODS[method], subject, seed, rates[method], (step,)):
            rows[method.partition(",")[0]] = _world.draw(unet, prompts, seed=7)
    pictures = {name: [_world.pipeline.numpy_to_pil(drawn)] for name, drawn in rows.items()}
    comparison_grid(pictures, prompts).save(path)


def print_table(table, where):
    for level, rows in table.items():
        print(f"\nAt {float(level):.0%} of the plain LoRA's gain, {where}")
        print(f"{'':28}{'reached':>9}{'drift':>10}{'/plain':>8}{'/prior':>8}{'leak':>8}{'moved':>8}{'seconds':>9}")
        for method, row in rows.items():
            line = f"{method:28}{row['reached']:>5}/{row['runs']:<3}"
            if row["noise_drift"] is not None:
                ratios = [(row[other] or {}).get("noise_drift") for other in ("vs_plain", "vs_prior")]
                line += f"{row['noise_drift']:10.4f}" + "".join(
                    "       -" if r is None else f"{r:8.2f}" for r in ratios
                )
                line += f"{row['class_leak']:8.2f}{row['others_moved']:8.3f}{row['seconds']:9.0f}"
            print(line)


# ---- Running, resumably ----------------------------------------------------------------------------------------------

_world = None  # of a worker process


def start_process():
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # runs go side by side, one on each core


def start_worker():
    global _world
    start_process()
    _world = World(BUNDLE)


def work(do, job):
    return do(_world, job)


def do(world, job):
    """One job in a worker: the scores of the base model, a run, or the memory that a method takes."""
    kind, *rest = job
    return {"base": World.base_scores, "run": run, "memory": measure_memory}[kind](world, *rest)


def measure_memory(world, method):
    """Resident memory of a fresh process, in bytes, before a personalisation and at its peak (Linux, see proc(5))."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of drawing what `World` compares with
    before = resident("VmRSS")
    for _ in train(world, METHODS[method], TUNING_SUBJECT, 0, METHODS[method]["rates"][0], (5,)):
        pass
    return {"before": before, "peak": resident("VmHWM")}


def describe_machine():
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, one thread a run",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
    }


class Results:
    """What was measured so far, written after every job, so that the next start goes on from there."""

    def __init__(self, path):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {}

    def save(self):
        partial = self.path.with_name(f"partial-{self.path.name}")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)

    def complete(self, section, jobs, workers, description, do=do):
        """Do the jobs (`dict` by key) that a section lacks, in workers with a `World` each; return the section."""
        done = self.content.setdefault(section, {})
        missing = {key: job for key, job in jobs.items() if key not in done}
        if missing:
            spawn = multiprocessing.get_context("spawn")
            fresh = 1 if section == "memory" else None  # a process's peak is that of all it has done
            with ProcessPoolExecutor(workers, spawn, start_worker, max_tasks_per_child=fresh) as pool:
                running = {pool.submit(work, do, job): key for key, job in missing.items()}
                try:
                    for future in tqdm(as_completed(running), total=len(running), desc=description, unit="run"):
                        done[running[future]] = future.result()
                        self.save()
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # or it would go on with all that nobody would save
                    raise
        return {key: done[key] for key in jobs}


def drop_changed(results):
    """Drop what was measured of methods that were defined otherwise then; their learning rates are tuning's to find."""
    methods = {
        name: {key: value for key, value in method.items() if key != "rates"} for name, method in METHODS.items()
    }
    known = results.content.get("methods", {})
    for section in ("tuning", "runs", "memory"):
        done = results.content.get(section, {})
        for key, entry in list(done.items()):
            name = entry.get("method", key)  # memory is by name
            if name not in methods or known.get(name) != methods[name]:
                del done[key]
    results.content["methods"] = methods


def build_bundle():
    if not (BUNDLE / "nullspace_config.json").exists():
        command = [sys.executable, ROOT / "build_nullspace.py", "--pretrained_model_name_or_path", MODEL]
        command += ["--prompts_file", DEMO / "prompts.txt", "--batch_size", "50", "--timestep_groups", "steps"]
        command += ["--nullspace_threshold", 0.9999]  # the most that a method below closes
        subprocess.run([*map(str, command), "--output_dir", str(BUNDLE)], check=True)


def tell(results, base):
    """Compare what was run so far, and print it."""
    done = list(results.content["runs"].values())
    results.content["machine"] = describe_machine()
    for name, likeness in LIKENESS.items():
        results.content[name] = compare(done, base, likeness)
        results.content[name.replace("levels", "headline")] = headline(results.content[name]["0.9"])
        print_table(results.content[name], f"by {likeness}")
    loras = [run for run in done if METHODS[run["method"]]["adapter"] == "lora"]
    results.content["ranking"] = {"LoRAs": rank_correlation(loras), "all adapters": rank_correlation(done)}
    results.save()
    plot(done, base, results.path.with_suffix(".png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One seed of one subject, fewer methods.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes (default: one for each core).")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    build_bundle()

    results = Results(HERE / "results" / "preservation.json")
    drop_changed(results)
    base = results.complete("base", {subject: ("base", subject) for subject in SUBJECTS}, args.workers, "Base model")

    # Those that the README compares first, then all others
    for methods in [COMPARED] if args.quick else [COMPARED, OTHERS]:
        # Tune each method's learning rate on one subject, with a seed of its own
        jobs = {
            f"{method} at {rate:g}": ("run", method, TUNING_SUBJECT, TUNING_SEED, rate)
            for method in methods
            for rate in methods[method]["rates"]
        }
        results.complete("tuning", jobs, args.workers, "Tuning")
        rates = results.content["rates"] = tune(list(results.content["tuning"].values()), base[TUNING_SUBJECT])

        # Train and score
        if args.quick:
            results = Results(WORK / "preservation.json")
            drop_changed(results)
        done = results.content.setdefault("runs", {})
        for key in [key for key, run in done.items() if run["rate"] != rates.get(run["method"])]:
            del done[key]  # it was tuned anew since
        for seed in SEEDS[: 1 if args.quick else None]:
            runs = {
                f"{method}/{subject}/{seed}": ("run", method, subject, seed, rates[method])
                for subject in ([TUNING_SUBJECT] if args.quick else SUBJECTS)
                for method in methods
            }
            results.complete("runs", runs, args.workers, f"Seed {seed}")
            tell(results, base)
    draw_picture(results.content["runs"], rates, base, results.path.with_suffix(".picture.png"))
    memory = {method: ("memory", method) for method in COMPARED if not args.quick}
    results.complete("memory", memory, args.workers, "Memory")


if __name__ == "__main__":
    main()
