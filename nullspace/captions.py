"""Captions of a subject's pictures: text files beside them, metadata of an imagefolder, columns, kohya's folders."""

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from nullspace.errors import NullSpaceError, listed
from nullspace.prompts import encoding


CAPTION_ENDINGS = (".txt", ".caption")  # of sd-scripts: --caption_extension, and its default
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of metadata files, where --caption_column names none
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # those of the datasets library's imagefolder
KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")
LAYOUT = "give the folder that holds them, or name those within it by repeats and caption, as '10_sks dog'"


class Captioned(NamedTuple):
    """A picture's file, how often it is in an epoch, its captions, which take turns, and where they are from."""

    path: Path
    repeats: int = 1
    captions: list[str] | None = None
    source: str | None = None


def counted(number, noun):
    """'1 picture', '2 pictures'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def kind_of(value):
    """What a cell holds where text is wanted, in words."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"list": "a list", "dict": "a dict", "bool": "a truth value"}.get(
            type(value).__name__, f"of type {type(value).__name__}"
        )
    return f"a number ({value})"


def check_text(value, where):
    """A caption as it is trained on, None where it is empty.

    Raises:
        NullSpaceError: if it is no text; `where` names its place, as "row 3 of the column 'text' of ...".
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise NullSpaceError(f"{where} is {kind_of(value)}, not text; write captions as text.")
    return value if value.strip() else None


def read_text(path):
    """The text of a small file in UTF-8 or UTF-16.

    Raises:
        NullSpaceError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
        return data.decode(encoding(data[:4096]))
    except (OSError, UnicodeDecodeError) as error:
        raise NullSpaceError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from error


def caption_beside(path):
    """The caption in the text file beside a picture, that file, and whether more stands in it: (None, None, False).

    As sd-scripts' `read_caption` does, of several lines the first is taken, and an empty file is refused.

    Raises:
        NullSpaceError: if it cannot be read, or its first line is empty.
    """
    for ending in CAPTION_ENDINGS:
        beside = path.with_suffix(ending)
        if beside.is_file():
            lines = [line.strip() for line in read_text(beside).splitlines()]
            if not lines or not lines[0]:
                raise NullSpaceError(f"{beside} has no caption in its first line; write one, or remove the file.")
            return lines[0], beside, any(lines[1:])
    return None, None, False


def metadata_rows(path):
    """The rows of a metadata file: a list of (its place in words, dict).

    Raises:
        NullSpaceError: if it cannot be read, or a line is not a JSON object.
    """
    text = read_text(path)
    if path.suffix == ".csv":
        return [(f"row {number} of {path}", row) for number, row in enumerate(csv.DictReader(text.splitlines()))]
    rows = []
    for number, line in enumerate(line for line in text.splitlines() if line.strip()):
        where = f"Row {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise NullSpaceError(f"{where} is not JSON ({error}); mend it.") from error
        if not isinstance(row, dict):
            raise NullSpaceError(f'{where} is not an object such as {{"file_name": "0.png", "text": "a caption"}}.')
        rows.append((where, row))
    return rows


def read_metadata(folder, column, tell):
    """Captions by picture path from the metadata file of a folder: `dict[Path, tuple[list[str], Path]]`, with the file.

    A picture has as many as rows name it.

    Args:
        folder (`Path`): in which `metadata.jsonl` or `metadata.csv` may lie.
        column (`str`, *optional*): the rows' key of the captions; the first of "text", "caption" and "prompt".
        tell: is called with a line on what is passed over.

    Raises:
        NullSpaceError: if it cannot be read, or a caption is no text.
    """
    path = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if path is None:
        if column is not None:
            tell(f"--caption_column {column} is not used: {folder} has neither {' nor '.join(METADATA_NAMES)}.")
        return {}
    rows = metadata_rows(path)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if column is None:
        column = next((name for name in CAPTION_COLUMNS if name in names), None)
    if column is None or column not in names:
        if column is not None:
            raise NullSpaceError(f"{path} has no '{column}'; choose a --caption_column of {', '.join(names)}.")
        tell(
            f"{path} is passed over: none of its columns {', '.join(names)} is named {', '.join(CAPTION_COLUMNS)}; if "
            "one has captions, name it in --caption_column."
        )
        return {}
    captions, absent = {}, []
    for where, row in rows:
        if not isinstance(row.get("file_name"), str):
            raise NullSpaceError(f"{where} has no file_name, which says whose caption it is.")
        picture = folder / row["file_name"]
        caption = check_text(row.get(column), f"{where}, '{column}',")
        if not picture.is_file():
            absent.append(row["file_name"])
        elif caption is not None:
            captions.setdefault(picture, ([], path))[0].append(caption)
    if absent:
        tell(f"{path} names {counted(len(absent), 'file')} not there: {listed(absent)}.")
    return captions


def kohya_repeats(folder):
    """(repeats, caption) that sd-scripts reads from a folder's name such as '10_sks dog', or None."""
    match = KOHYA_FOLDER.fullmatch(folder.name)
    return (int(match[1]), match[2].strip()) if match else None


def caption_pictures(paths, repeats, folder_caption, column, tell):
    """The pictures of one folder with their captions: a text file beside one, or else metadata, or the folder's name.

    Args:
        paths (`list[Path]`): pictures of one folder.
        repeats (`int`): of each of them in an epoch.
        folder_caption (`str`, *optional*): what those without a caption have where there is no --instance_prompt.
        column: --caption_column.
        tell: is called with a line on what is passed over.

    Raises:
        NullSpaceError: for all the captions that cannot be used.
    """
    metadata = read_metadata(paths[0].parent, column, tell) if paths else {}
    found, faults, several = [], [], []
    for path in paths:
        try:
            caption, source, has_more = caption_beside(path)
        except NullSpaceError as error:
            faults.append(str(error).rstrip("."))
            continue
        captions = [caption]
        if caption is None:
            captions, source = metadata.get(path, (None, None))
        elif has_more:
            several.append(source.name)
        kind = source and (source.name if source.name in METADATA_NAMES else f"{source.suffix} files")
        if captions is None and folder_caption:
            captions, kind = [folder_caption], "folder names"
        found.append(Captioned(path, repeats, captions, kind))
    if faults:
        raise NullSpaceError("; ".join(faults) + ".")
    if several:
        tell(f"Of {len(several)} caption files with several lines the first is used: {listed(several)}.")
    return found


def choose_captions(pictures, instance_prompts, tell):
    """The captions of each picture, `list[list[str] | None]`: its own, or --instance_prompt, or None.

    A caption file beats --instance_prompt, which beats the name of a folder. A line says what is used.
    """
    chosen, counts = [], {}
    for picture in pictures:
        own = picture.captions is not None and not (picture.source == "folder names" and instance_prompts)
        chosen.append(picture.captions if own else instance_prompts)
        source = picture.source if own else "--instance_prompt"
        counts[source] = counts.get(source, 0) + 1
    if counts.keys() - {"--instance_prompt"}:
        shares = ", ".join(f"{count} from {source}" for source, count in counts.items() if source)
        unused = "; --instance_prompt is not used" if instance_prompts and "--instance_prompt" not in counts else ""
        tell(f"Captions of {counted(len(pictures), 'picture')}: {shares}{unused}.")
    elif any(picture.captions for picture in pictures):
        tell("--instance_prompt takes the place of the captions that the folders' names give.")
    return chosen


def column_captions(cells, column, where, instance_prompts, tell):
    """The captions of each row of a column, `list[list[str] | None]`; an empty one has --instance_prompt, or None.

    Raises:
        NullSpaceError: if one is no text, or none is filled in.
    """
    captions = [
        check_text(cell, f"Row {number} of the column '{column}' of {where}") for number, cell in enumerate(cells)
    ]
    empty = [number for number, caption in enumerate(captions) if caption is None]
    if captions and len(empty) == len(captions):
        raise NullSpaceError(
            f"Row 0 of the column '{column}' of {where} is empty, as all of its rows are; choose another "
            "--caption_column, or leave it out and give an --instance_prompt."
        )
    if empty and not instance_prompts:
        raise NullSpaceError(
            f"Row {empty[0]} of the column '{column}' of {where} is empty ({len(empty)} rows are); fill it in, or "
            "give an --instance_prompt for such rows."
        )
    if empty:
        tell(f"{len(empty)} rows of the column '{column}' are empty and have --instance_prompt: {listed(empty)}.")
    return [[caption] if caption is not None else instance_prompts for caption in captions]


def check_captioned(captions, names, where, remedy):
    """Raise `NullSpaceError`, which names them, if pictures have neither a caption nor an --instance_prompt."""
    bare = [name for name, several in zip(names, captions, strict=True) if not several]
    if bare:
        raise NullSpaceError(
            f"{counted(len(bare), 'picture')} of {where} without a caption ({listed(bare)}); give an "
            f'--instance_prompt "a photo of a sks dog", or {remedy}.'
        )


def distinct_captions(captions):
    """The different captions among those of all pictures (`list[list[str]]`), in their order: `list[str]`."""
    return list(dict.fromkeys(caption for several in captions for caption in several))


def trained_prompts(captions, instance_prompts):
    """What is trained on, `list[str]`: --instance_prompt, or the different captions where pictures have their own."""
    if all(several is instance_prompts for several in captions):
        return instance_prompts
    return distinct_captions(captions)
