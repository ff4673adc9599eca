"""Bytes and FLOPs of a build and of a training step, as functions of prompts, steps, resolution and processes.

    python benchmarks/cost_model.py

FLOPs of the UNets are counted by torch on models without weights (the meta device); what the null space adds follows
from the layers' sizes by the formulas of `benchmarks/README.md`. Prints its tables and writes
`results/cost_model.json`, with what is measured in `results/` next to what the model says.
"""

import json
import statistics

import torch
from common import HERE, write
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from nullspace.layers import attention_inputs
from nullspace.moments import TILES
from nullspace.names import TEXT_INPUT


SD1 = {"cross_attention_dim": 768}
MODELS = {
    "SD 1.5": (SD1, 64),
    "LCM (of SD 1.5)": (SD1 | {"time_cond_proj_dim": 256}, 64),
    "SDXL size": (
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
        },
        128,
    ),
}
TEXT_TOKENS, COMPUTED = 77, (TILES + 1) / (2 * TILES)  # the latter of the entries of each x^T x
# Assumed: an A100's dense throughput by its data sheet, at 40% utilisation; a network of 200 Gbit/s; a CPU that
# decomposes in float64 at 60 GFLOP/s (half of what `bundle_size.py` reached in float32 on 2 cores); a start of 60 s.
GPU_FLOPS = {"bf16": 0.4 * 312e12, "tf32": 0.4 * 156e12, "float32": 0.4 * 19.5e12}
NETWORK, CPU_FLOPS, START = 25e9, 60e9, 60.0
PROMPTS, PROCESSES = 1_000_000, 64


def measure(config, side):
    """FLOPs of one forward pass for one picture, and (name, tokens, in, modules) of each input of cross-attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        sample, text = torch.empty(1, 4, side, side), torch.empty(1, TEXT_TOKENS, config["cross_attention_dim"])
        extra = {"timestep_cond": torch.empty(1, 256)} if "time_cond_proj_dim" in config else {}
    tokens, users = {}, {}
    for name, source in attention_inputs(unet).items():
        layer = unet.get_submodule(name)
        users.setdefault(source, []).append(layer)

        def read(module, args, source=source):
            tokens[source] = args[0].shape[1]

        layer.register_forward_pre_hook(read)
    with FlopCounterMode(display=False) as counter:
        unet(sample, torch.empty(1, device="meta"), text, **extra)
    inputs = [(source, tokens[source], layers[0].in_features, len(layers)) for source, layers in users.items()]
    return counter.get_total_flops(), inputs


def build_cost(forward, inputs, guidance=True):
    """What one prompt at one sampler step costs, and what the sums take.

    Returns:
        `dict`: `flops` of sampling, `collect_flops` for all x^T x of a step, `collect_once_flops` for that of the
        prompt's embeddings, `bytes` of the float32 sums of one group, `eigh_flops` of decomposing them.
    """
    branches = 2 if guidance else 1
    per_step = [(tokens, size) for source, tokens, size, _ in inputs if source != TEXT_INPUT]
    text = next(size for source, _, size, _ in inputs if source == TEXT_INPUT)
    return {
        "flops": branches * forward,
        "collect_flops": branches * sum(COMPUTED * 2 * tokens * size**2 for tokens, size in per_step),
        "collect_once_flops": branches * COMPUTED * 2 * TEXT_TOKENS * text**2,
        "bytes": 4 * sum(size**2 for _, size in per_step),
        "bundle_bytes": sum(size**2 + 8 * size for _, size in per_step),  # and the leading directions, which are few
        "text_bytes": 4 * text**2,
        "eigh_flops": 9 * sum(size**3 for _, size in per_step),
    }


def step_cost(forward, inputs, rank, closed=0.1):
    """What the projections of one training step cost, for a share of the directions that is closed.

    The backward pass of a LoRA needs the gradients of the activations but hardly any of the weights, about as much as
    the forward pass again. The gradient of each A (rank, in) and its change are multiplied by the matrix (in, in) that
    holds back, and they and the value by the k closed directions and back again.
    """
    kept = [(size, round(closed * size), modules) for _, _, size, modules in inputs]
    return {
        "flops": 2 * forward,
        "projection_flops": sum(4 * rank * size * (size + 3 * k) * modules for size, k, modules in kept),
        "projector_bytes": sum(2 * size**2 + 4 * size * k for size, k, _ in kept),
    }


def seconds_of_build(cost, prompts, steps, processes, groups=1):
    """What each process draws, and what takes as long however many there are.

    Sampling runs in bf16 and collecting in TF32; the all-reduce sends and receives the sums about twice; one process
    decomposes all groups, and the joint one besides, on its CPU.
    """
    collected = steps * cost["collect_flops"] + cost["collect_once_flops"]
    each = steps * cost["flops"] / GPU_FLOPS["bf16"] + collected / GPU_FLOPS["tf32"]
    sums = groups * cost["bytes"] + cost["text_bytes"]
    return {
        "drawing": prompts / processes * each,
        "all_reduce": 2 * sums / NETWORK if processes > 1 else 0.0,
        "decomposing": (groups + (groups > 1)) * cost["eigh_flops"] / CPU_FLOPS,
        "start": START,
        "sums_bytes": sums,
    }


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def read_result(name):
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def main():
    models, rows, steps_rows = {}, [], []
    for name, (config, side) in MODELS.items():
        for scale in (0.5, 1, 2) if name == "SD 1.5" else (1,):
            forward, inputs = measure(config, int(side * scale))
            build = build_cost(forward, inputs, guidance=not name.startswith("LCM"))
            step = {rank: step_cost(forward, inputs, rank) for rank in (4, 64)}
            pixels = int(8 * side * scale)
            models[f"{name}, {pixels}"] = {"forward_flops": forward, "build": build, "step": step}
            rows.append(
                [
                    f"{name}, {pixels}",
                    f"{build['flops'] / 1e12:.2f} T",
                    f"{build['collect_flops'] / 1e9:.0f} G",
                    f"{build['collect_flops'] / build['flops']:.1%}",
                    f"{(build['bytes'] + build['text_bytes']) / 1e6:.0f} MB",
                    f"{build['bundle_bytes'] / 1e6:.0f} MB",
                    f"{build['eigh_flops'] / 1e12:.2f} T",
                ]
            )
            steps_rows.append(
                [
                    f"{name}, {pixels}",
                    f"{step[4]['flops'] / 1e12:.2f} T",
                    *(f"{step[rank]['projection_flops'] / 1e9:.2f} G" for rank in step),
                    f"{step[64]['projection_flops'] / step[64]['flops']:.2%}",
                    f"{step[4]['projector_bytes'] / 1e6:.0f} MB",
                ]
            )
    print("One prompt at one sampler step, and one group of timesteps:\n")
    print(table(["", "sampling", "collecting", "share", "float32 sums", "bundle file", "decomposing"], rows))
    print("One training step of one picture, a tenth of the directions closed and the others held back:\n")
    print(table(["", "forward, backward", "projections, r 4", "r 64", "share, r 64", "directions held"], steps_rows))

    paper, shown = {}, []
    for name, steps, groups in (
        ("SD 1.5, 512", 30, 1),
        ("SD 1.5, 512", 30, 30),
        ("LCM (of SD 1.5), 512", 15, 8),  # of its 15 steps some visit the same timestep
        ("SDXL size, 1024", 30, 1),
        ("SDXL size, 1024", 30, 30),
    ):
        row = seconds_of_build(models[name]["build"], PROMPTS, steps, PROCESSES, groups)
        fixed = row["all_reduce"] + row["decomposing"] + row["start"]
        row["processes_at_half_efficiency"] = round(row["drawing"] * PROCESSES / fixed)
        paper[f"{name}, {groups} group{'s' * (groups > 1)}"] = row | {"steps": steps}
    for name, row in paper.items():
        times = [f"{row['drawing'] / 3600:.1f} h", f"{row['all_reduce']:.2f} s", f"{row['decomposing']:.0f} s"]
        shown.append([name, row["steps"], *times, f"{row['sums_bytes'] / 1e9:.1f} GB"])
        shown[-1].append(f"{row['processes_at_half_efficiency']:,}")
    header = [
        "",
        "sampler steps",
        "drawing",
        "all-reduce",
        "decomposing",
        "sums on each GPU",
        "GPUs at half efficiency",
    ]
    print(f"{PROMPTS:,} prompts on {PROCESSES} A100 (assumed, see the script):\n")
    print(table(header, shown))

    build, step = models["SD 1.5, 512"]["build"], models["SD 1.5, 512"]["step"]
    on_gpu = {
        "build ratio": 1 + build["collect_flops"] / build["flops"] * GPU_FLOPS["bf16"] / GPU_FLOPS["tf32"],
        **{
            f"step ratio, rank {rank}": 1
            + cost["projection_flops"] / cost["flops"] * GPU_FLOPS["bf16"] / GPU_FLOPS["float32"]
            for rank, cost in step.items()
        },
    }
    print("On that GPU, were it kept busy, SD 1.5 at 512:", {name: round(value, 3) for name, value in on_gpu.items()})

    checks, sd1 = {}, models["SD 1.5, 512"]
    if measured := read_result("build_overhead"):
        build = models["SD 1.5, 256"]["build"]  # as it was measured
        ratio = 1 + (build["collect_flops"] + build["collect_once_flops"]) / build["flops"]
        checks["build ratio, 256"] = {"model": ratio, "measured": measured["ratio"]}
    if measured := read_result("step_overhead"):
        for rank, result in measured["ranks"].items():
            cost = sd1["step"][int(rank)]
            checks[f"step ratio, rank {rank}"] = {
                "model": 1 + cost["projection_flops"] / cost["flops"],
                "measured": result["ratio, protected"],
                "measured_projections": result["projections_per_step"],
            }
        seconds = {
            kind: statistics.median(run["cpu"] for run in runs) for kind, runs in measured["ranks"]["4"]["runs"].items()
        }
        checks["FLOP/s of a CPU core"] = {
            "training step": sd1["step"][4]["flops"] / seconds["plain"],
            "sampler step": sd1["build"]["flops"] / seconds["sample"],
        }
    if measured := read_result("bundle_size"):
        checks["bytes of a further group"] = {
            "model": sd1["build"]["bundle_bytes"], "measured": measured["bytes_per_further_group"]
        }  # fmt: skip
    for name, check in checks.items():
        print(name, check)
    write(
        "cost_model",
        models=models,
        on_paper=paper,
        on_one_gpu_computed=on_gpu,
        assumed={"gpu_flops": GPU_FLOPS, "network": NETWORK, "cpu_flops": CPU_FLOPS, "start": START},
        checks=checks,
    )


if __name__ == "__main__":
    main()
