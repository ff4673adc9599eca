"""What each loss makes of a Latent Consistency Model, with and without null space, on the demo's.

    python benchmarks/lcm.py

For every loss (epsilon, x0, consistency), subject and seed it trains a LoRA without protection and one in the null
space, with `train_dreambooth_nullspace.py` in this process, and scores both by the exact reader of
`demo/world_reader.py`. It writes `results/lcm.json` after each of them, goes on from there when it was stopped, and
ends with the tables of `docs/benchmarks.md`.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from common import call
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from scoring import DEMO, HERE, world_hash
from tqdm.auto import tqdm

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace.adapters import add_lora
from nullspace.bundle import Bundle
from nullspace.families import get_family, latent_consistency
from nullspace.names import CONFIG_NAME, REPORT_NAME
from nullspace.optimizers import make_optimizer
from nullspace.projector import NullSpaceProjector
from train_world import CONTEXT, draw
from world import FOLDER, RESOLUTION, TUNING_SUBJECTS
from world_reader import judge, subject_distance


MODEL = DEMO / "shapes-lcm"
RESULTS = HERE / "results" / "lcm.json"
LOSSES = ("epsilon", "x0", "consistency")
SEEDS, STEPS = (0, 1, 2), (1, 2, 4, 8)
# The null space, at the trainer's defaults, takes a higher rate to come as close to the subject, as in
# `demo/run.py`; the plain LoRA has the rank that serves it better (`preservation.py`).
METHODS = {
    "plain": {"rank": 8, "learning_rate": 2e-3, "nullspace_threshold": 0},
    "null space": {"learning_rate": 1e-2},
}
GUIDANCE = 8.5  # the pipeline's own
HELD_OUT = (FOLDER / "heldout_combinations.txt").read_text().splitlines()[:100]


def prompt_of(subject):
    return f"a photo of a sks {subject}"


def train(folder, bundle, subject, model=MODEL, **flags):
    call(
        trainer,
        pretrained_model_name_or_path=model,
        nullspace_name_or_path=bundle,
        instance_data_dir=FOLDER / subject,
        instance_prompt=prompt_of(subject),
        output_dir=folder,
        resolution=RESOLUTION,
        pre_compute_text_embeddings=True,
        train_batch_size=5,
        lr_scheduler="cosine",
        lr_warmup_steps=0,
        num_validation_images=1,
        validation_prompt=prompt_of(subject),
        checkpointing_steps=10_000,
        validation_epochs=10_000,
        report_to="none",
        **{"no-compare_with_base": True},
        **flags,
    )


def load_pipeline(lora=None):
    pipeline = LatentConsistencyModelPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def fine_detail(pictures):
    """Mean energy of pictures (n, 64, 64, 3) above half of the highest frequency that they can hold."""
    power = np.square(np.abs(np.fft.fft2(pictures, axes=(1, 2), norm="ortho")))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(pictures.shape[1]), np.fft.fftfreq(pictures.shape[2])))
    return power[:, frequency > 0.25].mean().item()


def right(drawn):
    """The share of pictures (n, 64, 64, 3) of the held-out prompts that show what they say."""
    return sum(not wrong for wrong in judge(HELD_OUT, drawn)) / len(drawn)


def measure(pipeline, subject):
    """Scores of a model for one subject, and its pictures' fine detail."""
    scores = {"subject": {}}
    for steps in STEPS:
        drawn = draw(pipeline, [prompt_of(subject)] * 24, steps, GUIDANCE, seed=0)
        scores["subject"][str(steps)] = subject_distance(subject, drawn).mean().item()
    drawn = draw(pipeline, [f"a photo of a {subject}"] * 24, 4, GUIDANCE, seed=100)
    scores["class"] = subject_distance(subject, drawn).mean().item()
    drawn = draw(pipeline, HELD_OUT, 4, GUIDANCE, seed=200)
    scores["held-out"] = right(drawn)
    scores["detail"] = fine_detail(drawn)
    return scores


def seconds_a_step(bundle, rounds=9, steps=5):
    """Median time of a training step in the null space, relative to epsilon's: `dict[str, float]` by loss.

    The losses take turns in each round, and what is compared are times of the same round.
    """
    args = trainer.parse_args(
        ["--pretrained_model_name_or_path", str(MODEL), "--nullspace_name_or_path", str(bundle)]
        + ["--instance_data_dir", "-", "--instance_prompt", "-"]
    )
    unet = load_pipeline().unet.requires_grad_(False)
    noise_scheduler = LCMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    protected = Bundle.load(bundle).protected()
    parameters = add_lora({"unet": unet}, list(protected), args)
    projector = NullSpaceProjector(unet, protected)
    optimizer = make_optimizer(parameters, args)
    projector.attach(optimizer)
    guidance = latent_consistency.embed_guidance(GUIDANCE, unet.config.time_cond_proj_dim)
    denoise = partial(unet, timestep_cond=guidance)
    latents, noise = torch.randn(2, 5, 4, 16, 16)
    prompt_embeds = torch.randn(5, CONTEXT, unet.config.cross_attention_dim)
    timesteps = torch.tensor([199, 399, 599, 799, 999])
    losses = {loss: get_family("lcm").loss(argparse.Namespace(lcm_loss=loss, snr_gamma=None)) for loss in LOSSES}
    rows = []
    for _ in tqdm(range(rounds + 1), desc="Timing", unit="round"):
        row = {}
        for loss in LOSSES:
            start = time.perf_counter()
            for _ in range(steps):
                losses[loss](
                    denoise, noise_scheduler, latents, timesteps, noise, encoder_hidden_states=prompt_embeds
                ).backward()
                projector.project_gradients()
                optimizer.step()
                optimizer.zero_grad()
            row[loss] = time.perf_counter() - start
        rows.append(row)
    return {loss: statistics.median(row[loss] / row["epsilon"] for row in rows[1:]) for loss in LOSSES}


def write(results):
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_name(f"partial-{RESULTS.name}")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(RESULTS)


def print_tables(results):
    """The page's table: medians over subjects and seeds."""
    header = ["loss", "", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)]
    header += ["class", "held-out", "sharpness", "drift", "time a step"]
    rows = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]

    def row(name, method, scores, drift, seconds):
        def median(read):
            return statistics.median(read(subject, score) for subject, score in scores)

        cells = [f"{median(lambda _, score: score['subject'][str(steps)]):.2f}" for steps in STEPS]  # noqa: B023
        cells += [f"{median(lambda _, score: score['class']):.2f}", f"{median(lambda _, score: score['held-out']):.2f}"]
        cells += [f"{median(lambda subject, score: score['detail'] / results['base'][subject]['detail']):.2f}"]
        rows.append([name, method, *cells, drift, seconds])

    row("base LCM", "", list(results["base"].items()), "0", "")
    for loss in LOSSES:
        for method in METHODS:
            runs = [run for run in results["runs"].values() if (run["loss"], run["method"]) == (loss, method)]
            drift = f"{statistics.median(run['drift'] for run in runs):.3f}"
            scores = [(run["subject"], run["scores"]) for run in runs]
            row(f"`{loss}`", method, scores, drift, f"{results['seconds a step'][loss]:.2f}")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=300, help="Steps of every run (default: 300).")
    parser.add_argument("--work_dir", type=Path, default=DEMO / "output" / "lcm", help="Default: demo/output/lcm.")
    args = parser.parse_args()
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    settings = {
        "max_train_steps": args.max_train_steps, "methods": METHODS, "guidance_scale": GUIDANCE,
        "huber": latent_consistency.HUBER, "world": world_hash(MODEL),
    }  # fmt: skip
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if results.get("settings") != json.loads(json.dumps(settings)):  # of other settings: begin anew
        results = {"settings": settings, "base": {}, "runs": {}}
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    results |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}

    # The bundle, and what the base model draws
    bundle = args.work_dir / "bundle"
    if not (bundle / CONFIG_NAME).is_file():
        prompts = {"prompts_file": FOLDER / "protected.txt", "batch_size": 64}
        call(build_nullspace, pretrained_model_name_or_path=MODEL, output_dir=bundle, **prompts)
    for subject in TUNING_SUBJECTS:
        if subject not in results["base"]:
            results["base"][subject] = measure(load_pipeline(), subject)
            write(results)

    # Train and score; seeds outermost, so that a table of all losses is there after each
    plans = [
        (loss, method, subject, seed)
        for seed in SEEDS for subject in TUNING_SUBJECTS for loss in LOSSES for method in METHODS
    ]  # fmt: skip
    for loss, method, subject, seed in tqdm(plans, desc="Runs", unit="run"):
        key = f"{loss}, {method}, {subject}, {seed}"
        if key in results["runs"]:
            continue
        folder = args.work_dir / key.replace(", ", "-").replace(" ", "-")
        flags = METHODS[method] | {"lcm_loss": loss, "seed": seed, "max_train_steps": args.max_train_steps}
        train(folder, bundle, subject, **flags)
        report = json.loads((folder / REPORT_NAME).read_text())
        results["runs"][key] = {
            "loss": loss, "method": method, "subject": subject, "seed": seed,
            "drift": report["predicted_drift"]["rms"], "leakage": report["leakage"]["max"],
            "scores": measure(load_pipeline(folder), subject),
        }  # fmt: skip
        write(results)

    # Time and tell
    if "seconds a step" not in results:
        results["seconds a step"] = seconds_a_step(bundle)
        write(results)
    print_tables(results)


if __name__ == "__main__":
    main()
