"""Score LoRAs of a real model by DreamBooth's own metrics: likeness of the subject, prompts followed, all else unmoved.

    python benchmarks/real_model.py --instance_data_dir pictures --subject "sks dog" --class_name dog \\
        --lora plain=plain-lora --lora "null space=sks-dog"

Base model and every LoRA draw the same prompts from the same seeds. DINO and CLIP-I are the mean cosine of the features
of the subject's drawn pictures with those of its photographs, CLIP-T that of the pictures with their prompts
(DreamBooth, arXiv 2208.12242, sec. 4.2); drift is (1 - cosine) / 2 of the DINOv2 features of base and LoRA on prompts
of other things, as in peft's comparison of image generation. All models come from the Hub by their ids. Writes
`real_model.json` and `real_model.png` to --output_dir.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LatentConsistencyModelPipeline
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nullspace.checks import check_writable  # noqa: E402
from nullspace.errors import NullSpaceError, reason  # noqa: E402
from nullspace.lora import load_lora  # noqa: E402
from nullspace.pictures import comparison_grid, read_instances, save_picture  # noqa: E402
from nullspace.report import write_json  # noqa: E402


SCENES = ["a photo of {}", "{} in the jungle", "{} on a cobblestone street", "{} in the snow", "a painting of {}"]
OTHERS = ["a cat asleep on a sofa", "a mountain lake at dawn", "a bowl of oranges", "a red car in the rain", "a castle"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instance_data_dir", type=Path, required=True, help="Folder with the subject's pictures.")
    parser.add_argument("--subject", required=True, help="The subject as prompts name it: 'sks dog'.")
    parser.add_argument("--class_name", required=True, help="What it is, for CLIP-T: 'dog'.")
    parser.add_argument("--lora", action="append", required=True, metavar="NAME=PATH", help="As often as you like.")
    parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--dino_name_or_path", default="facebook/dinov2-base")
    parser.add_argument("--clip_name_or_path", default="openai/clip-vit-large-patch14")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--num_images", type=int, default=4, help="Pictures a prompt (default: %(default)s).")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--output_dir", type=Path, default=Path("real-model"))
    parser.set_defaults(dataset_name=None, instance_prompt=None)  # the pictures are those of the folder
    args = parser.parse_args(argv)
    if not all(name and path for name, _, path in (lora.partition("=") for lora in args.lora)):
        parser.error("give every --lora as NAME=PATH.")
    names = ["base", *(lora.partition("=")[0] for lora in args.lora)]
    if len(set(names)) < len(names):
        parser.error("give every --lora a name of its own, other than base.")
    args.lora = dict(lora.split("=", 1) for lora in args.lora)
    return args


class Features:
    """Unit features of pictures and texts by DINOv2 and CLIP."""

    def __init__(self, dino, clip, device):
        self.device = device
        self.dino_processor, self.dino = AutoProcessor.from_pretrained(dino), AutoModel.from_pretrained(dino)
        self.clip_processor, self.clip = AutoProcessor.from_pretrained(clip), AutoModel.from_pretrained(clip)
        self.dino.to(device).eval()
        self.clip.to(device).eval()

    def of_dino(self, pictures):
        """(n, width): the class token of DINOv2."""
        inputs = self.dino_processor(images=pictures, return_tensors="pt").to(self.device)
        return self._unit(self.dino(**inputs).last_hidden_state[:, 0])

    def of_clip(self, pictures):
        """(n, width): CLIP's projected features of pictures."""
        inputs = self.clip_processor(images=pictures, return_tensors="pt").to(self.device)
        vision = self.clip.vision_model(**inputs).pooler_output
        return self._unit(self.clip.visual_projection(vision))

    def of_text(self, texts):
        """(n, width): CLIP's projected features of texts."""
        inputs = self.clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self._unit(self.clip.text_projection(self.clip.text_model(**inputs).pooler_output))

    def _unit(self, features):
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def draw(pipeline, prompts, args, description):
    """Rows of pictures, --num_images for each prompt: `list[list[Image]]` by seed."""
    return [
        [
            pipeline(
                prompt,
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for prompt in prompts
        ]
        for seed in tqdm(range(args.num_images), desc=description, unit="row")
    ]


def score(features, rows, base_rows, photographs, args):
    """The four metrics of a model from what it and the base model drew: `dict[str, float]`."""
    count = len(SCENES)
    subject = [picture for row in rows for picture in row[:count]]
    others, base_others = ([picture for row in drawn for picture in row[count:]] for drawn in (rows, base_rows))
    prompts = [scene.format(args.class_name) for scene in SCENES] * len(rows)
    return {
        "dino": (features.of_dino(subject) @ features.of_dino(photographs).T).mean().item(),
        "clip_i": (features.of_clip(subject) @ features.of_clip(photographs).T).mean().item(),
        "clip_t": (features.of_clip(subject) * features.of_text(prompts)).sum(-1).mean().item(),
        "drift": ((1 - (features.of_dino(others) * features.of_dino(base_others)).sum(-1)) / 2).mean().item(),
    }


@torch.no_grad()
def main(args):
    photographs, _ = read_instances(args)
    for path in args.lora.values():
        load_lora(path)  # before hours of drawing, for its complaints
    check_writable(args.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        features = Features(args.dino_name_or_path, args.clip_name_or_path, device)
        pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None)
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"A model cannot be had ({reason(error)}).") from error
    pipeline.to(device, dtype)
    if not isinstance(pipeline, LatentConsistencyModelPipeline):  # which needs its own
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    prompts = [scene.format(args.subject) for scene in SCENES] + OTHERS
    rows = {"base": draw(pipeline, prompts, args, "base")}
    for name, path in args.lora.items():
        pipeline.load_lora_weights(path)
        rows[name] = draw(pipeline, prompts, args, name)
        pipeline.unload_lora_weights()
    scores = {name: score(features, drawn, rows["base"], photographs, args) for name, drawn in rows.items()}

    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_picture(comparison_grid(rows, prompts), args.output_dir / "real_model.png")
    settings = {key: str(value) for key, value in vars(args).items()}
    write_json(args.output_dir / "real_model.json", {"settings": settings, "scores": scores})
    print(f"{'':24}" + "".join(f"{key:>10}" for key in scores["base"]))
    for name, row in scores.items():
        print(f"{name:24}" + "".join(f"{value:10.4f}" for value in row.values()))


if __name__ == "__main__":
    try:
        main(parse_args())
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
