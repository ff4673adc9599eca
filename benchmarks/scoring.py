"""What models of the demo's world draw of a subject, and how far all else has moved: the base model, and its scores."""

import copy
import hashlib
import subprocess
import sys
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline


HERE = Path(__file__).resolve().parent
ROOT, DEMO, WORK = HERE.parent, HERE.parent / "demo", HERE / "output"
sys.path[:0] = [str(ROOT), str(DEMO)]
from nullspace.bundle import Bundle  # noqa: E402
from nullspace.layers import attention_inputs  # noqa: E402
from nullspace.samplers import make_scheduler  # noqa: E402
from world import FOLDER, parse, with_articles  # noqa: E402
from world_reader import read, subject_distance, wrong_parts  # noqa: E402


MODEL = DEMO / "shapes-sd"
GENERAL = MODEL / "prompts.txt"  # what the model brings for bundles of it
SINGLES = FOLDER / "protected.txt"  # one object in every prompt
GUIDANCE, DRAWING_STEPS, SAMPLER = 4.0, 12, "dpmpp_2m"  # as many prompts right as with 25 steps of DDIM
BATCH = 25  # pictures that are drawn at once
REPEATS = 16  # pictures of the subject, and of its class, with the bare prompt
HELD_OUT = {
    kind: (FOLDER / f"heldout_{kind}.txt").read_text().splitlines() for kind in ("combinations", "scenes", "unlike")
}
DRAWN = {kind: prompts[:30] for kind, prompts in HELD_OUT.items()}
PROBED = [prompt for prompts in HELD_OUT.values() for prompt in prompts[100:110]]  # whose predicted noise is compared
PROBE_TIMESTEPS = (50, 250, 500, 750, 950)
KINDS = ("subject", "placed", "class", "class_placed", *HELD_OUT)  # of pictures that are scored
FIRST_SEED = {kind: 1000 * number for number, kind in enumerate(KINDS)}


@cache
def world_hash(model=MODEL):
    """12 hex digits that stand for a model's weights, the prompts and the subjects."""
    files = [*model.rglob("*.safetensors"), *FOLDER.rglob("*.*")]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def bundle_folder(prompts=GENERAL):
    """Where the bundle of this very model and a file of prompts is."""
    return WORK / f"bundle-{prompts.stem}-{world_hash()}"


def build_bundle(prompts=GENERAL):
    """Build that bundle if it is not there."""
    if not (bundle_folder(prompts) / "nullspace_config.json").exists():
        command = [sys.executable, ROOT / "build_nullspace.py", "--pretrained_model_name_or_path", MODEL]
        command += ["--prompts_file", prompts, "--batch_size", BATCH]
        command += ["--nullspace_threshold", 0.999]  # the most that a method closes
        subprocess.run([*map(str, command), "--output_dir", str(bundle_folder(prompts))], check=True)


def places_of(subject):
    """15 prompts that put a subject, `{}`, where its pictures do not show it."""
    return (FOLDER / subject / "places.txt").read_text().splitlines()


def prompts_of(subject, called):
    """What is asked of a model that knows a subject as `called`, by kind: it, its class, and other things.

    `placed` puts it on new backgrounds, at other places and sizes, beside another object, and so on; `class_placed`
    asks for the class in just the same places.
    """
    places = places_of(subject)
    kinds = {
        "subject": [f"a photo of a {called}"] * REPEATS,
        "placed": [place.replace("{}", called) for place in places],
        "class": [f"a photo of a {subject}"] * REPEATS,
        "class_placed": [place.replace("{}", subject) for place in places],
        **DRAWN,
    }
    return {kind: [with_articles(prompt) for prompt in prompts] for kind, prompts in kinds.items()}


def surroundings(subject, place):
    """What a place (with `{}` for the subject) asks for but for the subject's own looks, which the reader cannot name.

    Its background, the other object whole, the relation, and the subject's size and position.
    """
    wanted = parse(place.replace("{}", subject))
    own = ("shape", "colour", "fill")
    objects = tuple(
        {key: value for key, value in each.items() if key not in own} if each.get("shape") == subject else each
        for each in wanted.objects
    )
    return type(wanted)(objects, wanted.relation, wanted.background)


class Base:
    """The base model, the bundle that protects it, and what it draws before anything is taught.

    Args:
        bundle (`Path`, *optional*): folder of a bundle.
    """

    def __init__(self, bundle=None):
        self.pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.unet = self.pipeline.unet.requires_grad_(False)
        self.text_encoder = self.pipeline.text_encoder.requires_grad_(False)
        self.weights = {name: self.unet.get_submodule(name).weight for name in attention_inputs(self.unet)}
        self.bundle = bundle and Bundle.load(bundle)

    def tuned(self, **components):
        """The pipeline with other components in place of its own."""
        pipeline = copy.copy(self.pipeline)
        for name, component in components.items():
            setattr(pipeline, name, component)
        return pipeline

    @torch.no_grad()
    def encode(self, prompts, pipeline=None):
        """Prompt embeddings (n, tokens, width)."""
        return (pipeline or self.pipeline).encode_prompt(prompts, "cpu", 1, False)[0]

    @torch.no_grad()
    def latents(self, pictures):
        """Means of the latents (n, 4, h, w), scaled, of pictures (n, H, W, 3) in [0, 1]."""
        pixels = self.pipeline.image_processor.preprocess(np.asarray(pictures, np.float32))
        latents = self.pipeline.vae.encode(pixels.contiguous()).latent_dist.mean
        return latents.contiguous() * self.pipeline.vae.config.scaling_factor

    def draw(self, pipeline, prompts, seed, steps=DRAWING_STEPS, sampler=SAMPLER):
        """Pictures (n, H, W, 3) in [0, 1], each from a seed of its own."""
        pipeline = copy.copy(pipeline)
        pipeline.scheduler = make_scheduler(sampler, self.pipeline.scheduler.config)
        pictures = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
            drawn = pipeline(
                batch, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, output_type="np"
            )
            pictures.append(drawn.images)
        return np.concatenate(pictures)

    @cached_property
    def probe(self):
        """Noisy latents of held-out pictures, their timesteps, and the noise that the base model predicts."""
        latents = self.latents(self.draw(self.pipeline, PROBED, seed=900)).repeat(len(PROBE_TIMESTEPS), 1, 1, 1)
        timesteps = torch.tensor(PROBE_TIMESTEPS).repeat_interleave(len(PROBED))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy, timesteps, self._predict(self.pipeline, noisy, timesteps)

    @torch.no_grad()
    def _predict(self, pipeline, noisy, timesteps):
        embeddings = self.encode(PROBED, pipeline).repeat(len(PROBE_TIMESTEPS), 1, 1)
        return pipeline.unet(noisy, timesteps, embeddings).sample

    def noise_drift(self, pipeline):
        """Relative squared change of the noise that a model predicts on held-out prompts."""
        *inputs, expected = self.probe
        change = self._predict(pipeline, *inputs) - expected
        return float(change.square().sum() / expected.square().sum())

    def nearness(self, pipeline, subject, called):
        """What settings are chosen by, `subject` and `noise_drift` of `score`: a sixth of its time."""
        prompts = prompts_of(subject, called)["subject"]
        pictures = self.draw(pipeline, prompts, FIRST_SEED["subject"])
        distance = float(subject_distance(subject, pictures).mean())
        return {"subject": distance, "noise_drift": self.noise_drift(pipeline)}

    def score(self, pipeline, subject, called):
        """What a model's pictures show, and how far it is from the base model: a `dict` of numbers.

        - subject, placed, class, class_placed: mean distance of the pictures of these kinds of `prompts_of` to the
          subject: 0 is the subject itself, about 1 nothing of it.
        - anywhere: mean of subject and placed.
        - placed_right: share of the placed pictures in which all is right but the subject's own looks.
        - class_right, class_placed_right, combinations_right, scenes_right, unlike_right: shares of these pictures
          that show all that their prompt names, by the world's reader.
        - others_moved: mean change of the held-out pictures' pixels at equal seeds.
        - noise_drift: relative squared change of the predicted noise on other held-out prompts; its root is the
          relative change.
        - diversity: mean distance between pictures of the class.
        """
        prompts, drawn, right = prompts_of(subject, called), {}, {}
        distance = self.nearness(pipeline, subject, called)
        del prompts["subject"]
        for kind, asked in prompts.items():
            pictures = drawn[kind] = self.draw(pipeline, asked, FIRST_SEED[kind])
            if kind not in DRAWN:
                distance[kind] = float(subject_distance(subject, pictures).mean())
            right[f"{kind}_right"] = _share_right(subject, kind, asked, pictures)
        flat = drawn["class"].reshape(REPEATS, -1)
        apart = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1))
        return {
            **distance,
            "anywhere": (distance["subject"] + distance["placed"]) / 2,
            **right,
            "others_moved": float(np.mean([np.abs(drawn[kind] - self.others[kind]).mean() for kind in DRAWN])),
            "diversity": float(apart.sum() / (REPEATS * (REPEATS - 1))),
        }

    @cached_property
    def others(self):
        """The base model's pictures of the held-out prompts, by kind."""
        return {kind: self.draw(self.pipeline, prompts, FIRST_SEED[kind]) for kind, prompts in DRAWN.items()}


def _share_right(subject, kind, prompts, pictures):
    readings = read(pictures)
    if kind == "placed":
        wrong = [
            [part for part in wrong_parts(surroundings(subject, place), reading) if part != "picture"]
            for place, reading in zip(places_of(subject), readings, strict=True)
        ]
    else:
        wrong = [wrong_parts(parse(prompt), reading) for prompt, reading in zip(prompts, readings, strict=True)]
    return float(np.mean([not parts for parts in wrong]))
