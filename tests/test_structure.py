"""The shape of the code: arrows point one way, and only a family's room names it."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT


DOORS = ("train_dreambooth_nullspace", "build_nullspace", "nullspace_utils")
LIBRARY = sorted((ROOT / "nullspace").rglob("*.py"))
MATHEMATICS = ("spectrum", "projector")  # know no model and no file
# A family by its names, in code: classes, --model_type's words, flags of its own.
FAMILY_NAMES = re.compile(
    r"StableDiffusion(?!Pipeline\b)|LatentConsistency|\bis_(sd|lcm|sdxl)\b|[\"'](sd|lcm|sdxl)[\"']|stable_diffusion\b|"
    r"latent_consistency\b|\bStableDiffusion\w*Pipeline\b"
)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """The modules that a file imports anywhere in it, those within functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_room_imports_a_door():
    for path in LIBRARY:
        assert not imported(path) & set(DOORS), f"{path} imports a door"


def test_imports_make_no_circle():
    modules = {name_of(path): imported(path) for path in LIBRARY}
    arrows = {name: {other for other in targets if other in modules} for name, targets in modules.items()}
    while arrows:  # take away what imports nothing that is left
        free = {name for name, targets in arrows.items() if not targets & arrows.keys() - {name}}
        assert free, f"these import each other: {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_knows_no_model_and_no_file(room):
    known = imported(ROOT / "nullspace" / f"{room}.py")
    foreign = {
        name for name in known if name.split(".")[0] in ("diffusers", "transformers", "peft", "safetensors", "os")
    }
    assert not foreign


def code_of(path):
    """A file without its docstrings and comments, by line."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            for number in range(first.lineno - 1, first.end_lineno):
                lines[number] = ""
    return [line.partition("  # ")[0] if not line.lstrip().startswith("#") else "" for line in lines]


def test_a_family_is_named_in_its_own_room():
    """At most six lines elsewhere: choices of a flag, what a library's class is called."""
    elsewhere = [path for path in [*LIBRARY, *(ROOT / f"{door}.py" for door in DOORS)] if "families" not in path.parts]
    naming = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in elsewhere
        for number, line in enumerate(code_of(path), 1)
        if FAMILY_NAMES.search(line)
    ]
    assert len(naming) <= 6, "\n".join(naming)


def test_every_room_says_what_it_is():
    for path in LIBRARY:
        assert ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))), path
