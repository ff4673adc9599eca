"""Reads the scene in a picture of `world.py` by matching it against renders, with no network that could be mistaken.

First the background is fitted to the picture's frame, robustly, since objects may reach into it. Then every shape
and fill at every place and size is laid over it with the colour that fits best; a region's error is a sum over its
pixels, so one matrix product gives the error of all of them, and of every pair of two that are apart or one in the
other. The best few are then fitted to the full picture, placement and colours.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np

from world import (
    COLOURS,
    CONTAINERS,
    DOT_PITCH,
    FILLS,
    PALETTE,
    RESOLUTION,
    SHAPES,
    STRIPE,
    SUBJECTS,
    Background,
    Object,
    Scene,
    background_basis,
    parse,
    regions,
)


MINIMUM_EXPLAINED = 0.8  # of what the objects change in the picture, for a reading to count
PATTERN = 1.25  # a pattern must be this much better than a plain shape, which it may imitate with its second colour
SECOND_OBJECT = 0.012  # share of the change that a second object must explain to be one, and half of what was left
SECOND_OBJECT_ERROR = 8.0  # and the squared error
CERTAIN = 0.02  # share of the change left unexplained by a fit that needs no rival
UNSURE = 0.06  # share of the change left unexplained that is worth a longer search
HOPELESS = 0.6  # more than this cannot be saved
RADII = (9.5, 11.5, 13.5, 15.5, 18.0, 20.5)  # of the coarse search
ACCENTS = (PALETTE["black"][0], PALETTE["white"][0])  # greys
_COLOURS = np.array([PALETTE[colour] for colour in COLOURS])


@dataclass(frozen=True)
class Reading:
    """The scene that fits a picture best, and the share of the objects' change to the background it explains."""

    scene: Scene
    explained: float


def as_float(pictures):
    """uint8 or float pictures (n, 64, 64, 3) as float32 in [0, 1]."""
    pictures = np.asarray(pictures)
    return pictures.astype(np.float32) / (255 if pictures.dtype == np.uint8 else 1)


def nearest_colour(colour):
    return COLOURS[int(np.square(_COLOURS - colour).sum(1).argmin())]


# ---- The background --------------------------------------------------------------------------------------------------


@cache
def _frame(width=3):
    inner = np.zeros((RESOLUTION, RESOLUTION), bool)
    inner[width:-width, width:-width] = True
    return ~inner


def fit_background(picture):
    """The `Background` of a picture (64, 64, 3), and what it looks like without the objects, of the same shape."""
    frame, best = _frame(), None
    pixels = picture[frame].astype(np.float64)  # (p, 3)
    for kind in ("plain", "split", "gradient"):
        basis = background_basis(kind)[:, frame].T  # (p, k)
        weights = np.ones(len(basis))
        for _ in range(12):  # towards the smallest sum of distances, which outliers hardly move
            weighted = basis * weights[:, None]
            colours = np.linalg.solve(weighted.T @ basis + 1e-6 * np.eye(basis.shape[1]), weighted.T @ pixels)
            distances = np.linalg.norm(pixels - basis @ colours, axis=1)
            weights = 1 / np.maximum(distances, 0.01)
        named = tuple(nearest_colour(colour) for colour in colours)
        error = np.minimum(distances, 0.3).mean() + 0.002
        if kind != "plain" and named[0] == named[1]:
            continue
        if best is None or error < 0.8 * best[0]:
            best = error, Background(kind, named), np.einsum("khw,kc->hwc", background_basis(kind), colours)
    return best[1], best[2].astype(np.float32)


# ---- The coarse search, on pictures of half the size -----------------------------------------------------------------


@lru_cache(maxsize=8000)
def _stamp(shape, fill, x, y, radius):
    """`regions` of an object whose centre is in the pixel at the picture's."""
    return regions(shape, fill, x, y, radius)


def _regions(shape, fill, x, y, radius):
    """`regions` for multiples of half a pixel: stamps shifted by whole ones."""
    across, down = int(np.floor(x)), int(np.floor(y))
    stamp = _stamp(shape, fill, x - across, y - down, radius)
    shifted = np.zeros_like(stamp)
    (rows, from_rows), (columns, from_columns) = _overlap(down), _overlap(across)
    shifted[:, rows, columns] = stamp[:, from_rows, from_columns]
    return shifted


def _overlap(shift):
    """Where a row of pixels lands in the picture when it is shifted, and which of its pixels do."""
    return slice(max(0, shift), RESOLUTION + min(0, shift)), slice(max(0, -shift), RESOLUTION - max(0, shift))


def _halve(picture):
    """Mean of 2 x 2 pixels of (..., 64, 64)."""
    return picture.reshape(*picture.shape[:-2], RESOLUTION // 2, 2, RESOLUTION // 2, 2).mean((-3, -1))


@cache
def _placements():
    """(n, 3) of x, y and radius: every third pixel where the object stays in the picture but for its edge."""
    offsets = np.arange(-18, 19, 3)
    return np.array(
        [
            (x, y, radius)
            for radius in RADII
            for x, y in product(offsets, offsets)
            if max(abs(x), abs(y)) <= max(34 - radius, 12)
        ]
    )


@cache
def _bank():
    """Shares of pixels of each shape and fill at each placement, and their sums.

    Masks (5, shapes * placements, 1024): a plain shape's own colour, then the accents of each fill; the own colour of
    stripes and dots is what is left of the plain shape.
    """
    masks = np.empty((4, len(SHAPES), len(_placements()), (RESOLUTION // 2) ** 2), np.float32)
    for s, shape in enumerate(SHAPES):
        for p, placement in enumerate(_placements().tolist()):
            masks[0, s, p] = _halve(_regions(shape, "plain", *placement)[0]).ravel()
            for f, fill in enumerate(FILLS[1:], start=1):
                masks[f, s, p] = _halve(_regions(shape, fill, *placement)[1]).ravel()
    masks = masks.reshape(4, -1, masks.shape[-1])
    return masks, masks.sum(-1)


def _own_gain(sums, area):
    """Change of the squared error when a region gets the colour that fits best.

    `sums` (..., 4) over the region: of the squared picture less the squared distance to the background, and of the
    picture's three channels; `area` (...,).
    """
    gain = sums[..., 0] - np.square(sums[..., 1:]).sum(-1) / np.maximum(area, 1)
    return np.where(area > 4, gain, np.inf)


def _accent_gains(sums, area):
    """The same when it gets black or white, (..., 2)."""
    return np.stack([sums[..., 0] - 2 * v * sums[..., 1:].sum(-1) + 3 * v * v * area for v in ACCENTS], -1)


def _candidates(sums):
    """The likely scenes of a picture, as lists of (shape, fill, x, y, radius, accent), the front one first.

    `sums` (4, shapes * placements, 4) are those of `_own_gain` for all masks of the bank. Returns single objects,
    best first, and the best pairs side by side and one in the other, as (gain, objects).
    """
    areas, placements, count = _bank()[1], _placements(), len(_placements())
    accents = _accent_gains(sums[1:], areas[1:])  # (3, n, 2)
    own_sums = np.stack([sums[0], sums[0] - sums[1], sums[0] - sums[2], sums[0]])
    own_areas = np.stack([areas[0], areas[0] - areas[1], areas[0] - areas[2], areas[0]])
    colours = own_sums[1:, :, 1:] / np.maximum(own_areas[1:], 1)[..., None]
    alike = np.stack([np.abs(colours - grey).max(-1) < 0.4 for grey in ACCENTS], -1)
    accents[alike] = np.inf  # no pattern
    gains = _own_gain(own_sums, own_areas)  # (fills, shapes * placements)
    gains[1:] += accents.min(-1)

    def describe(f, n):
        shape, placement = list(SHAPES)[n // count], placements[n % count].tolist()
        return (shape, FILLS[f], *placement, ACCENTS[accents[f - 1, n].argmin()] if f else None)

    by_kind = gains.reshape(len(FILLS) * len(SHAPES), count)
    singles = [
        (by_kind[k].min(), [describe(k // len(SHAPES), k % len(SHAPES) * count + by_kind[k].argmin())])
        for k in by_kind.min(1).argsort()[:6]
    ]

    # Two that are apart: their gains add. The best object of each placement, in all pairs of placements.
    at_place = gains.reshape(-1, count)
    best = at_place.min(0)
    total = best[:, None] + best[None] + _overlapping()
    first, second = np.unravel_index(total.argmin(), total.shape)
    pair = [
        describe(kind // len(SHAPES), kind % len(SHAPES) * count + place)
        for place, kind in ((place, at_place[:, place].argmin()) for place in (first, second))
    ]
    side = total[first, second], pair

    # One in the other: the outer one's own region loses what the inner one covers.
    outer, inner, contained = _nested()
    best_nested = np.inf, side[1]
    for f, fi in product((0, 3), (0, 3)):
        covered = sums[0, inner] + (sums[3, inner] if fi else 0)
        covered_area = areas[0, inner] + (areas[3, inner] if fi else 0)
        for row in gains[f, outer].argsort()[:12]:
            n = outer[row]
            total = _own_gain(sums[0, n] - covered, areas[0, n] - covered_area) + gains[fi, inner]
            total = np.where(contained[int(fi > 0), row], total + (accents[2, n].min() if f else 0), np.inf)
            if total.min() < best_nested[0]:
                best_nested = total.min(), [describe(fi, inner[total.argmin()]), describe(f, n)]
    return singles, side, best_nested


@cache
def _overlapping():
    """Infinity where two placements are not apart, else 0, (n, n)."""
    x, y, radius = _placements().T
    distance = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y))
    return np.where(distance < 0.9 * (radius[:, None] + radius), np.inf, 0).astype(np.float32)


@cache
def _nested():
    """Rows of the bank that may hold another object (a,), that may be held (b,), and which are in which (2, a, b).

    The latter for plain and for outlined ones.
    """
    (masks, areas), count = _bank(), len(_placements())
    x, y, radius = np.tile(_placements(), (len(SHAPES), 1)).T
    central = np.maximum(np.abs(x), np.abs(y)) <= 9
    container = np.repeat([shape in CONTAINERS for shape in SHAPES], count)
    outer, inner = np.flatnonzero(central & container & (radius >= 18)), np.flatnonzero(central & (radius < 12))
    held = np.stack([masks[0, inner], masks[0, inner] + masks[3, inner]])
    held_area = np.stack([areas[0, inner], areas[0, inner] + areas[3, inner]])
    return outer, inner, masks[0, outer] @ held.transpose(0, 2, 1) > 0.95 * held_area[:, None]


# ---- The fit to the full picture -------------------------------------------------------------------------------------


def _fit(picture, empty, candidates, stride=1):
    """Squared errors (n,) of a picture (64, 64, 3) to candidates over the empty background, and colours (n, k, 3).

    Each candidate has k objects. An error counts `PATTERN` times for each pattern, and is infinite where a pattern has
    one colour only. With a stride, every so manyth pixel stands for its neighbours.
    """
    every = slice(None, None, stride)
    rest, columns, target = 1.0, [], picture[None, every, every].reshape(1, -1, 3)
    greys = np.array([[each[5] or 0 for each in objects] for objects in candidates], np.float32)
    for index in range(greys.shape[1]):
        masks = np.stack([_regions(*objects[index][:5])[:, every, every] for objects in candidates])
        own, accented = masks.reshape(len(candidates), 2, -1).transpose(1, 0, 2)  # (n, pixels) each
        columns.append(rest * own)
        target = target - (rest * accented * greys[:, index, None])[..., None]
        rest = rest * (1 - own - accented)
    columns = np.stack(columns, 1)  # (n, k, pixels)
    target = target - rest[..., None] * empty[every, every].reshape(1, -1, 3)
    toward = columns @ target
    gram = columns @ columns.transpose(0, 2, 1) + 1e-3 * np.eye(greys.shape[1], dtype=np.float32)
    colours = np.linalg.solve(gram, toward)
    errors = (np.square(target).sum((1, 2)) - (toward * colours).sum((1, 2))) * stride**2
    patterned = greys > 0
    errors = errors * PATTERN ** patterned.sum(1)
    errors[(patterned & (np.abs(colours - greys[..., None]).max(-1) < 0.4)).any(1)] = np.inf
    return errors, colours


COARSE_TO_FINE = ((1.5, 2), (0.5, 1))  # step in pixels, and stride of `_fit`
FINEST = ((0.25, 1),)
_MOVES = [move for i in (2, 3, 4) for move in ((i, -1), (i, 1))]


def _refine(picture, empty, objects, which, steps=COARSE_TO_FINE):
    """Move and resize one object of several to the smallest error: (error, objects)."""
    for step, stride in steps:
        error = _fit(picture, empty, [objects], stride)[0][0]
        for _ in range(6):
            tries = []
            for index, sign in _MOVES:
                moved = list(objects[which])
                moved[index] += sign * step
                if 7 <= moved[4] <= 24 and max(abs(moved[2]), abs(moved[3])) < 30:
                    tries.append([*objects[:which], tuple(moved), *objects[which + 1 :]])
            errors = _fit(picture, empty, tries, stride)[0]
            if errors.min() >= error:
                break
            error, objects = errors.min(), tries[errors.argmin()]
    return error, objects


def _first_certain(fits, certain):
    """The first of (error, objects) with an error that is small enough, or else the best."""
    best = np.inf, None
    for error, objects in fits:
        if error < best[0]:
            best = error, objects
        if error < certain:
            break
    return best


# By how much a search may be off for it to see the same pattern.
_PATTERN_SHIFTS = {
    "striped": [(0, step * STRIPE) for step in (-2, -1, 0, 1, 2)],
    "dotted": list(product((-DOT_PITCH / 2, 0, DOT_PITCH / 2), repeat=2)),
}


def _alternatives(picture, empty, objects, which, certain, thorough=False):
    """The error with the best shape, fill and placement for one of the objects, others kept: (error, objects).

    A thorough search moves what has a pattern instead of resizing it.
    """
    tries, (x, y, radius) = [], objects[which][2:5]
    for shape, fill, scale in product(SHAPES, FILLS, (1.0,) if thorough else (0.8, 1.0, 1.25)):
        shifts = _PATTERN_SHIFTS.get(fill, [(0, 0)]) if thorough else [(0, 0)]
        for (right, down), grey in product(shifts, (None,) if fill == "plain" else ACCENTS):
            placement = x + right, y + down, min(max(round(2 * scale * radius) / 2, 8), 22)
            changed = [*objects[:which], (shape, fill, *placement, grey), *objects[which + 1 :]]
            tries.append(changed)
    errors = _fit(picture, empty, tries, 2)[0]
    tries = [tries[n] for n in errors.argsort(kind="stable")]
    # The best of each fill, since a pattern out of place fits no better than a plain shape, and the next best.
    likely = [next(each for each in tries if each[which][1] == fill) for fill in FILLS]
    likely += [each for each in tries if each not in likely][: 4 if thorough else 2]
    return _first_certain((_refine(picture, empty, each, which) for each in likely), certain)


def _scene(objects, colours, background):
    read = [
        Object(shape, nearest_colour(colour), fill, x, y, radius)
        for (shape, fill, x, y, radius, _), colour in zip(objects, colours, strict=True)
    ]
    scene = Scene(tuple(read), background)
    if scene.relation in ("left of", "above"):
        read.sort(key=lambda each: each.x if scene.relation == "left of" else each.y)
    return Scene(tuple(read), background)


def _read_one(picture, background, empty, sums):
    singles, *pairs = _candidates(sums)
    pairs = sorted((pair for _, pair in pairs), key=lambda pair: _fit(picture, empty, [pair])[0][0])
    change = np.square(picture - empty).sum()
    certain, enough = CERTAIN * change, max(SECOND_OBJECT * change, SECOND_OBJECT_ERROR)
    error, objects = _first_certain((_refine(picture, empty, each, 0) for _, each in singles[:3]), certain)
    for thorough in (False, True):
        if len(objects) == 1:
            if error > certain:
                found = _alternatives(picture, empty, objects, 0, certain, thorough)
                error, objects = min((error, objects), found, key=lambda each: each[0])
            error, objects = _refine(picture, empty, objects, 0, FINEST)
        if error > enough:
            pair = objects if len(objects) == 2 else pairs[thorough]
            for which in (0, 1) if thorough else (0, 1, 0, 1):
                # A small object matters less to the error than a large one.
                pair_error, pair = _alternatives(picture, empty, pair, which, certain / 4, thorough)
                if pair_error < certain / 4:
                    break
            for which in (0, 1) if pair_error < error else ():
                pair_error, pair = _refine(picture, empty, pair, which, FINEST)
            if pair_error < min(error - enough, 0.5 * error) or (len(objects) == 2 and pair_error < error):
                error, objects = pair_error, pair
        if not UNSURE * change < error < HOPELESS * change:
            break
    colours = _fit(picture, empty, [objects])[1][0]
    return Reading(_scene(objects, colours, background), 1 - error / max(float(change), 1.0))


def read(pictures, batch_size=50):
    """The `Reading` of each picture (n, 64, 64, 3)."""
    masks, _ = _bank()
    pictures, readings = as_float(pictures), []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        backgrounds, empty = zip(*map(fit_background, batch), strict=True)
        distance = np.square(batch - np.stack(empty)).sum(-1, keepdims=True)
        columns = np.concatenate([np.square(batch).sum(-1, keepdims=True) - distance, batch], -1)
        columns = _halve(columns.transpose(0, 3, 1, 2)).reshape(len(batch) * 4, -1).T
        sums = (masks @ columns).reshape(*masks.shape[:2], len(batch), 4)
        for index, picture in enumerate(batch):
            readings.append(_read_one(picture, backgrounds[index], empty[index], sums[:, :, index]))
    return readings


# ---- The verdict -----------------------------------------------------------------------------------------------------


def _wrong_objects(wanted, objects):
    """Keys of what the objects that were read have otherwise than wanted."""
    pairs = zip(wanted, objects, strict=True)
    return [key for asked, each in pairs for key, value in asked.items() if getattr(each, key) != value]


def wrong_parts(wanted, reading):
    """Names of what a `Reading` has other than `Wanted`: empty if the picture is right."""
    scene, wrong = reading.scene, []
    if reading.explained < MINIMUM_EXPLAINED:
        wrong.append("picture")
    if wanted.background and wanted.background != scene.background:
        wrong.append("background")
    if len(wanted.objects) != len(scene.objects):
        return (*wrong, "count")
    in_order = _wrong_objects(wanted.objects, scene.objects)
    if len(wanted.objects) == 2:
        related = wanted.relation in (None, scene.relation)
        swapped = _wrong_objects(wanted.objects, scene.objects[::-1])
        if wanted.relation is None:
            in_order = min(in_order, swapped, key=len)
        elif not related or len(swapped) < len(in_order):
            in_order = [*min(in_order, swapped, key=len), "relation"]
    return (*wrong, *dict.fromkeys(in_order))


def judge(prompts, pictures):
    """For each prompt and picture (n, 64, 64, 3), the names of the parts that are wrong: none if it is right."""
    return [wrong_parts(parse(prompt), reading) for prompt, reading in zip(prompts, read(pictures), strict=True)]


# ---- Subjects --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4000)
def _subject_layer(name, placement):
    share, colours = SUBJECTS[name].layer(*placement)
    return share.astype(np.float32), colours.astype(np.float32)


def _window(placement, margin=1.2):
    """Rows and columns of the picture around a subject: what is farther off is none of its business."""
    x, y, radius = placement
    return tuple(
        slice(max(0, round(RESOLUTION / 2 + at - margin * radius)), round(RESOLUTION / 2 + at + margin * radius))
        for at in (y, x)
    )


def _subject_error(name, picture, empty, placement):
    """Relative RMS error of a picture (64, 64, 3) to a render in the subject's window."""
    share, colours = _subject_layer(name, placement)
    window = _window(placement)
    rendered = (colours + (1 - share) * empty)[window]
    error = np.square(picture[window] - rendered).sum()
    return float(np.sqrt(error / np.square(rendered - empty[window]).sum()))


@cache
def _subject_bank(name):
    """Templates (4, n, 1024) of share and colours, windows (n, 1024) and summed squared colours (n,)."""
    templates, windows, squares = [], [], []
    for placement in map(tuple, _placements().tolist()):
        share, colours = _subject_layer.__wrapped__(name, placement)
        window = np.zeros((RESOLUTION, RESOLUTION), np.float32)
        window[_window(placement)] = 1
        templates.append(_halve(np.concatenate([share, colours], -1).transpose(2, 0, 1)).reshape(4, -1))
        windows.append(_halve(window).ravel())
        squares.append(np.square(colours).sum() / 4)
    return np.stack(templates, 1), np.array(windows), np.array(squares)


def subject_distance(name, pictures):
    """How far pictures (n, 64, 64, 3) are from showing a subject, (n,): 0 is the subject itself, about 1 nothing of it.

    The relative RMS error of the best render over positions and sizes on the picture's own background, which another
    object outside the subject's surroundings does not change.
    """
    templates, windows, squares = _subject_bank(name)
    distances = []
    for picture in as_float(pictures):
        empty = fit_background(picture)[1]
        values = np.concatenate([picture, empty], -1).transpose(2, 0, 1)
        seen, ground = _halve(values).reshape(2, 3, -1)
        to_ground = np.square(seen - ground).sum(0)
        error = windows @ to_ground + templates[0] @ (np.square(seen).sum(0) - to_ground) + squares
        error -= 2 * np.einsum("cnp,cp->n", templates[1:], seen)
        energy = squares + templates[0] @ np.square(ground).sum(0) - 2 * np.einsum("cnp,cp->n", templates[1:], ground)
        likely = (error / np.maximum(energy, 1)).argsort()[:3]
        distances.append(min(_nearest_render(name, picture, empty, tuple(_placements()[n].tolist())) for n in likely))
    return np.array(distances)


def _nearest_render(name, picture, empty, placement):
    """The smallest error of a subject around a placement."""
    best = _subject_error(name, picture, empty, placement)
    for step in (1.5, 0.5, 0.25):
        for _ in range(4):
            around = [tuple(np.add(placement, step * move).tolist()) for move in np.vstack([np.eye(3), -np.eye(3)])]
            errors = [_subject_error(name, picture, empty, each) for each in around]
            if min(errors) >= best:
                break
            best, placement = min(zip(errors, around, strict=True))
    return best
