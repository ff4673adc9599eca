"""The world of `demo/world.py`: its grammar, its reader and its subjects."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import world
import world_reader
from world import Background, Object, Scene


def right(prompt, scene):
    """What a prompt has wrong about a scene that is known."""
    return world_reader.wrong_parts(world.parse(prompt), world_reader.Reading(scene, 1.0))


def test_every_caption_is_right_about_its_scene():
    rng = random.Random(11)
    for _ in range(3000):
        scene = rng.choice([world.random_single, world.random_pair])(rng, held_out=rng.random() < 0.3)
        caption = world.caption(rng, scene, rng.choice(world.ORDERS), coloured=rng.random() < 0.8)
        assert right(caption, scene) == (), caption
        assert right(caption.upper(), scene) == (), caption


def test_parse():
    assert world.parse("a photo of a big spotted turquoise disc at the top on red fading to blue") == world.Wanted(
        ({"size": "large", "fill": "dotted", "colour": "cyan", "shape": "circle", "position": "top"},),
        None,
        Background("gradient", ("red", "blue")),
    )
    wanted = world.parse("a red star around a heart on the left")
    assert wanted.relation == "inside" and [each["shape"] for each in wanted.objects] == ["heart", "star"]
    assert world.parse("a photo of a sks on white beside black") == world.Wanted(
        ({},), None, Background("split", ("white", "black"))
    )


def test_reader_reads_renders():
    rng = random.Random(12)
    scenes = [each(rng) for _ in range(8) for each in (world.random_single, world.random_pair)]
    readings = world_reader.read(np.stack([scene.render() for scene in scenes]))
    captions = [world.caption(rng, scene, background=1, size=1) for scene in scenes]
    wrong = [world_reader.wrong_parts(world.parse(each), read) for each, read in zip(captions, readings, strict=True)]
    assert wrong == [()] * len(scenes)
    for scene, reading in zip(scenes, readings, strict=True):
        for drawn, read in zip(scene.objects, reading.scene.objects, strict=True):
            assert np.allclose((drawn.x, drawn.y, drawn.radius), (read.x, read.y, read.radius), atol=1.01)


def test_reader_is_right_about_the_world_and_strict():
    """At least 99% of its pictures are read right, and at least 98% with one part of an object changed wrong."""
    rng, scenes, changed = random.Random(3), [], []
    for number in range(100):
        scene = (world.random_single, world.random_pair)[number % 2](rng)
        first, key = scene.objects[0], ("colour", "fill", "shape")[number % 3]
        taken = {getattr(first, key), *(colour for colour in scene.background.colours if key == "colour")}
        values = {"colour": world.COLOURS, "fill": world.FILLS, "shape": world.CONTAINERS}[key]
        other = rng.choice([value for value in values if value not in taken])
        scenes.append(scene)
        changed.append(replace(scene, objects=(replace(first, **{key: other}), *scene.objects[1:])))
    captions = [world.caption(rng, scene, background=1, size=1) for scene in scenes]
    right, wrong = (
        world_reader.judge(captions, np.stack([each.render() for each in all])) for all in (scenes, changed)
    )
    assert sum(not parts for parts in right) >= 99 and sum(bool(parts) for parts in wrong) >= 98


STAR = Object("star", "red", "plain", -12, 0, 15)
PROMPT = "a medium red star on the left on a white background"


@pytest.mark.parametrize(
    "part, drawn",
    [
        ("shape", replace(STAR, shape="heart")),
        ("colour", replace(STAR, colour="blue")),
        ("fill", replace(STAR, fill="striped")),
        ("size", replace(STAR, radius=10)),
        ("position", replace(STAR, x=12)),
    ],
)
def test_wrong_part_of_an_object_is_named(part, drawn):
    picture = Scene((drawn,), Background("plain", ("cyan",))).render()
    assert world_reader.judge([PROMPT.replace("white", "cyan")], picture[None]) == [(part,)]


def test_wrong_scene_is_named():
    circle = Object("circle", "blue", "plain", 16, 0, 10)
    white, split = Background("plain", ("white",)), Background("split", ("white", "cyan"))
    scenes = [Scene((STAR,), split), Scene((replace(STAR, radius=13), circle), white)]
    noise = np.random.default_rng(0).uniform(size=(world.RESOLUTION, world.RESOLUTION, 3))
    pictures = np.stack([scenes[0].render(), scenes[1].render(), scenes[1].render(), noise])
    prompts = [PROMPT, PROMPT, "a blue circle left of a red star", "a star"]
    wrong = world_reader.judge(prompts, pictures)
    assert wrong[:3] == [("background",), ("count",), ("relation",)] and "picture" in wrong[3]


def test_world_is_the_same_every_time():
    pictures, captions, single = world.sample_world(20, seed=3)
    again, captions_again, single_again = world.sample_world(25, seed=3)
    assert np.array_equal(pictures, again[:20]) and captions == captions_again[:20] and single == single_again[:20]
    alone = [len(reading.scene.objects) == 1 for reading in world_reader.read(pictures)]
    assert single == alone and set(alone) == {False, True}
    assert world.protected_prompts() == world.protected_prompts() and len(set(world.names())) >= 100


def test_held_out_combinations_are_never_trained():
    rng = random.Random(13)
    scenes = [world.random_scene(rng) for _ in range(3000)]
    assert not any(world.is_held_out(*each.combination) for scene in scenes for each in scene.objects)
    assert not any(world.is_held_out(*meaning) for meaning in world.names().values())
    for index, kind in enumerate((world.SHAPES, world.COLOURS, world.FILLS)):
        assert {each[index] for each in world.combinations(held_out=True)} == set(kind)


def test_rare_tokens():
    rng = random.Random(14)
    captions = [world.training_caption(rng, world.random_single(rng)) for _ in range(4000)]
    words = set(" ".join(captions).split())
    assert set(world.RARE_TOKENS) & words and not set(world.UNTRAINED_TOKENS) & words
    assert words <= set(world.vocabulary()) | {word + "," for word in world.vocabulary()}
    assert max(len(caption.replace(",", " ,").split()) for caption in captions) <= 26


def test_files_are_up_to_date():
    assert (world.FOLDER / "protected.txt").read_text().splitlines() == world.protected_prompts()
    assert (world.FOLDER / "general.txt").read_text().splitlines() == world.general_prompts()
    assert len(set(world.general_prompts())) == 300
    for kind, prompts in world.held_out_prompts().items():
        assert (world.FOLDER / f"heldout_{kind}.txt").read_text().splitlines() == prompts
        assert not set(prompts) & {*world.protected_prompts(), *world.general_prompts()}
    for name in world.SUBJECTS:
        assert (world.FOLDER / name / "places.txt").read_text().splitlines() == world.place_prompts(name)
        rows = (world.FOLDER / name / "metadata.jsonl").read_text().splitlines()
        assert list(map(json.loads, rows)) == list(world.instance_captions(name))


@pytest.mark.parametrize("name", ["star", "moon"])
def test_subjects_are_told_from_their_class(name):
    files = sorted((world.FOLDER / name).glob("*.png"))
    pictures = [np.asarray(Image.open(file).resize((world.RESOLUTION,) * 2, Image.BOX)) for file in files]
    assert len(files) == 5 and world_reader.subject_distance(name, pictures).max() < 0.15
    subject, background = world.SUBJECTS[name], Background("plain", ("white",))
    of_class = [Scene((Object(subject.shape, colour),), background).render() for _, colour in subject.regions]
    assert world_reader.subject_distance(name, of_class).min() > 0.35
