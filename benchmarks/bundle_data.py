"""How much data does a bundle need? What a null-space LoRA moves, by what its bundle was built from.

    python benchmarks/bundle_data.py

Bundles of the demo's model are built with the number of prompts, the sampler, its steps and its guidance scale varied
one at a time, and from the first timesteps of sampling only. A LoRA is trained with each, from the same seeds, and
scored on held-out prompts: the change of the predicted noise, and of pictures drawn with three samplers. Goes on where
it stopped; writes `results/bundle_data.json` and `results/bundle_data.png`.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from statistics import median

import numpy as np
from methods import METHODS, SHIPPED, train
from preservation import SEEDS, make_base
from resumable import Results, describe_machine
from scoring import DRAWN, HERE, MODEL, ROOT, WORK, build_bundle, prompts_of, world_hash
from tqdm.auto import tqdm

from nullspace.bundle import Bundle
from world import TUNING_SUBJECTS, protected_prompts
from world_reader import subject_distance


STEPS = 800
SUBJECT, PROMPTS = TUNING_SUBJECTS[0], sum(DRAWN.values(), [])
RATE, PLAIN_RATE = 5e-3, 1e-3  # about those that preservation.py chooses in the null space, and outside
SAMPLERS = ("ddim", "dpmpp_2m_karras", "euler_a")
USUAL = {"prompts": 400, "steps": 25, "sampler": "ddim", "guidance": 7.5, "range": (0, 999)}
VARIED = {
    "prompts": (30, 100, 400, 1000, 3000),
    "steps": (4, 10, 25, 50),
    "sampler": SAMPLERS,
    "guidance": (1.0, 3.0, 7.5),
    "range": ((781, 999), (581, 999), (0, 999)),  # the first 5 and 10 of 25 steps, and all
}
NONE = "no bundle"


def name_of(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def settings():
    """Every setting to try, by name."""
    varied = [USUAL | {key: value} for key, values in VARIED.items() for value in values]
    return {name_of(setting): setting for setting in varied}


def bundle_of(setting):
    """The folder of the bundle with these settings, built if it is not there; ranges share one of all timesteps."""
    names = ("prompts", "steps", "sampler", "guidance")
    folder = WORK / f"bundle_data-{world_hash()}" / "-".join(str(setting[name]) for name in names)
    if not (folder / "nullspace_config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        prompts = folder.parent / f"prompts-{setting['prompts']}.txt"
        prompts.write_text("\n".join(protected_prompts(setting["prompts"])) + "\n")
        command = [sys.executable, ROOT / "build_nullspace.py", "--pretrained_model_name_or_path", MODEL]
        command += ["--prompts_file", prompts, "--batch_size", 50, "--timestep_groups", "steps"]
        command += ["--num_inference_steps", setting["steps"], "--sampler", setting["sampler"]]
        command += ["--guidance_scale", setting["guidance"], "--output_dir", folder]
        subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
    return folder


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
        base.bundle = Bundle.load(bundle_of(setting), timestep_range=setting["range"])
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
    """A panel for each thing varied: drift, and the change of pictures by each sampler, as medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(VARIED), figsize=(18, 4), layout="constrained", sharey=True)
    for axis, (key, values) in zip(axes, VARIED.items(), strict=True):
        labels = [str(value) for value in values]
        found = [runs[name_of(USUAL | {key: value})] for value in values]
        axis.plot(labels, [row["noise_drift"] for row in found], "ko-", label="predicted noise (squared)")
        for sampler in SAMPLERS:
            axis.plot(labels, [row["moved"][sampler] for row in found], ".--", label=f"pictures, {sampler}")
        axis.axhline(runs[NONE]["noise_drift"], color="grey", linestyle=":", label="predicted noise, no bundle")
        axis.set(title=key, yscale="log")
    axes[0].set_ylabel("change on held-out prompts")
    axes[0].legend(fontsize=7)
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


def main():
    WORK.mkdir(exist_ok=True)
    build_bundle()
    for setting in tqdm(settings().values(), desc="Bundles", unit="bundle"):
        bundle_of(setting)
    results = Results(HERE / "results" / "bundle_data.json", make_base, measure, os.cpu_count())
    trained = {"world": world_hash(), "method": asdict(METHODS[SHIPPED]), "steps": STEPS, "rates": [RATE, PLAIN_RATE]}
    if results.content.get("trained") != json.loads(json.dumps(trained)):  # otherwise than now: begin anew
        results.content = {"trained": trained}
    for seed in SEEDS:
        jobs = {f"{name}/{seed}": (setting, seed) for name, setting in {NONE: None, **settings()}.items()}
        results.complete("runs", jobs, f"Seed {seed}")
    results.content["machine"] = describe_machine()
    table = results.content["medians"] = medians(results.content["runs"])
    results.save()
    plot(table, HERE / "results" / "bundle_data.png")
    print(f"{'':60}{'noise drift':>12}{'subject':>9}" + "".join(f"{sampler:>17}" for sampler in SAMPLERS))
    for name, row in table.items():
        moved = "".join(f"{row['moved'][sampler]:17.4f}" for sampler in SAMPLERS)
        print(f"{name:60}{row['noise_drift']:12.5f}{row['subject']:9.3f}{moved}")


if __name__ == "__main__":
    main()
