"""How much data does a bundle need? What a null-space LoRA moves, by what its bundle was built from.

    python benchmarks/bundle_data.py

Bundles of the demo's model are built with the number of prompts, the sampler, its steps and its guidance scale varied
one at a time, and from the first timesteps of sampling only. A LoRA is trained with each, from the same seeds, and
scored on held-out prompts: the change of the predicted noise, and of pictures drawn with three samplers. Goes on where
it stopped; writes `results/bundle_data.json` and `results/bundle_data.png`.
"""

import subprocess
import sys
from statistics import median

import numpy as np
import preservation
from preservation import DRAWN, HERE, METHODS, MODEL, ROOT, SEEDS, TOKEN, TUNING_SUBJECT, WORK, Results, World
from tqdm.auto import tqdm

from shapes import protected_prompts, subject_distance


STEPS, RATE = 400, 5e-3
SAMPLERS = ("ddim", "dpmpp_2m_karras", "euler_a")
USUAL = {"prompts": 400, "steps": 25, "sampler": "ddim", "guidance": 7.5, "range": (0, 999)}
VARIED = {
    "prompts": (30, 100, 400, 1000, 3000),
    "steps": (4, 10, 25, 50),
    "sampler": SAMPLERS,
    "guidance": (1.0, 3.0, 7.5),
    "range": ((800, 999), (600, 999), (0, 999)),  # the first 5 and 10 of 25 steps, and all
}


def name_of(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def settings():
    """Every setting to try, by name."""
    varied = [USUAL | {key: value} for key, values in VARIED.items() for value in values]
    return {name_of(setting): setting for setting in varied}


def bundle_of(setting):
    """The folder of the bundle with these settings, built if it is not there; ranges share one of all timesteps."""
    names = ("prompts", "steps", "sampler", "guidance")
    folder = WORK / "bundle_data" / "-".join(str(setting[name]) for name in names)
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


def draw(world, unet, sampler):
    return world.draw(unet, DRAWN, seed=200, steps=25, sampler=sampler)


def measure(setting, seed, base):
    """Train with a bundle and score it: drift and change of pictures on held-out prompts, distance to the subject."""
    world = World(bundle_of(setting), timestep_range=setting["range"])
    for sampler in SAMPLERS:
        if sampler not in base:
            base[sampler] = draw(world, world.unet, sampler)
    (trained,) = preservation.train(world, METHODS["null space"], TUNING_SUBJECT, seed, RATE, (STEPS,))
    unet = trained[-1]
    subject = world.draw(unet, [f"a photo of a {TOKEN} {TUNING_SUBJECT}"] * 12, seed=0)
    return {
        "noise_drift": world.noise_drift(unet),
        "moved": {name: float(np.abs(draw(world, unet, name) - base[name]).mean()) for name in SAMPLERS},
        "subject": float(subject_distance(TUNING_SUBJECT, subject).mean()),
    }


def plot(runs, path):
    """A panel for each thing varied: drift, and the change of pictures by each sampler, as medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(VARIED), figsize=(18, 4), layout="constrained", sharey=True)
    for axis, (key, values) in zip(axes, VARIED.items(), strict=True):
        labels = [str(value) for value in values]
        found = [runs[name_of(USUAL | {key: value})].values() for value in values]
        axis.plot(labels, [median(run["noise_drift"] for run in several) for several in found], "ko-", label="noise")
        for sampler in SAMPLERS:
            moved = [median(run["moved"][sampler] for run in several) for several in found]
            axis.plot(labels, moved, ".--", label=f"pictures, {sampler}")
        axis.set(title=key, yscale="log")
    axes[0].set_ylabel("change on held-out prompts")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    preservation.start_process()
    results, base = Results(HERE / "results" / "bundle_data.json"), {}
    runs = results.content.setdefault("runs", {})
    todo = [(name, setting, seed) for seed in SEEDS for name, setting in settings().items()]
    for name, setting, seed in tqdm(todo, desc="Bundles", unit="run"):
        if str(seed) not in runs.setdefault(name, {}):
            runs[name][str(seed)] = measure(setting, seed, base)
            results.content["machine"] = preservation.describe_machine()
            results.save()
    plot(runs, HERE / "results" / "bundle_data.png")
    print(f"{'':60}{'noise drift':>12}{'moved':>9}{'subject':>9}")
    for name, several in runs.items():
        row = [median(run[key] for run in several.values()) for key in ("noise_drift", "subject")]
        moved = median(median(run["moved"].values()) for run in several.values())
        print(f"{name:60}{row[0]:12.5f}{moved:9.4f}{row[1]:9.3f}")


if __name__ == "__main__":
    main()
