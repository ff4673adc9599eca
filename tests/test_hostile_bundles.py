"""Bundles of strangers that lie, signed as honest ones are: each is refused in one sentence, by one check.

    python -m pytest -q tests/test_hostile_bundles.py -s -k table

prints which check refuses which, and after how many seconds.
"""

import json
import math
import re
import time
import traceback
from argparse import Namespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from nullspace.adapters import lora_targets
from nullspace.bundle import Bundle, check_files
from nullspace.errors import NullSpaceError
from nullspace.hashes import config_sha256, sha256
from nullspace.names import CONFIG_NAME, JOINT, TEXT_ENCODER, TEXT_INPUT
from test_train import bundle1  # noqa: F401


def first(mapping):
    return next(iter(mapping))


# ---- Lies in the configuration: each is a function of it -------------------------------------------------------------


def put(path, value):
    """A lie that sets a field, by its path; `...` stands for the first name there."""

    def lie(config):
        *parents, last = path
        for name in parents:
            config = config[first(config) if name is ... else name]
        config[first(config) if last is ... else last] = value

    return lie


def without(*path):
    def lie(config):
        *parents, last = path
        for name in parents:
            config = config[first(config) if name is ... else name]
        del config[first(config) if last is ... else last]

    return lie


def two_layers_of_all(config):
    """All layers but the first two, and what only they read, are left out: a bundle of a piece, which covers little."""
    config["modules"] = dict(list(config["modules"].items())[:2])
    read = {info["input"] for info in config["modules"].values()}
    for group in list(config["tokens"]):
        if group != TEXT_ENCODER:
            config["tokens"][group] = {key: value for key, value in config["tokens"][group].items() if key in read}
            if not config["tokens"][group]:
                del config["tokens"][group]
    config["exact"] = {
        group: {key: config["exact"][group][key] for key in inputs} for group, inputs in config["tokens"].items()
    }


def without_the_text(config):
    """The text encoder's output is dropped, and with it to_k and to_v."""
    config["modules"] = {key: info for key, info in config["modules"].items() if info["input"] != TEXT_INPUT}
    del config["tokens"][TEXT_INPUT], config["exact"][TEXT_INPUT]


def text_encoder_of_the_unet(config):
    config[TEXT_ENCODER]["modules"] = config["modules"]


def input_that_no_layer_has(config):
    for inputs in config["tokens"].values():
        inputs["down_blocks.9.attn"] = 7


def inputs_swapped(config):
    """Two layers of one size are each given the other's input."""
    infos = [info for name, info in config["modules"].items() if name.endswith("to_q")]
    one, other = next((a, b) for a in infos for b in infos if a is not b and a["in_features"] == b["in_features"])
    one["input"], other["input"] = other["input"], one["input"]


def layer_renamed(config):
    name = first(config["modules"])
    config["modules"]["down_blocks.0.nothing.to_q"] = config["modules"].pop(name)


def one_direction_fewer(config):
    exact = config["exact"][JOINT]
    exact[max(exact, key=exact.get)] -= 1


def last_timestep(number):
    """The range of all groups, and with it the last one's, ends at another timestep."""

    def lie(config):
        last = max(config["groups"][1:], key=lambda group: group["range"])
        config["groups"][0]["range"][1] = last["range"][1] = number

    return lie


def no_first_timesteps(config):
    first = min(config["groups"][1:], key=lambda group: group["range"])
    config["groups"][0]["range"][0] = first["range"][0] = first["timesteps"][0]


def file_named(name):
    def lie(config):
        config["files"][name] = "0" * 64

    return lie


CONFIGS = {
    **{f"no {name}": without(name) for name in (
        "base_model", "model_type", "sampler", "num_inference_steps", "guidance_scale", "resolution", "attention",
        "modules", "prompts", "seed", "groups", "tokens", "files",
    )},  # fmt: skip
    "no fingerprint": without("base_model", "fingerprint"),
    "no size of a layer": without("modules", ..., "in_features"),
    "no count of prompts": without("prompts", "count"),
    "no range of a group": without("groups", 0, "range"),
    "no text input": without("tokens", TEXT_INPUT),
    "no group of a layer": without("tokens", JOINT, ...),
    "no file of a group": without("files", "joint.safetensors"),
    "an unknown field": put(["exec"], "import os"),
    "an unknown field of a layer": put(["modules", ..., "code"], "x"),
    "format 0": put(["format_version"], 0),
    "format true": put(["format_version"], True),
    "format 1.5": put(["format_version"], 1.5),
    "a family that is none": put(["model_type"], "os"),
    "a sampler that is none": put(["sampler"], "__import__"),
    "an attention that is none": put(["attention"], "none"),
    "no steps": put(["num_inference_steps"], []),
    "steps without end": put(["num_inference_steps"], [10**9]),
    "guidance that is no number": put(["guidance_scale"], math.nan),
    "guidance without end": put(["guidance_scale"], math.inf),
    "guidance in words": put(["guidance_scale"], "7.5"),
    "steps that no sampler has": put(["num_inference_steps"], [10**4]),
    "a resolution of terapixels": put(["resolution"], 10**6),
    "a resolution of gigapixels": put(["resolution"], 2**15),
    "a resolution that no VAE has": put(["resolution"], 37),
    "a seed that is no number": put(["seed"], [1]),
    "a seed that no generator takes": put(["seed"], 2**64),
    "a negative clip skip": put(["clip_skip"], -1),
    "a hash that is none": put(["prompts", "sha256"], "f"),
    "an endless prompt": put(["prompts", "examples"], ["x" * 10**6]),
    "prompts that are no text": put(["prompts", "examples"], [{"x": 1}]),
    "prompts that are half a character": put(["prompts", "examples"], ["a \ud800 star"]),
    "a thousand prompts": put(["prompts", "examples"], ["a star"] * 1000),
    "a model's id that no path can be": put(["base_model", "id"], "a" * 4000),
    "a model's id that is no text": put(["base_model", "id"], ["a"]),
    "a fingerprint that is none": put(["base_model", "fingerprint"], {"unet": 1}),
    "a layer of 2^40 inputs": put(["modules", ..., "in_features"], 2**40),
    "a layer of 0 inputs": put(["modules", ..., "in_features"], 0),
    "a layer named as a path": put(["modules", ..., "input"], "../../etc/passwd"),
    "a layer that is a list": put(["modules", ...], [1, 2]),
    "no layer": put(["modules"], {}),
    "a negative count of tokens": put(["tokens", JOINT, ...], -5),
    "tokens that do not add up": put(["tokens", JOINT, ...], 5),
    "a group named as a path": put(["groups", 1, "name"], "../joint"),
    "the joint group twice": put(["groups", 1, "name"], JOINT),
    "timesteps that are not whole": put(["groups", 0, "timesteps"], [1.5]),
    "timesteps of no group": put(["groups", 0, "timesteps"], [1, 2, 3]),
    "timesteps outside of the range": put(["groups", 1, "range"], [990, 999]),
    "ranges that overlap": put(["groups", 1, "range"], [0, 999]),
    "ranges that begin late": no_first_timesteps,
    "ranges that end early": last_timestep(998),
    "ranges of a million timesteps": last_timestep(10**6),
    "a distance below 0": put(["distances"], {JOINT: {"layer": -1.0}}),
    "a distance that is no number": put(["distances"], {JOINT: {"layer": math.nan}}),
    "a distance without end": put(["distances"], {JOINT: {"layer": math.inf}}),
    "no exact directions": put(["exact", JOINT, ...], 0),
    "more exact directions than there are": put(["exact", JOINT, ...], 17),
    "fewer exact directions than the file has": one_direction_fewer,
    "exact directions of no input": put(["exact", JOINT, "layer"], 1),
    "no exact": without("exact"),
    "format 2 for format 3": put(["format_version"], 2),
    "format 1 for format 3": put(["format_version"], 1),
    "a file elsewhere": file_named("../README.md"),
    "a file by its whole path": file_named("/etc/passwd"),
    "a file in a folder": file_named("a/b"),
    "a file of Windows": file_named("c:\\autoexec.bat"),
    "a file that is all files": file_named("*"),
    "a hidden file": file_named(".netrc"),
    "two layers of all": two_layers_of_all,
    "no text and its layers": without_the_text,
    "the UNet's layers for the text encoder's": text_encoder_of_the_unet,
    "an input that no layer has": input_that_no_layer_has,
    "two inputs swapped": inputs_swapped,
    "a layer that the model lacks": layer_renamed,
}  # fmt: skip


# ---- Lies in the tensors: each is a function of the joint group's ----------------------------------------------------


def tensor(suffix, change):
    def lie(tensors):
        name = max((key for key in tensors if key.endswith(suffix)), key=lambda key: tensors[key].numel())
        tensors[name] = change(tensors[name]).contiguous()

    return lie


def scaled_column(vectors):
    vectors = vectors.clone()
    vectors[:, 0] *= 1.002
    return vectors


def one_entry(value, place=0):
    def change(values):
        values = values.clone()
        values.view(-1)[place] = value
        return values

    return change


def extra(tensors):
    tensors["more"] = torch.zeros(3)


TENSORS = {
    "vectors of zeros": tensor("vectors", torch.zeros_like),
    "vectors of NaN": tensor("vectors", lambda vectors: vectors * math.nan),
    "a NaN in the vectors": tensor("vectors", one_entry(math.nan)),
    "random vectors": tensor("vectors", lambda vectors: torch.randn_like(vectors) / len(vectors) ** 0.5),
    "a vector too long by 2e-3": tensor("vectors", scaled_column),
    "one vector for all": tensor("vectors", lambda vectors: vectors[:, :1].expand_as(vectors)),
    "vectors too short": tensor("vectors", lambda vectors: vectors[:-1]),
    "vectors in float64": tensor("vectors", torch.Tensor.double),
    "vectors in bfloat16": tensor("vectors", torch.Tensor.bfloat16),
    "vectors in a row": tensor("vectors", torch.Tensor.flatten),
    "values of zeros": tensor("values", torch.zeros_like),
    "values of NaN": tensor("values", lambda values: values * math.nan),
    "an infinite value": tensor("values", one_entry(math.inf)),
    "values below 0": tensor("values", lambda values: -values.flip(0)),
    "values that ascend": tensor("values", lambda values: values.flip(0)),
    "values doubled": tensor("values", lambda values: values * 2),
    "values too few": tensor("values", lambda values: values[:-1]),
    "values of whole numbers": tensor("values", torch.Tensor.int),
    "no values": lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("values"))),
    "one tensor more": extra,
    "a NaN in the rest": tensor("rest", one_entry(math.nan)),
    "an infinity in the rest": tensor("rest", one_entry(math.inf)),
    "a rest in float32": tensor("rest", torch.Tensor.float),
    "a rest too short": tensor("rest", lambda rest: rest[:-1]),
    "distances below 0": tensor("distances", one_entry(-1e-4)),
    "distances of NaN": tensor("distances", one_entry(math.nan)),
    "distances of anything": tensor("distances", one_entry(0.5)),
    "one distance that is not known": tensor("distances", one_entry(math.inf)),
}


# ---- Lies in the files: each is a function of the folder, once it is signed ------------------------------------------


def grown(folder):
    with open(folder / "joint.safetensors", "ab") as file:
        file.truncate(2**31)  # a hole, which takes no disk


def endless_config(folder):
    with open(folder / CONFIG_NAME, "ab") as file:
        file.truncate(2**31)


def linked(name):
    def lie(folder):
        (folder / name).rename(folder.with_name("elsewhere"))
        (folder / name).symlink_to(folder.with_name("elsewhere"))

    return lie


def pickled(folder):
    torch.save({"joint": torch.zeros(3)}, folder / "joint.safetensors")
    sign(folder, json.loads((folder / CONFIG_NAME).read_text()))


def header_of_terabytes(folder):
    path = folder / "joint.safetensors"
    path.write_bytes((2**42).to_bytes(8, "little") + path.read_bytes()[8:])
    sign(folder, json.loads((folder / CONFIG_NAME).read_text()))


def folder_for_a_file(folder):
    (folder / "joint.safetensors").unlink()
    (folder / "joint.safetensors").mkdir()


FILES = {
    "a file of 2 GB": grown,
    "a configuration of 2 GB": endless_config,
    "a link for a group's file": linked("joint.safetensors"),
    "a link for the configuration": linked(CONFIG_NAME),
    "a link for the card": linked("README.md"),
    "a pickle": pickled,
    "a header of terabytes": header_of_terabytes,
    "a folder for a file": folder_for_a_file,
    "a group's file for another's": lambda folder: (folder / "joint.safetensors").write_bytes(
        (folder / f"{TEXT_INPUT}.safetensors").read_bytes()
    ),
    "no file of a group": lambda folder: (folder / "joint.safetensors").unlink(),
    "a name that stands twice": lambda folder: (folder / CONFIG_NAME).write_text(
        (folder / CONFIG_NAME).read_text().replace("{", '{"seed": 7, ', 1)
    ),
    "brackets without end": lambda folder: (folder / CONFIG_NAME).write_text("[" * 10**6),
    "a number without end": lambda folder: (folder / CONFIG_NAME).write_text('{"format_version": ' + "9" * 10**5 + "}"),
    "other bytes than text": lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe{}"),
    "an unsigned change": lambda folder: (folder / CONFIG_NAME).write_text(
        (folder / CONFIG_NAME).read_text().replace('"cross"', '"all"')
    ),
}


# ---- Making and meeting them -----------------------------------------------------------------------------------------


def sign(folder, config):
    """Write a configuration with the hashes of the files that there are, as an honest bundle has them."""
    for name in config.get("files", {}):
        if re.fullmatch(r"[\w.-]+", name) and (folder / name).is_file():
            config["files"][name] = sha256(folder / name)
    config["sha256"] = config_sha256(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def make_hostile(kind, name, honest, folder):
    folder.mkdir()
    for path in honest.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / CONFIG_NAME).read_text())
    if kind == "config":
        CONFIGS[name](config)
        for group in config.get("tokens", {}) if name == "two layers of all" else ():
            path = folder / f"{group}.safetensors"
            read = config["tokens"][group]
            save_file({key: value for key, value in load_file(path).items() if key.rpartition(".")[0] in read}, path)
        sign(folder, config)
    elif kind == "tensors":
        tensors = load_file(folder / "joint.safetensors")
        TENSORS[name](tensors)
        save_file(tensors, folder / "joint.safetensors")
        sign(folder, config)
    else:
        FILES[name](folder)
    return folder


def meet(folder, pipeline):
    """What the trainer does with a bundle before its work, and the builder before it pushes one."""
    bundle = Bundle.load(folder, text_encoder=True, every_group=True)
    check_files(folder)
    bundle.check(pipeline.unet, pipeline.text_encoder, tokenizer=pipeline.tokenizer, noise_scheduler=pipeline.scheduler)
    args = Namespace(
        lora_layers=None, train_text_encoder=True, clip_skip=0, allow_unprotected=False, rank=2,
        nullspace_threshold=0.9, nullspace_criterion="energy", model_type="sd",
    )  # fmt: skip
    return lora_targets(pipeline.unet, {TEXT_ENCODER: pipeline.text_encoder}, bundle, bundle.protected(), args)


def refusal(folder, pipeline):
    """The check that refuses a bundle, its sentence, and the seconds until then."""
    start = time.perf_counter()
    with pytest.raises(NullSpaceError) as caught:
        meet(folder, pipeline)
    seconds = time.perf_counter() - start
    frames = [frame for frame in traceback.extract_tb(caught.tb) if "/nullspace/" in frame.filename]
    return frames[-1].name, str(caught.value), seconds


LIES = {"config": CONFIGS, "tensors": TENSORS, "files": FILES}
HOSTILE = [(kind, name) for kind, lies in LIES.items() for name in lies]


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    return StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)


def test_the_honest_one_is_welcome(bundle1, pipeline):  # noqa: F811
    assert len(meet(bundle1, pipeline)) == len(Bundle.load(bundle1).modules)


def test_what_was_checked_is_what_is_used(bundle1, tmp_path):  # noqa: F811
    """Whoever writes over the files of a bundle that was read changes nothing of it."""
    folder = make_hostile("config", "a seed that is no number", bundle1, tmp_path / "bundle")
    (folder / CONFIG_NAME).write_bytes((bundle1 / CONFIG_NAME).read_bytes())
    bundle = Bundle.load(folder)
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    for source, spectrum in Bundle.load(bundle1).group(JOINT).items():
        for (_, expected), (_, found) in zip(spectrum.parts(), bundle.group(JOINT)[source].parts(), strict=True):
            assert torch.equal(expected, found)


def test_the_table_of_hostile_bundles(bundle1, pipeline, tmp_path):  # noqa: F811
    assert len(HOSTILE) >= 40
    wrong = []
    print()
    for number, (kind, name) in enumerate(HOSTILE):
        try:
            check, sentence, seconds = refusal(make_hostile(kind, name, bundle1, tmp_path / str(number)), pipeline)
        except BaseException as error:  # pytest's own among them: which were let in is told together
            wrong.append(f"{kind}: {name}: {error!r:.300}")
            continue
        print(f"{kind:8} {name:42} {check:22} {seconds:6.3f} s  {sentence.replace(f'{tmp_path}/{number}/', '')}")
        if "\n" in sentence or not sentence.endswith(".") or seconds > 5:
            wrong.append(f"{kind}: {name}: {seconds:.1f} s, {sentence}")
    assert not wrong, "\n".join(wrong)
