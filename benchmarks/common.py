"""What the benchmarks share: a Stable Diffusion 1.x UNet with random weights, alternating runs, and their results."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler, UNet2DConditionModel


HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent / "demo"):
    sys.path.insert(0, str(folder))
SIDE = 64  # of the latents: pictures of 512 x 512
TEXT = (77, 768)  # tokens and width of the text encoder's output


def sd1_unet():
    """The UNet of Stable Diffusion 1.x, 860 million random weights in float32: time depends on the shapes alone."""
    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=TEXT[1]).requires_grad_(False)


def inputs(batch):
    """Latents, prompt embeddings, timesteps and noise of one training step, by the names of `diffusion_loss`."""
    latents = torch.randn(batch, 4, SIDE, SIDE)
    return {
        "noise_scheduler": DDPMScheduler(),
        "latents": latents,
        "encoder_hidden_states": torch.randn(batch, *TEXT),
        "timesteps": torch.randint(1000, (batch,)),
        "noise": torch.randn_like(latents),
    }


def call(script, *words, **flags):
    """Run a script of the project in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what accelerate shares within a process must not leak from one run to the next
    argv = list(words)
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    script.main(script.parse_args(argv))


def alternate(functions, rounds):
    """Run functions in turn, each way round every other time, after one run of each that does not count.

    Returns:
        `dict[str, list[dict]]`: `wall` and `cpu` seconds (of this process) of each run, by the function's name.
    """
    runs = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        names = list(functions)[:: 1 if round_number % 2 else -1]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            if round_number:
                runs[name].append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
        if round_number:
            print(f"round {round_number}:", {name: round(runs[name][-1]["cpu"], 2) for name in names}, flush=True)
    return runs


def median(runs, clock="cpu"):
    return statistics.median(run[clock] for run in runs)


def ratio(runs, reference, clock="cpu"):
    """The median of the ratios of runs in one round: what slows the whole machine for a while weighs on both."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(runs, reference, strict=True))


def write(name, **content):
    """Write `results/<name>.json`, with the machine and the versions."""
    content = {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, {torch.get_num_threads()} thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "gpu": "not measured",
        **content,
    }
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"Wrote {path.relative_to(HERE.parent)}")
