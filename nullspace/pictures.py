"""A subject's pictures, from a folder or a dataset, as they are trained on; and the sheets that compare pictures."""

import glob
import importlib.util
import json
import logging
import math
import os
import struct
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from nullspace.buckets import nearest_size
from nullspace.captions import (
    CAPTION_ENDINGS,
    LAYOUT,
    METADATA_NAMES,
    caption_pictures,
    check_captioned,
    choose_captions,
    column_captions,
    counted,
    kohya_repeats,
)
from nullspace.checks import require
from nullspace.errors import NullSpaceError, listed, reason
from nullspace.names import INTERPOLATION
from nullspace.system import make_inside, replacing


# A square crop of a picture longer than this shows too little of it, and enlarging the short side takes memory without
# bounds: 4000 x 1 at 512 would be 2,048,000 x 512 pixels.
MAX_ASPECT = 10
HEIC_ENDINGS = (".heic", ".heif", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
HEIC_REMEDY = "HEIC needs pillow-heif: pip install pillow-heif"
# Pictures that Pillow knows nothing of; a folder's other files are no pictures.
FOREIGN = {
    **dict.fromkeys(HEIC_ENDINGS, HEIC_REMEDY),
    ".avif": "this Pillow reads no AVIF: pip install --upgrade pillow",
    ".jxl": "JPEG XL is not read, save it as PNG or JPEG",
    ".svg": "SVG is not read, save it as PNG",
    **dict.fromkeys(
        (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
        "raw files of cameras are not read, save it as PNG or JPEG",
    ),
}
# What Pillow's plug-ins raise on damaged files, see also `Image.open`; DecompressionBombError is no OSError.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, AttributeError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MIN_TILE, MAX_TILE = 256, 512  # pixels of a picture on a sheet
ORIGINAL_SIZE = "original_size"  # in the `info` of a picture, beside what its file says


# ---- One picture -----------------------------------------------------------------------------------------------------


def eight_bit(picture):
    """A grey picture of more than 8 bits in mode L, or LA where one of its values is transparent; others as they are.

    16-bit values are divided by 65,535, and floats in [0, 1] taken as they are, each rounded to the nearest of 256.

    Raises:
        NullSpaceError: for 32-bit integers and floats outside of [0, 1], whose white nothing tells.
    """
    # Pillow before 11 opens 16-bit PNG in mode I, and any opens PGM of more than 8 bits so, scaled to 65,535
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if is_16_bit:
        values = np.asarray(picture).astype(np.int64)
        grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if isinstance(picture.info.get("transparency"), int):
            grey.putalpha(Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)))
        return grey
    if picture.mode == "I":
        raise NullSpaceError("32-bit integers, whose white is not known; save it with 8 or 16 bits")
    if picture.mode == "F":
        values = np.asarray(picture)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise NullSpaceError(f"floats from {values.min():g} to {values.max():g} rather than in [0, 1]; rescale it")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    return picture


def flatten(picture, background):
    """A picture in RGB, what is transparent laid on a colour (r, g, b)."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")


def check_shape(picture):
    """Raise `NullSpaceError` for a picture that is too long, before it is decoded."""
    width, height = picture.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise NullSpaceError(f"{width} x {height} pixels, more than {MAX_ASPECT} times as long as wide; crop it")


def upright_rgb(picture, background):
    """An opened picture of any mode as its camera was held, in RGB, transparency laid on `background` (r, g, b)."""
    check_shape(picture)
    return flatten(eight_bit(turned_upright(picture)), background)


def turned_upright(picture):
    """A picture turned as its EXIF says, with the format that it was read from."""
    form = picture.format
    picture = ImageOps.exif_transpose(picture)
    picture.format = form
    return picture


def fit(picture, sizes, interpolation):
    """A picture as large as covers that of the sizes, (width, height) each, which fits it best; itself if it does."""
    target = nearest_size(original_size(picture), sizes)
    scale = max(wanted / side for wanted, side in zip(target, picture.size, strict=True))
    size = tuple(max(wanted, round(side * scale)) for wanted, side in zip(target, picture.size, strict=True))
    return picture if picture.size == size else picture.resize(size, Image.Resampling[INTERPOLATION[interpolation]])


def original_size(picture):
    """Width and height that a picture of `read_instances` had before it was made smaller."""
    return picture.info.get(ORIGINAL_SIZE, picture.size)


def describe_sizes(pictures, sizes):
    """The lines on what `fit` made of pictures: of which sizes they were and are, and which it enlarged."""
    pictures = list({id(picture): picture for picture in pictures}.values())  # one that is repeated is one
    originals = [original_size(picture) for picture in pictures]
    if len(sizes) > 1:
        counts = Counter(nearest_size(size, sizes) for size in originals)
        shares = ", ".join(f"{count} of {width} x {height}" for (width, height), count in sorted(counts.items()))
        yield f"Training on pictures of {counted(len(counts), 'size')}: {shares} pixels."
    else:
        bounds = min(originals, key=math.prod), max(originals, key=math.prod)
        given, made = (" to ".join(dict.fromkeys(f"{w} x {h}" for w, h in each)) for each in (bounds, sizes))
        yield f"{counted(len(pictures), 'picture')} of {given} pixels, trained at {made}."
    small = sorted(
        size for size, picture in zip(originals, pictures, strict=True) if size[0] * size[1] < math.prod(picture.size)
    )
    if small:
        shown = listed([f"{width} x {height}" for width, height in dict.fromkeys(small)])
        yield (
            f"Enlarged {len(small)} of {counted(len(pictures), 'picture')}, which are smaller than they are trained "
            f"at and gain no detail: {shown} pixels."
        )


def register_heic():
    """Let Pillow read HEIC where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def is_heic(path):
    """Whether a file is HEIC by its name or, as pictures of phones that were renamed, by its brand (ISO 23008-12)."""
    if path.suffix.lower() in HEIC_ENDINGS:
        return True
    head = first_bytes(path)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def first_bytes(path):
    """The first 12 bytes of a file, of none where it is no file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(12)


def why_unreadable(error, path=None):
    """Why a picture, of a file or of a dataset, cannot be read, in words that name what would help."""
    if isinstance(error, NullSpaceError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    without_heic = HEIC_ENDINGS[0] not in known()
    if path is not None and without_heic and is_heic(path):
        return HEIC_REMEDY
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged or not readable: {reason(error)}"
    if path is None:
        return f"damaged, or of a format that Pillow does not read{'; ' + HEIC_REMEDY if without_heic else ''}"
    if not first_bytes(path):
        return "an empty file"
    ending = path.suffix.lower()
    return FOREIGN[ending] if ending not in known() else "damaged, or no picture"


def known():
    """The endings of files that Pillow and its plug-ins read."""
    return Image.registered_extensions()


# ---- All of them -----------------------------------------------------------------------------------------------------


def read_all(sources, where, background, keep):
    """Open, convert and `keep` pictures one after the other, so that one at a time is in memory at its full size.

    Args:
        sources (`Iterable[tuple[str, Path | None, Callable]]`): for each its name, its file and what opens it.
        where (`str`): the flag and value that the pictures are from.
        background (`tuple[int, int, int]`): what transparency is laid on.
        keep (`Callable`): gives what is kept of a picture.

    Raises:
        NullSpaceError: names all that cannot be read, each with its reason.
    """
    pictures, faults = [], []
    for name, path, opened in sources:
        try:
            with warnings.catch_warnings(), opened() as picture:
                # Pillow warns at half of what it refuses, which cameras of phones reach
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                whole = upright_rgb(picture, background)
                pictures.append(keep(whole))
                pictures[-1].info[ORIGINAL_SIZE] = whole.size
        except UNREADABLE as error:
            faults.append(f"{name} cannot be read ({why_unreadable(error, path)})")
    if faults:
        remedy = "mend or remove it" if len(faults) == 1 else "mend or remove them"
        count = f"{len(faults)} of {len(faults) + len(pictures)} in {where}"
        raise NullSpaceError(f"{', '.join(faults)}; {remedy} ({count}).")
    return pictures


def is_hidden(path):
    """Whether a file is one that macOS, Android and Windows hide: ._a.jpg, .trashed-a.jpg, Thumbs.db."""
    return path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def is_picture(path):
    """Whether a file is a picture by its name, readable or not."""
    return path.suffix.lower() in known() or path.suffix.lower() in FOREIGN


def pictures_in(folder, tell):
    """The picture files of a folder by name; one line counts hidden files, another those that are no pictures."""
    visible = sorted(path for path in folder.iterdir() if not is_hidden(path) and not path.is_dir())
    hidden = sorted(path.name for path in folder.iterdir() if is_hidden(path))
    pictures = [path for path in visible if is_picture(path)]
    others = [
        path.name
        for path in visible
        if not is_picture(path) and path.suffix.lower() not in CAPTION_ENDINGS and path.name not in METADATA_NAMES
    ]
    if hidden:
        tell(f"Passed over {counted(len(hidden), 'hidden file')} of {folder}: {listed(hidden)}.")
    if others:
        tell(f"Passed over {counted(len(others), 'file')} of {folder} that no picture needs: {listed(others)}.")
    return pictures


def holds_pictures(path):
    """Whether a path is a folder, open to this user, with pictures that are not hidden."""
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        return False
    return any(is_picture(file) and not is_hidden(file) for file in path.iterdir())


def find_instances(folder, column, tell):
    """The pictures of --instance_data_dir with captions and repeats: its own, or those of kohya's '10_name' folders.

    Returns:
        `list[Captioned]`.

    Raises:
        NullSpaceError: if there are none, or in both places, which kohya's scripts would not read.
    """
    where = f"--instance_data_dir {folder}"
    if not folder.is_dir():
        what = "is a file; name the folder that it is in" if folder.exists() else "is not there; check its name"
        raise NullSpaceError(f"{where} is not a folder: it {what}.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise NullSpaceError(f"{where} may not be read by this user; change its permissions.")
    own = pictures_in(folder, tell)
    filled = [path for path in sorted(folder.iterdir()) if not is_hidden(path) and holds_pictures(path)]
    kohya = {path: kohya_repeats(path) for path in filled if kohya_repeats(path)}
    others = [path.name for path in filled if path not in kohya]
    if own and kohya:
        raise NullSpaceError(f"{where} holds pictures both itself and in '{next(iter(kohya)).name}'; {LAYOUT}.")
    if not own and not kohya:
        inside = f", but its folders do ({listed(others)}); {LAYOUT}" if others else "; put 3 to 5 of the subject there"
        raise NullSpaceError(f"{where} holds no pictures{inside}.")
    if others:
        tell(f"Passed over {counted(len(others), 'folder')} of {folder} with pictures: {listed(others)}.")
    if own:
        return caption_pictures(own, 1, None, column, tell)
    found = []
    for path, (repeats, caption) in kohya.items():
        if repeats < 1:
            raise NullSpaceError(f"{path} asks for 0 repeats of its pictures; rename it, or move it away.")
        pictures = pictures_in(path, tell)
        tell(f"Reading {counted(len(pictures), 'picture')} of {path.name}, each {repeats} times an epoch.")
        found += caption_pictures(pictures, repeats, caption, column, tell)
    return found


def read_instances(args, background=(255, 255, 255), keep=lambda picture: picture, tell=None, need_captions=False):
    """The pictures, upright and in RGB, and the captions of each: those of a folder by name, or of a dataset in order.

    A picture with repeats of its own is there as often, one object. Captions are None where there is neither one nor
    an --instance_prompt.

    Args:
        args: --instance_data_dir or --dataset_name with its columns, and --instance_prompt.
        background (`tuple[int, int, int]`): what transparency is laid on.
        keep (`Callable`): what is kept of each picture once it is decoded, for instance a smaller one.
        tell (`Callable`): is called with lines on what was passed over and which captions are used (default: logged).
        need_captions (`bool`): refuse pictures that have neither a caption nor an --instance_prompt.

    Returns:
        `(list[Image], list[list[str] | None])`

    Raises:
        NullSpaceError: if there are none, or some cannot be read.
    """
    tell = tell or logging.getLogger(__name__).info
    register_heic()
    if args.dataset_name is not None:
        return read_dataset(args, background, keep, tell, need_captions)
    where = f"--instance_data_dir {args.instance_data_dir}"
    found = find_instances(args.instance_data_dir, getattr(args, "caption_column", None), tell)
    captions = choose_captions(found, args.instance_prompt, tell)
    if need_captions:
        remedy = "write each caption into a text file of the picture's name (0.txt for 0.png)"
        check_captioned(captions, [item.path.name for item in found], where, remedy)
    sources = [(str(item.path), item.path, partial(Image.open, item.path)) for item in found]
    pictures = read_all(sources, where, background, keep)
    numbers = [number for number, item in enumerate(found) for _ in range(item.repeats)]
    return [pictures[number] for number in numbers], [captions[number] for number in numbers]


def read_dataset(args, background, keep, tell, need_captions):
    """The same from the split "train" of --dataset_name; a row without a caption has the instance prompts."""
    require("datasets", "--dataset_name")
    from datasets import load_dataset  # slow to import, and seldom needed
    from datasets.exceptions import DatasetsError

    where = f"--dataset_name {args.dataset_name}"
    check_layout(Path(args.dataset_name), args.caption_column)
    columns = {"--image_column": args.image_column, "--caption_column": args.caption_column}
    try:
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir)
    except (OSError, ValueError, DatasetsError) as error:
        raise NullSpaceError(f"{where} cannot be read ({why_no_dataset(error)}){layout_hint(args)}.") from error
    for flag, column in columns.items():
        if column and column not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise NullSpaceError(f"{where} has no column '{column}'; choose a {flag} of {names}{layout_hint(args)}.")
    if not len(rows):
        raise NullSpaceError(f"{where} holds no pictures.")
    captions = [args.instance_prompt] * len(rows)
    if args.caption_column:
        cells = rows[args.caption_column][:]
        captions = column_captions(cells, args.caption_column, where, args.instance_prompt, tell)
    elif need_captions:
        remedy = f"choose a --caption_column of {', '.join(rows.column_names)}"
        check_captioned(captions, [f"row {number}" for number in range(len(rows))], where, remedy)

    def opened(number):
        picture = rows[number][args.image_column]
        if not isinstance(picture, Image.Image):
            what = "empty" if picture is None else f"not a picture but of type {type(picture).__name__}"
            raise NullSpaceError(f"{what}; choose another --image_column, or mend the row")
        return picture

    rows = rows.select_columns([args.image_column])  # so that a row decodes nothing else
    named = f"of the column '{args.image_column}'"
    sources = ((f"row {number} {named}", None, partial(opened, number)) for number in range(len(rows)))
    return read_all(sources, where, background, keep), captions


def why_no_dataset(error):
    """Why the datasets library reads none, with the columns where those of its files differ."""
    cause = error
    while cause is not None and not hasattr(cause, "requested_column_names"):  # of its CastError
        cause = cause.__cause__
    if cause is None:
        return reason(error)
    different = sorted({*cause.table_column_names} ^ {*cause.requested_column_names})
    return f"its files have different columns, give all of them the same: not in all are {', '.join(different)}"


def check_layout(folder, column):
    """Refuse a --dataset_name that is a folder for --instance_data_dir, whose repeats and captions would be ignored.

    Args:
        folder (`Path`): looked at with all of its folders, as the datasets library reads them all.
        column: --caption_column, beside which captions in text files are none.

    Raises:
        NullSpaceError: names what would be ignored, and the folder to give.
    """
    where = f"--dataset_name {folder}"
    for path in map(Path, sorted(root for root, *_ in os.walk(folder))):
        if path != folder and kohya_repeats(path) and holds_pictures(path):
            raise NullSpaceError(
                f"{where} would ignore the repeats of '{path.name}', which is a folder of kohya's layout; use "
                f"--instance_data_dir {path.parent} instead."
            )
        if column is None and holds_captions(path):
            raise NullSpaceError(
                f"{where} would ignore the captions in text files beside the pictures; use --instance_data_dir {path} "
                "instead, or choose a --caption_column."
            )


def holds_captions(folder):
    """Whether a folder has a text file beside one of its pictures, as sd-scripts takes for its caption."""
    texts = [path for ending in CAPTION_ENDINGS for path in folder.glob(f"*{ending}")]
    return any(is_picture(near) for text in texts for near in folder.glob(f"{glob.escape(text.stem)}.*"))


def layout_hint(args):
    """What to say of a --dataset_name without a column where captions are in text files, otherwise nothing."""
    folder = Path(args.dataset_name)
    if not any(map(holds_captions, (folder, *folder.glob("*/")))):
        return ""
    return "; pictures with captions in text files beside them are for --instance_data_dir"


# ---- Sheets ----------------------------------------------------------------------------------------------------------


def tile_of(picture):
    """A picture as a sheet shows it: enlarged by a whole factor to 256 pixels or more, reduced to 512 at most."""
    smaller, larger = min(picture.size), max(picture.size)
    if smaller < MIN_TILE:
        factor = -(-MIN_TILE // smaller)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if larger > MAX_TILE:
        size = tuple(max(MIN_TILE, round(side * MAX_TILE / larger)) for side in picture.size)
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def wrap(text, width, measure):
    """Lines of a text no wider than `width` by `measure`, cut within words only where a word alone is wider."""
    lines = [""]
    for word in text.split():
        if lines[-1] and measure(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while measure(lines[-1]) > width and len(lines[-1]) > 1:
            fits = max(1, sum(measure(lines[-1][:end]) <= width for end in range(1, len(lines[-1]) + 1)))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return "\n".join(lines)


def comparison_grid(rows_by_name, prompts, seed=None, step=None):
    """One picture: a column for each prompt, below it what each model drew, equal seeds next to each other.

    Args:
        rows_by_name (`dict[str, list[list[Image]]]`): model name -> rows of pictures, a row for each seed.
        prompts (`list[str]`): the columns' titles.
        seed (`int`, *optional*): of the first row; the others' follow it.
        step (`int`, *optional*): at which the tuned model was.

    Returns:
        `Image`: in RGB; its `info` holds seed, step and prompts for `save_picture`.
    """
    rows = [
        (name if seed is None else f"{name}\nseed {seed + number}", rows[number])
        for number in range(len(next(iter(rows_by_name.values()))))
        for name, rows in rows_by_name.items()
    ]
    sheet = _sheet("" if step is None else f"step {step}", prompts, rows)
    sheet.info = _told(prompts, seed=seed, step=step)
    return sheet


def checkpoint_grid(columns, prompts, seed):
    """One picture: a row for each prompt, in it what each model drew from the same seed, the columns' titles above.

    Args:
        columns (`dict[str, list[Image]]`): title -> a picture of each prompt.

    Returns:
        `Image`: in RGB; its `info` holds seed and prompts for `save_picture`.
    """
    rows = [(prompt, [column[number] for column in columns.values()]) for number, prompt in enumerate(prompts)]
    sheet = _sheet(f"seed {seed}", list(columns), rows)
    sheet.info = _told(prompts, seed=seed)
    return sheet


def _told(prompts, **numbers):
    told = {key: str(value) for key, value in numbers.items() if value is not None}
    return {**told, "prompts": json.dumps(list(prompts), ensure_ascii=False)}


def _sheet(corner, titles, rows):
    """Rows of pictures (`list[tuple[str, list[Image]]]`, each with its label) below the titles of their columns."""
    gap, font = 4, ImageFont.load_default(size=14)
    tiles = [[tile_of(picture) for picture in pictures] for _, pictures in rows]
    drawn = [tile for row in tiles for tile in row]
    width = max(tile.width for tile in drawn) + gap
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def measure(text):
        return pen.textlength(text, font=font)

    def size(text):
        return [int(edge) + 1 for edge in pen.multiline_textbbox((0, 0), text, font=font)[2:]]

    titles = [wrap(text, width - 2 * gap, measure) for text in titles]
    labels = ["\n".join(wrap(line, MIN_TILE, measure) for line in label.splitlines()) for label, _ in rows]
    margin = 2 * gap + max(size(text)[0] for text in (*labels, corner))
    top = 2 * gap + max(size(text)[1] for text in (*titles, corner))
    height = gap + max(*(tile.height for tile in drawn), *(size(label)[1] for label in labels))
    sheet = Image.new("RGB", (margin + width * len(titles), top + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, gap), corner, fill="black", font=font)
    for column, text in enumerate(titles):
        pen.multiline_text((margin + column * width + gap, gap), text, fill="black", font=font)
    for y, label, row in zip(range(top, sheet.height, height), labels, tiles, strict=True):
        pen.multiline_text((gap, y + (height - size(label)[1]) // 2), label, fill="black", font=font)
        for column, tile in enumerate(row):
            sheet.paste(tile, (margin + column * width + gap // 2, y + gap // 2))
    return sheet


def save_picture(picture, path):
    """Write a PNG, whole or not at all, with the texts that the picture's `info` holds."""
    make_inside(path.parent)
    texts = PngInfo()
    for key, value in picture.info.items():
        if isinstance(value, str):
            texts.add_text(key, value)
    with replacing(path) as partial:
        picture.save(partial, "PNG", pnginfo=texts)
