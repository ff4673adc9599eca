"""Text that comes from users in cards: Markdown, Python and shell that mean what was typed, whatever it holds."""

import json
import re
from urllib.parse import quote

from nullspace.terminal import UNSEEN, visible


def python_string(text):
    """A Python string literal in double quotes, on one line. (JSON's escapes are a part of Python's.)"""
    literal = json.dumps(str(text), ensure_ascii=False)
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", literal)


def plain(text):
    """Markdown that shows a text as it is, on one line: CommonMark, sec. 2.4."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", one_line(text))


def code_span(text):
    """A Markdown code span, on one line, fenced by more backticks than the text has in a row: CommonMark, sec. 6.1."""
    text = one_line(text)
    fence = _longer_than(text, 1)
    padding = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_block(language, code):
    """A fenced code block, its fence longer than any in the code: CommonMark, sec. 4.5."""
    fence = _longer_than(code, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def table_cell(markdown):
    """Markdown in a cell of a table, where a bar ends the cell, even within a code span: GFM, sec. 4.10."""
    return markdown.replace("|", r"\|")


def one_line(text):
    """A text with each run of white space as one space, and other characters that nobody sees as Python's escapes."""
    return visible(" ".join(str(text).split()))


def link(text, address):
    """A Markdown link, whatever its text and address hold: CommonMark, sec. 6.3."""
    return f"[{plain(text)}]({quote(address, safe=':/@')})"


def csv_cell(value):
    """A cell of a table that no program takes for a formula, and no viewer for anything but text."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def utf8(text):
    """A text that can be written: an argument's bytes that were no UTF-8 are lone surrogates, and become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _longer_than(text, least):
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
