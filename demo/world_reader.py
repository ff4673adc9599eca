"""Reads the scene in a picture of `world.py` by matching it against renders, with no network that could be mistaken.

First the background is fitted to the picture's frame, robustly, since objects may reach into it. What differs from it
is the silhouette of the objects, whatever their colours and fills: correlations with the silhouettes of all shapes at
all places and sizes find the likely ones. These are then fitted to the picture, with each fill and the colour that
fits best, by Gauss-Newton steps. Where one object leaves too much unexplained, two apart or one in the other are
fitted in turn. Renders here come from a table of signed distances to each shape's edge, which is fast, and differ
from the world's by less than its pixels' rounding can be seen.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np

from world import (
    COLOURS,
    CONTAINERS,
    DOT_PITCH,
    DOT_RADIUS,
    FILLS,
    OUTLINE,
    PALETTE,
    RESOLUTION,
    SHAPES,
    STRIPE,
    SUBJECT_REACH,
    SUBJECTS,
    Background,
    Object,
    Scene,
    background_basis,
    parse,
)


MINIMUM_EXPLAINED = 0.8  # of what the objects change in the picture, for a reading to count
PATTERN = 1.25  # a pattern must be this much better than a plain shape, which it may imitate with its second colour
VISIBLE = 0.2  # least distance of a colour to what is behind it; the world keeps 0.3
SECOND_OBJECT_ERROR = 8.0  # the squared error that a second object must explain to be one, and half of what was left
CERTAIN = 0.02  # share of the change left unexplained by a fit that needs no rival
ACCENTS = np.array([PALETTE["black"][0], PALETTE["white"][0]], np.float32)  # greys
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


@cache
def _frame_basis(kind):
    """The basis of a kind of background in the frame, (colours, pixels)."""
    return np.ascontiguousarray(background_basis(kind)[:, _frame()])


def fit_background(picture):
    """The `Background` of a picture (64, 64, 3), and what it looks like without the objects, of the same shape."""
    pixels, best = picture[_frame()].astype(np.float64), None  # (p, 3)
    for kind in ("plain", "split", "gradient"):
        basis = _frame_basis(kind)  # (k, p)
        weighted = basis
        for _ in range(12):  # towards the smallest sum of distances, which outliers hardly move
            colours = np.linalg.solve(weighted @ basis.T + 1e-6 * np.eye(len(basis)), weighted @ pixels)
            missed = pixels - basis.T @ colours
            distances = np.sqrt(np.einsum("pc,pc->p", missed, missed))
            weighted = basis / np.maximum(distances, 0.01)
        named = tuple(nearest_colour(colour) for colour in colours)
        error = np.minimum(distances, 0.3).mean() + 0.002
        if kind != "plain" and named[0] == named[1]:
            continue
        if best is None or error < 0.8 * best[0]:
            best = error, Background(kind, named), colours
    _, background, colours = best
    return background, np.einsum("khw,kc->hwc", background_basis(background.kind), colours).astype(np.float32)


# ---- Renders ---------------------------------------------------------------------------------------------------------

_SHAPES = list(SHAPES)
_PLAIN, _STRIPED, _DOTTED, _OUTLINED = range(4)  # of `FILLS`
_GROWN = 4  # no fill of the world: the silhouette of an outlined shape
_STEPS = 32  # of the table in a radius
_SIDE = 3 * _STEPS + 1  # points of the table, which reaches 1.5 radii from the centre, in a row
_PIXEL = 2  # of what is compared: blurred edges and thin lines count less, and there is less to compute
_COUNT = RESOLUTION // _PIXEL
_CENTRES = ((np.arange(_COUNT) + 0.5) * _PIXEL - RESOLUTION / 2).astype(np.float32)  # of pixels


@cache
def _distances():
    """Signed distance of points to each shape's edge in radii, negative inside: flat, for (shapes, side, side)."""
    points, fine = np.linspace(-1.5, 1.5, _SIDE), np.linspace(-1.5, 1.5, 8 * (_SIDE - 1) + 1)
    half, (across, down) = (fine[1] - fine[0]) / 2, np.meshgrid(fine, fine)
    nodes = np.stack(np.meshgrid(points, points), -1).reshape(-1, 2)
    table = []
    for inside in SHAPES.values():
        covered = inside(across, down)
        crossed_x, crossed_y = covered[:, 1:] != covered[:, :-1], covered[1:] != covered[:-1]
        edge = np.concatenate(
            [
                np.stack([across[:, :-1][crossed_x] + half, down[:, :-1][crossed_x]], -1),
                np.stack([across[:-1][crossed_y], down[:-1][crossed_y] + half], -1),
            ]
        )
        squared = np.square(nodes).sum(1) + (np.square(edge).sum(1)[:, None] - 2 * edge @ nodes.T).min(0)
        table.append(np.sqrt(np.maximum(squared, 0)) * np.where(covered[::8, ::8].ravel(), -1, 1))
    return np.concatenate(table).astype(np.float32)


def _shares(kinds, places, window):
    """Shares of the pixels of a window in objects' own colours and in their accents, two of (n, pixels).

    `kinds` (n, 2) are indices of shape and fill, `places` (n, 3) are x, y and radius.
    """
    rows, columns = (_CENTRES[each] for each in window)
    (x, y, radius), fills = places.T[..., None], kinds[:, 1]
    over, up = columns - x, rows - y  # (n, columns) and (n, rows)
    u, v = (np.minimum(np.maximum(each * (_STEPS / radius) + _SIDE // 2, 0), _SIDE - 1.001) for each in (over, up))
    left, top = u.astype(np.int32), v.astype(np.int32)
    right, bottom = (u - left)[:, None, :], (v - top)[:, :, None]
    corner = (left + kinds[:, :1] * _SIDE**2)[:, None, :] + top[:, :, None] * _SIDE
    table = _distances()
    upper, lower = table.take(corner), table.take(corner + _SIDE)
    upper += (table.take(corner + 1) - upper) * right
    lower += (table.take(corner + _SIDE + 1) - lower) * right
    outside = (upper + (lower - upper) * bottom) * radius[..., None]
    outside[fills == _GROWN] -= OUTLINE
    own = _share(outside)
    accented = np.zeros_like(own)
    if (chosen := np.flatnonzero(fills == _STRIPED)).size:
        to_stripe = np.abs(up[chosen] % (2 * STRIPE) - STRIPE) - STRIPE / 2
        accented[chosen] = own[chosen] * _share(to_stripe)[:, :, None]
    if (chosen := np.flatnonzero(fills == _DOTTED)).size:
        to_dot = [np.square((each[chosen] + DOT_PITCH / 2) % DOT_PITCH - DOT_PITCH / 2) for each in (over, up)]
        to_dot = np.sqrt(to_dot[0][:, None, :] + to_dot[1][:, :, None]) - DOT_RADIUS
        accented[chosen] = own[chosen] * _share(to_dot)
    if (chosen := np.flatnonzero(fills == _OUTLINED)).size:
        accented[chosen] = _share(outside[chosen] - OUTLINE)  # of which the shape itself is taken away below
    own -= accented * (fills != _OUTLINED)[:, None, None]
    accented -= own * (fills == _OUTLINED)[:, None, None]
    return own.reshape(len(own), -1), accented.reshape(len(own), -1)


def _share(outside):
    """How much of a pixel is covered whose centre is so far outside."""
    return np.minimum(np.maximum(0.5 - outside / _PIXEL, 0), 1)


# ---- The coarse search: silhouettes, on pictures of half the size ----------------------------------------------------

RADII = (9.0, 10.1, 11.3, 12.7, 14.2, 15.9, 17.8, 20.0, 22.4)
_OFFSETS = np.arange(-20, 21, 2)  # of a centre, in pixels
_ROOM = 48  # of the correlation: no silhouette in the picture comes round its edge


def _halve(picture):
    """Mean of 2 x 2 pixels of (..., 64, 64)."""
    return picture.reshape(*picture.shape[:-2], RESOLUTION // 2, 2, RESOLUTION // 2, 2).mean((-3, -1))


@cache
def _silhouettes():
    """Kinds (24, 2) of silhouettes, their spectra and their squared sums in the picture at every place.

    Spectra (24, radii, 48, 25), sums (24, radii, y, x); infinite where too much would be outside the picture.
    """
    kinds = np.array(list(product(range(len(_SHAPES)), (_PLAIN, _GROWN))))
    full = slice(0, _COUNT), slice(0, _COUNT)
    masks = []
    for radius in RADII:
        places = np.tile(np.array([0, 0, radius], np.float32), (len(kinds), 1))
        masks.append(_shares(kinds, places, full)[0].reshape(-1, _COUNT, _COUNT))
    masks = np.stack(masks, 1)
    spectra = np.conj(np.fft.rfft2(masks, (_ROOM, _ROOM))).astype(np.complex64)
    ones = np.fft.rfft2(np.ones(masks.shape[-2:]), (_ROOM, _ROOM))
    sums = _correlate(ones, np.conj(np.fft.rfft2(np.square(masks), (_ROOM, _ROOM))))
    reach = np.maximum(np.abs(_OFFSETS)[:, None], np.abs(_OFFSETS))
    for index, radius in enumerate(RADII):
        sums[:, index, reach > max(35 - radius, 12)] = np.inf
    return kinds, spectra, sums.astype(np.float32)


def _correlate(spectrum, spectra):
    at = _OFFSETS // _PIXEL % _ROOM
    return np.fft.irfft2(spectrum * spectra, (_ROOM, _ROOM))[..., at[:, None], at]


def _foreground(differences):
    """How surely pixels differ from what they are compared with, 0 to 1, of differences (..., 3)."""
    return _halve(np.minimum(np.maximum(np.sqrt(np.square(differences).sum(-1)) - 0.08, 0) / 0.14, 1))


def _foreground_half(d):
    return np.minimum(np.maximum(np.sqrt(np.square(d).sum(-1)) - 0.08, 0) / 0.14, 1)


def _scores(foreground):
    """Change of the squared error to a foreground (64, 64) with each silhouette, (24, radii, y, x)."""
    _, spectra, sums = _silhouettes()
    spectrum = np.fft.rfft2(foreground, (_ROOM, _ROOM)).astype(np.complex64)
    return sums - 2 * _correlate(spectrum, spectra)


def _best_places(scores, allowed=None):
    """The best place (24, 3) of each silhouette, and its score (24,); `allowed` (radii, y, x) restricts them."""
    if allowed is not None:
        scores = np.where(allowed, scores, np.inf)
    flat = scores.reshape(len(scores), -1)
    best = flat.argmin(1)
    radius, y, x = np.unravel_index(best, scores.shape[1:])
    return np.stack([_OFFSETS[x], _OFFSETS[y], np.array(RADII)[radius]], -1), flat[np.arange(len(flat)), best]


@cache
def _grid():
    """x, y and radius of each place of the scores, three of (radii, y, x)."""
    radius, y, x = np.meshgrid(RADII, _OFFSETS, _OFFSETS, indexing="ij")
    return x, y, radius


# ---- The fit of one object, all others kept --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    """An object as fitted: indices of shape and fill, x, y and radius, its colour, and the grey of its accent."""

    kind: np.ndarray
    place: np.ndarray
    colour: np.ndarray
    grey: float

    def layer(self):
        """Its share of each pixel (4096, 1), and its colours times that share (4096, 3)."""
        window = slice(0, _COUNT), slice(0, _COUNT)
        own, accented = (each[0, :, None] for each in _shares(self.kind[None], self.place[None], window))
        return own + accented, own * self.colour + accented * self.grey


class _View:
    """A window of a picture in which an object is fitted.

    `lacks` (p, c) is what the picture has other than what is behind and in front, `behind` (p, c), `weight` (p,) is
    the share of each pixel that nothing in front covers, `rest` is the squared error outside the window.
    """

    def __init__(self, picture, behind, window, front=None, ignored=None):
        """`front` is a `_Fitted` object; pixels `ignored` (64, 64) do not count."""
        lacks, weight = picture - behind, np.ones((*picture.shape[:2], 1), np.float32)
        if front is not None:
            share, colours = (values.reshape(*picture.shape[:2], -1) for values in front.layer())
            lacks = picture - (colours + (1 - share) * behind)
            weight = 1 - share
        if ignored is not None:
            lacks, weight = (np.where(ignored[..., None], np.float32(0), each) for each in (lacks, weight))
        self.window, channels = window, picture.shape[-1]
        self.lacks = np.ascontiguousarray(lacks[window].reshape(-1, channels))
        self.behind = np.ascontiguousarray(behind[window].reshape(-1, channels))
        self.weight = weight[window].ravel()
        self.error = np.square(self.lacks).sum()
        self.rest = np.square(lacks).sum() - self.error
        b = self.behind
        self.squares = np.concatenate([np.ones_like(b[:, :1]), b, np.square(b).sum(1, keepdims=True)], 1)
        self.products = np.concatenate([self.lacks, (self.lacks * b).sum(1, keepdims=True)], 1)

    def layers(self, kinds, places):
        return (self.weight * each for each in _shares(kinds, places, self.window))

    def fit(self, kinds, places):
        """Squared errors (n,) with the colour that fits best, the colours (n, c), and the accents' greys (n,).

        An error counts `PATTERN` times for a pattern, and is infinite where nothing could be seen of a colour.
        """
        own, accented = self.layers(kinds, places)
        patterned = np.isin(kinds[:, 1], (_STRIPED, _DOTTED, _OUTLINED))
        c = self.behind.shape[1]
        o2, o1 = np.square(own) @ self.squares, own @ self.products
        area, ob, obb, od, odb = o2[:, :1], o2[:, 1 : 1 + c], o2[:, -1], o1[:, :c], o1[:, -1]
        area = np.maximum(area, 1e-3)
        colours = (ob + od) / area
        errors = self.error + obb + 2 * odb - np.square(ob + od).sum(1) / area[:, 0]
        hidden = np.square(colours).sum(1) * area[:, 0] - 2 * (colours * ob).sum(1) + obb < VISIBLE**2 * area[:, 0]
        errors[hidden | (area[:, 0] < 1)] = np.inf
        greys = np.zeros(len(kinds), np.float32)
        if patterned.any():
            own, accented = own[patterned], accented[patterned]
            a2, x2, a1 = np.square(accented) @ self.squares, (own * accented) @ self.squares, accented @ self.products
            best = np.full(len(own), np.inf, np.float32), colours[patterned], greys[patterned]
            area, ob, obb, od, odb = (each[patterned] for each in (area, ob, obb, od, odb))
            for grey in ACCENTS:
                toward = ob + od + x2[:, 1 : 1 + c] - grey * x2[:, :1]
                tinted = toward / area
                # |lacks + own (behind - colour) + accented (behind - grey)|^2
                seen = a2[:, -1] - 2 * grey * a2[:, 1 : 1 + c].sum(1) + c * grey**2 * a2[:, 0]
                error = self.error + obb + 2 * odb + seen + 2 * (a1[:, -1] - grey * a1[:, :c].sum(1))
                error += 2 * (x2[:, -1] - grey * x2[:, 1 : 1 + c].sum(1)) - (toward * tinted).sum(1)
                error *= PATTERN
                hidden = (seen < VISIBLE**2 * a2[:, 0]) | (np.abs(tinted - grey).max(1) < 0.4) | (a2[:, 0] < 1)
                hidden |= (
                    np.square(tinted).sum(1) * area[:, 0] - 2 * (tinted * ob).sum(1) + obb < VISIBLE**2 * area[:, 0]
                )
                error[hidden] = np.inf
                better = error < best[0]
                best = (
                    np.where(better, error, best[0]),
                    np.where(better[:, None], tinted, best[1]),
                    np.where(better, grey, best[2]),
                )
            errors[patterned], colours[patterned], greys[patterned] = best
        return errors + self.rest, colours, greys

    def refine(self, kinds, places, steps):
        """Move and resize objects to smaller errors by a Gauss-Newton step for each difference in pixels.

        Returns errors (n,), places (n, 3), colours (n, c) and greys (n,).
        """
        errors, colours, greys = self.fit(kinds, places)
        damping, n = np.full(len(kinds), 0.02), len(kinds)
        moves = np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.float32)
        for step in steps:
            moved = places[:, None] + step * moves
            own, accented = self.layers(np.repeat(kinds, 4, 0), moved.reshape(-1, 3))
            own, accented = own.reshape(n, 4, -1, 1), accented.reshape(n, 4, -1, 1)
            drawn = own * (self.behind - colours[:, None, None]) + accented * (self.behind - greys[:, None, None, None])
            slopes, missed = (drawn[:, 1:] - drawn[:, :1]) / step, self.lacks + drawn[:, 0]
            own = own[:, 0]
            # A change that a colour can make is no reason to move.
            alike = np.einsum("npo,nkpc->nkc", own, slopes) / np.maximum(np.square(own).sum(1), 1e-3)[:, None]
            slopes -= own[:, None] * alike[:, :, None]
            slopes = slopes.reshape(n, 3, -1)
            hessian = slopes @ slopes.transpose(0, 2, 1)
            gradient = slopes @ missed.reshape(n, -1, 1)
            scale = np.trace(hessian, axis1=1, axis2=2) / 3 + 1e-6
            hessian = hessian + (damping * scale)[:, None, None] * np.eye(3)
            tried = places - np.clip(np.linalg.solve(hessian, gradient)[..., 0], -2, 2)
            tried[:, :2] = np.clip(tried[:, :2], -30, 30)
            tried[:, 2] = np.clip(tried[:, 2], 7, 24)
            tried = tried.astype(np.float32)
            fits = self.fit(kinds, tried)
            better = fits[0] < errors
            damping = np.where(better, damping / 4, damping * 16)
            errors = np.where(better, fits[0], errors)
            places = np.where(better[:, None], tried, places)
            colours = np.where(better[:, None], fits[1], colours)
            greys = np.where(better, fits[2], greys)
        return errors, places, colours, greys


# ---- The reading -----------------------------------------------------------------------------------------------------

# By how much a place may be off for it to see the same pattern.
_PATTERN_SHIFTS = {
    _STRIPED: [(0, step * STRIPE / 3) for step in range(-2, 4)],
    _DOTTED: list(product(DOT_PITCH * np.array([-0.25, 0, 0.25, 0.5]), repeat=2)),
}
FILLED = 10, 6
_ROUGH, _FINE = (1.0, 0.5), (0.5, 0.25, 0.25)  # steps in pixels


def _around(places, margin=OUTLINE + 3):
    """Rows and columns that objects at places (n, 3) can reach."""
    x, y, radius = places.T
    return tuple(
        slice(
            max(0, int(((at - radius).min() - margin + RESOLUTION / 2) / _PIXEL)),
            min(_COUNT, int(((at + radius).max() + margin + RESOLUTION / 2) / _PIXEL) + 1),
        )
        for at in (y, x)
    )


def _fit_silhouettes(picture, behind, foreground, places, scores, count, window=None, ignored=None):
    """The best `count` shapes that were found roughly, fitted to a foreground, then to the picture with each fill.

    Returns the error and the `_Fitted` object.
    """
    kinds = _silhouettes()[0]
    by_shape = scores.reshape(-1, 2).min(1)
    likely = (2 * by_shape.argsort(kind="stable")[:count, None] + [0, 1]).ravel()
    likely = likely[np.isfinite(scores[likely])]
    kinds, places = kinds[likely], places[likely].astype(np.float32)
    window = window or _around(places)
    if foreground is not None:
        blank = np.zeros((*foreground.shape, 1), np.float32)
        view = _View(foreground[..., None].astype(np.float32), blank, window)
        _, places, *_ = view.refine(kinds, places, _ROUGH)
    grown = kinds[:, 1] == _GROWN
    filled = [
        (kinds[chosen, 0], np.full(chosen.sum(), fill), places[chosen] + [*shift, 0])
        for chosen, fill, shifts in (
            (~grown, _PLAIN, [(0, 0)]),
            (~grown, _STRIPED, _PATTERN_SHIFTS[_STRIPED] if count == 12 else [(0, 0)]),
            (~grown, _DOTTED, _PATTERN_SHIFTS[_DOTTED] if count == 12 else [(0, 0)]),
            (grown, _OUTLINED, [(0, 0)]),
        )
        for shift in shifts
    ]
    shapes, fills, places = map(np.concatenate, zip(*filled, strict=True))
    kinds, places = np.stack([shapes, fills], -1), places.astype(np.float32)
    view = _View(picture, behind, window, ignored=ignored)
    errors, *_ = view.fit(kinds, places)
    best = errors.argsort(kind="stable")
    best = best[np.isfinite(errors[best])]
    _, first = np.unique(kinds[best], axis=0, return_index=True)
    best = best[np.sort(first)][: FILLED[count < 12]]
    if not len(best):
        return np.inf, None
    kinds = kinds[best]
    errors, places, *_ = view.refine(kinds, places[best], _ROUGH)
    best = errors.argsort(kind="stable")[:2]
    return _best(view, kinds[best], places[best], _FINE)


def _best(view, kinds, places, steps):
    errors, places, colours, greys = view.refine(kinds, places, steps)
    n = errors.argmin()
    return float(errors[n]), _Fitted(kinds[n], places[n], colours[n], float(greys[n]))


def _again(picture, behind, each, front=None):
    """Fit an object again over a changed background, or behind another."""
    view = _View(picture, behind, _around(each.place[None]), front)
    return _best(view, each.kind[None], each.place[None], _FINE)


def _over(each, behind):
    """A picture with an object in front."""
    share, colours = (values.reshape(_COUNT, _COUNT, -1) for values in each.layer())
    return colours + (1 - share) * behind


def _fit_apart(picture, empty, foreground, scores):
    """Two objects, one left of or above the other: error and objects."""
    x, y, radius = (each.ravel() for each in _grid())
    flat, best = scores.reshape(len(scores), -1), None
    at_place = flat.min(0)
    for along, across in ((x, y), (y, x)):
        usable = (np.abs(across) <= 10) & (radius < 17)
        first, second = (np.flatnonzero(usable & (sign * along >= 8)) for sign in (-1, 1))
        apart = along[second] - along[first][:, None] >= 0.9 * (radius[second] + radius[first][:, None])
        total = np.where(apart, at_place[first][:, None] + at_place[second], np.inf)
        a, b = np.unravel_index(total.argmin(), total.shape)
        if best is None or total[a, b] < best[0]:
            best = total[a, b], first[a], second[b], along is y
    _, first, second, vertical = best
    middle = (y if vertical else x)[[first, second]].mean()
    cut = int(round((middle + RESOLUTION / 2) / _PIXEL))
    objects = []
    for n, half in ((first, slice(0, cut)), (second, slice(cut, _COUNT))):
        gx, gy, gr = _grid()
        near = (np.maximum(np.abs(gx - x[n]), np.abs(gy - y[n])) <= 4) & (np.abs(np.log(gr / radius[n])) < 0.4)
        places, found = _best_places(scores, near)
        window = (half, slice(0, _COUNT)) if vertical else (slice(0, _COUNT), half)
        error, each = _fit_silhouettes(picture, empty, foreground, places, found, 4, window)
        if each is None:
            return np.inf, None
        objects.append(each)
    a, b = objects
    _, b = _again(picture, _over(a, empty), b)
    error, a = _again(picture, _over(b, empty), a)
    return error, [a, b]


def _fit_nested(picture, empty, scores):
    """One object in another: error and objects, the inner one first."""
    x, y, radius = _grid()
    central = (np.maximum(np.abs(x), np.abs(y)) <= 9) & (radius > 15)
    places, found = _best_places(scores, central)
    kinds = _silhouettes()[0]
    container = np.isin(kinds[:, 0], [_SHAPES.index(shape) for shape in CONTAINERS])
    found = np.where(container, found, np.inf)
    centre = places[found.argmin()][:2]
    hole = np.hypot(_CENTRES - centre[0], _CENTRES[:, None] - centre[1]) < 12.5
    error, outer = _fit_silhouettes(picture, empty, None, places, found, 3, ignored=hole)
    if outer is None:
        return np.inf, None
    behind = _over(outer, empty)
    centre = outer.place
    near = np.maximum(np.abs(_CENTRES - centre[0]), np.abs(_CENTRES[:, None] - centre[1])) < 15.5
    foreground = _foreground_half(picture - behind) * near
    inner_scores = _scores(foreground)
    close = (np.maximum(np.abs(x - centre[0]), np.abs(y - centre[1])) <= 4.5) & (radius < 13)
    places, found = _best_places(inner_scores, close)
    error, inner = _fit_silhouettes(picture, behind, foreground, places, found, 4)
    if inner is None:
        return np.inf, None
    _, outer = _again(picture, empty, outer, inner)
    error, inner = _again(picture, _over(outer, empty), inner)
    held, holds = (each.layer()[0] for each in (inner, outer))
    if outer.place[2] < 16 or inner.place[2] < 8 or (held * holds).sum() < 0.95 * held.sum():
        return np.inf, None
    return error, [inner, outer]


def _draw(empty, objects):
    for each in reversed(objects):
        empty = _over(each, empty)
    return empty


def _read_one(picture, background, empty):
    foreground = _foreground(picture - empty)
    picture, empty = (_halve(each.transpose(2, 0, 1)).transpose(1, 2, 0) for each in (picture, empty))
    change = np.square(picture - empty).sum()
    scores = _scores(foreground)
    places, found = _best_places(scores)
    for count in (4, 12):
        error, single = _fit_silhouettes(picture, empty, foreground, places, found, count)
        if error < CERTAIN * change:
            break
    objects = [single] if single else []
    if error > SECOND_OBJECT_ERROR / _PIXEL**2:
        pair_error, pair = min(
            (_fit_apart(picture, empty, foreground, scores), _fit_nested(picture, empty, scores)),
            key=lambda each: each[0],
        )
        if pair_error < min(error - SECOND_OBJECT_ERROR / _PIXEL**2, 0.5 * error):
            error, objects = pair_error, pair
    error = float(np.square(picture - _draw(empty, objects)).sum())
    return Reading(_scene(objects, background), 1 - error / max(float(change), 0.25))


def _scene(fitted, background):
    read = [
        Object(_SHAPES[each.kind[0]], nearest_colour(each.colour), FILLS[each.kind[1]], *map(float, each.place))
        for each in fitted
    ]
    scene = Scene(tuple(read), background)
    if len(read) == 2 and scene.relation in ("left of", "above"):
        read.sort(key=lambda each: each.x if scene.relation == "left of" else each.y)
    return Scene(tuple(read), background)


def read(pictures):
    """The `Reading` of each picture (n, 64, 64, 3)."""
    return [_read_one(picture, *fit_background(picture)) for picture in as_float(pictures)]


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


def _window(placement, margin=SUBJECT_REACH):
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
def _placements():
    """(n, 3) of x, y and radius: every third pixel where a subject stays in the picture but for its edge."""
    offsets = np.arange(-18, 19, 3)
    return np.array(
        [
            (x, y, radius)
            for radius in (9.5, 11.5, 13.5, 15.5, 18.0, 20.5)
            for x, y in product(offsets, offsets)
            if max(abs(x), abs(y)) <= max(34 - radius, 12)
        ]
    )


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
