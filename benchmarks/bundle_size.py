"""What a bundle takes on disk and at start-up, for the layers of Stable Diffusion 1.x and SDXL, and what it costs.

    python benchmarks/bundle_size.py

The layer sizes are those of the models' cross-attention; the moments are made up, with eigenvalues that fall as a power
of their rank, since size and time depend on the shapes alone; inputs of one size share theirs. Ways to store their
eigenvectors are compared by the drift of a LoRA that is free but for what is closed and held back, in closed form: of
A = A~ P, with A~ of white noise and P of the stored vectors, tr(P C P^T), as a multiple of that of the exact vectors.
Writes `results/bundle_size.json`.
"""

import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from nullspace.bundle import Bundle  # noqa: E402
from nullspace.layers import attention_inputs  # noqa: E402
from nullspace.names import FORMAT_VERSION, JOINT, TEXT_INPUT  # noqa: E402
from nullspace.spectrum import Spectrum  # noqa: E402


DECAY = 1.5  # of the eigenvalues with their rank: 0.9 of the energy is in 2% to 10% of the directions
SOFTNESSES = (1e-5, 1e-6, 1e-7)
COMPARED, DECADES = 320, 6  # the size of input at which drifts are compared, and what its eigenvalues fall by
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
UNETS = {"Stable Diffusion 1.x": {"cross_attention_dim": 768}, "SDXL": SDXL}


def synthetic_spectrum(size, generator):
    """The spectrum of a made-up second moment (size, size): random directions, a power law."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    stored = basis.float().contiguous()
    distances = (stored - basis).norm(dim=0).float()
    return Spectrum(torch.arange(1, size + 1) ** -DECAY, stored, 100 * size, distances)


def synthetic_bundle(unet, spectra):
    """A joint bundle of a UNet's cross-attention with made-up spectra, one for each size of input."""
    modules = {}
    for name, source in attention_inputs(unet).items():
        layer = unet.get_submodule(name)
        modules[name] = {"input": source, "in_features": layer.in_features, "out_features": layer.out_features}
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": {"id": "synthetic", "revision": None, "variant": None, "fingerprint": {"unet": "0" * 64}},
        "model_type": "sd", "sampler": "ddim", "num_inference_steps": [25], "guidance_scale": 7.5, "resolution": 512,
        "attention": "cross", "seed": 0, "modules": modules,
        "prompts": {"source": "none", "count": 1, "sha256": "0" * 64, "examples": []},
        "groups": [{"name": JOINT, "timesteps": [0], "range": [0, 999]}],
    }  # fmt: skip
    held = {JOINT: {}, TEXT_INPUT: {}}
    for info in modules.values():
        source, item = info["input"], spectra[info["in_features"]]
        copied = (part.clone() if isinstance(part, torch.Tensor) else part for part in item)
        held[TEXT_INPUT if source == TEXT_INPUT else JOINT][source] = Spectrum(*copied)  # safetensors shares no tensor
    return Bundle(config, held)


# ---- Ways to store eigenvectors: each gives the spectrum that is read again, and the bytes of its tensors -----------


def in_8_bits(matrix):
    """A matrix rounded to 8 bits with a scale a column, and its bytes."""
    scale = matrix.abs().amax(0, keepdim=True).clamp_min(1e-30) / 127
    return (matrix / scale).round() * scale, matrix.numel() + 4 * matrix.shape[1]


def in_16_bits(matrix):
    return matrix.half().float(), 2 * matrix.numel()


def format_2(full):
    return full, full.eigenvectors.nbytes


def format_3(full):
    packed = full.pack()
    return full._replace(eigenvectors=packed.orthonormal()), sum(part.nbytes for _, part in packed.parts())


def reflections_in_8_bits(full):
    packed = full.pack()
    size = len(full.eigenvalues) - packed.exact
    below = torch.ones(size, size, dtype=torch.bool).tril(-1)
    reflections = torch.zeros(size, size)
    reflections[below] = packed.rest.float()
    rounded = packed._replace(rest=in_8_bits(reflections)[0][below].half())  # which adds little
    stored = packed.eigenvectors.nbytes + packed.rest.nbytes // 2 + 4 * size
    return full._replace(eigenvectors=rounded.orthonormal()), stored


def columns(rounded):
    """The others rounded as columns, and orthogonal to the leading ones again."""

    def way(full):
        leading = full.pack().eigenvectors
        others, stored = rounded(full.eigenvectors[:, leading.shape[1] :])
        others = others - leading @ (leading.T @ others)
        return full._replace(eigenvectors=torch.cat((leading, others), 1)), leading.nbytes + stored

    return way


def leading_alone(full):
    """None of the others, all of them held back by their mean: any basis of what is left will do."""
    leading, eigenvalues = full.pack().eigenvectors, full.eigenvalues.clone()
    exact = leading.shape[1]
    basis = torch.linalg.qr(leading.double(), mode="complete").Q.float()
    eigenvalues[exact:] = eigenvalues[exact:].mean()
    return full._replace(
        eigenvalues=eigenvalues, eigenvectors=torch.cat((leading, basis[:, exact:]), 1)
    ), leading.nbytes


BUNDLES = "16-bit reflections"  # the way of bundles today, format 3
WAYS = {  # the leading directions are in float32 in all of them
    "float32": format_2,
    BUNDLES: format_3,
    "8-bit reflections": reflections_in_8_bits,
    "16-bit columns": columns(in_16_bits),
    "8-bit columns": columns(in_8_bits),
    "leading alone": leading_alone,
}


def drift(stored, full, exact, softness):
    """That of a LoRA that is free but for the `exact` directions closed, and what a stored spectrum holds back."""
    others = stored.eigenvectors[:, exact:]
    let_through = (others * stored.gains(softness)[exact:]) @ (others.T @ (full.eigenvectors * full.eigenvalues.sqrt()))
    return let_through.norm().item()


def main():
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        unets = {name: UNet2DConditionModel(**config) for name, config in UNETS.items()}
    counts = {}
    for name, unet in unets.items():
        widths = {source: unet.get_submodule(module).in_features for module, source in attention_inputs(unet).items()}
        counts[name] = Counter(widths.values())
    sizes = sorted({size for count in counts.values() for size in count})
    full = {size: synthetic_spectrum(size, generator) for size in sizes}
    packed = {size: item.pack() for size, item in tqdm(full.items(), desc="Packing")}

    # Where precision matters: what is held back reaches over many orders of magnitude
    steep = full[COMPARED]._replace(eigenvalues=torch.logspace(0, -DECADES, COMPARED))
    ways = {}
    for way, store in WAYS.items():
        row = {"bytes": dict.fromkeys(counts, 0), "drift": {}}
        for size in sizes:
            _, stored = store(full[size])
            for name, count in counts.items():
                row["bytes"][name] += count[size] * stored
        again, _ = store(steep)
        for softness in SOFTNESSES:
            found = drift(again, steep, steep.pack().exact, softness)
            row["drift"][str(softness)] = found / drift(steep, steep, steep.pack().exact, softness)
        ways[way] = row
        print(way, row)

    models = {}
    for name, unet in unets.items():
        with tempfile.TemporaryDirectory() as scratch:
            synthetic_bundle(unet, packed).save(Path(scratch) / "bundle")
            start = time.perf_counter()
            bundle = Bundle.load(Path(scratch) / "bundle")
            loaded = time.perf_counter()
            bundle.protected()
            ready = time.perf_counter()
            files = {path.name: path.stat().st_size for path in (Path(scratch) / "bundle").glob("*.safetensors")}
        models[name] = {"bytes": sum(files.values()), "bytes_without_text": files["joint.safetensors"]}
        models[name] |= {"seconds_to_load": loaded - start, "seconds_to_projectors": ready - start}
        print(name, models[name])

    first = next(iter(models.values()))
    written = {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "directions_in_float32": {size: item.exact for size, item in packed.items()},
        "inputs": counts,
        "models": models,
        "ways": ways,
        "bytes": first["bytes"],
        "bytes_per_further_group": first["bytes_without_text"],
        "seconds": first["seconds_to_projectors"],
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "bundle_size.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
