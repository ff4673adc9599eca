"""Reading prompt files, and tokenizers that cannot read prompts."""

import codecs
import csv
import hashlib
import json
import re
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path

from nullspace.checks import require
from nullspace.errors import NullSpaceError, reason


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CLIP_LENGTH = 77


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
        OSError, UnicodeDecodeError: if it cannot be read.
        ValueError: if it is JSONL or CSV, with the flags that read it.
    """
    path = Path(path)
    with open(path, "rb") as file:
        name = encoding(file.read(4096))
    with open(path, encoding=name) as file:
        for number, line in enumerate(file):
            if number == 0:
                refuse_table(path, line)
            yield line


def refuse_table(path, line):
    """Raise `ValueError` if the first line of a file is that of a JSONL or CSV file rather than a prompt."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    columns = []
    if isinstance(row, (dict, list)) or line.strip() in ("[", "{"):
        kind, columns = "JSON", list(row) if isinstance(row, dict) else []
    elif path.suffix.lower() in (".csv", ".tsv"):
        kind, columns = (
            "CSV",
            next(csv.reader([line.strip()], delimiter="\t" if path.suffix.lower() == ".tsv" else ",")),
        )
    else:
        heads = [cell.strip().lower() for cell in next(csv.reader([line.strip()]), [])]
        if len(heads) < 2 or not {"prompt", "text", "caption"} & set(heads):
            return
        kind, columns = "CSV", heads
    named = f" (its columns: {', '.join(columns)})" if columns else ""
    raise ValueError(
        f"it is {kind}{named}, not a prompt on each line; give the folder that holds it, named .jsonl or .csv, as "
        "--prompts_dataset_name with its --prompt_column"
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


class Prompts:
    """The prompts to protect, the empty one first: in a temporary file rather than in memory, however many they are.

    Only one iteration at a time.

    Args:
        lines (`Iterable[str]`): prompts and empty lines, which are passed over.
        limit (`int`, *optional*): take only the first so many prompts.

    Attributes:
        sha256 (`str`): of the prompts joined by newlines.
        examples (`list[str]`): up to 8 of them, evenly spread.
    """

    def __init__(self, lines, limit=None):
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._count, digest, kept, stride = 0, hashlib.sha256(), [], 1
        for prompt in chain([""], islice(filter(None, map(str.strip, lines)), limit)):
            self._file.write(json.dumps(prompt) + "\n")  # a prompt of a dataset may hold a newline
            digest.update(("\n" if self._count else "").encode() + prompt.encode())
            if self._count and (self._count - 1) % stride == 0:
                kept.append(prompt)
            if len(kept) == 16:
                kept, stride = kept[::2], 2 * stride
            self._count += 1
        self.sha256 = digest.hexdigest()
        shown = min(8, len(kept))
        self.examples = [kept[len(kept) * index // shown] for index in range(shown)]

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


def file_lines(args):
    try:
        yield from read_lines(args.prompts_file)
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"--prompts_file {args.prompts_file} cannot be read: {error}.") from error


def dataset_lines(args):
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
