"""Memory and time of a build as the number of prompts grows.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

The demo's model draws 1,000, 10,000 and 100,000 different prompts in one sampler step: each time
`build_nullspace.py` in a process of its own, whose peak resident memory is read when it has ended. Pictures are small,
16 x 16: how memory grows with the prompts does not depend on that. Writes `results/scaling.json`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, write

from world import COLOURS, SHAPES, SIZES


COUNTS = (1_000, 10_000, 100_000)
FLAGS = ("--num_inference_steps", "1", "--guidance_scale", "1", "--resolution", "16", "--batch_size", "100")


def write_prompts(path, count):
    words = [list(names) for names in (SIZES, COLOURS, SHAPES)]
    with open(path, "w") as file:
        for index in range(count):
            size, colour, shape = (names[index % len(names)] for names in words)
            file.write(f"picture {index} of a {size} {colour} {shape}\n")


def build(folder, count):
    """Peak resident bytes, and seconds of CPU and wall, of one build."""
    write_prompts(folder / "prompts.txt", count)
    command = [sys.executable, HERE.parent / "build_nullspace.py", *FLAGS, "--prompts_file", folder / "prompts.txt"]
    command += ["--pretrained_model_name_or_path", HERE.parent / "demo" / "shapes-sd", "--output_dir", folder / "out"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "the build failed"
    return {
        "prompts": count,
        "bytes": usage.ru_maxrss * 1024,
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": time.perf_counter() - start,
    }


def main():
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in COUNTS:
            runs.append(build(Path(scratch), count))
            print(runs[-1], flush=True)
    fewest, most = runs[0], runs[-1]
    write(
        "scaling",
        setting="the demo's model, 16 x 16, 1 sampler step without guidance, batches of 100, one process, one thread",
        ratio=most["bytes"] / fewest["bytes"],
        ratio_of="peak memory for the most prompts, against that for the fewest",
        seconds_per_1000_prompts=1000 * (most["cpu"] - fewest["cpu"]) / (most["prompts"] - fewest["prompts"]),
        processes="not measured: the two cores were shared with other work",
        runs=runs,
    )


if __name__ == "__main__":
    main()
