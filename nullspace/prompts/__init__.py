"""Reading prompt files, tokenizers that cannot read prompts, and prompts for models that bring none.

`general.txt`, beside this file, is for bundles that are built without a list of prompts. It was written by hand, for
coverage: each line adds words that the lines before it lack. People (ages, looks, trades, parts of the body), animals,
plants and food, objects, vehicles, landscapes, buildings, rooms, arts and styles, light and weather, materials,
actions, counts and places of things, views, writing, and the words of negative prompts and of quality follow each
other, so that any even selection has some of each. Short prompts and long ones, with "a photo of" and without, stand
side by side, as people write them. The empty prompt comes by itself (`Prompts`).
"""

import codecs
import csv
import hashlib
import json
import re
import shlex
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path

from nullspace.checks import require
from nullspace.errors import NullSpaceError, reason


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CLIP_LENGTH = 77
EXAMPLES = 64  # prompts that a bundle ships, by which others see that it is what it says
SAVE_AS_UTF8 = "save it as plain text in UTF-8"
LOOKED_AT = 50  # lines, for what a file is
DELIMITERS = {"\t": "a table with tabs", ";": "CSV with semicolons", "|": "a table with bars", ",": "CSV"}
GENERAL_PROMPTS = Path(__file__).with_name("general.txt")
OWN_PROMPTS = "prompts.txt"  # in a model's folder, in place of the general ones
PROMPT_COLUMNS = {"prompt", "prompts", "text", "caption", "captions"}


def encoding(head):
    """The encoding of a text file that begins with the bytes `head`, by its mark or by the zeros of UTF-16."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def read_lines(path):
    """The lines of a prompt file: plain text in UTF-8 or UTF-16, with a byte-order mark or without.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is of another encoding, JSON or a table, with what to do about it.
    """
    path = Path(path)
    with open(path, "rb") as file:
        name = encoding(file.read(4096))
    try:
        with open(path, encoding=name) as file:
            first = list(islice(file, LOOKED_AT))
            refuse_table(path, first)
            for line in chain(first, file):
                if "\0" in line:
                    raise ValueError(f"it holds zero bytes, as no text in UTF-8 or UTF-16 does; {SAVE_AS_UTF8}")
                yield line
    except UnicodeDecodeError as error:
        if name != "utf-8":
            raise ValueError(f"it begins as {name.upper()} and goes on as something else; {SAVE_AS_UTF8}") from error
        spoiled, at = error.object, error.start
        before, after = (
            part.decode("cp1252", "replace") for part in (spoiled[max(0, at - 12) : at], spoiled[at : at + 12])
        )
        near = before.split("\n")[-1] + after.split("\n")[0].rstrip()
        raise ValueError(
            f"it is not UTF-8 (as Latin-1 it would read '{near}'); {SAVE_AS_UTF8}, or convert it: "
            f"iconv -f windows-1252 -t utf-8 {shlex.quote(str(path))} > utf8.txt"
        ) from error


def refuse_table(path, lines):
    """Raise `ValueError` if the first lines of a file are of JSON or a table rather than prompts.

    A table is known by its ending, by as many tabs in every line, or by a first line of names, of which one is usual
    for prompts or, but for commas, which prompts are full of, all are words above as many cells in every line.
    """
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        return
    rows = [_json(line) for line in lines]
    if isinstance(rows[0], (dict, list)) or lines[0] in ("[", "{"):
        _refuse("JSON", list(rows[0]) if isinstance(rows[0], dict) else [], "jsonl")
    if all(isinstance(row, str) for row in rows):
        raise ValueError("each of its lines is a JSON string; take the quotation marks away, which would be read too")
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        _refuse("CSV", _cells(lines[:1], "\t" if ending == ".tsv" else ",")[0], ending[1:])
    for delimiter, kind in DELIMITERS.items():
        head, *body = _cells(lines, delimiter)
        names = [cell.strip() for cell in head]
        if len(names) < 2:
            continue
        is_named = bool(PROMPT_COLUMNS & {name.lower() for name in names})
        is_words = all(re.fullmatch(r"[\w-]+", cell) for cell in head)  # prose has a space after what parts it
        is_even = all(len(row) == len(head) for row in body)
        is_headed = is_words and delimiter != "," and any(" " in cell for row in body for cell in row)
        if is_named and (is_words or is_even) or is_even and (is_headed or delimiter == "\t"):
            columns = names if is_named or is_words else []
            _refuse(kind, columns, "tsv" if delimiter == "\t" else "csv", delimiter)


def _json(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def _cells(lines, delimiter):
    try:
        return list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:  # a line too long to be of a table
        return [lines]


def _refuse(kind, columns, ending, delimiter=","):
    named = f" (its columns: {', '.join(columns)})" if columns else ""
    commas = " with commas" if delimiter in ";|" else ""  # what the datasets library takes for granted
    raise ValueError(
        f"it is {kind}{named}, not a prompt on each line; save the prompts alone, or give the folder that holds it, "
        f"saved{commas} as .{ending}, as --prompts_dataset_name with its --prompt_column"
    )


class Counted:
    """Passes lines on; as a string it says how many of those that were read are empty or repeated, "" if none."""

    def __init__(self, lines):
        self._lines, self._seen = lines, Counter()

    def __iter__(self):
        for line in self._lines:
            self._seen[hash(line.strip()) if line.strip() else None] += 1
            yield line

    def __str__(self):
        empty, different = self._seen[None], len(self._seen.keys() - {None})
        repeated = self._seen.total() - empty - different
        counts = {"empty lines passed over": empty, "repeated prompts kept": repeated}
        return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)


def tokenizer_fault(tokenizer, where):
    """What is wrong with a tokenizer, or None; a window or pad token that is missing becomes what CLIP uses."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        return (
            f"The tokenizer of {where} knows only {len(tokenizer)} tokens: its vocabulary is missing; fetch it again."
        )
    if tokenizer.model_max_length > 10**6:
        tokenizer.model_max_length = CLIP_LENGTH
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return None


def word_warnings(tokenizer, prompts):
    """A sentence for each different word of --instance_prompt that the tokenizer does not know or splits.

    Words in plain use are one token each, as identifiers should be. Punctuation, which parts words, and numbers, of
    which each digit is a token, are not looked at.
    """

    def is_known(tokens):
        return bool(tokens) and tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(tokens)

    def is_whole(word):
        return is_known(tokens := tokenizer.tokenize(word)) and len(tokens) == 1

    words = {}
    for word in " ".join(prompts).split():
        if not is_whole(word):  # a token that was added may hold punctuation: "<star>"
            for part in re.findall(r"\w+", word):
                words.setdefault(part.lower(), part)
    sentences = []
    for word in words.values():
        tokens = tokenizer.tokenize(word)
        if not is_known(tokens):
            sentences.append(f"'{word}' of --instance_prompt is unknown to the tokenizer: {tokens}.")
        elif len(tokens) > 1 and not word.isdigit():
            sentences.append(f"'{word}' of --instance_prompt is {len(tokens)} tokens: {tokens}.")
    return sentences


def length_warnings(tokenizer, prompts, where, length=None):
    """A sentence if prompts have more than `length` tokens, the tokenizer's window by default; otherwise none."""
    length = length or tokenizer.model_max_length
    cut = sum(len(tokenizer(prompt, truncation=False)["input_ids"]) > length for prompt in prompts)
    return [f"The ends of {cut} of {where} are not read, for they are longer than {length} tokens."] if cut else []


def spread(items, count):
    """Up to `count` of a list's items, evenly spread from the first one on."""
    count = min(count, len(items))
    return [items[len(items) * index // count] for index in range(count)]


class Prompts:
    """The prompts to protect, the empty one first: in a temporary file rather than in memory, however many they are.

    Only one iteration at a time.

    Args:
        lines (`Iterable[str]`): prompts and empty lines, which are passed over.
        limit (`int`, *optional*): take only the first so many prompts.

    Attributes:
        sha256 (`str`): of the prompts joined by newlines.
        examples (`list[str]`): up to `EXAMPLES` of them, evenly spread.
    """

    def __init__(self, lines, limit=None):
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._count, digest, kept, stride = 0, hashlib.sha256(), [], 1
        for prompt in chain([""], islice(filter(None, map(str.strip, lines)), limit)):
            self._file.write(json.dumps(prompt) + "\n")  # a prompt of a dataset may hold a newline
            digest.update(("\n" if self._count else "").encode() + prompt.encode())
            if self._count and (self._count - 1) % stride == 0:
                kept.append(prompt)
            if len(kept) == 2 * EXAMPLES:
                kept, stride = kept[::2], 2 * stride
            self._count += 1
        self.sha256 = digest.hexdigest()
        self.examples = spread(kept, EXAMPLES)

    def and_more(self, prompts):
        """These `Prompts` and others (`list[str]`) after them."""
        return Prompts(chain(islice(self, 1, None), prompts)) if prompts else self

    def __len__(self):
        return self._count

    def __iter__(self):
        self._file.seek(0)
        return map(json.loads, self._file)


def read_prompts(args, tell=lambda sentence: None):
    """The `Prompts` to protect; `tell` is called with a sentence on lines that were empty or repeated.

    Raises:
        NullSpaceError: if there are none.
    """
    lines = Counted(file_lines(args) if args.prompts_file else dataset_lines(args))
    prompts = Prompts(lines, args.max_prompts)
    if len(prompts) == 1:
        raise NullSpaceError(f"{args.prompts_file or args.prompts_dataset_name} holds no prompt.")
    if counts := str(lines):
        tell(f"{args.prompts_file or args.prompts_dataset_name}: {counts}.")
    return prompts


def prompts_of_model(folder, count):
    """`count` prompts for a model, the empty one included, evenly spread over its list, and the list's file.

    The list is `prompts.txt` in the model's folder, or else `general.txt`; one that is shorter is taken whole.

    Raises:
        NullSpaceError: if the model's list cannot be read or is empty.
    """
    own = Path(folder) / OWN_PROMPTS
    source = own if own.is_file() else GENERAL_PROMPTS
    try:
        lines = [line.strip() for line in read_lines(source) if line.strip()]
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"The model's {source} cannot be read: {error}.") from error
    if not lines:
        raise NullSpaceError(f"The model's {source} holds no prompt; write one on each line, or remove it.")
    taken = min(count - 1, len(lines))
    return Prompts(lines[len(lines) * index // taken] for index in range(taken)), source


def file_lines(args):
    """The lines of --prompts_file, as they are read; `NullSpaceError` if it cannot be, see `read_lines`."""
    try:
        yield from read_lines(args.prompts_file)
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"--prompts_file {args.prompts_file} cannot be read: {error}.") from error


def dataset_lines(args):
    """The prompts of --prompts_dataset_name, as they come; `NullSpaceError` if it or its column cannot be had."""
    require("datasets", "--prompts_dataset_name")
    from datasets import load_dataset  # slow to import, and seldom needed

    column = args.prompt_column
    try:
        rows = load_dataset(
            args.prompts_dataset_name, args.prompts_dataset_config_name, split=args.prompts_split, streaming=True
        )
        columns = list(next(iter(rows), {column: None}))
        if column in columns:
            yield from (row[column] or "" for row in rows)
            return
    except (OSError, ValueError) as error:
        raise NullSpaceError(
            f"--prompts_dataset_name {args.prompts_dataset_name} cannot be read ({reason(error)})."
        ) from error
    raise NullSpaceError(
        f"--prompts_dataset_name {args.prompts_dataset_name} has no column '{column}'; choose a --prompt_column of "
        f"{', '.join(columns)}."
    )


def prompt_warnings(tokenizer, captions, instance_prompts, args):
    """Sentences on words of --instance_prompt that are no single token, and on prompts that the window cuts off.

    Args:
        captions (`list[list[str]]`): of each picture; those without a caption of their own have --instance_prompt.
        instance_prompts (`list[str]` or `None`): as given.
    """
    given, length = instance_prompts or [], args.tokenizer_max_length or tokenizer.model_max_length
    written = dict.fromkeys(caption for several in captions for caption in several if caption not in given)
    yield from word_warnings(tokenizer, given)
    yield from length_warnings(tokenizer, given, "--instance_prompt", length)
    yield from length_warnings(tokenizer, written, "the captions", length)
    # Drawn as the pipeline does, which knows no --tokenizer_max_length
    yield from length_warnings(tokenizer, args.nullspace_extra_prompts or [], "--nullspace_extra_prompts")
