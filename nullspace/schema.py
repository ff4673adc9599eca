"""What a bundle may hold, for it is of strangers: its configuration, the names and sizes of its files, its tensors."""

import json
import math
import re
from numbers import Real

import torch

from nullspace.errors import NullSpaceError, listed
from nullspace.families import FAMILIES
from nullspace.names import CONFIG_NAME, FORMAT_VERSION, JOINT, TEXT_ENCODERS, TEXT_INPUT, TIMELESS
from nullspace.prompts import EXAMPLES
from nullspace.samplers import SAMPLERS


CONFIG_BYTES = 2**24  # more than ten times what SDXL's layers in ten groups take
HEADER_BYTES = 2**20  # what a safetensors file holds besides its tensors
TYPE_BYTES = {"F16": 2, "F32": 4}  # as safetensors calls them
WIDEST = 2**15  # inputs of a layer
MODULES = 2**14
LONGEST_NAME = 255  # bytes of a file's or folder's, on most file systems
UNPAIRED = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can escape and no encoding has
PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
MODULE_NAME = re.compile(r"\w+(\.\w+){0,31}", re.ASCII)
GROUP_NAME = re.compile(rf"{JOINT}|timesteps-\d{{4,7}}-\d{{4,7}}")
# How far U^T U may be from 1. Those of format 1 are in float16, which rounds to within 2^-11 of each entry.
ORTHONORMAL = {torch.float32: 1e-3, torch.float16: 4e-3}
PROBES = 4
FAR = 5e-3  # the farthest that rounding to 16 bits can turn a direction, and more
PARTS = ("eigenvalues", "eigenvectors", "rest", "distances")  # of an input, in a group's file
TRACES = 1e-3  # how far the groups' traces may be from the joint one's, as a share


# ---- Fields: each is a function that raises `Wrong` unless a value is what it takes ----------------------------------


class Wrong(Exception):
    """Where in a configuration something is wrong, and what."""


def integer(low, high):
    """A whole number from `low` to `high`."""

    def check(value, where):
        if type(value) is not int or not low <= value <= high:
            raise Wrong(f"{where} must be a whole number from {low} to {high}")

    return check


def number(low, high):
    """A number from `low` to `high`, neither NaN nor a truth value."""

    def check(value, where):
        if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
            raise Wrong(f"{where} must be a number from {low} to {high}")

    return check


def text(longest=1000, pattern=None, what="text"):
    """Text of at most so many characters that matches a pattern; `what` is what the sentence calls it."""

    def check(value, where):
        if not isinstance(value, str) or len(value) > longest or (pattern and not pattern.fullmatch(value)):
            raise Wrong(f"{where} must be {what} of at most {longest} characters")
        if UNPAIRED.search(value):
            raise Wrong(f"{where} holds half of a character, which is no text")

    return check


def name_or_path(value, where):
    """A Hub id or a path, as file systems have them."""
    text(4096)(value, where)
    if any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        raise Wrong(f"{where} has a name in it that is longer than {LONGEST_NAME} bytes")


def choice(*values):
    """One of some texts."""

    def check(value, where):
        if not isinstance(value, str) or value not in values:
            raise Wrong(f"{where} must be one of {', '.join(values)}")

    return check


def optional(field):
    """What `field` takes, or null."""

    def check(value, where):
        if value is not None:
            field(value, where)

    return check


def array(field, fewest, most):
    """A list of `fewest` to `most` items that `field` takes."""

    def check(value, where):
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            raise Wrong(f"{where} must be a list of {fewest} to {most} items")
        for index, item in enumerate(value):
            field(item, f"{where}[{index}]")

    return check


def mapping(key, field, most):
    """Any names that `key` takes, each with a value that `field` takes."""

    def check(value, where):
        if not isinstance(value, dict) or not 1 <= len(value) <= most:
            raise Wrong(f"{where} must be an object of 1 to {most} entries")
        for name, item in value.items():
            key(name, f"a name in {where}")
            field(item, f"{where}.{name}")

    return check


def record(needed, others):
    """The named fields: those that are needed, and others that may be missing."""

    def check(value, where):
        if not isinstance(value, dict):
            raise Wrong(f"{where or 'it'} must be an object")
        prefix = f"{where}." if where else ""
        if missing := [name for name in needed if name not in value]:
            raise Wrong(f"{prefix}{missing[0]} is missing")
        if unknown := [name for name in value if name not in needed and name not in others]:
            raise Wrong(f"{where or 'it'} has fields that nobody knows ({listed(map(repr, unknown), 3)})")
        for name, item in value.items():
            (needed.get(name) or others[name])(item, f"{prefix}{name}")

    return check


HEX = text(64, re.compile("[0-9a-f]{64}"), "the hex digits of a sha256")
MODULE = text(256, MODULE_NAME, "the name of a layer, words and points,")
TIMESTEP = integer(0, 10**6)
SIZE = integer(1, WIDEST)
TOKENS = integer(1, 2**60)
LAYERS = mapping(MODULE, record({"input": MODULE, "in_features": SIZE, "out_features": SIZE}, {}), MODULES)
GROUP = text(64, GROUP_NAME, f"'{JOINT}' or the range of a group of timesteps")
ANY_GROUP = text(64, re.compile(f"{GROUP_NAME.pattern}|{'|'.join(TIMELESS)}"), "the name of a group")


def fingerprint(value, where):
    """One hash in format 1, those of a model's parts since."""
    if isinstance(value, str):
        HEX(value, where)
    else:
        mapping(MODULE, text(64, re.compile("[0-9a-f]{64}|[a-z_]+"), "a hash or a word"), 16)(value, where)


CONFIG = record(
    {
        "format_version": integer(1, FORMAT_VERSION),
        "base_model": record(
            {"id": name_or_path, "fingerprint": fingerprint},
            {
                "revision": optional(text()),
                "variant": optional(text()),
                "loras": array(record({"id": name_or_path, "sha256": HEX}, {}), 1, 1000),
            },
        ),
        "model_type": choice(*FAMILIES),
        "sampler": choice(*SAMPLERS),
        "num_inference_steps": array(integer(1, 1000), 1, 100),
        "guidance_scale": number(0, 1000),
        "resolution": integer(1, 2**16),
        "attention": choice("cross", "self", "all"),
        "modules": LAYERS,
        "prompts": record(
            {
                "source": text(10**4),
                "count": integer(1, 2**60),
                "sha256": HEX,
                "examples": array(text(10**4), 0, EXAMPLES),
            },
            {},
        ),
        "seed": integer(0, 2**62),  # to which the numbers of prompts are added
        "groups": array(
            record(
                {
                    "name": GROUP,
                    "timesteps": array(TIMESTEP, 1, 10**4),
                    "range": array(TIMESTEP, 2, 2),
                },
                {},
            ),
            1,
            1001,
        ),
        "tokens": mapping(ANY_GROUP, mapping(MODULE, TOKENS, MODULES), 1003),
        "files": mapping(text(128, PLAIN_NAME, "a plain file name"), HEX, 1100),
        "sha256": HEX,
    },
    {
        **{name: record({"modules": LAYERS}, {"fingerprint": HEX}) for name in TEXT_ENCODERS},
        "prediction_type": text(64),
        "clip_skip": integer(0, 1000),
        "mixed_precision": choice("no", "fp16", "bf16"),
        "command": text(10**5),
        "versions": mapping(text(64), text(256), 32),
        "dtype": choice("float16", "float32"),
        "distances": mapping(ANY_GROUP, mapping(MODULE, optional(number(0, 1e-2)), MODULES), 1003),
        "exact": mapping(ANY_GROUP, mapping(MODULE, SIZE, MODULES), 1003),
    },
)


# ---- The configuration -----------------------------------------------------------------------------------------------


def parse_config(content):
    """The object of a JSON text in which no name stands twice: readers differ in which of two they take.

    Raises:
        ValueError: if one does, or it is no JSON.
    """

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice")
        return found

    return json.loads(content, object_pairs_hook=unique)


def check_config(config, path):
    """Raise `NullSpaceError`, naming the field, unless a parsed `nullspace_config.json` is whole and of a piece."""
    try:
        CONFIG(config, "")
        _check_layers(config)
        _check_groups(config)
        _check_tokens(config)
    except Wrong as error:
        raise NullSpaceError(
            f"{path} is not what a bundle's is: {error}; use another bundle or build one with build_nullspace.py."
        ) from error


def _check_layers(config):
    """That no model's layers are given for another's, and that layers with one input agree on its size."""
    sizes = {}
    for part, modules in [("", config["modules"]), *_of_text_encoders(config).items()]:
        for name, info in modules.items():
            for given in (name, info["input"]):
                model = given.partition(".")[0]
                if (model if model in TEXT_ENCODERS else "") != part:
                    raise Wrong(f"{given} is no layer of the model that {part + '.' if part else ''}modules are of")
            if sizes.setdefault(info["input"], info["in_features"]) != info["in_features"]:
                raise Wrong(f"layers that read {info['input']} have it in different sizes ({name})")


def _check_groups(config):
    """That the first group is all timesteps, and the others split them."""
    joint, *split = config["groups"]
    if joint["name"] != JOINT or any(group["name"] == JOINT for group in split):
        raise Wrong(f"the first of the groups, and it alone, must be '{JOINT}'")
    for group in config["groups"]:
        first, last = group["range"]
        steps = group["timesteps"]
        if (
            not first <= steps[0]
            or not steps[-1] <= last
            or any(a >= b for a, b in zip(steps, steps[1:], strict=False))
        ):
            raise Wrong(f"the timesteps of {group['name']} must ascend within its range")
    ordered = sorted(split, key=lambda group: group["range"])
    if any(a["range"][1] >= b["range"][0] for a, b in zip(ordered, ordered[1:], strict=False)):
        raise Wrong("the ranges of the groups must not overlap")
    # What no group has is protected by none
    first, last = joint["range"]
    edges = [-1, *(edge for group in ordered or [joint] for edge in group["range"]), last + 1]
    if first or any(left + 1 != right for left, right in zip(edges[::2], edges[1::2], strict=True)):
        raise Wrong("the ranges of the groups must follow each other from timestep 0 on")
    if split and joint["timesteps"] != sorted(step for group in split for step in group["timesteps"]):
        raise Wrong(f"the timesteps of '{JOINT}' must be those of the other groups")


def _check_tokens(config):
    """That each group has the inputs of all layers, and a file, and that counts add up."""
    read = {info["input"] for info in config["modules"].values()}
    own = {name: {info["input"] for info in modules.values()} for name, modules in _of_text_encoders(config).items()}
    names = [group["name"] for group in config["groups"]]
    expected = {name: inputs for name in names if (inputs := read - {TEXT_INPUT})}
    expected |= {name: inputs for name, inputs in [(TEXT_INPUT, read & {TEXT_INPUT}), *own.items()] if inputs}
    tokens = config["tokens"]
    for name in [*expected, *tokens]:
        differing = expected.get(name, set()) ^ tokens.get(name, {}).keys()
        if differing:
            raise Wrong(f"the inputs of {name} in tokens are not those that its layers read ({listed(differing, 3)})")
        if f"{name}.safetensors" not in config["files"]:
            raise Wrong(f"files does not name {name}.safetensors")
    if config["format_version"] >= 3:
        sizes = {info["input"]: info["in_features"] for info in _modules(config).values()}
        exact = {name: inputs.keys() for name, inputs in config.get("exact", {}).items()}
        if exact != {name: inputs.keys() for name, inputs in tokens.items()}:
            raise Wrong("the inputs in exact are not those in tokens")
        for name, inputs in config["exact"].items():
            for source, count in inputs.items():
                if count > sizes[source]:
                    raise Wrong(f"exact.{name}.{source} is more than the {sizes[source]} directions that there are")
    for source, count in tokens.get(JOINT, {}).items():
        if names[1:] and sum(tokens[name][source] for name in names[1:]) != count:
            raise Wrong(f"the tokens of {source} in the groups do not add up to those in '{JOINT}'")


# ---- Files and tensors -----------------------------------------------------------------------------------------------


def check_plain(folder, name):
    """Raise `NullSpaceError` if a folder's file is a link, which may lead anywhere; those of the Hub's cache do not."""
    path = folder / name
    if path.is_symlink() and path.resolve().parent != (folder.parent.parent / "blobs").resolve():
        raise NullSpaceError(f"{path} is a link, which a bundle's files must not be; copy what it leads to there.")


def check_size(path, most):
    """Raise `NullSpaceError` if a file, unread, is larger than what the configuration describes."""
    size = path.stat().st_size
    if size > most:
        raise NullSpaceError(f"{path} has {size:,} bytes, and what it should hold takes at most {most:,}.")


def tensor_specs(config, group):
    """Shape and types, in safetensors' words, of each tensor in a group's file: `dict[str, (tuple, tuple)]`."""
    sizes = {info["input"]: info["in_features"] for info in _modules(config).values()}
    kinds = ("F32", "F16") if config["format_version"] == 1 else ("F32",)  # sums of format 1's are in float32
    specs = {}
    for source in config["tokens"][group]:
        size = sizes[source]
        exact = config.get("exact", {}).get(group, {}).get(source, size)
        specs[f"{source}.eigenvalues"] = ((size,), ("F32",))
        specs[f"{source}.eigenvectors"] = ((size, exact), kinds)
        if config["format_version"] >= 3:
            specs[f"{source}.rest"] = (((size - exact) * (size - exact - 1) // 2,), ("F16",))
            specs[f"{source}.distances"] = ((size,), ("F32",))
    return specs


def file_bytes(specs):
    """The most bytes that a safetensors file of `tensor_specs` takes."""
    return HEADER_BYTES + sum(math.prod(shape) * TYPE_BYTES[kinds[0]] for shape, kinds in specs.values())


def _of_text_encoders(config):
    """The layers that are covered of each text encoder, by its name."""
    return {name: config[name]["modules"] for name in TEXT_ENCODERS if name in config}


def _modules(config):
    return {
        name: info
        for modules in (config["modules"], *_of_text_encoders(config).values())
        for name, info in modules.items()
    }


def check_header(path, file, specs):
    """Raise `NullSpaceError` unless an open safetensors file holds exactly these tensors."""
    if differing := file.keys() ^ specs.keys():
        raise NullSpaceError(f"{path} does not hold the tensors that {CONFIG_NAME} describes ({listed(differing, 3)}).")
    for name, (shape, kinds) in specs.items():
        part = file.get_slice(name)
        found, kind = tuple(part.get_shape()), part.get_dtype()
        if found != shape or kind not in kinds:
            raise NullSpaceError(
                f"{path} has {name} as {kind} of {found}, and by {CONFIG_NAME} it is {' or '.join(kinds)} of {shape}."
            )


def check_spectrum(path, source, eigenvalues, eigenvectors, rest=None, distances=None):
    """Raise `NullSpaceError` unless these are tensors of a `Spectrum`. Whatever the rest, it makes directions."""
    fault = eigenvalue_fault(eigenvalues) or eigenvector_fault(eigenvectors)
    if rest is not None and not torch.isfinite(rest).all():
        fault = fault or "other directions are not finite"
    if distances is not None and not ((distances >= 0) & (distances <= FAR)).all() and not distances.isposinf().all():
        fault = fault or "distances are none"
    if fault:
        raise NullSpaceError(
            f"{path}: of {source} the {fault}, so they are those of no second moment; use another bundle or build one "
            "with build_nullspace.py."
        )


def eigenvalue_fault(values):
    """What is wrong with eigenvalues (in,), or None."""
    if not torch.isfinite(values).all():
        return "eigenvalues are not finite"
    if (values < 0).any():
        return "eigenvalues are not all at least 0"
    if (values[1:] > values[:-1]).any():
        return "eigenvalues do not descend"
    if not 0 < values.double().sum() < math.inf:
        return "eigenvalues add up to nothing"
    return None


def eigenvector_fault(vectors):
    """What is wrong with columns (in, k) that are to be orthonormal, or None.

    A probe in place of U^T U: with signs s drawn at random, U^T U s is s, and an entry by which U^T U differs from 1
    shows in it, in full.
    """
    signs = torch.empty(vectors.shape[1], PROBES).bernoulli_(generator=_secret()) * 2 - 1
    tolerance = ORTHONORMAL[vectors.dtype]
    vectors = vectors.float()
    worst = (vectors.T @ (vectors @ signs) - signs).abs().amax() if vectors.numel() else torch.zeros(())
    return None if worst <= tolerance else "eigenvectors are not orthonormal"  # nor are those with NaN


def _secret():
    """A generator that no bundle can have been made for, and that draws nothing from the global one."""
    generator = torch.Generator()
    generator.seed()
    return generator


def check_traces(path, spectra, split):
    """Raise `NullSpaceError` unless the energy of the joint group is that of the groups `split`, by input."""
    for source, joint in spectra[JOINT].items():
        energies = [spectra[name][source].energy() for name in split]
        if abs(sum(energies) - joint.energy()) > TRACES * joint.energy():
            raise NullSpaceError(
                f"{path}: the sum of {source} over all timesteps is not that of the groups'; use another bundle or "
                "build one with build_nullspace.py."
            )
