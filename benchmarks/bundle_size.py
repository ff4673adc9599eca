"""What a bundle of a Stable Diffusion 1.x model takes on disk and at start-up, for three ways to store it.

    python benchmarks/bundle_size.py

The layer sizes are those of the model's 16 cross-attention layers; the moments are synthetic, with eigenvalues that
fall as a power of their rank, since size and time depend on the shapes alone. Writes `results/bundle_size.json`.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from nullspace.bundle import Bundle  # noqa: E402
from nullspace.layers import attention_inputs  # noqa: E402
from nullspace.names import FORMAT_VERSION, JOINT, TEXT_INPUT  # noqa: E402
from nullspace.spectrum import Spectrum  # noqa: E402


ENERGY = 0.999


def synthetic_sum(size, generator):
    """A sum of x x^T (size, size) over as many tokens as directions times 100, with a power-law spectrum."""
    x = torch.randn(100 * size, size, generator=generator) * torch.arange(1, size + 1) ** -1.0
    mix = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    x = x @ mix
    return x.T @ x, len(x)


def eigenvectors(matrix):
    return torch.linalg.eigh(matrix).eigenvectors.contiguous()


def triangle(matrix):
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def decompose(flat, size):
    """The eigenvectors of a symmetric matrix that is stored as its upper triangle."""
    matrix = torch.zeros(size, size)
    matrix[tuple(torch.triu_indices(size, size))] = flat
    return torch.linalg.eigh(matrix, UPLO="U").eigenvectors


def timed(function, repeats=5):
    """The function's result and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def main():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    inputs = attention_inputs(unet)
    generator = torch.Generator().manual_seed(0)
    sums, sizes = {}, {name: unet.get_submodule(module).in_features for module, name in inputs.items()}
    for source, size in tqdm(sizes.items(), desc="Moments"):
        sums[source] = synthetic_sum(size, generator)
    modules = {
        name: {"input": source, "in_features": sizes[source], "out_features": unet.get_submodule(name).out_features}
        for name, source in inputs.items()
    }
    config = {"format_version": FORMAT_VERSION, "modules": modules}
    config["groups"] = [{"name": JOINT, "timesteps": [0], "range": [0, 999]}]
    config["base_model"] = {"id": "synthetic"}
    exact, spectra = {}, {JOINT: {}, TEXT_INPUT: {}}
    for source, (total, tokens) in tqdm(sums.items(), desc="Eigenvectors"):
        exact[source] = torch.linalg.eigh(total.double() / tokens).eigenvectors.flip(1)
        spectra[TEXT_INPUT if source == TEXT_INPUT else JOINT][source] = Spectrum.from_sum(total, tokens, source)

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        Bundle(config, spectra).save(folder)
        files = sorted(folder.glob("*.safetensors"))
        _, reading = timed(lambda: [load_file(path) for path in files])
        protected, ready = timed(lambda: Bundle.load(folder).protected(JOINT, "energy", ENERGY))
        # How far a protected direction of the full precision sticks out of the one that is stored.
        lost = 0.0
        for name, item in protected.items():
            vectors = exact[inputs[name]][:, : item.rank]
            kept = item.basis[:, : item.rank].double()
            lost = max(lost, ((vectors - kept @ (kept.T @ vectors)).norm() / vectors.norm()).item())
        results["a bundle: eigenvectors in float32"] = {
            "bytes": sum(path.stat().st_size for path in files),
            "bytes_without_text": (folder / "joint.safetensors").stat().st_size,
            "seconds_to_read": reading,
            "seconds_to_projectors": ready,
            "largest_deviation_of_protected_space": lost,
        }

        for name, pack, unpack in (
            ("eigenvectors in float16", lambda matrix: eigenvectors(matrix).half(), lambda stored, _: stored.float()),
            ("C in float32, upper triangle", triangle, decompose),
        ):
            path = Path(scratch) / "other.safetensors"
            save_file({source: pack(total / tokens) for source, (total, tokens) in sums.items()}, path)

            def projectors(path=path, unpack=unpack):
                return {source: unpack(stored, sizes[source]) for source, stored in load_file(path).items()}

            results[name] = {
                "bytes": path.stat().st_size,
                "seconds_to_read": timed(lambda path=path: load_file(path))[1],
                "seconds_to_projectors": timed(projectors, 3)[1],
            }

    best = results["a bundle: eigenvectors in float32"]
    written = {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "bytes": best["bytes"],
        "bytes_per_further_group": best["bytes_without_text"],
        "seconds": best["seconds_to_projectors"],
        "ways": results,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "bundle_size.json").write_text(json.dumps(written, indent=2) + "\n")
    for name, row in results.items():
        print(name, {key: value if isinstance(value, int) else round(value, 5) for key, value in row.items()})


if __name__ == "__main__":
    main()
