"""The card of a trained LoRA."""

from pathlib import Path

from huggingface_hub import ModelCardData

from nullspace.adapters import kinds_of
from nullspace.families import get_family
from nullspace.hub import base_license
from nullspace.markdown import code_span, link, plain, python_string, table_cell, utf8
from nullspace.names import COMPARISON_NAME, REPORT_NAME
from nullspace.pictures import save_picture
from nullspace.protection import describe_setting
from nullspace.system import write_text


def write_model_card(bundle, report, prompts, pictures, args):
    """Write the model card, and the pictures that it shows, one for each prompt; return the names of those."""
    names = [f"pictures/{index}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        save_picture(picture, args.output_dir / name)
    family = get_family(args.model_type)
    model, source = args.base_model, args.nullspace_name_or_path
    base, is_on_hub = model.name, model.revision is not None
    data = ModelCardData(
        license=base_license(args.pretrained_model_name_or_path, args.hub_token),
        library_name="diffusers",
        base_model=base if is_on_hub else None,
        datasets=None if Path(source).is_dir() else [source],
        instance_prompt=args.instance_prompt[0],
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora",
            *family.tags,
            "dreambooth", "null-space",
        ],
        widget=[
            {"text": prompt, "output": {"url": name}} for prompt, name in zip(prompts, names, strict=True)
        ],
    )  # fmt: skip
    shown = {
        key: "nothing is protected" if value["max"] is None else f"at most {value['max']:.1e}, mean {value['mean']:.1e}"
        for key, value in report.items()
        if key in ("leakage", "predicted_drift")
    }
    prompt_count = bundle.config["prompts"]["count"]
    covered = args.nullspace_timestep_range or bundle.config["groups"][0]["range"]
    setting = describe_setting(args)
    total, unprotected = len(report["layers"]), report["unprotected"]
    protection = (
        f"It was trained in the null space of what the attention layers read on {prompt_count:,} protected prompts, so "
        "that pictures of other things stay as they were."
    )
    if len(unprotected) == total:
        protection = "It was trained without protection, as a plain DreamBooth LoRA."
    elif args.nullspace_timesteps == "nearest":
        protection = (
            "Each of its training steps was projected into the null space of what the attention layers read on "
            f"{prompt_count:,} protected prompts, at timesteps near its own alone: nothing is guaranteed."
        )
    elif unprotected:
        protection = (
            f"It was trained partly unprotected: {total - len(unprotected)} of its {total} layers are in the null "
            f"space of what they read on {prompt_count:,} protected prompts, but the other {len(unprotected)} are "
            f"not, and may change any picture: {kinds_of(unprotected)}."
        )
    drawn = "Base model and LoRA, equal seeds" if args.compare_with_base else "What the LoRA draws"
    base_shown = link(base, f"https://huggingface.co/{base}") if is_on_hub else code_span(base)
    source_shown = (
        link(source, f"https://huggingface.co/datasets/{source}") if data.datasets else code_span(Path(source).name)
    )
    triggers = " or ".join(map(code_span, args.instance_prompt))
    loaded = f"DiffusionPipeline.from_pretrained({python_string(base)}, "
    if model.file:
        loaded = f"{family.pipeline.__name__}.from_single_file({python_string(base)}, "
    elif args.revision:
        loaded += f"revision={python_string(model.revision)}, "
    vae_row = f"| VAE | {table_cell(code_span(model.vae))} |\n" if model.vae else ""
    few_steps = family.call_arguments(args.guidance_scale)
    with_skip = f", clip_skip={args.clip_skip}" if args.clip_skip else ""
    text = f"""---
{data.to_yaml()}
---

# {plain(args.output_dir.resolve().name)}

{report["guarantee"]}

<Gallery />

A DreamBooth LoRA for {base_shown}. {protection}

![{drawn}]({COMPARISON_NAME})

## Trigger words

Use {triggers} to trigger the subject.

## Use it with diffusers

```py
import torch
from diffusers import {loaded.partition(".")[0]}

pipeline = {loaded}torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights({python_string(args.hub_model_id or args.output_dir)})
image = pipeline({python_string(args.instance_prompt[0])}{few_steps}{with_skip}).images[0]
```

## Null space

| | |
|---|---|
| bundle | {table_cell(source_shown)} |
| protected | {setting}, timesteps {covered[0]} to {covered[1]} |
| leakage, share of a layer's change that protected inputs see | {shown["leakage"]} |
| predicted drift, relative change of a layer's output on protected inputs | {shown["predicted_drift"]} |
| layers trained, of them unprotected | {total}, {len(unprotected)} |
{vae_row}| rank, steps, learning rate | {args.rank}, {args.max_train_steps}, {args.learning_rate:g} |
| clip skip | {args.clip_skip} |

`{REPORT_NAME}` has the figures of every layer. Trained with `train_dreambooth_nullspace.py`.
"""
    write_text(args.output_dir / "README.md", utf8(text))
    return names
