"""Text that others wrote, on a terminal: nothing in it moves the cursor, turns the reading around or is a secret."""

import re


SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\"]+")
QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")  # of an address: it may be a signature that lets others upload
# Control characters, those that end a line, those that turn the direction of the text, and halves of characters.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""A text on one line in which characters that a terminal obeys are shown as in Python: `\x1b`."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def printable(text):
    """A text as it may be shown to anybody: `visible`, and without the Hub's tokens and signatures that are in it."""
    return visible(SECRET.sub("***", QUERY.sub(r"\1", str(text))))


def print_table(header, rows):
    """Print a table of strings, `printable` ones: the first column begins at the left, the others end at the right."""
    rows = [list(map(printable, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())
