"""The whole story on the demo's tiny model: build a bundle, train with and without it, and see what moved.

    make demo

It runs the commands that a user would type, prints them, and measures with the exact scorer of `shapes.py`.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from shapes import COLOURS, DEMO, matches, subject_distance
from train_shapes import draw


ROOT = DEMO.parent
sys.path.insert(0, str(ROOT))
from nullspace.names import LORA_NAME, REPORT_NAME  # noqa: E402
from nullspace.pictures import comparison_grid, save_picture  # noqa: E402


MODEL, OUTPUT, SUBJECT = DEMO / "shapes-sd", DEMO / "output", "star"
SUBJECT_PROMPTS = ["a photo of a sks star", "a sks star on a green background", "a small sks star on white"]
GUIDANCE = 2.5  # more of it exaggerates what a model this small has just learned
OTHER_PROMPTS = ["a photo of a star", "a blue heart on a yellow background", "a large red ring on black"]


def launch(script, **flags):
    """Run a script of the project with accelerate, showing the command."""
    words = [script]
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    words = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in words]
    print(f"\n$ accelerate launch {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words], cwd=ROOT, check=True)


def train(folder, **flags):
    """Train the demo's subject; the flags that are the same in both runs stand here.

    The learning rates differ: each is one at which the method comes near to the subject in these steps.
    """
    launch(
        "train_dreambooth_nullspace.py",
        pretrained_model_name_or_path=MODEL,
        nullspace_name_or_path=OUTPUT / "bundle",
        instance_data_dir=DEMO / "instance_images" / SUBJECT,
        instance_prompt=SUBJECT_PROMPTS[0],
        output_dir=folder,
        resolution=32,
        pre_compute_text_embeddings=True,
        train_batch_size=5,
        lr_scheduler="cosine",
        lr_warmup_steps=0,
        max_train_steps=1000,
        seed=0,
        num_validation_images=1,
        validation_prompt=SUBJECT_PROMPTS + OTHER_PROMPTS,
        validation_epochs=10_000,
        checkpointing_steps=10_000,
        **flags,
    )


def measure(pipeline, heldout, base=None):
    """Scores of a model, and its pictures (n, 32, 32, 3) of the held-out prompts."""
    subject = draw(pipeline, SUBJECT_PROMPTS[:1] * 24, guidance_scale=GUIDANCE, seed=0)
    places = [f"a sks {SUBJECT} on a {colour} background" for colour in COLOURS for _ in range(3)]
    placed = draw(pipeline, places, guidance_scale=GUIDANCE, seed=300)
    drawn_class = draw(pipeline, [f"a photo of a {SUBJECT}"] * 24, guidance_scale=GUIDANCE, seed=100)
    others = draw(pipeline, heldout, guidance_scale=GUIDANCE, seed=200)
    return {
        "distance to the subject": subject_distance(SUBJECT, subject).mean(),
        "the same in new places": subject_distance(SUBJECT, placed).mean(),
        "distance of its class": subject_distance(SUBJECT, drawn_class).mean(),
        "held-out prompts drawn right": matches(heldout, others).mean(),
        "held-out pictures moved by": 0.0 if base is None else np.abs(others - base).mean(),
    }, others


def main():
    # Build the bundle, train without and with protection
    launch(
        "build_nullspace.py",
        pretrained_model_name_or_path=MODEL,
        prompts_file=DEMO / "prompts.txt",
        batch_size=64,
        output_dir=OUTPUT / "bundle",
    )
    train(OUTPUT / "plain-lora", learning_rate=1e-3, nullspace_threshold=0)
    train(OUTPUT / "lora", learning_rate=1e-2)

    # Measure and draw base model, plain LoRA and null-space LoRA with equal seeds
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    heldout = (DEMO / "heldout_prompts.txt").read_text().splitlines()[:100]
    scores, rows, base = {}, {}, None
    for name, folder in {"base": None, "plain LoRA": OUTPUT / "plain-lora", "null space": OUTPUT / "lora"}.items():
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if folder:
            pipeline.load_lora_weights(folder)
        scores[name], drawn = measure(pipeline, heldout, base)
        base = drawn if base is None else base
        drawn = draw(pipeline, SUBJECT_PROMPTS + OTHER_PROMPTS, guidance_scale=GUIDANCE, seed=7)
        rows[name] = [pipeline.numpy_to_pil(drawn)]
    save_picture(comparison_grid(rows, SUBJECT_PROMPTS + OTHER_PROMPTS), OUTPUT / "comparison.png")

    # Tell
    print("\n" + " " * 32 + "".join(f"{name:>12}" for name in scores))
    for key in scores["base"]:
        print(f"{key:32}" + "".join(f"{score[key]:12.3f}" for score in scores.values()))
    leakage = json.loads((OUTPUT / "lora" / REPORT_NAME).read_text())["leakage"]["max"]
    print(f"\nLargest leakage of the null-space LoRA, in any layer: {leakage:.1e}\n\nWrote")
    for path in ("bundle/", f"lora/{LORA_NAME}", f"lora/{REPORT_NAME}", "comparison.png"):
        print(f"  demo/output/{path}")


if __name__ == "__main__":
    main()
