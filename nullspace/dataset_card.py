"""What people see of a bundle: its card, a picture of its spectra and a table of ranks."""

import shlex
from pathlib import Path
from statistics import median

import torch
from huggingface_hub import DatasetCardData

from nullspace.bundle import group_file
from nullspace.families import get_family
from nullspace.markdown import code_block, code_span, link, plain, table_cell, utf8
from nullspace.names import (
    CARD_NAME,
    CONFIG_NAME,
    ENERGIES,
    JOINT,
    TABLE_NAME,
    TEXT_ENCODERS,
    TEXT_INPUT,
)  # fmt: skip


THIS_REPOSITORY = "<this repository>"  # in a card's command, until it is known


def rank_table(bundle):
    """Header and rows of strings: for each size of layer input, how many directions hold how much of the energy."""
    header = ["input size", "inputs", "layers", *(f"rank at {energy}" for energy in ENERGIES), "bytes"]
    kinds = {JOINT: "", TEXT_INPUT: " (text)", **{name: f" ({name.replace('_', ' ')})" for name in TEXT_ENCODERS}}
    by_kind = {}
    for row in bundle.table():
        if row["group"] in kinds:
            by_kind.setdefault((list(kinds).index(row["group"]), row["in_features"], row["group"]), []).append(row)
    rows = []
    for (_, size, group), members in sorted(by_kind.items()):
        unique = {row["input"]: row for row in members}.values()
        ranks = [f"{median(row[f'rank_{energy}'] for row in unique):g}" for energy in ENERGIES]
        stored = sum(part.nbytes for row in unique for _, part in bundle.spectra[group][row["input"]].parts())
        rows.append([f"{size}{kinds[group]}", str(len(unique)), str(len(members)), *ranks, f"{stored:,}"])
    return header, rows


def model_name(config):
    """The base model's id on the Hub, or the name of its folder."""
    model = config["base_model"]
    return model["id"] if model["revision"] else Path(model["id"]).name


def draw_spectra(bundle, folder):
    """Write `spectra.png`: the eigenvalues of every input, as shares of their sum, and the energy they leave out."""
    import matplotlib  # only the picture needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    sizes = sorted({len(spectrum.eigenvalues) for spectrum in bundle.group(JOINT).values()})
    for source, spectrum in sorted(bundle.group(JOINT).items()):
        share = spectrum.eigenvalues.double() / spectrum.eigenvalues.double().sum()
        size = len(share)
        is_text = source == TEXT_INPUT
        within_text = source.partition(".")[0] in TEXT_ENCODERS
        style = {
            "color": "black" if is_text else "grey" if within_text else f"C{sizes.index(size)}",
            "linestyle": "-" if is_text else ("--" if ".to_out" in source else ":"),
            "linewidth": 1.8 if is_text else 1.0,
        }
        axis = torch.arange(1, size + 1) / size
        left.semilogy(axis, share.clamp_min(1e-12), **style)
        right.semilogy(axis, (1 - share.cumsum(0)).clamp_min(1e-9), **style)
    left.set(xlabel="direction, as a share of all", ylabel="share of the energy", title="Eigenvalues", ylim=(1e-10, 1))
    right.set(xlabel="directions protected, as a share of all", ylabel="energy left unprotected", ylim=(1e-7, 1))
    right.set_title("What protecting more of them leaves")
    for energy in ENERGIES:
        right.axhline(1 - energy, color="grey", linewidth=0.5)
        place = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "va": "center"}
        right.annotate(f"energy {energy}", (1.02, 1 - energy), fontsize=8, color="grey", **place)
    kinds = [("black", "-", "text: to_k, to_v")] + [
        (f"C{index}", line, f"{size}: {label}")
        for index, size in enumerate(sizes)
        for line, label in ((":", "hidden states"), ("--", "to_out"))
        if any(
            len(spectrum.eigenvalues) == size and (".to_out" in source) == (label == "to_out")
            for source, spectrum in bundle.spectra[JOINT].items()
        )
    ]
    kinds += [("grey", ":", "within the text encoder")] * any(name in bundle.spectra for name in TEXT_ENCODERS)
    lines = [plt.Line2D([], [], color=color, linestyle=line) for color, line, _ in kinds]
    left.legend(lines, [label for _, _, label in kinds], fontsize=7, loc="lower left")
    figure.savefig(folder / "spectra.png", dpi=120)
    plt.close(figure)


def break_lines(command):
    """A command line with each flag on a line of its own."""
    lines = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def write_dataset_card(license_name):
    """A writer of the dataset card, `README.md`, for `Bundle.save`."""

    def write(bundle, folder):
        config = bundle.config
        model = config["base_model"]
        is_hub_id = model["revision"] is not None
        data = DatasetCardData(
            license=license_name,
            task_categories=["text-to-image"],
            size_categories=["n<1K" if len(bundle.table()) < 1000 else "1K<n<10K"],
            tags=["null-space", "dreambooth", "lora", "diffusers", f"model-type:{config['model_type']}"],
            pretty_name=f"Null-space bundle of {Path(model['id']).name}",
            configs=[{"config_name": "default", "data_files": TABLE_NAME}],
            **({"base_model": model["id"]} if is_hub_id else {}),
        )
        header, rows = rank_table(bundle)
        table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---:"] * len(header), *rows))
        groups = "\n".join(
            f"| `{group_file(group['name'])}` | {group['range'][0]} to {group['range'][1]} | "
            f"{len(group['timesteps'])} |"
            for group in config["groups"]
        )
        prompts = config["prompts"]
        text_modules = {name: config[name]["modules"] for name in TEXT_ENCODERS if name in config}
        fingerprints_shown = ", ".join(
            f"{part.replace('_', ' ')} `{value}`" for part, value in model["fingerprint"].items()
        )
        within_text = "; ".join(
            f"{len(modules)} projections, in `{group_file(name)}`" for name, modules in text_modules.items()
        )
        steps = ", ".join(map(str, config["num_inference_steps"]))
        sampling = f"{config['sampler']}, {steps} steps, guidance scale {config['guidance_scale']}"
        spectra = [item for spectra in bundle.spectra.values() for item in spectra.values()]
        hidden = hidden_drift = "not known, as of all bundles that were added up"
        if all(item.distances is not None for item in spectra):
            hidden = f"at most {max(item.distance() for item in spectra):.1e}"
            drift = max(item.drift_distance() for item in spectra)
            hidden_drift = f"at most {drift:.1e} of a LoRA that were free"
        own_flags = f"  --clip_skip {bundle.clip_skip} \\\n" if bundle.clip_skip else ""
        named = link(model["id"], f"https://huggingface.co/{model['id']}") if is_hub_id else code_span(model["id"])
        loras = model.get("loras", [])  # a folder's by its name alone
        if loras:
            own_flags += f"  --base_lora {' '.join(shlex.quote(lora['id']) for lora in loras)} \\\n"
            shown = ", ".join(f"{code_span(lora['id'])} (sha256 `{lora['sha256'][:12]}...`)" for lora in loras)
            named += f" with the LoRAs {shown}"
        training = f"""accelerate launch train_dreambooth_nullspace.py \\
  --pretrained_model_name_or_path {shlex.quote(model["id"])} \\
  --nullspace_name_or_path {THIS_REPOSITORY} \\
  --instance_data_dir <folder with 3 to 5 pictures> \\
  --instance_prompt "a photo of a sks dog" \\
{own_flags}  --resolution {config["resolution"]} --train_batch_size 1 --learning_rate 1e-3 --max_train_steps 800 \\
  --output_dir lora"""
        use = f"## Train with it\n\n{code_block('bash', training)}"
        if not get_family(config["model_type"]).is_trainable:
            audit = f"python nullspace_utils.py audit \\\n  --nullspace {THIS_REPOSITORY} \\\n"
            audit += "  --lora <folder, file or Hub id>"
            use = f"## Audit with it\n\n{code_block('bash', audit)}"
        card = f"""---
{data.to_yaml()}
---

# Null-space bundle of {plain(Path(model["id"]).name)}

The directions that the attention layers of {named} use on {prompts["count"]:,} prompts
({code_span(prompts["source"])}, the empty prompt included). A DreamBooth LoRA that is trained outside of them learns
its subject and leaves these prompts as they were.

{use}

## What is protected

| | |
|---|---|
| base model | {table_cell(named)}{f", revision `{model['revision']}`" if is_hub_id else ""} |
| its fingerprints | {fingerprints_shown} |
| model type, prediction type | {config["model_type"]}, {config["prediction_type"]} |
| attention layers | {config["attention"]}, {len(config["modules"])} projections |
| text encoder | {within_text or "not covered"} |
| sampling | {sampling}, {config["resolution"]} pixels |
| clip skip | {bundle.clip_skip} |
| prompts | {prompts["count"]:,}, sha256 `{prompts["sha256"]}` |
| what rounding may hide of a leakage | {hidden} |
| what it may hide of a drift | {hidden_drift} |

Median number of directions, over the inputs of one size, that hold a share of the energy (the trace of the second
moment). Layers that read the same input share it; each layer is a row of `{TABLE_NAME}`.

{table}

![Eigenvalue spectra](spectra.png)

## Files

| file | training timesteps | sampled timesteps in it |
|---|---|---:|
{groups}

`{group_file(TEXT_INPUT)}` holds the text encoder's output, which to_k and to_v of every cross-attention layer read
at all timesteps. `{CONFIG_NAME}` describes everything and holds the sha256 of every file.

## How it was built

{code_block("bash", break_lines(config["command"]))}
"""
        (folder / CARD_NAME).write_text(utf8(card), encoding="utf-8")

    return write
