"""What is left of a plain LoRA that is repaired, and what a short training makes of it, against training anew.

    OMP_NUM_THREADS=1 python benchmarks/repair.py            # five subjects, two seeds; goes on where it stopped
    OMP_NUM_THREADS=1 python benchmarks/repair.py --quick    # one subject, few steps; writes no result

On the demo's world a plain LoRA is trained, and repaired with the protected prompts weighing little, as much as the
subject, and much. From the one in the middle a training in the null space goes on for a quarter and a half of the
steps; beside it stand trainings as short without such a start, and whole ones, without a word and with one. All are
scored as in `preservation.py`. Seconds are of CPU time, and of what a LoRA takes beyond those that it is made from.
Writes `results/repair.json`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
from common import HERE, call
from diffusers import StableDiffusionPipeline
from methods import METHODS, SHIPPED
from resumable import Results, describe_machine
from scoring import HELD_OUT, MODEL, Base, build_bundle, bundle_folder, world_hash

import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace.names import WORD_NAME
from world import FOLDER, REPORTED_SUBJECTS, RESOLUTION


STEPS, SEEDS, WEIGHTS = 800, (0, 1), (0.1, 1.0, 10.0)
PLAIN, ANEW = "plain LoRA", "null space"
CHOSEN = json.loads((HERE / "results" / "preservation.json").read_text())["chosen"]
RATES = {method: CHOSEN[method]["rate"] for method in (PLAIN, ANEW, SHIPPED)}
SHOWN = ("subject", "placed", "class", "others_right", "noise_drift", "seconds")


def called(subject, word):
    return f"sks-{subject}" if word else f"sks {subject}"


def train(folder, method, subject, seed, steps, **flags):
    """Train a subject by one of `METHODS` with the trainer's own command."""
    word = "placeholder_token" in METHODS[method].flags
    flags = METHODS[method].flags | flags
    if word:
        flags |= {"placeholder_token": called(subject, word), "initializer_token": subject}
    call(
        trainer, pretrained_model_name_or_path=MODEL, nullspace_name_or_path=bundle_folder(),
        instance_data_dir=FOLDER / subject, instance_prompt=f"a photo of a {called(subject, word)}",
        caption_column="word" if word else "identifier", resolution=RESOLUTION, cache_latents=True, train_batch_size=5,
        learning_rate=RATES[method], max_train_steps=steps, seed=seed, output_dir=folder, num_validation_images=1,
        checkpointing_steps=10_000, report_to="none", **{"no-compare_with_base": True}, **flags,
    )  # fmt: skip


def ways(scratch, subject, seed, steps):
    """What is compared: a name, and a function that makes the LoRA in a folder; each needs those before it."""
    plain, repaired = scratch / PLAIN, scratch / repaired_name(1.0)

    def repair(folder, weight):
        words = {"lora": plain, "nullspace": bundle_folder(), "instance_prompt": f"a photo of a sks {subject}"}
        call(nullspace_utils, "repair", **words, drift_weight=weight, output_dir=folder)

    yield PLAIN, lambda folder: train(folder, PLAIN, subject, seed, steps)
    for weight in WEIGHTS:
        yield repaired_name(weight), lambda folder, weight=weight: repair(folder, weight)
    for part in (4, 2):
        few = steps // part
        yield (
            f"repaired, then {few} steps",
            lambda folder, few=few: train(folder, ANEW, subject, seed, few, init_lora=repaired),
        )
        yield f"{ANEW}, {few} steps", lambda folder, few=few: train(folder, ANEW, subject, seed, few)
    for method in (ANEW, SHIPPED):
        yield f"{method}, {steps} steps", lambda folder, method=method: train(folder, method, subject, seed, steps)


def repaired_name(weight):
    return f"repaired, drift weight {weight:g}"


def follow(base, job):
    """All ways for one subject and seed: their scores and seconds, by name."""
    subject, seed, steps = job
    rows = {"base": base.score(base.pipeline, subject, subject) | {"seconds": 0.0}}
    with TemporaryDirectory() as scratch:
        for name, make in ways(Path(scratch), subject, seed, steps):
            folder, start = Path(scratch) / name, time.process_time()
            make(folder)
            seconds = time.process_time() - start
            pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.load_lora_weights(folder)
            word = (folder / WORD_NAME).exists()
            if word:
                pipeline.load_textual_inversion(folder)
            rows[name] = base.score(pipeline, subject, called(subject, word)) | {"seconds": seconds}
    return rows


def medians(runs):
    """Medians over the runs: `dict` of what is shown, by way."""
    runs = [{way: row | {"others_right": others_right(row)} for way, row in run.items()} for run in runs]
    return {way: {key: median(run[way][key] for run in runs) for key in SHOWN} for way in runs[0]}


def others_right(row):
    """The share of held-out pictures that show what they are asked for: as many of each kind."""
    return mean(row[f"{kind}_right"] for kind in HELD_OUT)


def print_table(table):
    print("| " + " | ".join(["", *SHOWN]) + " |\n|---|" + "---:|" * len(SHOWN))
    for way, row in table.items():
        print("| " + " | ".join([way, *(f"{row[key]:.3g}" for key in SHOWN)]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One subject, few steps; writes no result.")
    parser.add_argument("--workers", type=int, default=2, help="Jobs at once (default: 2).")
    args = parser.parse_args()
    build_bundle()
    if args.quick:
        print_table(medians([follow(Base(), (REPORTED_SUBJECTS[0], 0, 20))]))
        return
    results = Results(HERE / "results" / "repair.json", Base, follow, args.workers)
    setting = {"world": world_hash(), "steps": STEPS, "rates": RATES}
    if results.content.get("setting") != setting:  # of another world: begin anew
        results.content = {"setting": setting}
    jobs = {f"{subject}, {seed}": (subject, seed, STEPS) for seed in SEEDS for subject in REPORTED_SUBJECTS}
    runs = results.complete("runs", jobs, "Runs")
    results.content |= describe_machine() | {"medians": medians(runs.values())}
    results.save()
    print_table(results.content["medians"])


if __name__ == "__main__":
    main()
