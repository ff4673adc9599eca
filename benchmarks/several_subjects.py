"""Whether subjects stay as they were when more are taught: one after the other, protected or not, and apart.

    OMP_NUM_THREADS=1 python benchmarks/several_subjects.py

On the demo's world, with a word of its own for each subject. One after the other, each LoRA is trained on the model
with those before it: with --base_lora, which protects their prompts; and on a model that they were written into, which
protects none of theirs. Apart, each is trained on the base model, and they are loaded together. After every training
all subjects so far are drawn; the first three of the five are what three give. Distances to a subject are 0 for it and
about 1 for nothing of it; drift is the mean absolute change of held-out pictures. Trainings that are done are kept in
--output_dir and not done again. Writes `results/several_subjects.json`.

`--quick` trains two subjects for so few steps that it shows no more than that all runs, and writes no results.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
from common import HERE, write
from run import HELD_OUT, lines

from nullspace.families import recognise
from nullspace.models import download_model
from nullspace.names import LORA_NAME
from nullspace.stack import read_stack
from train_world import draw
from world import DEMO, FOLDER, RESOLUTION
from world_reader import judge, subject_distance


MODEL, SUBJECTS = DEMO / "shapes-sd", ("star", "heart", "moon", "mushroom", "ring")
SEEDS, STEPS, PICTURES = (0, 1, 2), 800, 15
PROTECTED, WRITTEN, APART = "one after the other", "one after the other, not protected", "apart"
SETTING = {
    "learning_rate": 1e-2, "num_vectors": 4, "max_drift": 0.05, "train_batch_size": 5, "cache_latents": True,
    "caption_column": "word",
    "resolution": RESOLUTION, "num_validation_images": 1, "validation_epochs": 10_000, "checkpointing_steps": 10_000,
    "report_to": "none",
}  # fmt: skip


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Two subjects, one seed, few steps.")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "output" / "several", help="Where LoRAs are kept.")
    return parser.parse_args()


# ---- Training --------------------------------------------------------------------------------------------------------


def train(model, folder, subject, seed, steps, beneath=()):
    """Train a subject on a model and the LoRAs beneath it, unless that is done; return the folder."""
    flags = SETTING | {
        "pretrained_model_name_or_path": model, "nullspace_cache_dir": folder.parent.parent / "bundles",
        "instance_data_dir": FOLDER / subject, "instance_prompt": prompt_of(subject),
        "placeholder_token": f"sks-{subject}", "initializer_token": subject,
        "validation_prompt": prompt_of(subject), "output_dir": folder, "seed": seed, "max_train_steps": steps,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value) if word is not True]
    words += ["--base_lora", *map(str, beneath)] if beneath else []
    if not (folder / LORA_NAME).is_file():
        script = HERE.parent / "train_dreambooth_nullspace.py"
        subprocess.run([sys.executable, str(script), *words], check=True, stderr=subprocess.DEVNULL)
    return folder


def prompt_of(subject):
    return f"a photo of a sks-{subject}"


def load(model, folders=()):
    """The pipeline of a model with LoRAs."""
    pipeline = recognise(model).load_pipeline(download_model(model)._replace(loras=read_stack(map(str, folders))))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def written_into(pipeline, folder):
    """A model's folder with what a pipeline has, and the base model's list of prompts."""
    if not (folder / "model_index.json").is_file():
        pipeline.save_pretrained(folder)
        shutil.copy(MODEL / "prompts.txt", folder)
    return folder


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Scores:
    """Distances of subjects and what has become of held-out pictures, by a pipeline.

    Args:
        count (`int`): pictures of each subject's prompt, and held-out prompts of each kind.
    """

    def __init__(self, count):
        self.count = count
        self.others = [prompt for prompts in HELD_OUT.values() for prompt in prompts[:count]]
        self.base = draw(load(MODEL), self.others)

    def __call__(self, pipeline, subjects):
        drawn, scores = draw(pipeline, self.others), {}
        for subject in subjects:
            places = [line.replace("{}", f"sks-{subject}") for line in lines(FOLDER / subject / "places.txt")]
            prompts = {"trained prompt": [prompt_of(subject)] * self.count, "new places": places[: self.count]}
            for name, each in prompts.items():
                scores.setdefault(name, {})[subject] = float(subject_distance(subject, draw(pipeline, each)).mean())
        right = np.mean([not wrong for wrong in judge(self.others, drawn)])
        return scores | {"drift": float(np.abs(drawn - self.base).mean()), "others right": float(right)}


def sequence(kind, folder, subjects, seed, steps, score):
    """Scores after each training of a kind: a list, by how many subjects there are."""
    done, model, found = [], MODEL, []
    for number, subject in enumerate(subjects, 1):
        # The first is the same in all
        place = folder / (f"{APART}-{seed}" if number == 1 else f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}")
        trained = train(model, place / subject, subject, seed, steps, done if kind == PROTECTED else ())
        done.append(trained)
        together = load(model, [trained] if kind == WRITTEN else done)
        point = {"subjects": number, "together": score(together, subjects[:number])}
        if kind == WRITTEN:
            model = written_into(together, folder / f"models-{seed}" / str(number))
        if kind == APART:
            point["alone"] = score(load(MODEL, [trained]), [subject])
        found.append(point)
        shown = {each: round(value, 3) for each, value in point["together"]["trained prompt"].items()}
        print(f"{kind}, seed {seed}: {shown}", flush=True)
    return found


def summarize(points, number):
    """Of the first so many subjects: distances when each was made and with all, how much the worst lost, and drift."""
    last, rows = points[number - 1]["together"], {}
    for name in ("trained prompt", "new places"):
        # Apart, each is as it was made while it is alone
        made = [point.get("alone", point["together"])[name] for point in points[:number]]
        lost = [last[name][subject] - made[index][subject] for index, subject in enumerate(last[name])]
        rows[name] = {"made": mean(each[subject] for each, subject in zip(made, last[name], strict=True))}
        rows[name] |= {"with all": mean(last[name].values()), "most lost": max(lost)}
    return rows | {"drift": last["drift"], "others right": last["others right"]}


def main():
    args, started = parse_args(), time.process_time()
    subjects, seeds, steps, count = (SUBJECTS[:2], (0,), 30, 3) if args.quick else (SUBJECTS, SEEDS, STEPS, PICTURES)
    folder, score = args.output_dir / ("quick" if args.quick else "full"), Scores(count)
    runs = []
    for seed in seeds:
        for kind in (PROTECTED, WRITTEN, APART):
            runs.append({"kind": kind, "seed": seed, "points": sequence(kind, folder, subjects, seed, steps, score)})
    summary = {}
    for number in sorted({min(number, len(subjects)) for number in (3, 5)}):
        for run in runs:
            row = summarize(run["points"], number)
            summary.setdefault(f"{number} subjects", {}).setdefault(run["kind"], []).append(row)
    for title, kinds in summary.items():
        print(f"\n{title:38}     made  with all  most lost   drift   right")
        for kind, rows in kinds.items():
            values = [mean(row["trained prompt"][key] for row in rows) for key in ("made", "with all", "most lost")]
            values += [mean(row[key] for row in rows) for key in ("drift", "others right")]
            print(f"{kind:38}" + "".join(f"{value:9.3f}" for value in values))
    print(f"{time.process_time() - started:.0f} CPU seconds besides the trainings")
    if not args.quick:
        setting = f"demo/shapes-sd; {', '.join(subjects)}; {steps} steps, a word each; {SETTING}"
        write("several_subjects", setting=setting, summary=summary, runs=runs)


if __name__ == "__main__":
    main()
