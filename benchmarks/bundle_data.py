"""How much data does a bundle need? What a null-space LoRA moves, by what its bundle was built from.

    python benchmarks/bundle_data.py

Bundles of the demo's model are built with one thing varied at a time: the number of prompts, the pictures drawn of
each, the sampler, its steps, its guidance scale, the resolution and the precision; from the first timesteps of
sampling only; with the eigenvectors stored in the ways of `bundle_size.py`; and one of as few prompts and steps as the
trainer takes where it builds one itself. Of each the cost of the build is measured, its bytes, and the share of the
energy of held-out prompts that it lets through. A LoRA is trained with each, from the same seeds, and scored on
held-out prompts: the change of the predicted noise, and of pictures drawn with three samplers. Goes on where it
stopped; writes `results/bundle_data.json` and `results/bundle_data.png`.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from statistics import mean, median

import numpy as np
import torch
from bundle_size import BUNDLES, WAYS
from methods import METHODS, SHIPPED, train
from preservation import SEEDS, make_base
from resumable import Results, describe_machine
from scoring import DRAWN, HELD_OUT, HERE, MODEL, ROOT, WORK, build_bundle, prompts_of, world_hash
from tqdm.auto import tqdm

from nullspace import finding
from nullspace.bundle import Bundle
from nullspace.names import JOINT, WORD_SOFTNESS
from nullspace.spectrum import Spectrum
from world import TUNING_SUBJECTS, general_prompts
from world_reader import subject_distance


STEPS = 800
SUBJECT, PROMPTS = TUNING_SUBJECTS[0], sum(DRAWN.values(), [])
RATE, PLAIN_RATE = 1e-2, 2e-3  # those that preservation.py chooses in the null space, and outside
SAMPLERS = ("ddim", "dpmpp_2m_karras", "euler_a")
ALL = (0, 999)
USUAL = {
    "prompts": 300, "samples": 1, "steps": 25, "sampler": "ddim", "guidance": 7.5, "resolution": 64, "precision": "no",
    "range": ALL, "stored": BUNDLES,
}  # fmt: skip
VARIED = {
    "prompts": (30, 100, 300, 1000, 3000),
    "samples": (1, 4),
    "steps": (4, 10, 25, 50),
    "sampler": SAMPLERS,
    "guidance": (1.0, 3.0, 7.5),
    "resolution": (32, 64, 128),
    "precision": ("no", "bf16"),
    "range": ((781, 999), (581, 999), ALL),  # the first 5 and 10 of 25 steps, and all
    "stored": tuple(WAYS),
}
OWN = USUAL | {"prompts": finding.PROMPTS, "steps": finding.STEPS[0]}  # what a training builds where none is named
NONE = "no bundle"


def name_of(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def settings():
    """Every setting to try, by name."""
    varied = [USUAL | {key: value} for key, values in VARIED.items() for value in values]
    return {name_of(setting): setting for setting in [*varied, OWN]}


# ---- The bundles -----------------------------------------------------------------------------------------------------


def folder_of(setting):
    """Where the bundle with these settings is; ranges of the timesteps share one that keeps its steps apart."""
    names = [str(value) for key, value in setting.items() if key not in ("range", "stored")]
    return WORK / f"bundle_data-{world_hash()}" / "-".join([*names, "joint" if setting["range"] == ALL else "steps"])


def build(setting, prompts, folder):
    """Build a bundle of these prompts with these settings; return the CPU seconds that it took."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    path = folder.parent / f"{folder.name}.txt"
    path.write_text("\n".join(prompts) + "\n")
    command = [sys.executable, ROOT / "build_nullspace.py", "--pretrained_model_name_or_path", MODEL]
    command += ["--prompts_file", path, "--batch_size", 50, "--output_dir", folder]
    command += ["--num_inference_steps", setting["steps"], "--sampler", setting["sampler"]]
    command += ["--guidance_scale", setting["guidance"], "--resolution", setting["resolution"]]
    command += ["--mixed_precision", setting["precision"]]
    command += [] if setting["range"] == ALL else ["--timestep_groups", "steps"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load(setting):
    """The bundle with these settings, and the bytes of its tensors.

    What another way to store them than that of bundles loses is measured from the moment that the bundle gives.
    """
    bundle, stored = Bundle.load(folder_of(setting), timestep_range=setting["range"]), 0
    for spectra in bundle.spectra.values():
        for source, item in spectra.items():
            size = sum(part.nbytes for _, part in item.parts())
            if setting["stored"] != BUNDLES:
                spectra[source], size = WAYS[setting["stored"]](Spectrum.from_sum(item.sum(), item.tokens))
            stored += size
    return bundle, stored


def let_through(bundle, moments):
    """The share of held-out inputs' energy that a LoRA in the bundle's null space may answer to, mean over the layers.

    tr(S C S) / tr(C), S being the map that its down-projections go through, C the held-out second moment.
    """
    shares = []
    for module, item in bundle.protected(softness=WORD_SOFTNESS).items():
        total = moments[bundle.modules[module]["input"]].sum().double()
        free = item.basis[:, item.rank :].double() * item.gains.double()
        shares.append((torch.einsum("ij,ik,kj->", free, total, free) / total.trace()).item())
    return mean(shares)


def measure_bundles(results):
    """Build the bundles that are not measured yet: each one's cost, and what it lets through of held-out prompts."""
    held_out = WORK / f"bundle_data-{world_hash()}" / "held_out"
    if not held_out.exists():
        build(USUAL, sum((prompts[:100] for prompts in HELD_OUT.values()), []), held_out)
    moments, costs = Bundle.load(held_out).group(JOINT), results.content.setdefault("cpu_seconds", {})
    measured = results.content.setdefault("bundles", {})
    for name, setting in tqdm(settings().items(), desc="Bundles", unit="bundle"):
        folder = folder_of(setting)
        if folder.name not in costs or not folder.exists():
            prompts = general_prompts(setting["prompts"]) * setting["samples"]  # each drawn from a seed of its own
            costs[folder.name] = build(setting, prompts, folder)
        if name not in measured:
            bundle, stored = load(setting)
            measured[name] = {
                "cpu_seconds": costs[folder.name],
                "bytes": stored,
                "let_through": let_through(bundle, moments),
            }
        results.save()


# ---- What is trained with them ---------------------------------------------------------------------------------------


def draw(base, pipeline, sampler):
    return base.draw(pipeline, PROMPTS, seed=200, sampler=sampler)


@cache
def base_pictures(base, sampler):
    return draw(base, base.pipeline, sampler)


def measure(base, job):
    """Train with a bundle, or none, and score it: what moved on held-out prompts, and the distance to the subject."""
    setting, seed = job
    method, rate = METHODS[SHIPPED], RATE
    if setting is None:
        method, rate = replace(method, flags=method.flags | {"nullspace_threshold": 0}), PLAIN_RATE
    else:
        base.bundle, _ = load(setting)
    ((_, _, pipeline),) = train(base, method, SUBJECT, seed, rate, None, (STEPS,))
    subject = base.draw(pipeline, prompts_of(SUBJECT, method.called(SUBJECT))["subject"], seed=0)
    return {
        "noise_drift": base.noise_drift(pipeline),
        "moved": {
            name: float(np.abs(draw(base, pipeline, name) - base_pictures(base, name)).mean()) for name in SAMPLERS
        },
        "subject": float(subject_distance(SUBJECT, subject).mean()),
    }


def plot(runs, path):
    """A panel for each thing varied: what moved, what was learned and what is let through, medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(VARIED) // 3, figsize=(16, 12), layout="constrained", sharey=True)
    for axis, (key, values) in zip(axes.flat, VARIED.items(), strict=True):
        labels = [str(value) for value in values]
        found = [runs[name_of(USUAL | {key: value})] for value in values]
        axis.plot(labels, [row["noise_drift"] for row in found], "ko-", label="predicted noise (squared)")
        for sampler in SAMPLERS:
            axis.plot(labels, [row["moved"][sampler] for row in found], ".--", label=f"pictures, {sampler}")
        axis.plot(labels, [row["let_through"] for row in found], "x:", label="energy let through")
        axis.plot(labels, [row["subject"] for row in found], "^-", label="distance to the subject")
        axis.axhline(runs[NONE]["noise_drift"], color="grey", linestyle=":", label="predicted noise, no bundle")
        axis.axhline(runs[name_of(OWN)]["noise_drift"], color="grey", label="predicted noise, the trainer's own bundle")
        axis.tick_params(axis="x", labelrotation=20 if key == "stored" else 0)
        axis.set(title=key, yscale="log")
    axes[0, 0].set_ylabel("change on held-out prompts; distance")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def medians(runs):
    """The median over seeds of everything measured, by setting."""
    table = {}
    for key, run in runs.items():
        table.setdefault(key.rpartition("/")[0], []).append(run)
    return {
        name: {key: median(run[key] for run in several) for key in ("noise_drift", "subject")}
        | {"moved": {sampler: median(run["moved"][sampler] for run in several) for sampler in SAMPLERS}}
        for name, several in table.items()
    }


def tell(results, runs):
    """Write, draw and print the medians over the seeds whose runs are all there."""
    results.content["machine"] = describe_machine()
    table = results.content["medians"] = medians(runs)
    for name, row in results.content["bundles"].items():
        table[name] |= row
    results.save()
    plot(table, HERE / "results" / "bundle_data.png")
    print(
        f"{'':110}{'CPU s':>7}{'MB':>7}{'let thr.':>10}{'drift':>9}{'subject':>9}"
        + "".join(f"{each:>17}" for each in SAMPLERS)
    )
    for name, row in table.items():
        built = (
            f"{row['cpu_seconds']:7.0f}{row['bytes'] / 1e6:7.2f}{row['let_through']:10.6f}"
            if name != NONE
            else " " * 24
        )
        moved = "".join(f"{row['moved'][sampler]:17.4f}" for sampler in SAMPLERS)
        print(f"{name:110}{built}{row['noise_drift']:9.5f}{row['subject']:9.3f}{moved}")


def main():
    WORK.mkdir(exist_ok=True)
    build_bundle()
    results = Results(HERE / "results" / "bundle_data.json", make_base, measure, os.cpu_count())
    trained = {"world": world_hash(), "method": asdict(METHODS[SHIPPED]), "steps": STEPS, "rates": [RATE, PLAIN_RATE]}
    if results.content.get("trained") != json.loads(json.dumps(trained)):  # otherwise than now: begin anew
        results.content = {"trained": trained}
    measure_bundles(results)
    runs = {}
    for seed in SEEDS:
        jobs = {f"{name}/{seed}": (setting, seed) for name, setting in {NONE: None, **settings()}.items()}
        runs |= results.complete("runs", jobs, f"Seed {seed}")
        results.content["seeds"] = seed + 1
        tell(results, runs)


if __name__ == "__main__":
    main()
