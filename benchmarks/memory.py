"""Peak memory of training, with the protection and without.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

Stable Diffusion 1.x with random weights, 512 x 512, batch 1, float32, rank 4: each run is a process of its own that
trains one step with the trainer's functions and reports its peak resident memory. Three kinds alternate: with the
protection of a bundle loaded as the trainer loads it; with that bundle and --nullspace_threshold 0; and without any
bundle, as a trainer that knows of none. Writes `results/memory.json`.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bundle_size import synthetic_bundle, synthetic_spectrum
from common import inputs, sd1_unet, write
from torch.nn.utils import clip_grad_norm_

from nullspace.adapters import add_lora
from nullspace.audit import Auditor
from nullspace.families.stable_diffusion import diffusion_loss
from nullspace.layers import attention_inputs
from nullspace.optimizers import make_optimizer
from nullspace.projector import NullSpaceProjector
from nullspace.protection import load_protection
from train_dreambooth_nullspace import parse_args


ROUNDS = 1  # memory hardly varies


def save_bundle(folder):
    """A joint bundle of Stable Diffusion 1.x's sizes; inputs of one size share their made-up moments."""
    with torch.device("meta"):
        unet = sd1_unet()
    sizes = {unet.get_submodule(name).in_features for name in attention_inputs(unet)}
    generator = torch.Generator().manual_seed(0)
    spectra = {size: synthetic_spectrum(size, generator).pack() for size in sorted(sizes)}
    synthetic_bundle(unet, spectra).save(folder)


def train(folder, threshold=None):
    """Train one step, as the trainer does; print the peak resident memory of this process in bytes."""
    argv = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--instance_prompt", "x", "--rank", "4"]
    args = parse_args([*argv, "--nullspace_name_or_path", folder, "--nullspace_threshold", threshold or "0"])
    bundle, protected = None, {}
    if threshold is not None:
        bundle, protected = load_protection(args)  # the trainer keeps the bundle for its report
    unet = sd1_unet()
    parameters = add_lora({"unet": unet}, list(attention_inputs(unet)), args)
    optimizer = make_optimizer(parameters, args)
    projector = NullSpaceProjector(unet, protected)
    projector.attach(optimizer)
    auditor = None if bundle is None else Auditor(bundle, protected, {"unet": unet})  # as the trainer keeps it
    del protected
    diffusion_loss(unet, **inputs(1)).backward()
    projector.project_gradients()
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    del auditor
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main():
    kinds = {"no bundle": [], "threshold 0": ["0"], "protected": ["0.9"]}
    peaks = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        save_bundle(folder)
        for _ in range(ROUNDS):
            for name, threshold in kinds.items():
                command = [sys.executable, __file__, folder, *threshold]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peaks[name].append(int(done.stdout.split()[-1]))
                print(name, f"{peaks[name][-1]:,}", flush=True)
    write(
        "memory",
        setting="512 x 512, batch 1, rank 4, float32, no gradient checkpointing, energy 0.9; peak resident bytes",
        ratio=statistics.median(peaks["protected"]) / statistics.median(peaks["threshold 0"]),
        ratio_to_no_bundle=statistics.median(peaks["protected"]) / statistics.median(peaks["no bundle"]),
        bytes=statistics.median(peaks["protected"]) - statistics.median(peaks["no bundle"]),
        runs=peaks,
    )


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) > 1 else main()
