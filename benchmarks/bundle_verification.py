"""How far what a bundle claims may lie from what is measured: honest bundles and forged ones.

    OMP_NUM_THREADS=1 python benchmarks/bundle_verification.py

The demo's two models verify bundles of their own, built with other prompts, seeds, precisions, samplers and numbers of
steps, as the trainer does before it trains, in float32 and bfloat16 and from several seeds, and forgeries of one of
these bundles. Of every input it notes how much energy is let through, claimed and measured, and what of the limit of
`nullspace.verify` the measured share is: an honest bundle must stay below 1 at all inputs, a forged one come above it
at one. Takes about 3 minutes. Writes `results/bundle_verification.json`.

With --sd15 it does so with random weights of Stable Diffusion 1.5's size, drawn at 256 pixels, instead. Writes
`results/bundle_verification_sd15.json`, after each part: `measured` says what was until then. One model is in memory at
a time, in one precision, and one forgery, so that it stays below 6 GB.
"""

import argparse
import copy
import gc
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from common import HERE, TEXT, sd1_unet, write
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import build_nullspace
from nullspace.bundle import Bundle
from nullspace.collection import collect, load_collected
from nullspace.families import recognise
from nullspace.models import download_model
from nullspace.names import JOINT, TIMELESS
from nullspace.prompts import read_prompts
from nullspace.spectrum import Spectrum
from nullspace.verify import BESIDES, PROMPTS, STEPS, TIMES, compare, read


DEMO = HERE.parent / "demo"
MODELS = (DEMO / "shapes-sd", DEMO / "shapes-lcm")
SD15 = "random-sd15"
DTYPES = (torch.float32, torch.bfloat16)
SEEDS = (None, 100)  # the bundle's own, and another
FLAGS_OF = {
    "shapes-sd": "--num_inference_steps 10 --with_text_encoder --attention all",
    "shapes-lcm": "--with_text_encoder --attention all",
    SD15: "--num_inference_steps 4 --resolution 256 --max_prompts 12 --batch_size 4",
}
# How an honest bundle is built, besides the model and --max_prompts 30
HONEST = {
    "bfloat16": "--mixed_precision bf16",
    "10 prompts": "--max_prompts 10",
    "1 prompt": "--max_prompts 1",
    "other prompts, another seed": "--prompts_file demo/world/heldout_combinations.txt --seed 1000",
}
OF_MODEL = {
    "shapes-sd": {
        "4 steps": "--num_inference_steps 4",
        "Euler a": "--sampler euler_a",
    },
    "shapes-lcm": {"1 step": "--num_inference_steps 1"},
    SD15: {},
}


def load(model, scratch, flags=""):
    """The pipeline of a model's folder, its prompts and the builder's flags."""
    words = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(scratch / "out")]
    words += ["--prompts_file", str(DEMO / "world" / "protected.txt"), "--max_prompts", "30", "--batch_size", "50"]
    words += [*FLAGS_OF[model.name].split(), *flags.split()]
    args = build_nullspace.parse_args(words)
    family = recognise(args.pretrained_model_name_or_path)
    args.model_type = family.name
    for name, value in family.collection.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    prompts = read_prompts(args)
    args.base_model = download_model(args.pretrained_model_name_or_path)
    return load_collected(family, args.base_model, prompts, print, args), prompts, args


def build(model, scratch, flags=""):
    pipeline, prompts, args = load(model, scratch, flags)
    moments, groups, config, checkpoint = collect(pipeline, prompts, args.base_model, args, PartialState())
    checkpoint.remove()
    bundle = Bundle.from_moments(moments, groups, config)
    bundle.config["tokens"] = {name: dict.fromkeys(spectra) for name, spectra in bundle.spectra.items()}
    return bundle


def make_sd15(folder):
    """A pipeline of Stable Diffusion 1.5's text encoder and UNet with random weights; the VAE is not used."""
    tokenizer = CLIPTokenizer.from_pretrained(MODELS[0] / "tokenizer", model_max_length=TEXT[0])
    unet = sd1_unet()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT[1], intermediate_size=4 * TEXT[1], num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=TEXT[0], bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


# ---- Forgeries: each of a spectrum, by the number of directions that are closed --------------------------------------


def with_vectors(spectrum, vectors):
    """The spectrum with eigenvectors (in, in), all of them in float32."""
    return spectrum._replace(eigenvectors=vectors.contiguous(), rest=None)


def shuffled(spectrum, indices, generator):
    """The spectrum in which the eigenvectors of these indices stand in another order."""
    order = torch.arange(len(spectrum.eigenvalues))
    order[indices] = indices[torch.randperm(len(indices), generator=generator)]
    return with_vectors(spectrum, spectrum.orthonormal()[:, order])


def some_held_back(share):
    def forge(spectrum, rank, generator):
        size = len(spectrum.eigenvalues)
        chosen = rank + torch.randperm(size - rank, generator=generator)[: max(2, round(share * (size - rank)))]
        return shuffled(spectrum, chosen, generator)

    return forge


def random_vectors(spectrum, rank, generator):
    size = len(spectrum.eigenvalues)
    return with_vectors(spectrum, torch.linalg.qr(torch.randn(size, size, generator=generator)).Q)


def swap(spectrum, first, second):
    order = torch.arange(len(spectrum.eigenvalues))
    order[[first, second]] = order[[second, first]]
    return with_vectors(spectrum, spectrum.orthonormal()[:, order])


def nothing_held_back(spectrum, rank, generator):
    values = spectrum.eigenvalues.clone()
    values[rank:] = 0
    return spectrum._replace(eigenvalues=values)


FORGERIES = {
    "random orthonormal vectors": random_vectors,
    "reversed eigenvectors": lambda spectrum, *_: with_vectors(spectrum, spectrum.orthonormal().flip(1)),
    "leading ones right, held-back ones shuffled": some_held_back(1),
    "half of the held-back ones shuffled": some_held_back(0.5),
    "a fifth of the held-back ones shuffled": some_held_back(0.2),
    "held-back eigenvalues zero": nothing_held_back,
    "the first direction free": lambda spectrum, rank, _: swap(spectrum, 0, -1),
    "the last closed direction free": lambda spectrum, rank, _: swap(spectrum, rank - 1, -1),
    "the first held-back direction free": lambda spectrum, rank, _: swap(spectrum, rank, -1),
}


def shuffled_model(bundle, pipeline):
    """The spectra of a bundle of the same model with its weights shuffled, in place: another one, of the same sizes."""
    generator = torch.Generator().manual_seed(0)
    for part in (pipeline.unet, pipeline.text_encoder):
        for parameter in part.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            # In place, for a file that weights were loaded from stays in memory until the last is replaced
            parameter.data.copy_(parameter.data.flatten()[order].view_as(parameter))
    moments = read(bundle, pipeline, prompts=8, whole=True)

    def spectrum_of(source, tokens):
        return Spectrum.from_sum(moments[source] * tokens, tokens)

    return {
        group: {source: spectrum_of(source, item.tokens) for source, item in spectra.items()}
        for group, spectra in bundle.spectra.items()
        if group in (JOINT, *TIMELESS)
    }


def forge(bundle, change, seed):
    forged = Bundle(copy.deepcopy(bundle.config))
    generator = torch.Generator().manual_seed(seed)
    for group, spectra in bundle.spectra.items():
        forged.spectra[group] = {
            source: change(spectrum, spectrum.rank(), generator) for source, spectrum in spectra.items()
        }
    return forged


# ---- The experiment --------------------------------------------------------------------------------------------------


def read_all(bundle, model, scratch):
    """What the model in each precision reads from each seed, and the least seconds: `dict[dtype, (list, float)]`."""
    found = {}
    for dtype in DTYPES:
        pipeline = load(model, scratch)[0].to(dtype)
        moments, seconds = [], []
        for seed in SEEDS:
            start = time.perf_counter()
            moments.append(read(bundle, pipeline, seed=seed))
            compare(bundle, moments[-1])
            seconds.append(time.perf_counter() - start)
        found[dtype] = moments, min(seconds)
        del pipeline
        gc.collect()  # a pipeline refers to itself
    return found


def examine(kind, model, bundle, readings, honest):
    """A row for each precision: of all seeds and inputs, the largest and the smallest share of the limit."""
    for dtype, (moments, seconds) in readings.items():
        runs = [compare(bundle, each) for each in moments]
        findings = [finding for run in runs for finding in run]
        of_limit = [finding.measured / finding.limit for finding in findings]
        times = [finding.measured / max(finding.claimed, 1e-12) for finding in findings]
        row = {
            "model": model.name,
            "bundle": kind,
            "honest": honest,
            "dtype": str(dtype).removeprefix("torch."),
            "inputs": len(runs[0]),
            "claimed": [min(item.claimed for item in findings), max(item.claimed for item in findings)],
            "measured": [min(item.measured for item in findings), max(item.measured for item in findings)],
            "measured / claimed": [min(times), max(times)],
            "measured / limit": [min(of_limit), max(of_limit)],
            "besides": max(item.measured - TIMES * item.claimed for item in findings),
            "inputs above the limit": [sum(not item.holds for item in run) for run in runs],
            "seconds": seconds,
        }
        if honest:
            worst = max(findings, key=lambda item: item.measured / item.limit)
            row["worst"] = worst._asdict()
        show = "{:11.11} {:45.45} {:9} claimed {:.0e}-{:.0e} measured {:.0e}-{:.0e} x {:.1f}-{:.1f} "
        show += "of limit {:.3f}-{:.3f} besides {:.1e} above {} of {} {:.2f} s"
        print(
            show.format(
                model.name, kind, row["dtype"], *row["claimed"], *row["measured"], *row["measured / claimed"],
                *row["measured / limit"], row["besides"], row["inputs above the limit"], row["inputs"], row["seconds"],
            ), flush=True,
        )  # fmt: skip
        yield row


def main():
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true", help="Random weights of Stable Diffusion 1.5's size.")
    args = parser.parse_args()
    rows, bundles, readings = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        models = [make_sd15(scratch / SD15)] if args.sd15 else MODELS
        gc.collect()
        for model in models:
            bundles[model] = build(model, scratch)
            readings[model] = read_all(bundles[model], model, scratch)
            rows += examine("as forged below", model, bundles[model], readings[model], True)
            write_rows(rows, models)
        for model in models:
            for kind, bundle in forged(model, models, bundles, scratch):
                rows += examine(kind, model, bundle, readings[model], False)
            write_rows(rows, models)
        readings.clear()
        for model in models:
            for kind, flags in {**HONEST, **OF_MODEL[model.name]}.items():
                bundle = build(model, scratch, flags)
                rows += examine(kind, model, bundle, read_all(bundle, model, scratch), True)
                write_rows(rows, models)


def forged(model, models, bundles, scratch):
    """Each forgery of a model's bundle, one after the other: its kind and the `Bundle`."""
    honest = bundles[model]
    for kind, change in FORGERIES.items():
        yield kind, forge(honest, change, 0)
    for other in models:
        if other != model:
            yield f"that of {other.name}", Bundle(copy.deepcopy(honest.config), bundles[other].spectra)
    spectra = shuffled_model(honest, load(model, scratch)[0])
    gc.collect()
    yield "that of shuffled weights", Bundle(copy.deepcopy(honest.config), spectra)


def write_rows(rows, models):
    write(
        "bundle_verification_sd15" if models[0].name == SD15 else "bundle_verification",
        setting=f"{' and '.join(model.name for model in models)}, {PROMPTS} prompts in {STEPS} steps, all prompts "
        f"through the text encoder; the limit is {TIMES} times the claimed share and {BESIDES:g}; figures are "
        "[smallest, largest] over inputs and seeds",
        measured=list(dict.fromkeys(row["bundle"] for row in rows)),
        seeds=SEEDS,
        rows=rows,
    )


if __name__ == "__main__":
    main()
