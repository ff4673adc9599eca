"""Count how many pictures a model of the world draws right, by kind of prompt, and how varied its class pictures are.

    python demo/score_world.py --pretrained_model_name_or_path demo/shapes-sd

Prints a line for each kind of prompt with the parts that are wrong most often, then how far the sizes, positions and
colours of `a photo of a star` and so on are from the world's frequencies. Writes a sheet of 64 pictures, drawn from
the prompts of all kinds, and their captions beside it.
"""

import argparse
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from train_world import draw
from world import DEMO, KINDS, SHAPES, kind_prompts, random_single
from world_reader import judge, read


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", type=Path, default=DEMO / "shapes-sd", help="Folder of the pipeline."
    )
    parser.add_argument("--count", type=int, default=500, help="Prompts of each kind.")
    parser.add_argument(
        "--class_pictures", type=int, default=3000, help="Pictures of classes; of 500, chance moves a share by 13%%."
    )
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Steps of a picture.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Guidance of a picture.")
    parser.add_argument("--sheet", type=Path, default=DEMO / "output" / "world.png", help="Where the sheet is saved.")
    return parser.parse_args()


def frequencies(scenes):
    """How often single objects have each size, position and colour: {property: Counter of shares}."""
    objects = [scene.objects[0] for scene in scenes]
    shares = {}
    for key in ("size", "position", "colour"):
        counts = Counter(getattr(each, key) for each in objects)
        shares[key] = Counter({value: count / len(objects) for value, count in counts.items()})
    return shares


def main():
    args = parse_args()
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    choices = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)

    sheet = []
    for kind in KINDS:
        prompts = kind_prompts(kind, args.count, seed=7)
        pictures = draw(pipeline, prompts, **choices)
        wrong = judge(prompts, pictures)
        often = Counter(part for parts in wrong for part in parts).most_common()
        right = sum(not parts for parts in wrong) / len(wrong)
        print(f"{kind:10} {right:6.1%} right; wrong: " + ", ".join(f"{part} {count}" for part, count in often))
        sheet += list(zip(prompts, pictures, wrong, strict=True))[: 64 // len(KINDS)]

    rng = random.Random(0)
    classes = [f"a photo of a{'n' * (shape[0] in 'aeiou')} {shape}" for shape in SHAPES]
    prompts = (classes * args.class_pictures)[: args.class_pictures]
    drawn = frequencies([each.scene for each in read(draw(pipeline, prompts, **choices))])
    world = frequencies([random_single(rng) for _ in range(20_000)])
    for key in world:
        print(f"{key}: " + ", ".join(f"{value} {drawn[key][value] / world[key][value]:.2f}" for value in world[key]))

    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    pictures = pipeline.numpy_to_pil(np.stack([picture for _, picture, _ in sheet]))
    make_image_grid([each.resize((128, 128)) for each in pictures], len(pictures) // 8, 8).save(args.sheet)
    captions = [f"{number}: {prompt}: {', '.join(wrong) or 'right'}" for number, (prompt, _, wrong) in enumerate(sheet)]
    args.sheet.with_suffix(".txt").write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
