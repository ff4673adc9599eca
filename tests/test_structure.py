"""The shape of the code: arrows point one way, and only a family's room names it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from nullspace.families import FAMILIES


DOORS = ("train_dreambooth_nullspace", "build_nullspace", "nullspace_utils")
LIBRARY = sorted((ROOT / "nullspace").rglob("*.py"))
MATHEMATICS = {"moments", "spectrum", "projector", "timesteps"}  # know no model and no file
BENEATH = {"checks", "errors", "layers", "names"}  # what they may know: values, sentences, names, modules of torch
# A family by its names, in code: its file, its class and what begins with that, --model_type's word.
FILES, CLASSES = map("|".join, zip(*(place.split(".") for place in FAMILIES.values()), strict=True))
WORDS = "|".join(FAMILIES)
FAMILY_NAMES = re.compile(rf"\b({FILES})\b|\b({CLASSES})|[\"']({WORDS})[\"']|\bis_({WORDS})\b")


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


@pytest.mark.parametrize("room", sorted(MATHEMATICS))
def test_the_mathematics_knows_no_model_and_no_file(room):
    known = [name.split(".") for name in imported(ROOT / "nullspace" / f"{room}.py")]
    foreign = {"diffusers", "transformers", "peft", "safetensors", "os", "pathlib"}
    assert not foreign & {name[0] for name in known}
    assert {name[1] for name in known if name[0] == "nullspace"} <= MATHEMATICS | BENEATH


def names_in(nodes):
    """Names and attributes that are read anywhere in pieces of code."""
    found = [node for piece in nodes for node in ast.walk(piece) if isinstance(getattr(node, "ctx", None), ast.Load)]
    return {getattr(node, "id", None) or getattr(node, "attr", None) for node in found}


def test_nothing_in_the_library_is_unused():
    """What only tests call is unused, too; `console` is called by the commands that pip makes."""
    paths = [*LIBRARY, *(ROOT / f"{door}.py" for door in DOORS)]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    elsewhere = set().union(*map(imported, trees), {f"nullspace.families.{place}" for place in FAMILIES.values()})
    for tree in trees.values():  # signals.run, of a room that is imported whole
        elsewhere |= {f"nullspace.{ast.unparse(node)}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unused = []
    for path in LIBRARY:
        body = trees[path].body if path.stem != "console" else []
        for node in body:
            made = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign):
                made = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            at_exit = any(ast.unparse(each) == "atexit.register" for each in getattr(node, "decorator_list", []))
            here = names_in([other for other in body if other is not node])
            for name in made if not at_exit else ():
                full = f"{name_of(path)}.{name}"
                if name not in here and full not in elsewhere and not name.startswith("__"):
                    unused.append(full)
    assert not unused


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


def test_what_is_tracked_is_small():
    """A clone is no larger than it must be: the largest files are the demo's models."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("no checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert max(path.stat().st_size for path in paths) < 8e6 and sum(path.stat().st_size for path in paths) < 60e6
