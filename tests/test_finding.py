"""Training without a bundle: one of this very model is found, or built once and kept."""

import json
import logging
import re
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT
from filelock import FileLock
from hub_server import HubServer, User
from safetensors.torch import load_file
from test_hub import python, seed

import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace import bundle as bundle_room
from nullspace import finding
from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.hashes import config_sha256
from nullspace.layers import attention_inputs
from nullspace.models import download_model
from nullspace.names import CARD_NAME, CONFIG_NAME, REPORT_NAME, TEXT_ENCODER
from nullspace.prompts import GENERAL_PROMPTS, prompts_of_model
from test_train import command_line, drawing_in_two_steps, make_bundle, same, train  # noqa: F401
from world import DEMO, FOLDER


UNNAMED = ("--nullspace_name_or_path",)
PROMPTS = 9  # three batches


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(finding, "PROMPTS", PROMPTS)
    monkeypatch.setattr(finding, "STEPS", [2])
    PartialState()  # which accelerate's loggers ask for


class Run:
    """What the trainer has at hand when it looks for a bundle."""

    def __init__(self, model, cache, *flags):
        line = command_line(model, "", "lora", "--nullspace_cache_dir", cache, *flags, without=UNNAMED)
        self.args = trainer.parse_args(line)
        self.args.base_model = download_model(model)
        family = get_family("sd")
        self.components = family.load_models(self.args.base_model)
        self.components |= family.load_tokenizers(self.args.base_model)
        self.components["noise_scheduler"] = family.load_noise_scheduler(model)
        self.wanted = finding.Wanted(family, self.components, self.args)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), is_local_main_process=True, mixed_precision="no")

    def find(self):
        """The folder or repository, and whether it was built."""
        built = finding.find_or_build(self.wanted, self.accelerator, self.args)
        return self.args.nullspace_name_or_path, built


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the tests that only read share."""
    return tmp_path_factory.mktemp("shared") / "cache"


@pytest.fixture
def built(tiny_sd1, cache):
    """A folder of that cache with the bundle of the tiny model."""
    return Run(tiny_sd1, cache).find()[0]


@pytest.fixture
def no_drawing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was drawn")

    return lambda: monkeypatch.setattr(finding, "collect", refuse)


def copy_to(cache, folder):
    """A cache of its own for a test, with that bundle in it; the bundle's folder there."""
    target = cache / folder.rpartition("/")[2]
    shutil.copytree(folder, target)
    return target


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- Found or built --------------------------------------------------------------------------------------------------


def test_built_once_and_taken_from_the_cache(tiny_sd1, tmp_path, no_drawing, caplog):
    caplog.set_level(logging.INFO)
    run = Run(tiny_sd1, tmp_path / "cache")
    folder, is_new = run.find()
    assert is_new and folder.startswith(f"{tmp_path}/cache/tiny-sd1-")
    assert "No bundle of this model" in caplog.text
    config = json.loads(open(f"{folder}/{CONFIG_NAME}").read())
    assert config["prompts"]["count"] == PROMPTS and config["prompts"]["source"] == GENERAL_PROMPTS.name
    assert config["attention"] == "cross" and config["num_inference_steps"] == [2]
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    name = folder.rpartition("/")[2]
    assert left - {f"{name}.lock"} == {name}  # some versions of filelock leave it
    Bundle.load(folder).check(**{name: part for name, part in run.components.items() if name != "vae"})
    no_drawing()
    assert Run(tiny_sd1, tmp_path / "cache").find() == (folder, False)
    assert "is in the cache" in caplog.text


def test_a_training_without_a_bundle_is_the_same_from_the_cache(tiny_sd1, tmp_path, no_drawing):
    cache = tmp_path / "home" / "cache"
    flags = ("--nullspace_cache_dir", cache, "--lora_layers", "attn2.to_q,attn2.to_v")
    first = train(tiny_sd1, "", tmp_path / "first", *flags, "--checkpointing_steps", 2, without=UNNAMED)
    no_drawing()
    assert same(first, train(tiny_sd1, "", tmp_path / "second", *flags, without=UNNAMED))
    resumed = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", 2)
    assert same(first, train(tiny_sd1, "", tmp_path / "first", *flags, *resumed, without=UNNAMED))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    named = train(tiny_sd1, folder, tmp_path / "named", *flags[2:])
    assert same(first, named)
    assert {CARD_NAME, "spectra.png"} <= {path.name for path in folder.iterdir()}  # as it is, it can be published
    report = json.loads((tmp_path / "first" / REPORT_NAME).read_text())
    assert report["nullspace"]["bundle"] == folder.name and report["leakage"]["max"] < 1e-5
    assert folder.name in (tmp_path / "first" / CARD_NAME).read_text()
    assert str(cache) not in (tmp_path / "first" / CARD_NAME).read_text()  # where it lies is not published


@pytest.mark.parametrize(
    ("flags", "attention", "with_text_encoder"),
    [
        (("--lora_layers", "attn1.to_q"), "self", False),
        (("--lora_layers", "to_q,to_k"), "all", False),
        (("--train_text_encoder",), "cross", True),
        (("--clip_skip", "1"), "cross", False),
    ],
)
def test_other_layers_take_another_bundle(flags, attention, with_text_encoder, tiny_sd1, built, cache):
    run = Run(tiny_sd1, cache, *flags)
    folder, is_new = run.find()
    assert is_new and folder != built
    bundle = Bundle.load(folder, text_encoder=True)
    assert set(bundle.config["modules"]) == set(attention_inputs(run.components["unet"], attention))
    assert (TEXT_ENCODER in bundle.spectra) == with_text_encoder
    assert bundle.clip_skip == run.args.clip_skip


def test_a_threshold_beyond_what_is_stored_takes_another_bundle(tiny_sd1, built, cache):
    assert Run(tiny_sd1, cache, "--nullspace_threshold", "0.5").find() == (built, False)
    flags = ("--nullspace_criterion", "percentile", "--nullspace_threshold", "20")
    folder, is_new = Run(tiny_sd1, cache, *flags).find()
    assert is_new and folder != built
    assert Bundle.load(folder).ranks("percentile", 20)
    with pytest.raises(NullSpaceError, match="in 16 bits; choose a higher threshold, or build a bundle with "):
        Bundle.load(built).ranks("percentile", 20)


def test_another_version_of_the_model_is_not_taken(tiny_sd1, built, cache):
    run = Run(tiny_sd1, cache)
    run.components[TEXT_ENCODER].get_parameter("text_model.final_layer_norm.weight" if hasattr(
        run.components[TEXT_ENCODER], "text_model") else "final_layer_norm.weight").data[0] += 0.5  # fmt: skip
    folder, is_new = run.find()
    assert is_new and folder != built


def test_the_models_own_prompts_replace_the_general_ones(tiny_sd1, built, cache, tmp_path):
    run = Run(tiny_sd1, cache)
    run.args.base_model = download_model(shutil.copytree(tiny_sd1, tmp_path / "model"))
    own = tmp_path / "model" / "prompts.txt"
    own.write_text("a red star\na blue ring\n")
    folder, is_new = run.find()
    assert is_new and folder != built
    config = json.loads(open(f"{folder}/{CONFIG_NAME}").read())
    assert config["prompts"]["examples"] == ["a red star", "a blue ring"] and config["prompts"]["count"] == 3
    own.write_text("\n")
    with pytest.raises(NullSpaceError, match="prompts.txt holds no prompt"):
        run.find()


# ---- What can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["altered", "missing", "config", "of another model"])
def test_a_damaged_bundle_is_built_anew_with_a_line(damage, tiny_sd1, tiny_sd2, built, tmp_path, caplog):
    folder = copy_to(tmp_path, built)
    if damage == "altered":
        flip(folder / "joint.safetensors")
    elif damage == "missing":
        (folder / "joint.safetensors").unlink()
    elif damage == "config":
        (folder / CONFIG_NAME).write_text("{")
    else:
        other = Run(tiny_sd2, tmp_path / "other").find()[0]
        shutil.rmtree(folder)
        shutil.move(other, folder)
    assert Run(tiny_sd1, tmp_path).find() == (str(folder), True)
    assert len(re.findall(r"in the cache is not used .*it is built anew", caplog.text)) == 1
    assert (folder / "joint.safetensors").read_bytes() == open(f"{built}/joint.safetensors", "rb").read()
    caplog.clear()
    assert Run(tiny_sd1, tmp_path).find() == (str(folder), False) and "not used" not in caplog.text


def test_a_cache_that_cannot_be_written(tiny_sd1, tmp_path, no_drawing):
    no_drawing()
    (tmp_path / "file").write_text("")
    with pytest.raises(NullSpaceError, match=r"bundles .*file/cache cannot be written .*--nullspace_cache_dir"):
        Run(tiny_sd1, tmp_path / "file" / "cache").find()


def test_a_disk_that_is_full_while_drawing(tiny_sd1, tmp_path):
    """The system refuses files above a size, whoever writes them."""
    run = Run(tiny_sd1, tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(NullSpaceError, match="cannot be written .*make room"):
            run.find()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.find()[1]


def test_a_disk_that_is_full_half_way_leaves_nothing_half_written(tiny_sd1, built, tmp_path, monkeypatch):
    """And what was drawn is not drawn again."""
    run, saved = Run(tiny_sd1, tmp_path / "cache"), []
    monkeypatch.setattr(finding, "BATCH_SIZE", 1)

    def save_file(tensors, path, **kwargs):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **kwargs)

    real = bundle_room.save_file
    with monkeypatch.context() as patch:
        patch.setattr(bundle_room, "save_file", save_file)
        with pytest.raises(NullSpaceError, match="No space left on device"):
            run.find()
    kept = {path.name.rpartition(".")[2] for path in (tmp_path / "cache").iterdir()}
    assert kept - {"lock"} == {"checkpoint"}  # some versions of filelock leave it
    drawn = count_drawn(run, monkeypatch)
    assert run.find()[1] and not drawn  # the last batch is kept, too


def count_drawn(run, monkeypatch, stop_after=None):
    """A list to which the prompts that a run draws are added; it is stopped by `Killed` after so many."""
    drawn, real = [], type(run.wanted.family).sample

    def sample(self, pipeline, prompts, *args, **kwargs):
        if len(drawn) == stop_after:
            raise Killed
        drawn.extend(prompts)
        real(self, pipeline, prompts, *args, **kwargs)

    monkeypatch.setattr(type(run.wanted.family), "sample", sample)
    return drawn


class Killed(Exception):
    pass


def test_a_build_that_was_stopped_goes_on(tiny_sd1, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(finding, "BATCH_SIZE", 1)
    whole = Run(tiny_sd1, tmp_path / "whole").find()[0]
    run = Run(tiny_sd1, tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_drawn(run, patch, stop_after=7)
        run.find()
    with monkeypatch.context() as patch:
        drawn = count_drawn(run, patch)
        folder = run.find()[0]
        assert len(drawn) == PROMPTS - 5
    for name in ("joint.safetensors", "encoder_hidden_states.safetensors"):
        assert same(load_file(f"{folder}/{name}"), load_file(f"{whole}/{name}"))
    # Of a build with another size of batch nothing can be gone on from
    shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_drawn(run, patch, stop_after=7)
        run.find()
    monkeypatch.setattr(finding, "BATCH_SIZE", 2)
    drawn = count_drawn(run, monkeypatch)
    assert run.find() == (folder, True) and len(drawn) == PROMPTS
    assert "begins anew" in caplog.text


def test_a_build_that_was_stopped_in_another_precision_begins_anew(tiny_sd1, tmp_path, monkeypatch, caplog):
    """And is bound to the model as it is stored, not as it was cast."""
    monkeypatch.setattr(finding, "BATCH_SIZE", 1)
    run, again = Run(tiny_sd1, tmp_path / "cache"), Run(tiny_sd1, tmp_path / "cache")
    fingerprint = finding.fingerprint_of(run.components)
    again.accelerator.mixed_precision = "bf16"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_drawn(run, patch, stop_after=7)
        run.find()
    folder, is_new = again.find()
    config = json.loads(open(f"{folder}/{CONFIG_NAME}").read())
    assert is_new and re.search(r"another build \(mixed_precision\).*", caplog.text) and "begins anew" in caplog.text
    assert config["mixed_precision"] == "bf16" and config["base_model"]["fingerprint"] == fingerprint
    assert Run(tiny_sd1, tmp_path / "cache").find() == (folder, False)


def test_of_two_runs_at_once_one_builds(tiny_sd1, built, tmp_path, no_drawing, caplog):
    caplog.set_level(logging.INFO)
    run, found = Run(tiny_sd1, tmp_path), []
    folder = tmp_path / built.rpartition("/")[2]
    no_drawing()
    with FileLock(f"{folder}.lock"):  # the other run
        thread = threading.Thread(target=lambda: found.append(run.find()))
        thread.start()
        deadline = time.monotonic() + 20
        while "Waiting for another run" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert thread.is_alive()
        copy_to(tmp_path, built)
    thread.join(20)
    assert found == [(str(folder), False)]


def test_a_bundle_that_a_killed_run_was_about_to_replace_is_put_back(tiny_sd1, built, tmp_path, no_drawing):
    folder = copy_to(tmp_path, built)
    folder.rename(f"{folder}.old-{2**30}")  # of a process that there is none of
    (tmp_path / f"{folder.name}.partial-{2**30}").mkdir()
    no_drawing()
    assert Run(tiny_sd1, tmp_path).find() == (str(folder), False)
    assert {path.name for path in tmp_path.iterdir()} - {f"{folder.name}.lock"} == {folder.name}


def test_a_model_that_lacks_its_text_encoder_is_refused_before_anything_is_built(tiny_sd1, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1, model)
    shutil.rmtree(model / "text_encoder")
    with pytest.raises(NullSpaceError, match="cannot be loaded"):
        train(model, "", tmp_path / "lora", "--nullspace_cache_dir", tmp_path / "cache", without=UNNAMED)
    assert not (tmp_path / "cache").exists()


def test_layers_that_are_none_are_refused_before_anything_is_built(tiny_sd1, tmp_path, no_drawing):
    no_drawing()
    flags = ("--nullspace_cache_dir", tmp_path / "cache", "--lora_layers")
    for layers, sentence in (("attn9", "no layer of the UNet ends with"), ("conv_in", "train unprotected")):
        with pytest.raises(NullSpaceError, match=sentence):
            train(tiny_sd1, "", tmp_path / "lora", *flags, layers, without=UNNAMED)


@pytest.mark.parametrize(
    ("flags", "named", "sentence"),
    [
        (("--nullspace_revision", "v1"), False, "--nullspace_revision is of --nullspace_name_or_path"),
        (("--nullspace_namespace", "ada"), True, "--nullspace_namespace is read only without"),
        (("--nullspace_cache_dir", "c"), True, "--nullspace_cache_dir is read only without"),
        (("--nullspace_timestep_range", "0", "500"), False, "--nullspace_timestep_range needs a bundle"),
    ],
)
def test_flags_that_contradict_each_other(flags, named, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.parse_args(command_line("m", "b", "o", *flags, without=() if named else UNNAMED))
    assert caught.value.code == 1 and sentence in capsys.readouterr().err


SHARE = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from accelerate import PartialState
from nullspace.errors import NullSpaceError
from nullspace.launch import on_main_process

state, folder = PartialState(cpu=True), Path(sys.argv[1])

def work():
    (folder / f"worked-{state.process_index}").touch()
    return {"of": state.process_index}

def fail():
    raise NullSpaceError("It cannot be had.")

found = str(on_main_process(work))
try:
    on_main_process(fail)
except NullSpaceError as error:
    found += f" {error}"
(folder / f"found-{state.process_index}").write_text(found)
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_one_of_several_processes_works_and_all_learn_what_came_of_it(run_script, tmp_path):
    (tmp_path / "share.py").write_text(SHARE)
    run_script(tmp_path / "share.py", tmp_path, ROOT, processes=2)
    assert {path.name for path in tmp_path.glob("worked-*")} == {"worked-0"}
    assert [(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)] == ["{'of': 0} It cannot be had."] * 2


# ---- The Hub ---------------------------------------------------------------------------------------------------------

ASK = """
import contextlib, io
from accelerate import PartialState
sys.path[:0] = ["tests"]
import nullspace_utils
from nullspace import finding
from test_finding import Run

PartialState()
out = {"said": []}
model, cache = Path(args[0]), args[1]
finding.logger.warning = out["said"].append
run = Run(model, cache, "--nullspace_namespace", "ada")
out["found"] = [*run.find(), run.args.nullspace_revision]
beyond = Run(model, cache, "--nullspace_namespace", "ada", "--nullspace_threshold", "0.99")
out["beyond"] = beyond.find()[1]
out["nobody's"] = finding.on_the_hub("eve", lambda config: True, None, out["said"].append)
words = ["find", "--pretrained_model_name_or_path", str(model), "--nullspace_namespace", "ada"]
with contextlib.redirect_stdout(io.StringIO()) as listed:
    nullspace_utils.main(nullspace_utils.parse_args([*words, "--nullspace_cache_dir", cache]))
out["listed"] = [line for line in listed.getvalue().splitlines() if line.startswith("ada/")]
"""


def test_a_namespace_on_the_hub_is_asked(tiny_sd1, tiny_sd2, tmp_path):
    """Of its tagged datasets those of this very model serve, that with most prompts first; others are passed over."""

    def files(bundle, **changed):
        content = {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix != ".png"}
        config = json.loads(content[CONFIG_NAME])
        if changed:
            config |= changed
            config["sha256"] = config_sha256(config)
            content[CONFIG_NAME] = json.dumps(config).encode()
        return content

    mine, other = make_bundle(tiny_sd1, tmp_path / "mine"), make_bundle(tiny_sd2, tmp_path / "other")
    prompts = json.loads((mine / CONFIG_NAME).read_text())["prompts"]
    with HubServer(tmp_path / "hub", {"hf_ada": User("ada")}) as hub:
        seed(hub, "dataset", "ada/other", files(other))
        seed(hub, "dataset", "ada/fewer", files(mine))
        commit = seed(hub, "dataset", "ada/more", files(mine, prompts=prompts | {"count": 300}))
        damaged = files(mine, prompts=prompts | {"count": 900})
        damaged["joint.safetensors"] = damaged["joint.safetensors"][:-1] + b"!"
        seed(hub, "dataset", "ada/damaged", damaged)
        seed(hub, "dataset", "ada/odd", files(mine, prompts=None))
        seed(hub, "dataset", "ada/untagged", files(mine, prompts=prompts | {"count": 999}) | {CARD_NAME: b"# Mine"})
        out = python(ASK, hub.environment(tmp_path), tiny_sd1, tmp_path / "caches")
    assert out["found"] == ["ada/more", False, commit]
    assert out["beyond"] and any("ada/more was passed over (--nullspace_criterion" in said for said in out["said"])
    assert out["nobody's"] == [] and out["listed"] == ["ada/damaged", "ada/more", "ada/fewer"]
    said = " ".join(out["said"])
    assert re.search(r"ada/damaged was passed over .*truncated or altered", said) and "ada/odd was passed over" in said
    assert "ada/untagged" not in said


@pytest.mark.parametrize(
    ("flags", "changed", "serves"),
    [
        ((), {}, True),
        ((), {"attention": "all"}, False),  # whose default would be to train more
        ((), {"clip_skip": 1}, False),
        ((), {"model_type": "lcm"}, False),
        ((), {"base_model": {"fingerprint": {"unet": "1"}}}, False),
        (("--lora_layers", "attn1.to_q"), {}, False),
        (("--train_text_encoder",), {}, False),
        (("--train_text_encoder",), {TEXT_ENCODER: {}}, True),
    ],
)
def test_what_somebodys_bundle_must_be_to_serve(flags, changed, serves, tiny_sd1, built, cache):
    run = Run(tiny_sd1, cache, *flags)
    config = json.loads(open(f"{built}/{CONFIG_NAME}").read())
    assert run.wanted.matches(config | changed, finding.fingerprint_of(run.components)) == serves


def test_a_fault_of_this_code_is_not_laid_on_a_bundle(built, monkeypatch):
    hub = SimpleNamespace(list_datasets=lambda **asked: [SimpleNamespace(id="ada/bundle")])
    monkeypatch.setattr(finding, "is_offline_mode", lambda: False)
    monkeypatch.setattr(finding, "HfApi", lambda token: hub)
    monkeypatch.setattr(finding, "fetch_files", lambda *asked, **options: Path(built))
    assert [name for name, *_ in finding.on_the_hub("ada", lambda config: True, None, pytest.fail)] == ["ada/bundle"]
    with pytest.raises(KeyError, match="misspelt"):
        finding.on_the_hub("ada", lambda config: config["misspelt"], None, pytest.fail)


def test_the_hub_is_not_asked_offline(tiny_sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "is_offline_mode", lambda: True)
    monkeypatch.setattr(finding, "HfApi", None)
    assert Run(tiny_sd1, tmp_path, "--nullspace_namespace", "ada").find()[1]


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def test_general_prompts_cover_much(tmp_path):
    lines = GENERAL_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 300 and len(set(lines)) == len(lines) and all(line == line.strip() != "" for line in lines)
    words = {word for line in lines for word in re.findall(r"[a-z]+", line.lower())}
    assert len(words) > 800 and max(len(line.split()) for line in lines) < 30
    prompts, source = prompts_of_model(tmp_path, 100)
    chosen = list(prompts)
    assert source == GENERAL_PROMPTS and chosen[0] == "" and len(set(chosen)) == len(chosen) == 100
    places = [lines.index(prompt) for prompt in chosen[1:]]
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= 4 and places[0] == 0 and places[-1] >= 330


@pytest.mark.parametrize("content", ['{"prompt": "a star"}\n', b"caf\xe9\n"])
def test_prompts_of_a_model_that_cannot_be_read_are_named(content, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NullSpaceError, match=r"prompts\.txt cannot be read"):
        prompts_of_model(tmp_path, 100)


# ---- nullspace_utils.py ----------------------------------------------------------------------------------------------


def utils(*words):
    nullspace_utils.main(nullspace_utils.parse_args([str(word) for word in words]))


def test_find_lists_the_bundles_of_a_model(tiny_sd1, tiny_sd2, built, tmp_path, capsys):
    folder = copy_to(tmp_path, built)
    words = ("--nullspace_cache_dir", tmp_path, "--pretrained_model_name_or_path")
    utils("find", *words, tiny_sd1)
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}\n  cross attention; {PROMPTS} prompts of general.txt; ddim, 2 steps")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["prompts"]["source"] = "\x1b[2Jgeneral.txt"
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"sha256": config_sha256(config)}))
    utils("find", *words, tiny_sd1)
    said = capsys.readouterr().out
    assert "general.txt" in said and "\x1b" not in said
    utils("find", *words, tiny_sd2)
    assert capsys.readouterr().out.startswith("There is no bundle of this very model")


def test_cache_lists_and_removes(built, tmp_path, capsys):
    folder, words = copy_to(tmp_path, built), ("cache", "--nullspace_cache_dir", tmp_path)
    damaged = tmp_path / f"other-{'0' * 16}"
    shutil.copytree(built, damaged)
    flip(damaged / "joint.safetensors")
    unfinished = tmp_path / f"third-{'1' * 16}.checkpoint"
    unfinished.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    utils(*words)
    said = capsys.readouterr().out
    assert re.search(rf"{folder.name} +\d+\.\d MB  .*tiny-sd1, {PROMPTS} prompts\n", said)
    assert re.search(r"other-0+ .* damaged\n", said) and re.search(r"third-1+ .* unfinished\n", said)
    assert "notes" not in said and "3 bundles, " in said
    with pytest.raises(NullSpaceError, match="has no notes.txt"):
        utils(*words, "--remove", "notes.txt")
    with FileLock(f"{folder}.lock"), pytest.raises(NullSpaceError, match="is being built"):
        utils(*words, "--remove", folder.name)
    assert folder.exists()
    utils(*words, "--remove", folder.name)
    assert not folder.exists() and damaged.exists()
    utils(*words, "--remove", "all")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"notes.txt"}


def test_an_empty_cache(tmp_path, capsys):
    utils("cache", "--nullspace_cache_dir", tmp_path / "none")
    assert capsys.readouterr().out.startswith("0 bundles")


@pytest.mark.parametrize("model", ["shapes-sd", "shapes-lcm"])
def test_the_demos_models_bring_their_prompts(model):
    prompts, source = prompts_of_model(DEMO / model, 100)
    assert source == DEMO / model / "prompts.txt" and len(prompts) == 100
    assert source.read_bytes() == (FOLDER / "general.txt").read_bytes()
