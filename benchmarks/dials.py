"""Pictures of what each dial of the trainer does, for `docs/settings.md`: one subject of the demo's world.

    OMP_NUM_THREADS=1 python benchmarks/dials.py

Each picture turns one dial and leaves the others where the launch line of the README has them. A column is a training
by the trainer's own command. Its title has what that gave: the distance of 15 pictures to the subject (0 is the
subject, about 1 nothing of it), and how much 30 other pictures moved. Trainings that are there are not done again.
Writes `results/dials/DIAL.png`.
"""

import argparse
import subprocess
import sys
from functools import cache

import diffusers
import numpy as np
import torch
import transformers
from common import HERE
from diffusers import StableDiffusionPipeline
from run import CLASS_PROMPT, HELD_OUT, MODEL, SEED, SUBJECT, WORD
from run import PLACES as ALL_PLACES

from nullspace.names import LORA_NAME, WORD_NAME
from nullspace.pictures import checkpoint_grid, save_picture
from train_world import draw
from world import FOLDER, RESOLUTION
from world_reader import subject_distance


WORK = HERE / "output" / "dials"
OF_SUBJECT = f"a photo of a {WORD}", *(place.replace("{}", WORD) for place in ALL_PLACES[:10:5])
OTHERS = CLASS_PROMPT, *(prompts[0] for prompts in HELD_OUT.values())
MOVED = sum((prompts[:10] for prompts in HELD_OUT.values()), [])
USUAL = {
    "placeholder_token": WORD, "initializer_token": SUBJECT, "caption_column": "word",
    "num_vectors": 4, "nullspace_softness": 1e-6, "rank": 4, "max_drift": 0.05, "learning_rate": 1e-2,
    "max_train_steps": 800,
}  # fmt: skip
NO_WORD = {
    "placeholder_token": None, "initializer_token": None, "num_vectors": None, "max_drift": None,
    "caption_column": "identifier",
}  # fmt: skip
DIALS = {
    "softness": {
        f"softness {value}": {"nullspace_softness": float(value)} for value in ("1e-4", "1e-5", "1e-6", "1e-7")
    },
    "rank": {f"rank {value}": {"rank": value} for value in (1, 4, 16, 64)},
    "steps": {f"{value} steps": {"max_train_steps": value} for value in (200, 400, 800, 1600)},
    "word": {
        "a word": {},
        "sks, softness 1e-6": NO_WORD,
        "sks, softness 1e-5": NO_WORD | {"nullspace_softness": 1e-5},
        "sks, no null space": NO_WORD | {"nullspace_threshold": 0, "learning_rate": 2e-3},
    },
    "rows": {f"rows of the word: {value}": {"num_vectors": value} for value in (1, 2, 4, 8)},
    "budget": {f"budget {value:g}": {"max_drift": value} for value in (0.01, 0.03, 0.05)}
    | {"no budget": {"max_drift": None}},
}


def train(flags):
    """Train with these flags in place of the usual ones, unless that is done; return the folder."""
    own = [f"{name}-{value}" for name, value in flags.items() if USUAL.get(name) != value]
    folder = WORK / ("_".join(own) or "usual")
    settings = {name: value for name, value in (USUAL | flags).items() if value is not None}
    called = settings.get("placeholder_token", f"sks {SUBJECT}")
    settings |= {
        "pretrained_model_name_or_path": MODEL, "nullspace_cache_dir": WORK / "bundles", "output_dir": folder,
        "instance_data_dir": FOLDER / SUBJECT, "instance_prompt": f"a photo of a {called}", "resolution": RESOLUTION,
        "train_batch_size": 5, "cache_latents": True, "seed": SEED, "report_to": "none",
        "num_validation_images": 1, "validation_epochs": 10_000, "checkpointing_steps": 10_000,
    }  # fmt: skip
    if not (folder / LORA_NAME).is_file():
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value) if word is not True]
        subprocess.run([sys.executable, HERE.parent / "train_dreambooth_nullspace.py", *words], check=True)
    return folder


def load(folder=None):
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if folder:
        pipeline.load_lora_weights(folder)
        if (folder / WORD_NAME).is_file():
            pipeline.load_textual_inversion(folder)
    return pipeline


@cache
def base():
    """The base model's pictures of other prompts."""
    return draw(load(), MOVED, seed=SEED)


def column(title, folder):
    """The title with the figures of a training, and its pictures of the prompts that are shown."""
    pipeline = load(folder)
    has_word = (folder / WORD_NAME).is_file()
    of_subject = [prompt if has_word else prompt.replace("sks-", "sks ") for prompt in OF_SUBJECT]
    distance = subject_distance(SUBJECT, draw(pipeline, of_subject[:1] * 15, seed=SEED)).mean()
    moved = np.abs(draw(pipeline, MOVED, seed=SEED) - base()).mean()
    shown = draw(pipeline, [*of_subject, *OTHERS], seed=SEED)
    return f"{title}: subject at {distance:.2f}, others moved by {moved:.3f}", pipeline.numpy_to_pil(shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dials", nargs="+", choices=list(DIALS), default=list(DIALS), help="Which (default: all).")
    args = parser.parse_args()
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    (HERE / "results" / "dials").mkdir(exist_ok=True)
    for dial in args.dials:
        columns = dict(column(title, train(flags)) for title, flags in DIALS[dial].items())
        prompts = [prompt.replace(WORD, "[subject]") for prompt in (*OF_SUBJECT, *OTHERS)]
        path = HERE / "results" / "dials" / f"{dial}.png"
        save_picture(checkpoint_grid(columns, prompts, SEED), path)
        print(f"Wrote {path.relative_to(HERE.parent)}", flush=True)


if __name__ == "__main__":
    main()
