"""Reading prompt files, and tokenizers that cannot read prompts."""

import codecs
import csv
import json
import re
from collections import Counter
from pathlib import Path


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
