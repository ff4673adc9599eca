"""What is left of the protection when a null-space LoRA meets an LCM-LoRA, on the demo's models.

    python benchmarks/lcm_lora.py

The LCM-LoRA is what the demo's LCM added to the weights of its Stable Diffusion, cut to a low rank by a singular value
decomposition and saved as published ones are. With it and without it, the change that a LoRA of the subject makes in
each kind of layer on protected prompts is measured while they are drawn. Writes `results/lcm_lora.json`.
"""

import json
import platform
from collections import defaultdict

import diffusers
import torch
import transformers
from common import call
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import lcm
from lcm import DEMO, FOLDER, HELD_OUT, build_nullspace, draw, fine_detail, prompt_of, right, subject_distance


MODEL, SUBJECT, RANK = DEMO / "shapes-sd", "star", 16
WORK = DEMO / "output" / "lcm-lora"
RESULTS = lcm.HERE / "results" / "lcm_lora.json"
KINDS = {"to_k": "to_k, to_v", "to_v": "to_k, to_v", "to_q": "to_q", "0": "to_out"}


def extract_lcm_lora(path):
    """Save the LCM-LoRA; return the share of the weights' change that its rank keeps."""
    before, after = (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float() for folder in (MODEL, lcm.MODEL)
    )
    tensors, total, lost = {}, 0.0, 0.0
    for name, module in before.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            weight = after.get_submodule(name).weight - module.weight
            flat = weight.detach().flatten(1)
            left, values, right = torch.linalg.svd(flat, full_matrices=False)
            rank = min(RANK, len(values))
            down, up = right[:rank], left[:, :rank] * values[:rank]
            total += flat.square().sum().item()
            lost += (flat - up @ down).square().sum().item()
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down.reshape(rank, *weight.shape[1:]).contiguous()
            tensors[f"{key}.lora_up.weight"] = up.reshape(-1, rank, *(1 for _ in weight.shape[2:])).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return 1 - lost / total


def changes(pipeline, **sampling):
    """Relative RMS change of the outputs by the adapter "subject" on protected prompts: `dict[str, float]` by kind."""
    sums, handles = defaultdict(lambda: torch.zeros(2)), []

    def reader(kind):
        def read(module, args, output):
            change = module.scaling["subject"] * module.lora_B["subject"](module.lora_A["subject"](args[0]))
            sums[kind] += torch.stack([change.square().sum(), module.base_layer(args[0]).square().sum()])

        return read

    for name, module in pipeline.unet.named_modules():
        if "subject" in getattr(module, "lora_A", {}):
            handles.append(module.register_forward_hook(reader(KINDS[name.rpartition(".")[2]])))
    with torch.no_grad():
        draw(pipeline, (FOLDER / "protected.txt").read_text().splitlines()[:50], **sampling)
    for handle in handles:
        handle.remove()
    return {kind: (change / output).sqrt().item() for kind, (change, output) in sums.items()}


def main():
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    results = {"machine": platform.machine(), "torch": torch.__version__, "diffusers": diffusers.__version__}

    # The bundle, a LoRA of the subject with and without null space, and the LCM-LoRA
    WORK.mkdir(parents=True, exist_ok=True)
    prompts = {"prompts_file": FOLDER / "protected.txt", "max_prompts": 100, "batch_size": 50}
    call(build_nullspace, pretrained_model_name_or_path=MODEL, output_dir=WORK / "bundle", **prompts)
    for method, flags in lcm.METHODS.items():
        lcm.train(WORK / method, WORK / "bundle", SUBJECT, model=MODEL, max_train_steps=300, seed=0, **flags)
    results["LCM-LoRA"] = {"rank": RANK, "share kept": extract_lcm_lora(WORK / "lcm.safetensors")}

    # Draw with one, and with both
    few_steps = {"num_inference_steps": 4, "guidance_scale": 1.0}
    for method in (None, *lcm.METHODS):
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        row = results[method or "LCM-LoRA alone"] = {}
        if method:
            pipeline.load_lora_weights(WORK / method, adapter_name="subject")
            row["change, 25 steps"] = changes(pipeline, num_inference_steps=25, guidance_scale=7.5)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        pipeline.load_lora_weights(WORK, weight_name="lcm.safetensors", adapter_name="lcm")
        pipeline.set_adapters(["subject", "lcm"] if method else ["lcm"])
        if method:
            row["change, LCM-LoRA and 4 steps"] = changes(pipeline, **few_steps)
        drawn = draw(pipeline, [prompt_of(SUBJECT)] * 24, seed=0, **few_steps)
        row["subject"] = subject_distance(SUBJECT, drawn).mean().item()
        drawn = draw(pipeline, HELD_OUT, seed=200, **few_steps)
        row["held-out"], row["detail"] = right(drawn), fine_detail(drawn)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
