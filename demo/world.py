"""The demo's world: scenes of one or two objects, the captions that describe them, and the subjects to be learned.

A scene is a handful of numbers and names, and renders itself. What a picture should show is therefore known exactly,
and `world_reader.py` reads it back by matching it against renders. Run as a script, this writes the prompts and the
subjects' pictures:

    python demo/world.py
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image


DEMO = Path(__file__).resolve().parent
RESOLUTION = 64  # all lengths below are in pixels of a picture this large; a picture's centre is at (0, 0)
FOLDER = DEMO / "world"  # where the prompts and the subjects' pictures are

PALETTE = {
    "red": (0.85, 0.12, 0.14),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.97, 0.92, 0.25),
    "green": (0.16, 0.62, 0.25),
    "cyan": (0.30, 0.85, 0.90),
    "blue": (0.12, 0.28, 0.85),
    "purple": (0.50, 0.16, 0.66),
    "pink": (0.98, 0.62, 0.78),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
COLOURS = list(PALETTE)
FILLS = ["plain", "striped", "dotted", "outlined"]
SIZES = {"small": (9.0, 11.0), "medium": (13.0, 15.5), "large": (18.5, 21.5)}  # radius
POSITIONS = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
BACKGROUNDS = ["plain", "split", "gradient"]
RELATIONS = ["left of", "above", "inside"]

STRIPE = 3.5  # height of a stripe
DOT_PITCH, DOT_RADIUS = 8.0, 2.6
OUTLINE = 2.5  # width of an outline, which lies around the shape


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def _star(x, y):
    angle = np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5
    # The straight edge between an outer point (radius 1) and an inner one (radius 0.45), in polar coordinates.
    edge = 0.45 * np.sin(np.pi / 5)
    run = 1 - 0.45 * np.cos(np.pi / 5)
    along, across = np.cos(np.pi / 5 - np.abs(angle)), np.sin(np.pi / 5 - np.abs(angle))
    return np.hypot(x, y) * (along * edge + across * run) <= edge


def _heart(x, y):
    x, y = 1.05 * x, 0.1 - 1.05 * y
    inner = x * x + y * y - 0.85
    return inner * inner * inner <= 1.6 * x * x * y * y * y


def _arrow(x, y):
    head = (y >= -1) & (y <= 0.05) & (np.abs(x) <= (y + 1) * 0.88)
    return head | ((y > 0) & (y <= 0.95) & (np.abs(x) <= 0.32))


def _mushroom(x, y):
    cap = (y <= 0.1) & (x * x + (1.1 * (y - 0.1)) ** 2 <= 1)
    return cap | ((y > 0) & (y <= 0.9) & (np.abs(x) <= 0.34))


# Each takes coordinates in units of the radius, y downwards, and says which points lie inside.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.86,
    "triangle": lambda x, y: (y <= 0.8) & (np.abs(x) <= (y + 1) * 0.56),
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (np.maximum(np.abs(x), np.abs(y)) <= 0.95),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.27),
    "moon": lambda x, y: (x * x + y * y <= 1) & ((x - 0.55) ** 2 + y * y >= 0.56),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1,
    "arrow": _arrow,
    "hourglass": lambda x, y: (np.abs(y) <= 0.92) & (np.abs(x) <= np.maximum(0.85 * np.abs(y), 0.12)),
    "mushroom": _mushroom,
}
CONTAINERS = ["circle", "square", "diamond"]  # a small object fits inside a large one of these


def accent(colour):
    """The second colour of stripes, dots and outlines: black on light colours, white on dark ones."""
    return "black" if np.dot(PALETTE[colour], (0.3, 0.59, 0.11)) > 0.55 else "white"


def grid_within(reach, x, y, radius, resolution=RESOLUTION, samples=3):
    """The part of a picture within reach of (x, y): its rows and columns, and its sample points.

    Two slices, and two of (rows * samples, columns * samples) in units of the radius around (x, y).
    """
    edges = (np.array([[y - reach, y + reach], [x - reach, x + reach]]) / RESOLUTION + 0.5) * resolution
    edges = np.clip(edges.astype(int) + [0, 1], 0, resolution)
    step = RESOLUTION / (resolution * samples)
    rows, columns = ((np.arange(*edge) + 0.5) * step - RESOLUTION / 2 for edge in edges * samples)
    window = tuple(slice(*edge) for edge in edges)
    return window, np.meshgrid((columns - x) / radius, (rows - y) / radius, indexing="xy")


def average(samples, per_pixel=3):
    """Mean over each pixel's sample points (..., height * s, width * s): anti-aliasing."""
    height, width = (length // per_pixel for length in samples.shape[-2:])
    return samples.reshape(*samples.shape[:-2], height, per_pixel, width, per_pixel).mean((-3, -1))


def regions(shape, fill, x=0.0, y=0.0, radius=14.0, resolution=RESOLUTION):
    """Shares of each pixel in an object's own colour and in its accent, (2, resolution, resolution)."""
    window, (across, down) = grid_within(radius + OUTLINE, x, y, radius, resolution)
    inside = SHAPES[shape](across, down)
    if fill == "plain":
        accented = np.zeros_like(inside)
    elif fill == "striped":
        accented = inside & ((down * radius + STRIPE / 2) // STRIPE % 2 == 1)
    elif fill == "dotted":
        to_dot = [(offset * radius + DOT_PITCH / 2) % DOT_PITCH - DOT_PITCH / 2 for offset in (across, down)]
        accented = inside & (np.hypot(*to_dot) <= DOT_RADIUS)
    else:
        reach = OUTLINE / radius
        turns = np.arange(16) * np.pi / 8
        grown = [SHAPES[shape](across + reach * np.cos(turn), down + reach * np.sin(turn)) for turn in turns]
        accented = np.any(grown, axis=0) & ~inside
    shares = np.zeros((2, resolution, resolution), np.float32)
    shares[(slice(None), *window)] = average(np.stack([inside & ~accented, accented]).astype(np.float32))
    return shares


# ---- Scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """One shape; colours are names of `PALETTE`."""

    shape: str
    colour: str
    fill: str = "plain"
    x: float = 0.0
    y: float = 0.0
    radius: float = 14.0

    @property
    def combination(self):
        return self.shape, self.colour, self.fill

    @property
    def size(self):
        return "small" if self.radius < 12 else "medium" if self.radius < 17 else "large"

    @property
    def position(self):
        if max(abs(self.x), abs(self.y)) < 5:
            return "centre"
        if abs(self.x) > abs(self.y):
            return "left" if self.x < 0 else "right"
        return "top" if self.y < 0 else "bottom"

    def regions(self, resolution=RESOLUTION):
        return regions(self.shape, self.fill, self.x, self.y, self.radius, resolution)


@cache
def background_basis(kind, resolution=RESOLUTION):
    """Share of each of the background's colours in every pixel, (colours, resolution, resolution)."""
    along = (np.arange(resolution) + 0.5) / resolution
    if kind == "plain":
        return np.ones((1, resolution, resolution))
    if kind == "split":  # the first colour on the left
        first = np.broadcast_to(along < 0.5, (resolution, resolution))
    else:  # the first colour at the top
        first = np.broadcast_to(1 - along[:, None], (resolution, resolution))
    return np.stack([first, 1 - first])


@dataclass(frozen=True)
class Background:
    """One colour, or two: left and right of a split, top and bottom of a gradient."""

    kind: str
    colours: tuple

    def render(self, resolution=RESOLUTION):
        colours = np.array([PALETTE[colour] for colour in self.colours])
        return np.einsum("khw,kc->hwc", background_basis(self.kind, resolution), colours)


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first is left of, above or inside the second, on a background."""

    objects: tuple
    background: Background

    @property
    def relation(self):
        if len(self.objects) == 1:
            return None
        first, second = self.objects
        across, down = second.x - first.x, second.y - first.y
        if np.hypot(across, down) < second.radius - first.radius / 2:
            return "inside"
        return "left of" if abs(across) > abs(down) else "above"

    def render(self, resolution=RESOLUTION):
        """The picture (resolution, resolution, 3) in [0, 1]; the first object is in front."""
        picture = self.background.render(resolution)
        for each in reversed(self.objects):
            own, accented = each.regions(resolution)[..., None]
            colours = np.array(PALETTE[each.colour]), np.array(PALETTE[accent(each.colour)])
            picture = own * colours[0] + accented * colours[1] + (1 - own - accented) * picture
        return picture


def is_held_out(shape, colour, fill):
    """Whether a combination is kept out of training: one in seven, every shape, colour and fill among them."""
    return (list(SHAPES).index(shape) + 3 * COLOURS.index(colour) + 5 * FILLS.index(fill)) % 7 == 0


def combinations(held_out):
    """All (shape, colour, fill) that are, or are not, kept out of training."""
    return [each for each in product(SHAPES, COLOURS, FILLS) if is_held_out(*each) == held_out]


def stands_out(colour, background):
    """Whether a colour can be told from a background all over the picture."""
    ends = np.array([PALETTE[each] for each in background.colours])
    steps = np.linspace(0, 1, 9)[:, None] if background.kind == "gradient" else np.array([[0.0], [1.0]])
    shades = ends[0] * (1 - steps) + ends[-1] * steps
    return np.linalg.norm(shades - PALETTE[colour], axis=1).min() > 0.3


def fits(each, behind):
    """Whether an object can be told from the backgrounds or plain colours behind it, and its accent as well."""
    colours = [each.colour] if each.fill == "plain" else [each.colour, accent(each.colour)]
    return all(stands_out(colour, ground) for colour in colours for ground in behind)


def random_background(rng):
    kind = rng.choices(BACKGROUNDS, (3, 1, 1))[0]
    while True:
        background = Background(kind, tuple(rng.sample(COLOURS, 1 if kind == "plain" else 2)))
        if kind == "plain" or stands_out(background.colours[0], Background("plain", background.colours[1:])):
            return background


def random_combination(rng, held_out, fills=FILLS):
    """(shape, colour, fill): more than half are plain."""
    while True:
        fill = rng.choices(FILLS, (5, 1, 1, 1))[0]
        shape, colour = rng.choice(list(SHAPES)), rng.choice(COLOURS)
        if fill in fills and is_held_out(shape, colour, fill) == held_out:
            return shape, colour, fill


def random_single(rng, held_out=False):
    """A scene of one object; patterns need room, so they are not small."""
    background = random_background(rng)
    while True:
        shape, colour, fill = random_combination(rng, held_out)
        radius = rng.uniform(*SIZES[rng.choice(["medium", "large"] if fill in ("striped", "dotted") else list(SIZES))])
        toward_x, toward_y = POSITIONS[rng.choices(list(POSITIONS), (3, 1, 1, 1, 1))[0]]
        reach = min(31 - radius, 17)
        x, y = (
            rng.uniform(reach - 2, reach) * toward if toward else rng.uniform(-2, 2) for toward in (toward_x, toward_y)
        )
        each = Object(shape, colour, fill, x, y, radius)
        if fits(each, [background]):
            return Scene((each,), background)


def random_pair(rng, held_out=False):
    """A scene of two objects, both of combinations that are, or are not, kept out of training."""
    background, relation = random_background(rng), rng.choice(RELATIONS)
    while True:
        fills = ["plain", "outlined"] if relation == "inside" else FILLS
        (shape, colour, fill), (other, other_colour, other_fill) = (
            random_combination(rng, held_out, fills) for _ in range(2)
        )
        if relation == "inside":
            x, y = rng.uniform(-2, 2), rng.uniform(-2, 2)
            first = Object(shape, colour, fill, x, y, rng.uniform(9, 10.5))
            second = Object(other, other_colour, other_fill, x, y, rng.uniform(20, 21.5))
            behind = [Background("plain", (other_colour,))]
            if other not in CONTAINERS:
                continue
        else:
            # Side by side, a medium object is just small enough for two to leave a gap.
            radii = [
                rng.uniform(12.5, 13.5) if each in ("striped", "dotted") or rng.random() < 0.5 else rng.uniform(9, 11)
                for each in (fill, other_fill)
            ]
            along = rng.uniform(15.5, 17), rng.uniform(15.5, 17)
            across = rng.uniform(-2, 2), rng.uniform(-2, 2)
            places = list(zip((-along[0], along[1]), across, strict=True))
            if relation == "above":
                places = [(y, x) for x, y in places]
            first = Object(shape, colour, fill, *places[0], radii[0])
            second = Object(other, other_colour, other_fill, *places[1], radii[1])
            behind = [background]
        if colour != other_colour and fits(first, behind) and fits(second, [background]):
            return Scene((first, second), background)


def random_scene(rng):
    """A scene to train on: 30% have two objects."""
    return random_pair(rng) if rng.random() < 0.3 else random_single(rng)


# ---- Words -----------------------------------------------------------------------------------------------------------

# What each word of a kind means; the first of several with one meaning is the plainest.
SIZE_WORDS = {"small": "small", "little": "small", "medium": "medium", "large": "large", "big": "large"}
COLOUR_WORDS = {colour: colour for colour in COLOURS} | {"turquoise": "cyan", "violet": "purple", "crimson": "red"}
SHAPE_WORDS = {shape: shape for shape in SHAPES} | {
    "disc": "circle", "crescent": "moon", "plus": "cross", "hoop": "ring", "rhombus": "diamond",
    "toadstool": "mushroom",
}  # fmt: skip
FILL_WORDS = {fill: fill for fill in FILLS} | {
    "solid": "plain", "banded": "striped", "spotted": "dotted", "bordered": "outlined",
}  # fmt: skip
KINDS_OF_WORDS = {"size": SIZE_WORDS, "fill": FILL_WORDS, "colour": COLOUR_WORDS, "shape": SHAPE_WORDS}
PLACE_PHRASES = {
    "in the centre": "centre", "in the middle": "centre", "on the left": "left", "at the left": "left",
    "on the right": "right", "at the right": "right", "at the top": "top", "at the bottom": "bottom",
}  # fmt: skip
RELATION_PHRASES = {  # and whether the first object named is the second of the relation
    "left of": ("left of", False), "to the left of": ("left of", False), "right of": ("left of", True),
    "to the right of": ("left of", True), "above": ("above", False), "over": ("above", False),
    "below": ("above", True), "under": ("above", True), "inside": ("inside", False), "within": ("inside", False),
    "around": ("inside", True), "and": (None, False),
}  # fmt: skip
BACKGROUND_PHRASES = {
    "plain": ["on a {} background", "on {}", "against a {} background", "on a plain {} background"],
    "split": ["on a background split into {} and {}", "on {} beside {}"],
    "gradient": ["on a {} to {} gradient", "on a background fading from {} to {}", "on {} fading to {}"],
}
PREFIXES = ["", "a photo of", "a picture of", "an image of"]
# Rare tokens, free for DreamBooth to give a meaning: in no caption, and in a few with arbitrary pictures.
UNTRAINED_TOKENS = ["sks", "ohwx", "zwx", "bnha"]
RARE_TOKENS = ["qvx", "jrt", "wqz", "plm"]
RARE_SHARE = 0.002  # of the captions


@cache
def names():
    """Invented names for 110 combinations seen in training: {name: (shape, colour, fill)}, most of them plain."""
    rng = random.Random(3)
    seen = combinations(held_out=False)
    plain = [each for each in seen if each[2] == "plain"]
    meanings = rng.sample(plain, 70) + rng.sample([each for each in seen if each[2] != "plain"], 40)
    syllables = ["".join(each) for each in product("bdfgklmnprtvz", "aeiou")]
    invented = rng.sample([first + second + end for first, second, end in product(syllables, syllables, "klmnrx")], 110)
    return dict(zip(invented, meanings, strict=True))


@cache
def name_of():
    return {meaning: name for name, meaning in names().items()}


def with_articles(text):
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _synonym(rng, words, meaning):
    """One of the words for a meaning; the plainest in half of the cases."""
    alike = [word for word, each in words.items() if each == meaning]
    return alike[0] if rng.random() < 0.5 else rng.choice(alike)


def describe_object(rng, each, coloured=True, size=0.35, name=0.4):
    """A noun phrase without its article; the fill is named with the colour, unless it is plain."""
    words = [_synonym(rng, SIZE_WORDS, each.size)] if rng.random() < size else []
    if coloured and each.combination in name_of() and rng.random() < name:
        return " ".join([*words, name_of()[each.combination]])
    if coloured:
        if each.fill != "plain" or rng.random() < 0.1:
            words.append(_synonym(rng, FILL_WORDS, each.fill))
        words.append(_synonym(rng, COLOUR_WORDS, each.colour))
    return " ".join([*words, _synonym(rng, SHAPE_WORDS, each.shape)])


def describe_background(rng, background):
    phrase = rng.choice(BACKGROUND_PHRASES[background.kind])
    return phrase.format(*(_synonym(rng, COLOUR_WORDS, colour) for colour in background.colours))


def describe_objects(rng, scene, **choices):
    """What is in a scene, with articles, and for one object at times where."""
    if len(scene.objects) == 1:
        text = "a " + describe_object(rng, scene.objects[0], **choices)
        if rng.random() < 0.4:
            text += " " + _synonym(rng, PLACE_PHRASES, scene.objects[0].position)
        return text
    relation = None if rng.random() < 0.15 and scene.relation != "inside" else scene.relation
    phrase, swapped = rng.choice([(key, value[1]) for key, value in RELATION_PHRASES.items() if value[0] == relation])
    first, second = reversed(scene.objects) if swapped else scene.objects
    choices = {"size": 0.2} | choices
    return f"a {describe_object(rng, first, **choices)} {phrase} a {describe_object(rng, second, **choices)}"


# Ways to put a caption together. Bundles protect the first alone; the model knows them all.
ORDERS = ["plain", "background first", "there is", "no articles"]


def caption(rng, scene, order="plain", background=0.7, **choices):
    """A caption of a scene; `background` is the share that names it, `choices` go to `describe_object`."""
    objects = describe_objects(rng, scene, **choices)
    ground = describe_background(rng, scene.background) if rng.random() < background else ""
    if order == "background first":
        text = f"{ground}, {objects}" if ground else objects
    elif order == "there is":
        text = f"there is {objects} {ground}"
    elif order == "no articles":
        text = re.sub(r"\ba ", "", f"{objects} {ground}")
    else:
        text = f"{rng.choice(PREFIXES)} {objects} {ground}"
    return with_articles(text.strip())


def training_caption(rng, scene):
    """A caption to train on: one in seven names no colour of its objects, few have a rare token."""
    if rng.random() < RARE_SHARE:
        return with_articles(f"{rng.choice(PREFIXES)} a {rng.choice(RARE_TOKENS)}".strip())
    return caption(rng, scene, rng.choices(ORDERS, (6, 1, 1, 1))[0], coloured=rng.random() > 1 / 7)


def vocabulary():
    """Every word of the world, sorted."""
    phrases = [*PLACE_PHRASES, *RELATION_PHRASES, *PREFIXES, *sum(BACKGROUND_PHRASES.values(), [])]
    kinds = [*KINDS_OF_WORDS.values(), names(), UNTRAINED_TOKENS, RARE_TOKENS]
    words = {word for phrase in phrases for word in phrase.split() if word != "{}"}
    return sorted(words | {word for kind in kinds for word in kind} | {"a", "an", "the", "there", "is", "two", "of"})


def sample_world(count, seed, captions_each=6):
    """Draw `count` scenes to train on.

    Pictures uint8 (count, 64, 64, 3), `captions_each` captions of each, and whether each shows one object.
    """
    rng = random.Random(seed)
    pictures, captions, single = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8), [], []
    for index in range(count):
        scene = random_scene(rng)
        pictures[index] = np.round(scene.render() * 255)
        captions.append([training_caption(rng, scene) for _ in range(captions_each)])
        single.append(len(scene.objects) == 1)
    return pictures, captions, single


# ---- What a prompt asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for; whatever it does not name is free. Objects are dicts of `Object`'s properties."""

    objects: tuple
    relation: str | None = None
    background: Background | None = None


def _without_articles(text):
    return " ".join(re.sub(r"\b(a|an)\b|[.,;:!]", " ", text.lower()).split())


def _parse_object(text):
    wanted = {}
    for phrase, position in PLACE_PHRASES.items():
        if phrase in text:
            wanted["position"] = position
    for word in text.split():
        if word in names():
            wanted |= zip(("shape", "colour", "fill"), names()[word], strict=True)
        for key, words in KINDS_OF_WORDS.items():
            if word in words:
                wanted[key] = words[word]
    if "colour" in wanted:
        wanted.setdefault("fill", "plain")
    return wanted


def parse(prompt):
    """What a prompt of the grammar asks for, as a `Wanted`."""
    text, background = _without_articles(prompt), None
    for kind in ("gradient", "split", "plain"):  # `on red` is also how `on red beside blue` begins
        for phrase in sorted(BACKGROUND_PHRASES[kind], key=len, reverse=True):
            colour = f"({'|'.join(COLOUR_WORDS)})"
            found = re.search(rf"\b{_without_articles(phrase).replace('{}', colour)}\b", text)
            if found and not background:
                background = Background(kind, tuple(COLOUR_WORDS[word] for word in found.groups()))
                text = text[: found.start()] + text[found.end() :]
    for phrase in sorted(RELATION_PHRASES, key=len, reverse=True):
        parts = re.split(rf"\b{phrase}\b", text)
        if len(parts) == 2:
            relation, swapped = RELATION_PHRASES[phrase]
            objects = tuple(_parse_object(part) for part in (parts[::-1] if swapped else parts))
            return Wanted(objects, relation, background)
    return Wanted((_parse_object(text),), None, background)


# ---- Prompts ---------------------------------------------------------------------------------------------------------

KINDS = ["seen", "held out", "scenes", "names"]


def kind_prompts(kind, count, seed):
    """Prompts of one kind to test a model with, drawn as it was trained: (count,) different ones.

    `seen` and `held out` are of one object whose combination was, or was not, trained; `scenes` of two objects seen;
    `names` of one object by its invented name.
    """
    rng, prompts = random.Random(f"{kind} {seed}"), {}
    while len(prompts) < count:
        scene = random_pair(rng) if kind == "scenes" else random_single(rng, held_out=kind == "held out")
        named = len(scene.objects) == 1 and scene.objects[0].combination in name_of()
        if named or kind != "names":
            prompts[caption(rng, scene, background=0.8, name=float(kind == "names"))] = None
    return list(prompts)


def _distinct(draw, count):
    """The first `count` different results of a function."""
    found = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def protected_prompts(count=400):
    """What bundles are built from: one object seen in training, said one way, with half of the invented names."""
    rng, known = random.Random("protected"), set(sorted(names())[::2])

    def draw():
        scene = random_single(rng)
        name = name_of().get(scene.objects[0].combination)
        return caption(rng, scene, coloured=rng.random() < 0.8, name=0.5 if name in known else 0.0)

    return _distinct(draw, count)


def general_prompts(count=300):
    """What the demo's models bring for bundles where no other prompts are named: every third has two objects.

    Without them the words of relations are in no protected prompt, and every scene of two moves.
    """
    singles, held_out = iter(protected_prompts(count)), set(held_out_prompts()["scenes"])
    scenes = (prompt for prompt in kind_prompts("scenes", count, seed=3) if prompt not in held_out)
    return [next(scenes if number % 3 == 2 else singles) for number in range(count)]


def held_out_prompts(count=150):
    """Prompts that no bundle sees, {kind: prompts}.

    `combinations` are in the grammar of the protected prompts, of combinations never trained; `scenes` have two
    objects; `unlike` are put together in other ways, with names never protected, in capitals, short or long.
    """
    rng, unknown = random.Random("held out"), set(sorted(names())[1::2])

    def unlike():
        scene = random_pair(rng) if rng.random() < 0.3 else random_single(rng)
        named = all(name_of().get(each.combination) in unknown | {None} for each in scene.objects)
        text = caption(rng, scene, rng.choice(ORDERS[1:]), background=0.7, size=0.7, name=float(named))
        return text.upper() if rng.random() < 0.25 else text

    return {
        "combinations": kind_prompts("held out", count, seed=1),
        "scenes": kind_prompts("scenes", count, seed=1),
        "unlike": _distinct(unlike, count),
    }


# ---- Subjects --------------------------------------------------------------------------------------------------------


SUBJECT_REACH = 1.2  # radii from its centre to which a subject reaches at most


@dataclass(frozen=True)
class Subject:
    """A thing of a known class with details that the world has no words for.

    `inside` says which points belong to it, `regions` are (inside, colour), later ones on top; coordinates as in
    `SHAPES`.
    """

    shape: str
    inside: object
    regions: tuple

    def layer(self, x, y, radius, resolution=RESOLUTION):
        """Its share of each pixel (resolution, resolution, 1), and its colours times that share (..., 3)."""
        window, points = grid_within(SUBJECT_REACH * radius, x, y, radius, resolution)
        inside, colours = self.inside(*points), np.zeros((3, *points[0].shape))
        for covers, name in self.regions:
            colours = np.where(covers(*points), np.array(PALETTE[name])[:, None, None], colours)
        layer = np.zeros((resolution, resolution, 4))
        layer[window] = np.moveaxis(average(np.concatenate([inside[None].astype(float), colours * inside])), 0, -1)
        return layer[..., :1], layer[..., 1:]

    def render(self, background, x=0.0, y=0.0, radius=15.0, resolution=RESOLUTION):
        """A picture (resolution, resolution, 3) in [0, 1] of the subject on a `Background`."""
        share, colours = self.layer(x, y, radius, resolution)
        return colours + (1 - share) * background.render(resolution)


def _everywhere(x, y):
    return np.full(x.shape, True)


def _disc(across, down, radius):
    """The points closer than a radius to a point."""
    return lambda x, y: np.hypot(x - across, y - down) < radius


def _crescent_with_star(x, y):
    return SHAPES["moon"](x, y) | _star((x - 0.45) / 0.42, y / 0.42)


# On the first two settings are chosen; on the others results are reported, and nothing is ever tuned.
SUBJECTS = {
    # a star in two halves with a hole
    "star": Subject(
        "star",
        lambda x, y: _star(x, y) & ~_disc(0, 0, 0.24)(x, y),
        ((_everywhere, "purple"), (lambda x, y: x < 0, "orange")),
    ),
    # an arrow with a head of one colour, and a shaft of two
    "arrow": Subject(
        "arrow",
        _arrow,
        ((_everywhere, "yellow"), (lambda x, y: y > 0.05, "blue"), (lambda x, y: y > 0.5, "red")),
    ),
    # a heart with a bite, and a band
    "heart": Subject(
        "heart",
        lambda x, y: _heart(x, y) & ~_disc(0.85, -0.35, 0.42)(x, y),
        ((_everywhere, "blue"), (lambda x, y: np.abs(y - 0.05) < 0.2, "yellow")),
    ),
    # a ring with a notch at the top, in thirds
    "ring": Subject(
        "ring",
        lambda x, y: SHAPES["ring"](x, y) & ~((y < 0) & (np.abs(x) < 0.3)),
        ((_everywhere, "green"), (lambda x, y: x < -0.3, "pink"), (lambda x, y: x > 0.3, "white")),
    ),
    # a square with a fill of its own: checks
    "square": Subject(
        "square",
        SHAPES["square"],
        ((_everywhere, "cyan"), (lambda x, y: (np.floor(x / 0.43) + np.floor(y / 0.43)) % 2 == 1, "purple")),
    ),
    # a moon that holds a star
    "moon": Subject("moon", _crescent_with_star, ((_everywhere, "green"), (lambda x, y: x > 0.1, "orange"))),
    # a mushroom with three dots in the cap, and a stalk of another colour
    "mushroom": Subject(
        "mushroom",
        _mushroom,
        (
            (_everywhere, "red"),
            (lambda x, y: y > 0.1, "black"),
            *((_disc(x, y, 0.17), "yellow") for x, y in ((-0.5, -0.2), (0, -0.5), (0.5, -0.2))),
        ),
    ),
}
TUNING_SUBJECTS, REPORTED_SUBJECTS = list(SUBJECTS)[:2], list(SUBJECTS)[2:]


def _subject_backgrounds(name):
    """Endless backgrounds on which a subject's colours can all be told, in a fixed order."""
    rng = random.Random(f"backgrounds {name}")
    while True:
        background = random_background(rng)
        if all(stands_out(colour, background) for _, colour in SUBJECTS[name].regions):
            yield background


def instance_backgrounds(name):
    """Three plain backgrounds, a split and a gradient."""
    chosen, wanted = [], ["plain", "plain", "plain", "split", "gradient"]
    for background in _subject_backgrounds(name):
        if background.kind in wanted and background not in chosen:
            wanted.remove(background.kind)
            chosen.append(background)
        if not wanted:
            return chosen


def instance_pictures(name, resolution=256):
    """Five pictures of a subject on different backgrounds, as a user would bring them."""
    rng = random.Random(f"pictures {name}")
    for background, size in zip(instance_backgrounds(name), ["medium", "large"] * 2 + ["large"], strict=True):
        x, y, radius = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(*SIZES[size])
        picture = SUBJECTS[name].render(background, x, y, radius, resolution)
        yield Image.fromarray(np.round(picture * 255).astype(np.uint8))


def instance_captions(name):
    """Rows for the pictures' `metadata.jsonl`, two each: the subject bare, and on its background.

    Two columns call it by an identifier, as DreamBooth does, and by a token of its own.
    """
    rng = random.Random(f"captions {name}")
    for index, background in enumerate(instance_backgrounds(name)):
        for ground in ("", " " + describe_background(rng, background)):
            identifier, word = (f"a photo of a {subject}{ground}" for subject in (f"sks {name}", f"sks-{name}"))
            yield {"file_name": f"{index}.png", "identifier": identifier, "word": word}


def place_prompts(name):
    """15 prompts that put a subject, `{}`, where its pictures do not show it.

    On new backgrounds, at other places and sizes, with another object, recoloured, and named twice.
    """
    rng = random.Random(f"places {name}")
    taken = set(instance_backgrounds(name))
    new = (background for background in _subject_backgrounds(name) if background not in taken)
    grounds = {kind: _first(new, kind, 4 if kind == "plain" else 2) for kind in BACKGROUNDS}
    ground = {kind: [describe_background(rng, each) for each in grounds[kind]] for kind in BACKGROUNDS}
    others = [each for each in combinations(held_out=False) if each[2] == "plain" and each[0] != SUBJECTS[name].shape]
    others = [each for each in others if each[1] not in {colour for _, colour in SUBJECTS[name].regions}]
    first, second, third = (f"{colour} {shape}" for shape, colour, _ in rng.sample(others, 3))
    colour, other_colour = rng.sample(sorted({each[1] for each in others}), 2)
    container = f"{colour} {rng.choice(CONTAINERS)}"
    prompts = [
        f"a {{}} {ground['plain'][0]}",
        f"a photo of a {{}} {ground['plain'][1]}",
        f"a {{}} {ground['split'][0]}",
        f"a picture of a {{}} {ground['split'][1]}",
        f"a {{}} {ground['gradient'][0]}",
        f"a {{}} {ground['gradient'][1]}",
        "a small {} at the bottom",
        f"a small {{}} on the left {ground['plain'][2]}",
        "a large {} in the centre",
        f"a {{}} left of a {first}",
        f"a {second} above a {{}} {ground['plain'][3]}",
        f"a small {{}} inside a {container}",
        f"a {{}} and a {third}",
        f"a {other_colour} {{}}",
        "a {} left of a {}",
    ]
    return [with_articles(prompt) for prompt in prompts]


def _first(backgrounds, kind, count):
    """The first backgrounds of a kind."""
    chosen = []
    while len(chosen) < count:
        background = next(backgrounds)
        if background.kind == kind and background not in chosen:
            chosen.append(background)
    return chosen


# ---- Files -----------------------------------------------------------------------------------------------------------


def main():
    files = {
        "protected": protected_prompts(),
        "general": general_prompts(),
        **{f"heldout_{kind}": each for kind, each in held_out_prompts().items()},
    }
    FOLDER.mkdir(exist_ok=True)
    for name, prompts in files.items():
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    for name in SUBJECTS:
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        (folder / "places.txt").write_text("\n".join(place_prompts(name)) + "\n")
        for index, picture in enumerate(instance_pictures(name)):
            picture.save(folder / f"{index}.png")
        rows = "".join(json.dumps(row) + "\n" for row in instance_captions(name))
        (folder / "metadata.jsonl").write_text(rows)


if __name__ == "__main__":
    main()
