"""The card of a trained LoRA."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from nullspace.adapters import kinds_of
from nullspace.embeddings import loading_code
from nullspace.families import get_family
from nullspace.hub import base_license
from nullspace.markdown import code_span, link, plain, python_string, table_cell, utf8
from nullspace.names import CARD_NAME, CHECKPOINTS_NAME, COMPARISON_NAME, EMBEDDINGS, REPORT_NAME, kohya_path
from nullspace.pictures import save_picture
from nullspace.protection import describe_setting
from nullspace.system import without_folder, write_text


def write_model_card(bundle, report, prompts, pictures, args):
    """Write the model card, and the pictures that it shows, one for each prompt or none; return the names of those."""
    names = [f"pictures/{index}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        save_picture(picture, args.output_dir / name)
    model, source = args.base_model, args.nullspace_name_or_path
    base, is_on_hub = model.name, model.revision is not None
    data = ModelCardData(
        license=base_license(args.pretrained_model_name_or_path, args.hub_token),
        library_name="diffusers",
        base_model=base if is_on_hub else None,
        datasets=None if source is None or Path(source).is_dir() else [source],
        instance_prompt=args.instance_prompt[0],
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image", "diffusers", "diffusers-training",
            *([] if args.word_only else ["lora", "template:sd-lora"]),
            *get_family(args.model_type).tags,
            *(["textual_inversion"] if args.placeholder_token else []),
            *([] if args.word_only else ["dreambooth", "null-space"]),
        ],
        widget=[
            {"text": prompt, "output": {"url": name}} for prompt, name in zip(prompts, names, strict=True)
        ] if names else None,
    )  # fmt: skip
    kind, what = ("textual inversion", "word") if args.word_only else ("DreamBooth LoRA", "LoRA")
    drawn = f"Base model and {what}, equal seeds" if args.compare_with_base else f"What the {what} draws"
    base_shown = link(base, f"https://huggingface.co/{base}") if is_on_hub else code_span(base)
    triggers = " or ".join(map(code_span, [args.placeholder_token] if args.placeholder_token else args.instance_prompt))
    alternatives = {COMPARISON_NAME: drawn, CHECKPOINTS_NAME: "What its checkpoints draw, equal seed"}
    sheets = [f"![{text}]({name})\n\n" for name, text in alternatives.items() if (args.output_dir / name).is_file()]
    gallery = "\n<Gallery />\n" if names else ""
    elsewhere = [f"- {line}\n" for line in in_web_uis(args)]
    elsewhere = f"\n## Use it in web UIs\n\n{''.join(elsewhere)}" if elsewhere else ""
    text = f"""---
{data.to_yaml()}
---

# {plain(args.output_dir.resolve().name)}

{report["guarantee"]}
{gallery}
A {kind} for {base_shown}. {describe_training(bundle, report, args)}

{"".join(sheets)}## Trigger words

Use {triggers} to trigger the subject.

## Use it with diffusers

```py
{usage_code("cuda", args, here=False)}
```
{elsewhere}
{describe_figures(bundle, report, args)}
`{REPORT_NAME}` has {"how it was trained" if args.word_only else "the figures of every layer"}. Trained with \
`train_dreambooth_nullspace.py`.
"""
    write_text(args.output_dir / CARD_NAME, utf8(text))
    return names


def usage_code(device, args, here=True):
    """Python that loads base model, LoRA and word on a device, and draws the subject.

    Args:
        here (`bool`): whether it is for this machine; a card names files and other VAEs by their last name.
    """
    model, classes, vae = args.base_model, [], []
    dtype = f"torch_dtype=torch.{'float32' if device == 'cpu' else 'float16'}"
    if model.vae_folder:
        given = Path(args.pretrained_vae_model_name_or_path)
        part = ['subfolder="vae"'] * (model.vae_folder.name == "vae" != given.name)
        named = python_string(str(given) if here else model.vae)
        vae = [f"vae=AutoencoderKL.from_pretrained({', '.join([named, *part, dtype])})"]
        classes.append("AutoencoderKL")
    classes.append(get_family(args.model_type).pipeline.__name__ if model.file else "DiffusionPipeline")
    method = "from_single_file" if model.file else "from_pretrained"
    where = python_string(str(model.file) if here and model.file else model.name)
    config = args.single_file_config and (args.single_file_config if here else without_folder(args.single_file_config))
    asked = {"revision": args.revision and model.revision, "variant": model.variant, "config": config}
    options = [f"{key}={python_string(value)}" for key, value in asked.items() if value]
    imports, lines = loading_lines(", ".join(classes), args)
    loaded = f"{classes[-1]}.{method}({', '.join([where, *options, *vae, dtype])})"
    return f'{imports}\n\npipeline = {loaded}.to("{device}")\n{lines}\n{drawing_line(args)}'


def in_web_uis(args):
    """A line for each program on where the files go that --output_kohya_format wrote, and what to type there."""
    if not args.output_kohya_format:
        return []
    prompt, token, name = args.instance_prompt[0], args.placeholder_token, kohya_path(args.output_dir).name
    with_lora = prompt if args.word_only else f"{prompt} <lora:{Path(name).stem}:1>"
    bundled = not args.word_only  # which AUTOMATIC1111 and SD.Next alone read
    programs = [  # where LoRAs go, where embeddings go, and the prompt
        (
            "ComfyUI",
            "models/loras",
            "models/embeddings",
            prompt.replace(token, f"embedding:{token}") if token else prompt,
        ),
        ("Forge", "models/Lora", "embeddings", with_lora),
        ("AUTOMATIC1111, SD.Next", "models/Lora", None if bundled else "embeddings", with_lora),
    ]
    lines = []
    for program, loras, embeddings, shown in programs:
        placed = {} if args.word_only else {name: loras}
        placed |= {f"{EMBEDDINGS}/{token}.safetensors": embeddings} if token and embeddings else {}
        files = ", ".join(f"{code_span(file)} into {code_span(folder)}" for file, folder in placed.items())
        lines.append(f"{program}: {files}; prompt {code_span(shown)}")
    return lines


def loading_lines(classes, args):
    """The imports of the card's code, diffusers' `classes` among them, and its lines that load what was trained."""
    source, imports, lines = args.hub_model_id or args.output_dir, [f"from diffusers import {classes}"], []
    text_encoders, beneath, adapters = list(get_family(args.model_type).text_encoders), args.base_model.loras, []
    # In order: where it is, whether that is on the Hub, whether there is a LoRA, and the words
    stack = [(*shown(lora, args), bool(lora.layers), [word.token for word in lora.words]) for lora in beneath]
    own = [args.placeholder_token] if args.placeholder_token else []
    stack.append((source, args.hub_model_id is not None, not args.word_only, own))
    for place, is_on_hub, has_lora, tokens in stack:
        if has_lora:
            name = f"{len(adapters) + 1}-{re.sub('[^A-Za-z0-9]+', '-', Path(place).name)}"
            adapters.append(python_string(name))
            named = f", adapter_name={adapters[-1]}" if beneath else ""
            lines.append(f"pipeline.load_lora_weights({python_string(place)}{named})")
        if tokens:
            more, loading = loading_code(place, is_on_hub, tokens, text_encoders)
            imports, lines = [*imports, *(line for line in more if line not in imports)], lines + loading
    if len(adapters) > 1:
        lines.append(f"pipeline.set_adapters([{', '.join(adapters)}])")
    return "\n".join(["import torch", *imports]), "\n".join(lines)


def drawing_line(args):
    """The line that draws the subject with what was trained."""
    few_steps = get_family(args.model_type).call_arguments(args.guidance_scale)
    with_skip = f", clip_skip={args.clip_skip}" if args.clip_skip else ""
    return f"image = pipeline({python_string(args.instance_prompt[0])}{few_steps}{with_skip}).images[0]"


def shown(lora, args):
    """Where the card says that an earlier LoRA is, and whether that is on the Hub: of one that is published no path."""
    is_on_hub = not Path(lora.name).exists()
    return lora.record()["id"] if args.hub_model_id else lora.name, is_on_hub


def describe_training(bundle, report, args):
    """A sentence or two on what was trained, and what it was kept from."""
    token = args.placeholder_token and code_span(args.placeholder_token)
    beneath = [link_or_code(lora.record()["id"], Path(lora.name).exists()) for lora in args.base_model.loras]
    beneath = f" It was trained on top of {', '.join(beneath)}, and is to be loaded with them." if beneath else ""
    if args.word_only:
        return f"Nothing but the rows of {token} in the embedding was trained (arXiv 2208.01618).{beneath}"
    prompt_count = bundle.config["prompts"]["count"]
    total, unprotected = len(report["layers"]), report["unprotected"]
    protection = (
        f"It was trained in the null space of what the attention layers read on {prompt_count:,} protected prompts, so "
        "that pictures of other things stay as they were."
    )
    if len(unprotected) == total:
        protection = "It was trained without protection, as a plain DreamBooth LoRA."
    elif unprotected:
        protection = (
            f"It was trained partly unprotected: {total - len(unprotected)} of its {total} layers are in the null "
            f"space of what they read on {prompt_count:,} protected prompts, but the other {len(unprotected)} are "
            f"not, and may change any picture: {kinds_of(unprotected)}."
        )
    if args.init_lora:
        initial = link_or_code(without_folder(args.init_lora), Path(args.init_lora).exists())
        protection += f" The training went on from another LoRA, {initial}."
    protection += beneath
    if token:
        protection += f" The rows of {token} in the embedding were trained along (arXiv 2208.01618)."
    return protection


def link_or_code(name, is_local):
    """A folder's or file's name as code, or a repository of the Hub as a link to it."""
    return code_span(name) if is_local else link(name, f"https://huggingface.co/{name}")


def describe_figures(bundle, report, args):
    """The card's table, with its title."""
    rate, source = f"{args.learning_rate:g}", args.nullspace_name_or_path
    if args.word_only:
        return f"""## Training

| | |
|---|---|
| rows, steps, learning rate | {args.num_vectors}, {args.max_train_steps}, {args.word_learning_rate:g} |
| clip skip | {args.clip_skip} |
"""
    shown = {
        key: "nothing is protected" if value["max"] is None else f"at most {value['max']:.1e}, mean {value['mean']:.1e}"
        for key, value in report.items()
        if key in ("leakage", "predicted_drift")
    }
    if args.max_drift:
        shown["predicted_drift"] += (
            f", root mean square {report['predicted_drift']['rms']:.4g} of {args.max_drift:g} allowed"
        )
    covered = args.nullspace_timestep_range or bundle.joint["range"]
    setting = describe_setting(args)
    vae_row = f"| VAE | {table_cell(code_span(args.base_model.vae))} |\n" if args.base_model.vae else ""
    total, unprotected = len(report["layers"]), report["unprotected"]
    is_local = Path(source).is_dir()
    source_shown = (
        code_span(Path(source).name) if is_local else link(source, f"https://huggingface.co/datasets/{source}")
    )
    if args.text_encoder_lr is not None:
        rate += f" (text encoder {args.text_encoder_lr:g})"
    if args.placeholder_token:
        rate += f" (word {args.word_learning_rate:g}, rows: {args.num_vectors})"
    return f"""## Null space

| | |
|---|---|
| bundle | {table_cell(source_shown)} |
| protected | {setting}, timesteps {covered[0]} to {covered[1]} |
| leakage, share of a layer's change that protected inputs see | {shown["leakage"]} |
| predicted drift, relative change of a layer's output on protected inputs | {shown["predicted_drift"]} |
| layers trained, of them unprotected | {total}, {len(unprotected)} |
{vae_row}| rank, steps, learning rate | {args.rank}, {args.max_train_steps}, {rate} |
| clip skip | {args.clip_skip} |
"""
