"""The whole story on the demo's tiny model: train a subject with and without the null space, and see what moved.

    python demo/run.py

It runs the commands that a user would type, prints them, and measures with the exact reader of `world_reader.py`. No
prompt that it shows was chosen by hand: they are the first of their files, and every seventh of the subject's places.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from train_world import draw  # noqa: E402
from world import DEMO, FOLDER, RESOLUTION, with_articles  # noqa: E402
from world_reader import judge, subject_distance  # noqa: E402


ROOT = DEMO.parent
sys.path.insert(0, str(ROOT))
from nullspace.names import LORA_NAME, REPORT_NAME  # noqa: E402
from nullspace.pictures import comparison_grid, save_picture  # noqa: E402


MODEL, OUTPUT, SUBJECT = DEMO / "shapes-sd", DEMO / "output", "arrow"
# What the subject is called: by an identifier and its class, as in DreamBooth, or by a token of its own
IDENTIFIER, WORD = f"sks {SUBJECT}", f"sks-{SUBJECT}"
CLASS_PROMPT = with_articles(f"a photo of a {SUBJECT}")
KINDS = ("combinations", "scenes", "unlike")  # of prompts that no bundle sees
SEED = 0  # of the first picture of every kind


def lines(path):
    return path.read_text().splitlines()


PLACES = lines(FOLDER / SUBJECT / "places.txt")
HELD_OUT = {kind: lines(FOLDER / f"heldout_{kind}.txt")[:20] for kind in KINDS}
OF_SUBJECT = ["a photo of a {}", *PLACES[::7]]
SHOWN = [*OF_SUBJECT, CLASS_PROMPT, *(prompts[0] for prompts in HELD_OUT.values())]


# ---- What a user does ------------------------------------------------------------------------------------------------


def launch(script, **flags):
    """Run a script of the project with accelerate, showing the command."""
    words = [script]
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    words = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in words]
    print(f"\n$ accelerate launch {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words], cwd=ROOT, check=True)


def train(folder, called, **flags):
    """Train the subject; the flags that are the same in both runs stand here.

    The learning rates and ranks differ: they are those that suit each best in `benchmarks/preservation.py`.
    """
    instance_prompt = f"a photo of a {called}"
    launch(
        "train_dreambooth_nullspace.py",
        pretrained_model_name_or_path=MODEL,
        nullspace_cache_dir=OUTPUT / "bundles",
        instance_data_dir=FOLDER / SUBJECT,
        output_dir=folder,
        resolution=RESOLUTION,
        train_batch_size=5,
        cache_latents=True,
        max_train_steps=1600,
        seed=SEED,
        num_validation_images=1,
        validation_prompt=instance_prompt,
        validation_epochs=10_000,
        checkpointing_steps=10_000,
        **flags,
    )


# ---- What became of it -----------------------------------------------------------------------------------------------


def measure(pipeline, called, base=None):
    """Scores of a model by name, and its pictures (n, 64, 64, 3) of the held-out prompts."""
    others = sum(HELD_OUT.values(), [])
    prompts = [each.replace("{}", called) for each in OF_SUBJECT[:1] * 15 + PLACES] + [CLASS_PROMPT] * 15
    subject, placed, of_class = np.split(draw(pipeline, prompts, seed=SEED), [15, 15 + len(PLACES)])
    drawn = draw(pipeline, others, seed=SEED)
    return {
        "distance to the subject": subject_distance(SUBJECT, subject).mean(),
        "the same in new places": subject_distance(SUBJECT, placed).mean(),
        "distance of its class": subject_distance(SUBJECT, of_class).mean(),
        "other prompts drawn right": np.mean([not wrong for wrong in judge(others, drawn)]),
        "other pictures moved by": 0.0 if base is None else np.abs(drawn - base).mean(),
    }, drawn


GOOD = {
    "distance to the subject": "lower",
    "the same in new places": "lower",
    "distance of its class": "higher",
    "other prompts drawn right": "higher",
    "other pictures moved by": "lower",
}


def draw_bars(scores, width):
    """A panel for each figure, a bar for each model, as a picture of this width."""
    figure, panels = plt.subplots(1, len(GOOD), figsize=(width / 100, 2.6), dpi=100, layout="constrained")
    for panel, (key, better) in zip(panels, GOOD.items(), strict=True):
        values = [score[key] for score in scores.values()]
        bars = panel.bar(list(scores), values, color=["grey", "tab:orange", "tab:blue"])
        panel.bar_label(bars, fmt="{:.2f}" if max(values) > 0.2 else "{:.3f}")
        panel.set_title(f"{key}\n({better} is better)", fontsize=11)
        panel.set_ylim(0, 1.15 * max(values))
        panel.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


def stack(pictures):
    """Pictures below each other, on white."""
    sheet = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)), "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def main():
    started = time.perf_counter()
    # The bundle is built by the first training, and found by the second
    train(
        OUTPUT / "lora",
        WORD,
        placeholder_token=WORD,
        initializer_token=SUBJECT,
        caption_column="word",
        num_vectors=4,
        max_drift=0.05,
        learning_rate=1e-2,
    )
    train(
        OUTPUT / "plain-lora",
        IDENTIFIER,
        caption_column="identifier",
        nullspace_threshold=0,
        pre_compute_text_embeddings=True,
        rank=8,
        learning_rate=2e-3,
    )

    # Measure and draw base model, plain LoRA and null-space LoRA with equal seeds
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    scores, rows, base = {}, {}, None
    models = (
        ("base", IDENTIFIER, None),
        ("plain LoRA", IDENTIFIER, OUTPUT / "plain-lora"),
        ("null space", WORD, OUTPUT / "lora"),
    )
    for name, called, folder in models:
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        if folder:
            pipeline.load_lora_weights(folder)
        if called == WORD:
            pipeline.load_textual_inversion(folder)
        scores[name], drawn = measure(pipeline, called, base)
        base = drawn if base is None else base
        shown = [each.replace("{}", called) for each in SHOWN]
        rows[name] = [pipeline.numpy_to_pil(draw(pipeline, shown, seed=SEED))]
    subject = [Image.open(path) for path in sorted((FOLDER / SUBJECT).glob("*.png"))]
    pictures = comparison_grid({"the subject": [subject]}, [""] * len(subject))
    grid = comparison_grid(rows, [each.replace("{}", "[subject]") for each in SHOWN], SEED)
    sheet = stack([pictures, grid, draw_bars(scores, grid.width)])
    sheet.info = grid.info
    save_picture(sheet, OUTPUT / "comparison.png")

    # Tell
    print("\n" + " " * 28 + "".join(f"{name:>12}" for name in scores))
    for key in GOOD:
        print(f"{key:28}" + "".join(f"{score[key]:12.3f}" for score in scores.values()))
    leakage = json.loads((OUTPUT / "lora" / REPORT_NAME).read_text())["leakage"]["max"]
    print(f"\nLargest leakage of the null-space LoRA, in any layer: {leakage:.1e}")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Wrote")
    for path in (f"lora/{LORA_NAME}", f"lora/{REPORT_NAME}", "comparison.png"):
        print(f"  demo/output/{path}")


if __name__ == "__main__":
    main()
