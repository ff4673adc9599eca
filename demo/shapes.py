"""The demo's world: pictures of one shape, and a scorer that reads them exactly.

A picture shows one shape in one colour and size on a background colour. Everything in the world is rendered from
numbers, so what a picture should show is known, and whether it shows it is measured by matching it against renders,
with no neural network that could be mistaken. Run as a script, it writes the prompts and the subjects' pictures:

    python demo/shapes.py
"""

import random
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image


DEMO = Path(__file__).resolve().parent
RESOLUTION = 32

PALETTE = {
    "red": (0.85, 0.12, 0.14),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.97, 0.90, 0.25),
    "green": (0.16, 0.62, 0.25),
    "blue": (0.15, 0.33, 0.86),
    "purple": (0.52, 0.18, 0.66),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
COLOURS = list(PALETTE)
# Radius in pixels of a 32 x 32 picture, and how far the centre may lie from the picture's centre.
SIZES = {"small": (7.0, 8.0, 3.5), "medium": (9.3, 10.3, 2.5), "large": (11.7, 12.8, 1.5)}
RARE_TOKENS = ["sks", "ohwx", "zwx"]  # in the vocabulary, but in no caption: free for DreamBooth to give a meaning

TEMPLATES = [
    "a photo of a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} on a {background} background",
    "a photo of a {colour} {shape} on a {background} background",
    "a {colour} {shape} on a {background} background",
    "a picture of a {colour} {shape} on {background}",
    "a {colour} {shape} on {background}",
    "a photo of a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {colour} {shape}",
    "a {shape} on a {background} background",
    "a photo of a {shape} on {background}",
    "a photo of a {size} {shape}",
    "a photo of a {shape}",
    "a {shape}",
]


# ---- Rendering -------------------------------------------------------------------------------------------------------


def _star(x, y):
    angle = np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5
    # The straight edge between an outer point (radius 1) and an inner one (radius 0.45), in polar coordinates.
    edge = 0.45 * np.sin(np.pi / 5)
    run = 1 - 0.45 * np.cos(np.pi / 5)
    along, across = np.cos(np.pi / 5 - np.abs(angle)), np.sin(np.pi / 5 - np.abs(angle))
    return np.hypot(x, y) * (along * edge + across * run) <= edge


def _heart(x, y):
    x, y = 1.05 * x, 0.1 - 1.05 * y
    return (x * x + y * y - 0.85) ** 3 <= 1.6 * x * x * y**3


# Each takes coordinates in units of the radius, y downwards, and says which points lie inside.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.86,
    "triangle": lambda x, y: (y <= 0.8) & (np.abs(x) <= (y + 1) * 0.56),
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 0.98),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.3),
    "moon": lambda x, y: (x * x + y * y <= 1) & ((x - 0.5) ** 2 + y * y >= 0.56),
}


@dataclass(frozen=True)
class Subject:
    """A distinctive member of a class: regions of the class's shape in colours of their own, later ones on top."""

    shape: str
    regions: tuple

    def colours(self, x, y):
        """Colour (..., 3) at points inside the shape; coordinates as in `SHAPES`."""
        colour = np.empty((*x.shape, 3))
        for inside, name in self.regions:
            colour[inside(x, y)] = PALETTE[name]
        return colour


def _everywhere(x, y):
    return np.full(x.shape, True)


SUBJECTS = {
    "star": Subject(
        "star",
        (
            (_everywhere, "purple"),
            (lambda x, y: x < 0, "orange"),
            (lambda x, y: x * x + y * y < 0.1, "white"),
        ),
    ),
    "heart": Subject(
        "heart",
        (
            (_everywhere, "blue"),
            (lambda x, y: y > 0.05, "yellow"),
            (lambda x, y: np.abs(y - 0.05) < 0.16, "black"),
        ),
    ),
    "circle": Subject(
        "circle",
        (
            (_everywhere, "green"),
            (lambda x, y: x * x + y * y < 0.5, "white"),
            (lambda x, y: x * x + y * y < 0.15, "red"),
        ),
    ),
}


def _grid(resolution, centre_x, centre_y, radius, samples=5):
    """Sample points of every pixel in units of the radius around the shape's centre, (resolution * samples, same)."""
    step = RESOLUTION / (resolution * samples)
    points = (np.arange(resolution * samples) + 0.5) * step - RESOLUTION / 2
    return np.meshgrid((points - centre_x) / radius, (points - centre_y) / radius, indexing="xy")


def _average(samples, resolution):
    """Mean over each pixel's sample points: anti-aliasing."""
    per_pixel = samples.shape[0] // resolution
    return samples.reshape(resolution, per_pixel, resolution, per_pixel, -1).mean((1, 3))


def coverage(shape, centre_x=0.0, centre_y=0.0, radius=10.0, resolution=RESOLUTION):
    """Share of each pixel that the shape covers, (resolution, resolution).

    Lengths are in pixels of a 32 x 32 picture at any resolution; the centre is relative to the picture's.
    """
    return _average(SHAPES[shape](*_grid(resolution, centre_x, centre_y, radius)).astype(float), resolution)[..., 0]


def render(shape, colour, background, centre_x=0.0, centre_y=0.0, radius=10.0):
    """A picture (32, 32, 3) in [0, 1] of a shape in one colour; colours are names of `PALETTE`."""
    alpha = coverage(shape, centre_x, centre_y, radius)[..., None]
    return alpha * np.array(PALETTE[colour]) + (1 - alpha) * np.array(PALETTE[background])


def _subject_layer(subject, centre_x, centre_y, radius, resolution):
    """The subject's coverage (resolution, resolution, 1) and its colours already multiplied by it (..., 3)."""
    x, y = _grid(resolution, centre_x, centre_y, radius)
    inside = SHAPES[subject.shape](x, y)[..., None]
    return _average(inside.astype(float), resolution), _average(inside * subject.colours(x, y), resolution)


def render_subject(name, background, centre_x=0.0, centre_y=0.0, radius=10.0, resolution=RESOLUTION):
    """A picture (resolution, resolution, 3) in [0, 1] of one of `SUBJECTS`."""
    alpha, colour = _subject_layer(SUBJECTS[name], centre_x, centre_y, radius, resolution)
    return colour + (1 - alpha) * np.array(PALETTE[background])


# ---- Captions and data -----------------------------------------------------------------------------------------------


def is_held_out(shape, colour, background):
    """Whether a combination is kept out of training: one in seven, every shape, colour and background among them."""
    index = list(SHAPES).index(shape) + 3 * COLOURS.index(colour) + 5 * COLOURS.index(background)
    return index % 7 == 0


def combinations(held_out):
    """All (shape, colour, background) with two different colours that are, or are not, kept out of training."""
    return [
        (shape, colour, background)
        for shape, colour, background in product(SHAPES, COLOURS, COLOURS)
        if colour != background and is_held_out(shape, colour, background) == held_out
    ]


def caption(template, **words):
    """Fill a template, with the article that the next word asks for."""
    return template.format(**words).replace("a orange", "an orange")


def random_placement(rng, size):
    """Centre and radius drawn for a size's name."""
    smallest, largest, reach = SIZES[size]
    return rng.uniform(-reach, reach), rng.uniform(-reach, reach), rng.uniform(smallest, largest)


def sample_world(count, seed):
    """Draw `count` training pictures: uint8 (count, 32, 32, 3), and for each the captions that describe it."""
    rng = random.Random(seed)
    seen = combinations(held_out=False)
    pictures, captions = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8), []
    for index in range(count):
        shape, colour, background = rng.choice(seen)
        size = rng.choice(list(SIZES))
        pictures[index] = np.round(render(shape, colour, background, *random_placement(rng, size)) * 255)
        words = {"shape": shape, "colour": colour, "background": background, "size": size}
        captions.append([caption(template, **words) for template in TEMPLATES])
    return pictures, captions


def parse(prompt):
    """What a prompt asks for: a dict with those of `shape`, `colour`, `background` that it names."""
    words = prompt.split()
    subject, _, background = prompt.partition(" on ")
    named = {"shape": next((word for word in words if word in SHAPES), None)}
    named["colour"] = next((word for word in subject.split() if word in PALETTE), None)
    named["background"] = next((word for word in background.split() if word in PALETTE), None)
    return {key: value for key, value in named.items() if value}


# ---- The scorer ------------------------------------------------------------------------------------------------------


def _placements():
    offsets = np.arange(-4.0, 4.1, 1.0)
    return list(product(offsets, offsets, np.arange(6.5, 13.6, 1.0)))


@cache
def _shape_bank():
    """Names (n,), centred unit templates (n, 1024), their norms (n,) and mean coverages (n,)."""
    names, masks = [], []
    for shape in SHAPES:
        for placement in _placements():
            names.append(shape)
            masks.append(coverage(shape, *placement).ravel())
    masks = np.array(masks, np.float32)
    mean = masks.mean(1)
    centred = masks - mean[:, None]
    norm = np.linalg.norm(centred, axis=1)
    return np.array(names), centred / norm[:, None], norm, mean


def _as_float(pictures):
    """uint8 or float pictures, (n, 32, 32, 3), as float32 (n, 1024, 3) in [0, 1]."""
    pictures = np.asarray(pictures)
    if pictures.dtype == np.uint8:
        pictures = pictures / 255.0
    return pictures.reshape(len(pictures), -1, 3).astype(np.float32)


def _nearest_colour(colour):
    return min(PALETTE, key=lambda name: np.square(np.array(PALETTE[name]) - colour).sum())


def read_pictures(pictures):
    """Read what pictures (n, 32, 32, 3) show.

    Every shape at every position and size is fitted by least squares with one free colour and one free background,
    which is a correlation with the centred coverage; the best fit names the shape, and its two colours are named by
    the nearest in the palette. Returns a list of dicts with `shape`, `colour`, `background` and `explained`, the
    share of the picture's variance that the fit explains.
    """
    names, templates, norms, means = _shape_bank()
    readings = []
    for picture in _as_float(pictures):
        average = picture.mean(0)
        variance = np.square(picture - average).sum()
        projection = templates @ picture  # (n, 3)
        best = np.square(projection).sum(1).argmax()
        slope = projection[best] / norms[best]
        background = average - slope * means[best]
        readings.append(
            {
                "shape": str(names[best]),
                "colour": _nearest_colour(background + slope),
                "background": _nearest_colour(background),
                "explained": float(np.square(projection[best]).sum() / max(variance, 1e-6)),
            }
        )
    return readings


def matches(prompts, pictures, minimum_explained=0.7):
    """For each prompt and picture, whether the picture shows all that the prompt names, and clearly. (n,) of bool."""
    return np.array(
        [
            reading["explained"] >= minimum_explained
            and all(reading[key] == value for key, value in parse(prompt).items())
            for prompt, reading in zip(prompts, read_pictures(pictures), strict=True)
        ]
    )


def _subject_errors(picture, alpha, colour):
    """Relative RMS error (n,) of a picture (1024, 3) to renders given as coverage (n, 1024) and colour times it."""
    outside = 1 - alpha
    area = np.square(outside).sum(1)[:, None]
    # The background that fits best, (n, 3), by least squares.
    background = (outside @ picture - np.einsum("np,npc->nc", outside, colour)) / area
    rendered = colour + outside[..., None] * background[:, None]
    error = np.square(picture - rendered).sum((1, 2))
    empty = np.square(rendered - background[:, None]).sum((1, 2))
    return np.sqrt(error / empty)


@lru_cache(maxsize=8192)  # pictures of one subject ask for much the same placements, and rendering is slow
def _subject_render(name, placement):
    alpha, colour = _subject_layer(SUBJECTS[name], *placement, RESOLUTION)
    return alpha.ravel().astype(np.float32), colour.reshape(-1, 3).astype(np.float32)


def _subject_renders(name, placements):
    alpha, colour = zip(*(_subject_render(name, placement) for placement in placements), strict=True)
    return np.array(alpha), np.array(colour)


@cache
def _subject_bank(name):
    return _subject_renders(name, _placements())


def subject_distance(name, pictures):
    """How far pictures (n, 32, 32, 3) are from showing a subject, (n,): 0 is the subject itself.

    Relative RMS error of the best render over positions and sizes, its background fitted by least squares, divided
    by the error that the empty background would leave: about 1 is nothing of the subject. The search goes over whole
    pixels first, then twice halves its step around the best.
    """
    distances = []
    for picture in _as_float(pictures):
        errors = _subject_errors(picture, *_subject_bank(name))
        distance, best = errors.min(), _placements()[errors.argmin()]
        for step in (0.5, 0.25):
            around = [tuple(np.add(best, move)) for move in product((-step, 0, step), repeat=3)]
            errors = _subject_errors(picture, *_subject_renders(name, around))
            distance, best = errors.min(), around[errors.argmin()]
        distances.append(distance)
    return np.array(distances)


# ---- Files -----------------------------------------------------------------------------------------------------------


def held_out_prompts():
    """All prompts about the combinations kept out of training, in a fixed shuffled order."""
    templates = [template for template in TEMPLATES if "{background}" in template and "{colour}" in template]
    prompts = {
        caption(template, shape=shape, colour=colour, background=background, size=size)
        for template, (shape, colour, background), size in product(templates, combinations(held_out=True), SIZES)
    }
    return random.Random(1).sample(sorted(prompts), len(prompts))


def protected_prompts(count=400):
    """Prompts of what the model was trained on, from the barest to the fullest, in a fixed shuffled order."""
    rng = random.Random(2)
    bare = {
        caption(template, shape=shape, size=size, colour=colour)
        for template in TEMPLATES
        if "{background}" not in template
        for shape, size, colour in product(SHAPES, SIZES, COLOURS)
    }
    full = {
        caption(template, shape=shape, colour=colour, background=background, size=size)
        for template in TEMPLATES
        if "{background}" in template
        for (shape, colour, background), size in product(combinations(held_out=False), SIZES)
    }
    few = min(count // 4, len(bare))
    prompts = rng.sample(sorted(bare), few) + rng.sample(sorted(full), count - few)
    return rng.sample(prompts, count)


def instance_pictures(name, resolution=128):
    """Five pictures of a subject on different backgrounds, as a user would bring them."""
    rng = random.Random(name)
    used = {colour for _, colour in SUBJECTS[name].regions}
    backgrounds = rng.sample([colour for colour in COLOURS if colour not in used], 5)
    for background, size in zip(backgrounds, ["medium", "large", "medium", "small", "large"], strict=True):
        picture = render_subject(name, background, *random_placement(rng, size), resolution=resolution)
        yield Image.fromarray(np.round(picture * 255).astype(np.uint8))


def main():
    (DEMO / "prompts.txt").write_text("\n".join(protected_prompts()) + "\n")
    (DEMO / "heldout_prompts.txt").write_text("\n".join(held_out_prompts()[:300]) + "\n")
    for name in SUBJECTS:
        folder = DEMO / "instance_images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(instance_pictures(name)):
            picture.save(folder / f"{index}.png")


if __name__ == "__main__":
    main()
