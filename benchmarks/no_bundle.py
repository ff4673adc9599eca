"""What a training without a bundle pays for building one, against class pictures.

    OMP_NUM_THREADS=1 python benchmarks/no_bundle.py

On the demo's model: the trainer's own search and build, from an empty cache and from a full one, and the drawing of
100 pictures of the class in 25 steps with which prior preservation begins, alternating in one process; then the whole
command twice. What so small a bundle keeps is in `bundle_data.py`. Writes `results/no_bundle.json`.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from common import HERE, alternate, median, ratio, write
from diffusers import StableDiffusionPipeline

from nullspace import finding
from nullspace.families import recognise
from nullspace.models import download_model
from train_dreambooth_nullspace import parse_args
from world import DEMO, FOLDER, RESOLUTION


MODEL, ROUNDS, TRAIN_STEPS = DEMO / "shapes-sd", 2, 400
CLASS_PICTURES, CLASS_STEPS, CLASS_BATCH = 100, 25, 4  # as diffusers' scripts draw them by default


def command(cache, output_dir):
    words = ["--pretrained_model_name_or_path", MODEL, "--nullspace_cache_dir", cache, "--output_dir", output_dir]
    words += ["--instance_data_dir", FOLDER / "star", "--instance_prompt", "a photo of a sks star"]
    words += ["--resolution", RESOLUTION, "--train_batch_size", 5, "--learning_rate", 1e-2, "--seed", 0]
    words += ["--max_train_steps", TRAIN_STEPS, "--num_validation_images", 1, "--report_to", "none"]
    return [str(word) for word in words]


def costs(scratch):
    """Seconds of the trainer's search and build, and of drawing class pictures, alternating."""
    cache, accelerator = scratch / "cache", Accelerator(cpu=True)
    family = recognise(MODEL)

    def find():
        args = parse_args(command(cache, scratch / "lora"))
        args.base_model = download_model(MODEL)
        components = family.load_models(args.base_model)
        components |= family.load_tokenizers(args.base_model)
        components["noise_scheduler"] = family.load_noise_scheduler(MODEL)
        return finding.find_or_build(finding.Wanted(family, components, args), accelerator, args)

    def building():
        shutil.rmtree(cache, ignore_errors=True)
        assert find()

    def found():
        if not cache.exists():
            find()
        assert not find()

    def class_pictures():
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for start in range(0, CLASS_PICTURES, CLASS_BATCH):
            prompts = ["a photo of a star"] * CLASS_BATCH
            for number, picture in enumerate(pipeline(prompts, num_inference_steps=CLASS_STEPS).images, start):
                picture.save(scratch / f"{number}.png")

    return alternate({"building": building, "found": found, "class pictures": class_pictures}, ROUNDS)


def whole_command(scratch):
    """CPU seconds of the whole command from an empty cache, and of the same again."""
    seconds = []
    for name in ("first", "second"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [
            sys.executable,
            HERE.parent / "train_dreambooth_nullspace.py",
            *command(scratch / "new", scratch / name),
        ]
        subprocess.run([str(word) for word in words], check=True, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return dict(zip(("first run", "second run"), seconds, strict=True))


def main():
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        runs = costs(scratch)
        whole = whole_command(scratch)
    write(
        "no_bundle",
        setting=f"demo/shapes-sd; {finding.PROMPTS} prompts in {finding.STEPS} steps against {CLASS_PICTURES} class "
        f"pictures in {CLASS_STEPS}, batches of {CLASS_BATCH}; {TRAIN_STEPS} steps of training; CPU seconds",
        seconds={name: median(found) for name, found in runs.items()} | whole,
        ratios={name: ratio(runs[name], runs["class pictures"]) for name in ("building", "found")},
        runs=runs,
    )


if __name__ == "__main__":
    main()
