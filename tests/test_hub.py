"""Bundles and LoRAs over the Hub, against a Hub on loopback.

Most is driven in this process. What only whole processes show (two that work together, the environment, the log) is
launched at once, a few at a time; each test waits for the one that it looks at.
"""

import contextlib
import io
import json
import logging
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from hub_server import LFS_SUFFIXES, Commit, Entry, HubServer, Repo, User, git_oid, lfs_pointer
from safetensors.torch import load_file, save

import build_nullspace
import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace.bundle import Bundle, check_files
from nullspace.collection import without_token
from nullspace.embeddings import words_beside
from nullspace.errors import NullSpaceError
from nullspace.families import recognise
from nullspace.families.stable_diffusion import StableDiffusion
from nullspace.hashes import config_sha256
from nullspace.hub import base_license, create_repository, hub_repository, patiently, push_folder
from nullspace.initial import read_initial
from nullspace.logs import PrintableFormatter
from nullspace.models import BaseModel, download_model
from nullspace.names import (
    COMPARISON_NAME,
    CONFIG_NAME,
    FLAGS_NAME,
    LORA_NAME,
    REPORT_NAME,
    TABLE_NAME,
    TEXT_INPUT,
    WORD_NAME,
)
from nullspace.publishing import name_repository
from nullspace.results import log_files, push
from world import FOLDER


ROOT = Path(__file__).resolve().parent.parent
WRITE, READ = "hf_adasSecretPenIsBlue", "hf_adasGlassesAreBlack"
TOKENS = {WRITE: User("ada"), READ: User("ada", can_write=False)}
MODEL, BUNDLE, LORA = "ada/tiny-model", "ada/tiny-bundle", "ada/sks-star"
PROMPT, OTHER_PROMPT = "a photo of a sks star", "the sks star"
STEPS = 12  # of the sampler, each a group of its own
JOINT_FILES = {CONFIG_NAME, "joint.safetensors", f"{TEXT_INPUT}.safetensors"}
NOT_OURS = {"notes.txt", ".env", "logs/old.txt", "logs/.hidden", "logs/linked.txt", "secrets.txt"}

# What the trainer says of bundles that it cannot use, each before it looks for the base model.
REFUSALS = {
    "missing": "no Hub dataset of that name that you may read",
    "private": "if it is private, log in with `hf auth login` or pass --hub_token",
    "wrong-token": "401 Invalid credentials in Authorization header.*log in again",
    "gated": "is gated; accept its conditions on the Hub and log in",
    "model": f"{MODEL} is a model on the Hub, not a dataset",
    "revision": "has no revision v2",
    "no-bundle": f"has no {CONFIG_NAME}: it is not a bundle",
    "newer": "has format 99, newer than the 3 known here",
    "damaged": "joint.safetensors is truncated or altered",
    "offline": "not in the local cache and cannot be downloaded now .*offline mode is enabled",
    "unreachable": "not in the local cache and cannot be downloaded now .*onnection refused",
    "no-name": "not in the local cache and cannot be downloaded now .*(resolution|not known|nodename)",
    "unwritable": "cannot be stored in the cache .*Not a directory.*set HF_HOME",
    "forbidden": "cannot be downloaded .403 Failed on demand.; log in again",
    "truncated": "cannot be downloaded .*should be of size.*run this command again later",
    "dropped": "cannot be downloaded .*check the network and run this command again",
    "busy": "cannot be downloaded .500 Failed on demand.; run this command again later",
    "limited": "cannot be downloaded .429 Failed on demand.; run this command again later",
}
TRANSIENT = ("truncated", "dropped", "busy", "limited")


def seed(hub, repo_type, repo_id, files, private=False):
    """Commit these files to a repository as if somebody had pushed them, and return the commit's id."""
    entries = {}
    for path, content in files.items():
        entries[path] = hub.store_regular(content)
        if path.endswith(LFS_SUFFIXES):
            oid = git_oid(lfs_pointer(entries[path].sha256, len(content)))
            entries[path] = Entry(entries[path].sha256, len(content), True, oid)
    commit = Commit(secrets.token_hex(20), "seeded", entries)
    hub.repos.setdefault((repo_type, repo_id), Repo(private, [])).commits.append(commit)
    return commit.id


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(files):
    """The files of a bundle with one bit of the joint group altered."""
    joint = bytearray(files["joint.safetensors"])
    joint[-1] ^= 1
    return files | {"joint.safetensors": bytes(joint)}


def run(command, env):
    """Run a command line with plain python, for what `accelerate launch` does not change."""
    done = subprocess.run(
        [str(word) for word in command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(code, env, *args):
    """Run code in a new process and return what it leaves in `out`."""
    prelude = "import json, sys; from pathlib import Path; args = sys.argv[1:]"
    done = run([sys.executable, "-W", "ignore", "-c", f"{prelude}\n{code}\nprint(json.dumps(out))", *args], env)
    return json.loads(done.stdout.splitlines()[-1])


def call(script, *words):
    """Run a script's command line in this process and return what it prints."""
    words = [str(word) for word in words]
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what accelerate shares within a process must not leak from one run to the next
    said = io.StringIO()
    with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *words]), contextlib.redirect_stdout(said):
        script.main(script.parse_args(words))
    return said.getvalue()


def refused(action, *arguments):
    """The one sentence with which a function of this project refuses."""
    with pytest.raises(NullSpaceError) as refusal:
        action(*arguments)
    said = str(refusal.value)
    assert ". " not in said.split("push it with: ")[0] and "\n" not in said, said
    return said


def fetched(requests, repo_id):
    """Bytes sent of each file of a repository: `dict[str, int]` by path."""
    files = {}
    for request in requests:
        if request.method == "GET" and f"{repo_id}/resolve/" in request.path and request.status in (200, 206):
            path = request.path.split("/resolve/")[1].split("/", 1)[1]
            files[path] = files.get(path, 0) + request.bytes_sent
    return files


def training(bundle, output_dir, *flags, model=MODEL):
    """A short training's command line, without the script."""
    words = ["--pretrained_model_name_or_path", model, "--nullspace_name_or_path", bundle, "--output_dir", output_dir]
    words += ["--instance_prompt", PROMPT, OTHER_PROMPT]
    words += ["--instance_data_dir", FOLDER / "star", "--resolution", 32, "--max_train_steps", 2]
    words += ["--num_validation_images", 1, "--train_batch_size", 2, "--learning_rate", 1e-2, "--seed", 0]
    return [str(word) for word in (*words, *flags)]


@pytest.fixture(scope="module", autouse=True)
def drawing_in_two_steps():
    """Rather than 25, which take most of the time of trainings this short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "num_inference_steps", 2)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(home, tiny_sd1):
    card = "---\nlicense: creativeml-openrail-m\n---\n# A model\n"
    with HubServer(home / "server", TOKENS) as server:
        seed(server, "model", MODEL, contents(tiny_sd1) | {"README.md": card.encode()})
        yield server


@pytest.fixture
def here(hub, tmp_path):
    """This process uses the Hub, with a cache of this test's."""
    with hub.used_here(tmp_path / "cache", WRITE):
        yield hub


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that would have been slept, by us and by the Hub's client."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture(scope="module")
def prompts(home):
    path = home / "prompts.txt"
    path.write_text("a red star\na blue heart on a white background\na ring\n")
    return path


@pytest.fixture(scope="module")
def built(hub, home, prompts):
    """What a build prints that pushes the bundle in `home / "tiny-bundle"`."""
    words = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", prompts, "--num_inference_steps", STEPS]
    words += ["--timestep_groups", "steps", "--output_dir", home / "tiny-bundle", "--push_to_hub"]
    with hub.used_here(home / "cache-build"):
        return call(build_nullspace, *words, "--hub_token", WRITE)


@pytest.fixture(scope="module")
def runs(built, hub, home, prompts, tiny_sd1, run_script):
    """Every launch of this module: name -> future of its finished process."""

    def env(name, token=None, **more):
        """A cache of this name, and one thread: launches share the processors."""
        return hub.environment(home / f"cache-{name}", token) | {"OMP_NUM_THREADS": "1"} | more

    def build_in_two():
        words = ["--pretrained_model_name_or_path", tiny_sd1, "--prompts_file", prompts, "--num_inference_steps", 2]
        words += ["--output_dir", home / "two", "--push_to_hub", "--hub_dataset_id", "ada/secret", "--batch_size", 2]
        return run_script("build_nullspace.py", *words, "--hub_private_repo", env=env("two", WRITE), processes=2)

    def train_in_two():
        futures["build in two"].result()  # also because two launches at once would take the same port
        words = ["train_dreambooth_nullspace.py", *training("ada/secret", home / "pair", model=tiny_sd1)]
        return run_script(*words, "--push_to_hub", "--report_to", "none", env=env("pair", WRITE), processes=2)

    def train():
        """Into a folder in which other people's files lie."""
        for name in NOT_OURS:
            path = home / "sks-star" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(prompts) if name in ("logs/linked.txt", "secrets.txt") else path.write_text("not ours")
        words = training(BUNDLE, home / "sks-star", "--checkpointing_steps", 1, "--push_to_hub", "--hub_token", WRITE)
        return run([sys.executable, "train_dreambooth_nullspace.py", *words], env("train"))

    def train_offline():
        futures["train"].result()
        words = training(BUNDLE, home / "offline", "--report_to", "none")
        return run([sys.executable, "train_dreambooth_nullspace.py", *words], env("train", HF_HUB_OFFLINE="1"))

    with ThreadPoolExecutor(2) as pool:
        futures = {}
        jobs = {"train": train, "build in two": build_in_two, "train in two": train_in_two, "offline": train_offline}
        for name, job in jobs.items():
            futures[name] = pool.submit(job)
        yield futures


@pytest.fixture
def copy(built, home, tmp_path):
    """A copy of the finished build."""
    return Path(shutil.copytree(home / "tiny-bundle", tmp_path / "tiny-bundle"))


def resign(folder, **changes):
    """Change the configuration of a bundle as its builder, or a liar, would."""
    config = json.loads((folder / CONFIG_NAME).read_text()) | changes
    config["sha256"] = config_sha256(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def push_bundle(folder, *flags):
    return call(build_nullspace, "--output_dir", folder, "--push_to_hub", *flags)


# ---- A bundle is published -------------------------------------------------------------------------------------------


def test_a_build_is_pushed_in_one_commit(built, hub, home):
    repo = hub.repos["dataset", BUNDLE]  # named after the folder
    assert [commit.message for commit in repo.commits] == [
        "initial commit",
        f"Null-space bundle of {MODEL}: 4 prompts, ddim, format 3",
    ]
    assert not repo.private
    local = contents(home / "tiny-bundle")
    assert hub.files("dataset", BUNDLE) == sorted([".gitattributes", *local])
    assert all(hub.read("dataset", BUNDLE, name) == content for name, content in local.items())
    assert f"Pushed to {hub.url}/datasets/{BUNDLE}\n" in built
    assert not any(WRITE.encode() in content for content in local.values())


def test_two_processes_push_one_bundle(runs, hub, home):
    done = runs["build in two"].result()
    assert " 2/2 " in done.stderr  # 2 steps of a batch: the other process draws the other 2 of 4 prompts
    repo = hub.repos["dataset", "ada/secret"]
    assert repo.private
    assert [commit.message for commit in repo.commits] == [
        "initial commit",
        "Null-space bundle of tiny-sd1: 4 prompts, ddim, format 3",  # not where it lies on this machine
    ]
    assert done.stdout.count("Pushed to") == 1


def test_two_processes_push_one_lora(runs, hub, home):
    assert "Num processes: 2" in runs["train in two"].result().stderr
    repo = hub.repos["model", "ada/pair"]
    assert [commit.message for commit in repo.commits][1:] == [f"Null-space DreamBooth LoRA of tiny-sd1: {PROMPT}"]
    assert LORA_NAME in repo.commits[-1].files and not repo.private


def test_a_finished_build_is_pushed_later_without_computing(copy, here, capfd):
    said = push_bundle(copy, "--hub_dataset_id", "ada/later")
    assert said.splitlines() == [f"Pushed to {here.url}/datasets/ada/later"]
    # No progress bar of any work. What libraries say at import, of torchvision or of kernels, is not ours.
    assert not any(mark in capfd.readouterr().err for mark in ("step", "Collecting", "Loading"))
    assert len(here.repos["dataset", "ada/later"].commits) == 2
    assert here.files("dataset", "ada/later") == here.files("dataset", BUNDLE)
    assert "--nullspace_name_or_path ada/later" in here.read("dataset", "ada/later", "README.md").decode()
    check_files(copy)
    assert not any("/api/models/" in request.path and "later" in request.path for request in here.requests)


@pytest.mark.parametrize(
    ("token", "said", "command"),
    [
        (None, "needs a token of the Hub; log in with `hf auth login`", ""),
        ("wrong", r"refuses the token \(401 Invalid credentials in Authorization header\)", ""),
        (READ, "needs a token that can write, and this one can only read", " --hub_dataset_id ada/other"),
        ("hf_a\x0bb", "token that you are logged in with has white space or other characters", ""),
        ("unreachable", "The Hub cannot be reached .*Connection refused", ""),
        ("no name", "The Hub cannot be reached .*(resolution|not known|nodename)", ""),
    ],
)
def test_a_push_that_fails_names_the_command_for_later(copy, hub, tmp_path, token, said, command):
    before = contents(copy)
    elsewhere = {"unreachable": "http://127.0.0.1:9", "no name": "http://nowhere.invalid"}
    endpoint, token = elsewhere.get(token, hub.url), WRITE if token in elsewhere else token
    with hub.used_here(tmp_path / "cache", token, ENDPOINT=endpoint):
        error = refused(push_bundle, copy, *command.split())
    assert re.search(said, error), error
    assert error.endswith(f"push it with: python build_nullspace.py --output_dir {copy} --push_to_hub{command}")
    assert contents(copy) == before and (token is None or token not in error)
    assert ("dataset", "ada/other") not in hub.repos


def test_the_repository_is_made_before_any_work(here, home, prompts, tmp_path, copy):
    words = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", prompts, "--output_dir", home / "none"]
    built = refused(call, build_nullspace, *words, "--push_to_hub", "--hub_dataset_id", "eve/bundle")
    words = training(copy, home / "none", "--report_to", "none", "--push_to_hub", "--hub_model_id", "eve/lora")
    trained = refused(call, trainer, *words)
    refusal = "cannot be created (403 This takes a write token of the namespace); once it can, run this command again"
    assert built == f"The Hub repository eve/bundle {refusal}"
    assert trained == f"The Hub repository eve/lora {refusal}"
    seen = {path.name for folder in (tmp_path / "cache").rglob("unet") for path in folder.iterdir()}
    assert seen <= {"config.json"}  # of the model, what tells its type, and no weights
    assert not (home / "none").exists()


def test_a_lost_connection_leaves_nothing_half_there_and_the_named_command_pushes(copy, tmp_path, pauses):
    """To a Hub of its own, which has none of the files yet; of one file the upload never succeeds."""
    with HubServer(tmp_path / "server", TOKENS) as other, other.used_here(tmp_path / "cache", WRITE):
        last = json.loads((copy / CONFIG_NAME).read_text())["files"]["spectra.png"]
        other.fail_next("PUT", f"/lfs/{last}", "drop", times=100)
        error = refused(push_bundle, copy)
        assert re.search("Everything is whole in .*, but was not pushed to ada/tiny-bundle .*", error)
        check_files(copy)
        Bundle.load(copy, every_group=True)
        assert other.files("dataset", BUNDLE) == [".gitattributes"]
        assert len(other.repos["dataset", BUNDLE].commits) == 1
        assert sum(pauses) < 60  # the client's own: what it has given up is not begun again
        other.faults.clear()
        sent = len([request for request in other.requests if request.method == "PUT" and request.status == 200])
        words = shlex.split(error.split("push it with: ")[1])
        assert words[:2] == ["python", "build_nullspace.py"]
        call(build_nullspace, *words[2:])
        assert other.repos["dataset", BUNDLE].commits[1].files.keys() == {".gitattributes", *contents(copy)}
        again = [request for request in other.requests if request.method == "PUT" and request.status == 200][sent:]
        assert sent > 3 and len(again) == 1  # what has come is not sent again


def test_a_damaged_or_missing_bundle_is_not_pushed(built, home, tmp_path):
    for name, content in damaged(contents(home / "tiny-bundle")).items():
        (tmp_path / name).write_bytes(content)
    found = {tmp_path: "joint.safetensors is truncated or altered", tmp_path / "none": "holds no bundle"}
    for folder, said in found.items():  # before the Hub is asked anything
        assert said in refused(push_bundle, folder, "--hub_token", "x")


def test_a_second_push_replaces_the_groups_of_the_first(runs, here, home, tmp_path):
    runs["build in two"].result()
    seed(here, "dataset", "ada/again", contents(home / "tiny-bundle") | {"notes.txt": b"by hand"})
    shutil.copytree(home / "two", tmp_path / "two")
    push_bundle(tmp_path / "two", "--hub_dataset_id", "ada/again")
    assert here.files("dataset", "ada/again") == sorted([*contents(home / "two"), "notes.txt"])
    assert len(here.repos["dataset", "ada/again"].commits) == 2


# ---- And nothing else ------------------------------------------------------------------------------------------------


def test_the_files_of_others_are_left_alone_and_counted(copy, here, prompts):
    (copy / "notes.txt").write_text("mine")
    (copy / ".ssh").mkdir()
    (copy / ".ssh" / "id").write_text("mine")
    (copy / "drafts").mkdir()
    (copy / "drafts" / "\x1b[2Ja.txt").write_text("mine")
    (copy / "timesteps-0000-0001.safetensors").symlink_to(prompts)
    said = push_bundle(copy, "--hub_dataset_id", "ada/alone")
    assert here.files("dataset", "ada/alone") == here.files("dataset", BUNDLE)
    assert said.splitlines() == [
        f"Pushed to {here.url}/datasets/ada/alone; not published from {copy}: links: 1 "
        "(timesteps-0000-0001.safetensors), hidden: 1 (.ssh), other files: 2 (notes.txt, drafts/\\x1b[2Ja.txt)"
    ]
    assert (copy / "notes.txt").read_text() == (copy / ".ssh" / "id").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["*", "notes.tx[t]", "note?.txt", "../notes.txt", ".env", "drafts/a.txt", "/etc/hosts"]
)
def test_a_configuration_cannot_choose_what_is_published(copy, here, name):
    files = json.loads((copy / CONFIG_NAME).read_text())["files"]
    (copy / "notes.txt").write_text("mine")
    resign(copy, files=files | {name: files["modules.csv"]})
    asked = len(here.requests)
    assert "files must be a plain file name" in refused(push_bundle, copy, "--hub_dataset_id", "ada/no")
    assert len(here.requests) == asked and ("dataset", "ada/no") not in here.repos


def test_a_bundle_of_links_is_not_published(copy, here, tmp_path):
    (copy / "joint.safetensors").rename(tmp_path / "joint.safetensors")
    (copy / "joint.safetensors").symlink_to(tmp_path / "joint.safetensors")
    assert "joint.safetensors is a link, which is not published" in refused(push_bundle, copy)


@pytest.mark.parametrize("mark", [".git", ".cache/huggingface", "snapshots", "card"])
def test_a_clone_is_not_pushed_over_its_origin(copy, here, tmp_path, mark):
    """Which has the same name, and the same owner. It is pushed where the user says."""
    if mark == "snapshots":
        (tmp_path / "snapshots").mkdir()
        copy = copy.rename(tmp_path / "snapshots" / ("0" * 40))
    elif mark == "card":
        name_repository("eve/tiny-bundle", copy)
    else:
        (copy / mark).mkdir(parents=True)
    before = here.repos["dataset", BUNDLE].commits[-1]
    error = refused(push_bundle, copy)
    assert re.search("(cloned|was pushed to eve/tiny-bundle and).*--hub_dataset_id", error), error
    assert here.repos["dataset", BUNDLE].commits[-1] == before
    push_bundle(copy, "--hub_dataset_id", f"ada/fork-{mark.strip('.').replace('/', '-')}")


def test_a_clone_is_not_trained_into_and_pushed_over_its_origin(copy, here, tmp_path):
    (tmp_path / "sks-star" / ".git").mkdir(parents=True)
    words = training(copy, tmp_path / "sks-star", "--report_to", "none", "--push_to_hub")
    assert re.search(r"was cloned .*\.git.*--hub_model_id", refused(call, trainer, *words))


def test_what_is_private_stays_so_and_what_is_public_is_not_said_to_be(copy, here):
    push_bundle(copy, "--hub_dataset_id", "ada/hidden", "--hub_private_repo")
    assert here.repos["dataset", "ada/hidden"].private
    resign(copy, seed=1)
    push_bundle(copy, "--hub_dataset_id", "ada/hidden")
    push_bundle(copy, "--hub_dataset_id", "ada/hidden", "--hub_private_repo")
    assert here.repos["dataset", "ada/hidden"].private and len(here.repos["dataset", "ada/hidden"].commits) == 3
    commits = list(here.repos["dataset", BUNDLE].commits)
    error = refused(push_bundle, copy, "--hub_dataset_id", BUNDLE, "--hub_private_repo")
    assert "is there already and public, and --hub_private_repo does not change that" in error
    assert here.repos["dataset", BUNDLE].commits == commits and not here.repos["dataset", BUNDLE].private


def test_a_repository_that_was_renamed_is_named(copy, here):
    push_bundle(copy, "--hub_dataset_id", "ada/old-name")
    here.rename("dataset", "ada/old-name", "ada/new-name")
    error = refused(push_bundle, copy, "--hub_dataset_id", "ada/old-name")
    assert error.endswith("ada/old-name is now called ada/new-name; pass --hub_dataset_id ada/new-name.")
    assert ("dataset", "ada/old-name") not in here.repos
    assert Bundle.load("ada/old-name").revision == here.repos["dataset", "ada/new-name"].commits[-1].id


def test_a_name_that_the_hub_does_not_take_is_refused(here):
    error = refused(create_repository, "ada/my lora", "model")
    assert error == "ada/my lora cannot be the name of a Hub repository; give another with --hub_model_id."


# ---- The Hub's answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "b.bin").write_bytes(b"b")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    ("method", "path", "how", "waited"),
    [
        *(("POST", "/commit/", status, 1) for status in (409, 412, 429, 500, 502, 503, 504, "drop", "lose")),
        ("GET", "/api/models/ada/patient", 503, 1),
        ("POST", "/preupload/", 502, 1),
        ("POST", "/objects/batch", 500, 1),
        ("PUT", "/lfs/", 503, 1),
    ],
)
def test_a_push_outlives_a_moment(here, folder, pauses, caplog, method, path, how, waited):
    """The client or we ask again, after a pause, with a line on screen; there is one commit in the end."""
    (folder / "b.bin").write_bytes(secrets.token_bytes(8))
    here.repos.pop(("model", "ada/patient"), None)
    create_repository("ada/patient", "model")
    here.fail_next(method, path, how)
    said = push_folder("ada/patient", "model", folder, ["a.txt", "b.bin"], "message", "retry")
    assert said == f"Pushed to {here.url}/ada/patient" and pauses == [waited] and not here.faults
    assert [commit.message for commit in here.repos["model", "ada/patient"].commits] == ["initial commit", "message"]
    assert here.read("model", "ada/patient", "b.bin") == (folder / "b.bin").read_bytes()
    if path == "/commit/":
        (line,) = [record.getMessage() for record in caplog.records if record.name == "nullspace.hub"]
        assert re.fullmatch(r"The Hub fails on model ada/patient \(.+\); trying again in 1 s \(1 of 3\)\.", line)


def test_the_hub_is_left_alone_for_as_long_as_it_wants(here, folder, pauses):
    create_repository("ada/limited", "model")
    here.fail_next("POST", "/commit/", 429, Retry_After="7")
    push_folder("ada/limited", "model", folder, ["a.txt"], "message", "retry")
    assert pauses == [7]
    here.fail_next("POST", "/commit/", 429, Retry_After="3600")  # which nobody waits for
    (folder / "a.txt").write_text("b")
    error = refused(push_folder, "ada/limited", "model", folder, ["a.txt"], "message", "retry")
    assert pauses == [7] and error.endswith("was not pushed to ada/limited (429 Failed on demand); push it with: retry")


@pytest.mark.parametrize(
    ("how", "times", "attempts"), [(400, 1, 1), (401, 1, 1), (403, 1, 1), (404, 1, 1), (503, 9, 4), ("drop", 9, 4)]
)
def test_a_push_that_goes_on_failing_says_how_to_push_later(here, folder, pauses, how, times, attempts):
    before = contents(folder)
    create_repository("ada/failing", "model")
    asked = len(here.requests)  # other tests read what was asked before
    here.fail_next("POST", "/commit/", how, times)
    error = refused(push_folder, "ada/failing", "model", folder, ["a.txt", "b.bin"], "message", "the command")
    here.faults.clear()
    assert error.startswith(f"Everything is whole in {folder}, but was not pushed to ada/failing (")
    login = "log in as somebody who may write there and " if how in (401, 403) else ""
    assert error.endswith(f"; {login}push it with: the command")
    assert len([request for request in here.requests[asked:] if "/commit/" in request.path]) == attempts
    assert pauses == [1, 4, 16][: attempts - 1]
    assert contents(folder) == before and here.files("model", "ada/failing") == [".gitattributes"]


def test_a_push_waits_for_a_network_that_is_away_for_a_moment(hub, folder, tmp_path, pauses):
    with hub.used_here(tmp_path / "cache", WRITE, ENDPOINT="http://127.0.0.1:9"):
        error = refused(push_folder, "ada/away", "model", folder, ["a.txt"], "message", "the command")
    assert "Connection refused" in error and pauses == [1, 4, 16]


@pytest.mark.parametrize(("unreachable", "attempts"), [(False, 1), (True, 4)])
def test_a_hub_that_never_answers_is_asked_again_after_the_work_alone(pauses, unreachable, attempts):
    """The client has asked it several times by then, and waited each time."""
    asked = []
    transport = type("TransportError", (Exception,), {})  # of the client's library, which differs between versions
    timeout = type("ReadTimeout", (type("TimeoutException", (transport,), {}),), {})

    def ask():
        asked.append(1)
        raise timeout("timed out")

    with pytest.raises(timeout):
        patiently(ask, "model ada/slow", unreachable)
    assert len(asked) == attempts


@pytest.mark.parametrize(("status", "attempts"), [(503, 4), (429, 4), (400, 1)])
def test_before_the_work_the_hub_is_asked_again_too(here, tmp_path, pauses, status, attempts):
    here.fail_next("GET", "/api/whoami", status, attempts - 1)
    if attempts > 1:
        assert hub_repository(None, tmp_path / "lora", "model") == "ada/lora"
    here.fail_next("GET", "/api/whoami", status, 4)
    error = refused(hub_repository, None, tmp_path / "lora", "model")
    assert re.search(f"does not say whose token this is .{status} .*; later, run this command again", error), error
    here.faults.clear()


@pytest.mark.parametrize(
    ("name", "fault", "said", "waited"),
    [
        ("ada/nowhere", None, "check its name, and if it is private log in", []),
        (MODEL, "gated", "accept its conditions on the Hub and log in", []),
        (MODEL, 503, "the fault is on the Hub's side, so run this command again later", [1, 4, 16]),
        (MODEL, 403, "if it is private log in", []),
        (MODEL, 429, "wait some minutes and run this command again", [1, 4, 16]),
        (MODEL, "revision", "name a revision that it has", []),
        (MODEL, "offline", "check the network, or run it where the cache has what is needed", []),
        (MODEL, "unreachable", "check the network, or run it where the cache has what is needed", []),
    ],
)
def test_a_base_model_that_cannot_be_had(hub, tmp_path, pauses, monkeypatch, name, fault, said, waited):
    changes = {"offline": {"HF_HUB_OFFLINE": True}, "unreachable": {"ENDPOINT": "http://127.0.0.1:9"}}
    revision = "v2" if fault == "revision" else None
    if isinstance(fault, int):
        hub.fail_next("GET", f"/api/models/{MODEL}", fault, 9)
        hub.fail_next("HEAD", f"{MODEL}/resolve", fault, 99)
    if fault == "gated":
        monkeypatch.setattr(hub, "gated", {("model", MODEL)})
    with hub.used_here(tmp_path / "cache", WRITE, **changes.get(fault, {})):
        errors = [refused(action, name, revision) for action in (recognise, download_model)]
    hub.faults.clear()
    for error in errors:
        assert re.match(f"The base model {name}(, no folder or file here,)? cannot be had ", error), errors
        assert said in error and ("no folder" in error) == ("check the network" in said), errors
    assert set(pauses) >= set(waited)


def test_a_license_is_a_word(here):
    for number, license_name in enumerate(["mit", "'a: b\\n---'", "[mit]", "'<b>x</b>'"]):
        seed(here, "model", f"ada/card-{number}", {"README.md": f"---\nlicense: {license_name}\n---\n".encode()})
    assert [base_license(f"ada/card-{number}") for number in range(4)] == ["mit", None, None, None]


# ---- Its card and its table ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cards(runs, hub, home):
    """The metadata of both cards and the table, as the libraries read them from the Hub into an empty cache."""
    runs["train"].result()
    code = """
import datasets
from huggingface_hub import DatasetCard, ModelCard
out = []
for kind, name in ((DatasetCard, args[0]), (ModelCard, args[1])):
    card = kind.load(name)
    out.append([card.data.to_dict(), card.text])
table = datasets.load_dataset(args[0])
out.append([str(table), table["train"].to_list()])
"""
    return python(code, hub.environment(home / "cache-cards"), BUNDLE, LORA)


def test_the_dataset_card_says_what_the_bundle_is(cards, hub, home):
    metadata, text = cards[0]
    assert metadata["license"] == "creativeml-openrail-m"
    assert metadata["base_model"] == MODEL
    assert metadata["configs"] == [{"config_name": "default", "data_files": TABLE_NAME}]
    assert metadata["size_categories"] == ["n<1K"]
    assert {"null-space", "dreambooth", "lora", "diffusers", "model-type:sd"} <= set(metadata["tags"])
    config = json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())
    assert config["base_model"]["revision"] == hub.repos["model", MODEL].commits[-1].id
    fingerprints = config["base_model"]["fingerprint"].values()
    for shown in (*fingerprints, config["base_model"]["revision"], config["prompts"]["sha256"]):
        assert f"`{shown}`" in text
    built = re.search(r"## How it was built\n\n```bash\n(.*?)\n```", text, re.DOTALL)[1]
    assert shlex.split(built.replace("\\\n", "")) == shlex.split(config["command"])
    flags = build_nullspace.parse_args(shlex.split(config["command"])[3:])
    assert (flags.prompts_file, flags.timestep_groups) == (home / "prompts.txt", "steps") and flags.hub_token is None
    assert f"--nullspace_name_or_path {BUNDLE}" in text and "<this repository>" not in text
    bundle = Bundle.load(home / "tiny-bundle")
    for row in bundle_rows(bundle):
        assert row in text
    assert "![Eigenvalue spectra](spectra.png)" in text
    assert hub.read("dataset", BUNDLE, "spectra.png").startswith(b"\x89PNG")


def bundle_rows(bundle):
    """The lines of the card's table of ranks."""
    header, rows = build_nullspace.rank_table(bundle)
    assert [cell for cell in header if "rank" in cell] == [f"rank at {x}" for x in (0.9, 0.99, 0.999, 0.9999)]
    return ["| " + " | ".join(row) + " |" for row in (header, *rows)]


def test_a_local_model_is_no_base_model_of_the_hub(runs, home):
    runs["build in two"].result()
    card = (home / "two" / "README.md").read_text()
    assert "base_model:" not in card and "license:" not in card and "revision `" not in card


def test_datasets_opens_the_table(cards, home):
    shown, rows = cards[2]
    assert "num_rows" in shown
    table = Bundle.load(home / "tiny-bundle", every_group=True).table()
    assert {(row["module"], row["group"]): row["rank_0.999"] for row in rows} == {
        (row["module"], row["group"]): row["rank_0.999"] for row in table
    }
    assert len(rows) == len(table) > 100


# ---- Somebody trains with it -----------------------------------------------------------------------------------------


def test_joint_mode_downloads_three_files(runs, hub, home):
    done = runs["train"].result()
    assert "HTTP Request" not in done.stderr
    # Nobody else reads this repository but the test of its card and its table.
    files = fetched(hub.requests, BUNDLE)
    read = {name: size for name, size in files.items() if name not in ("README.md", TABLE_NAME)}
    sizes = {name: entry.size for name, entry in hub.repos["dataset", BUNDLE].commits[-1].files.items()}
    assert read == {name: sizes[name] for name in JOINT_FILES}
    report = json.loads((home / "sks-star" / REPORT_NAME).read_text())
    assert report["nullspace"]["revision"] == hub.repos["dataset", BUNDLE].commits[-1].id
    assert sum(read.values()) < sum(sizes.values()) / 5
    assert sum(name.startswith("timesteps-") for name in sizes) == STEPS


def test_a_part_of_the_timesteps_at_a_revision_downloads_its_groups(here, home, built, tiny_sd1, tmp_path):
    """At the commit that holds the bundle; the one after it is of another format."""
    files = contents(home / "tiny-bundle")
    commit = seed(here, "dataset", "ada/history", files)
    seed(here, "dataset", "ada/history", files | {CONFIG_NAME: newer(files)})
    *_, first, last = json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())["groups"]
    part = [first["range"][0], last["range"][1]]
    flags = ["--nullspace_revision", commit, "--nullspace_timestep_range", *part, "--report_to", "none"]
    call(trainer, *training("ada/history", tmp_path / "part", *flags, model=tiny_sd1))
    files = fetched(here.requests, "ada/history")
    needed = {f"{group['name']}.safetensors" for group in (first, last)}
    assert set(files) == JOINT_FILES - {"joint.safetensors"} | needed
    report = json.loads((tmp_path / "part" / REPORT_NAME).read_text())
    assert report["nullspace"]["revision"] == commit
    assert report["nullspace"]["timestep_range"] == part


def test_a_warm_cache_is_enough_offline(runs, home):
    runs["offline"].result()
    online, offline = (load_file(home / name / LORA_NAME) for name in ("sks-star", "offline"))
    assert online.keys() == offline.keys() and all(torch.equal(online[key], offline[key]) for key in online)


def newer(files):
    return json.dumps(json.loads(files[CONFIG_NAME]) | {"format_version": 99}).encode()


@pytest.mark.parametrize("name", REFUSALS)
def test_an_unusable_bundle_is_refused_before_the_model_is_looked_for(
    hub, home, built, prompts, tmp_path, pauses, monkeypatch, name
):
    files, repo_id = contents(home / "tiny-bundle"), f"ada/{name}"
    if name == "no-bundle":
        files = {"README.md": b"# Pictures", "data.csv": b"a,b\n1,2\n"}
    elif name == "newer":
        files |= {CONFIG_NAME: newer(files)}
    elif name == "damaged":
        files = damaged(files)
    if name not in ("missing", "model"):
        seed(hub, "dataset", repo_id, files, private=name == "private")
    monkeypatch.setattr(hub, "gated", {("dataset", "ada/gated")})
    faults = {"truncated": "truncate", "dropped": "drop", "busy": 500, "limited": 429, "forbidden": 403}
    if name in faults:
        hub.fail_next("GET", f"{repo_id}/.*joint", faults[name], 100)
    changes = {
        "offline": {"HF_HUB_OFFLINE": True},
        "unreachable": {"ENDPOINT": "http://127.0.0.1:9"},
        "no-name": {"ENDPOINT": "http://nowhere.invalid"},
    }
    cache = prompts / "cache" if name == "unwritable" else tmp_path / "cache"
    token = {"wrong-token": "wrong", "gated": READ}.get(name)
    flags = ["--nullspace_revision", "v2"] if name == "revision" else []
    words = training(MODEL if name == "model" else repo_id, tmp_path / "lora", *flags, model=f"ada/nowhere-{name}")
    with hub.used_here(cache, token, **changes.get(name, {})):
        error = refused(call, trainer, *words)
        hub.faults.clear()
        assert re.search(REFUSALS[name], error), error
        assert error.endswith(".")
        assert not any(f"nowhere-{name}" in request.path for request in hub.requests)
        assert not (tmp_path / "lora").exists()
        if name in TRANSIENT:  # in the same cache: nothing half-written is left in it
            assert {1, 4, 16} <= set(pauses)
            assert sorted(Bundle.load(repo_id).spectra) == [TEXT_INPUT, "joint"]


@pytest.mark.parametrize("how", [500, 502, 503, 429, "drop", "truncate"])
def test_a_download_outlives_a_moment(here, home, built, pauses, caplog, how):
    seed(here, "dataset", f"ada/moment-{how}", contents(home / "tiny-bundle"))
    here.fail_next("GET", f"ada/moment-{how}/.*joint", how)
    assert sorted(Bundle.load(f"ada/moment-{how}").spectra) == [TEXT_INPUT, "joint"]
    assert pauses == [1] and not here.faults
    if how not in (429, "drop"):  # which the client waits for itself
        assert f"The Hub fails on dataset ada/moment-{how} (" in caplog.text


def test_the_bundle_of_another_model_is_refused(here, built, tiny_sd2, tmp_path):
    words = training(BUNDLE, tmp_path / "lora", "--report_to", "none", model=tiny_sd2)
    assert re.search(f"built for {MODEL}, .* use the bundle of this model", refused(call, trainer, *words))
    assert not (tmp_path / "lora").exists()


def load(*names, every_group=False):
    """What a bundle of each name is, or why it is none: digest and groups, or a sentence."""
    found = []
    for name in names:
        try:
            bundle = Bundle.load(name, every_group=every_group)
            found.append([bundle.config["sha256"], sorted(bundle.spectra)])
        except NullSpaceError as error:
            found.append(str(error))
    return found


def test_what_was_damaged_on_the_way_is_downloaded_again(built, hub, home, tmp_path, pauses):
    """The client does not notice an altered byte, and would give it from its cache for ever.

    It also passes over an error, once its cache has something of a commit, and returns what it has of it.
    """
    names = ["flipped-joint", "flipped-config", "resumed", "partial", "lacking"]
    for name in names:
        seed(hub, "dataset", f"ada/{name}", contents(home / "tiny-bundle"))
    hub.fail_next("GET", "ada/flipped-joint/.*joint", "flip")
    hub.fail_next("GET", f"ada/flipped-config/.*{CONFIG_NAME}", "flip")
    hub.fail_next("GET", "ada/resumed/.*joint", "drop")
    hub.fail_next("GET", "/api/datasets/ada/partial/", 500)
    del hub.repos["dataset", "ada/lacking"].commits[-1].files["joint.safetensors"]
    with hub.used_here(tmp_path):
        *found, lacking = load(*(f"ada/{name}" for name in names))
    whole = [json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())["sha256"], [TEXT_INPUT, "joint"]]
    assert found == [whole] * 4
    assert lacking == "The Hub dataset ada/lacking at revision {} has no joint.safetensors: {}.".format(
        hub.repos["dataset", "ada/lacking"].commits[-1].id, "it is not a bundle, or not a whole one"
    )
    assert not [path for _, path, *_ in hub.faults if any(name in path for name in names)]  # every fault has struck
    assert fetched(hub.requests, "ada/flipped-joint")["joint.safetensors"] == 2 * len(
        hub.read("dataset", BUNDLE, "joint.safetensors")
    )

    # What the cache now has is whole, with no Hub to ask; what rots in it later is mended when there is one
    path = next(path for path in tmp_path.rglob("joint.safetensors") if "resumed" in str(path))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with hub.used_here(tmp_path, HF_HUB_OFFLINE=True):
        mended, rotten = load("ada/flipped-joint", "ada/resumed")
    assert mended == whole and "joint.safetensors is truncated or altered" in rotten
    with hub.used_here(tmp_path):
        assert load("ada/resumed") == [whole]


def test_files_come_from_the_commit_of_their_configuration(runs, here, home, pauses):
    """While the Hub falters, the client takes an old configuration from its cache, and then files from the new one."""
    runs["build in two"].result()
    first = contents(home / "tiny-bundle")
    seed(here, "dataset", "ada/moving", first)
    (old,) = load("ada/moving")
    seed(here, "dataset", "ada/moving", contents(home / "two"))
    here.fail_next("HEAD", f"ada/moving/.*{CONFIG_NAME}", 500)
    (still,) = load("ada/moving", every_group=True)
    assert still[0] == old[0]
    assert len(still[1]) == STEPS + 2
    (new,) = load("ada/moving")
    assert new[0] == json.loads((home / "two" / CONFIG_NAME).read_text())["sha256"] != old[0]


def test_the_configuration_is_checked_against_its_own_digest(built, home, tmp_path):
    config = json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())
    assert config["sha256"] == config_sha256(config)
    shutil.copytree(home / "tiny-bundle", tmp_path / "bundle")
    config["tokens"]["joint"] = {name: count + 1 for name, count in config["tokens"]["joint"].items()}
    (tmp_path / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(NullSpaceError, match="altered"):
        Bundle.load(tmp_path / "bundle")


# ---- And publishes the LoRA ------------------------------------------------------------------------------------------


def test_the_lora_is_published_without_checkpoints_or_token(runs, hub, home):
    runs["train"].result()
    repo = hub.repos["model", LORA]
    assert [commit.message for commit in repo.commits] == [
        "initial commit",
        f"Null-space DreamBooth LoRA of {MODEL}: {PROMPT}",
    ]
    assert not repo.private
    files = hub.files("model", LORA)
    assert {LORA_NAME, "README.md", REPORT_NAME, COMPARISON_NAME} < set(files)
    assert (home / "sks-star" / "checkpoint-1").is_dir() and not any("checkpoint" in name for name in files)
    logs = [name for name in files if name.startswith("logs/")]
    assert any("tfevents" in name for name in logs) and not set(files) & NOT_OURS
    assert f'pipeline.load_lora_weights("{LORA}")' in runs["train"].result().stdout.splitlines()
    said = runs["train"].result().stderr
    assert re.search("Pushed to .*not published from .*links: 2 .*, hidden: 4 .*, other files: [0-9]+ ", said), said
    for name in files:
        content = hub.read("model", LORA, name)
        assert WRITE.encode() not in content and b"hub_token" not in content, name
        assert name == ".gitattributes" or content == (home / "sks-star" / name).read_bytes()
    assert not [name for name in files if "partial" in name]


def test_the_model_card_says_what_the_lora_is(cards, hub, home):
    metadata, text = cards[1]
    assert metadata["base_model"] == MODEL
    assert metadata["datasets"] == [BUNDLE]
    assert metadata["instance_prompt"] == PROMPT
    assert metadata["license"] == "creativeml-openrail-m"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("diffusers", "text-to-image")
    tags = {"text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "stable-diffusion"}
    assert tags <= set(metadata["tags"])
    files = hub.files("model", LORA)
    assert metadata["widget"][0]["text"] == PROMPT
    assert len(metadata["widget"]) > 1 and all(example["output"]["url"] in files for example in metadata["widget"])
    assert f"![Base model and LoRA, equal seeds]({COMPARISON_NAME})" in text
    assert f"Use `{PROMPT}` or `{OTHER_PROMPT}` to trigger" in text
    assert f'pipeline.load_lora_weights("{LORA}")' in text
    report = json.loads(hub.read("model", LORA, REPORT_NAME))
    assert report["training"]["instance_prompt"] == [PROMPT, OTHER_PROMPT]
    for key in ("leakage", "predicted_drift"):
        assert f"at most {report[key]['max']:.1e}, mean {report[key]['mean']:.1e}" in text
    assert report["leakage"]["max"] < 1e-5
    assert "energy 0.9, softness 1e-05, timesteps 0 to 999" in text


def test_a_pipeline_loads_the_lora_by_its_id(runs, hub, home, tiny_sd1, tmp_path):
    runs["train"].result()
    code = """
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
pipeline = StableDiffusionPipeline.from_pretrained(args[0], safety_checker=None)
pipeline.load_lora_weights(args[1])
(adapter,) = pipeline.get_list_adapters()["unet"]
state = get_peft_model_state_dict(pipeline.unet, adapter_name=adapter)
save_file({f"unet.{key}": value.contiguous() for key, value in state.items()}, args[2])
out = None
"""
    python(code, hub.environment(tmp_path), tiny_sd1, LORA, tmp_path / "loaded.safetensors")
    loaded, saved = load_file(tmp_path / "loaded.safetensors"), load_file(home / "sks-star" / LORA_NAME)
    loaded = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): loaded[key] for key in loaded}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    assert all(value.any() for value in saved.values())


def test_a_lora_is_read_by_its_id(hub, tmp_path, pauses):
    """As --init_lora does: also a private one, with the token alone, and whatever its file is called."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    content = save({f"{name}.down.weight": torch.ones(2, 32), f"{name}.up.weight": torch.ones(32, 2)})
    seed(hub, "model", "ada/private-lora", {LORA_NAME: content, "another.safetensors": b"x"}, private=True)
    seed(hub, "model", "ada/named-lora", {"named.safetensors": content})
    args = SimpleNamespace(hub_token=READ, rank=None, lora_alpha=None, train_text_encoder=False, placeholder_token=None)
    accelerator = SimpleNamespace(main_process_first=contextlib.nullcontext)
    hub.fail_next("HEAD", f"ada/private-lora/.*{LORA_NAME}", 503, 2)  # diffusers asks twice
    with hub.used_here(tmp_path / "cache"):
        for args.init_lora in ("ada/private-lora", "ada/named-lora"):
            assert list(read_initial(accelerator, args).layers) == [name.removeprefix("unet.").removesuffix(".lora")]
            assert (args.rank, args.lora_alpha) == (2, 2)
        args.init_lora = "ada/nowhere"
        assert refused(read_initial, accelerator, args).startswith(
            "--init_lora: ada/nowhere, no folder or file here, cannot be read as a LoRA: "
        )
    assert not hub.faults and pauses


def test_a_lora_that_is_not_published_is_whole_and_the_named_command_publishes_it(here, copy, tiny_sd1, tmp_path):
    """Of a folder whose name is a pattern, in which there is a file that the pattern names, too.

    The `hf upload` of huggingface_hub 1 takes no folder of such a name.
    """
    output = tmp_path / ("lora1" if huggingface_hub.__version__.startswith("1.") else "lora[12]")
    output.mkdir()
    (output / "lora2.safetensors").write_text("not ours")
    here.fail_next("POST", "ada/named/commit/", 403)
    flags = ["--output_kohya_format", "--push_to_hub", "--hub_model_id", "ada/named", "--hub_private_repo"]
    flags += ["--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", "a sks-star"]
    push_bundle(copy, "--hub_dataset_id", "ada/secret-too", "--hub_private_repo")
    words = training("ada/secret-too", output, *flags, "--report_to", "none", model=tiny_sd1)
    error = refused(call, trainer, *words)
    assert error.startswith(f"Everything is whole in {output}, but was not pushed to ada/named (403 Failed on demand)")
    assert here.repos["model", "ada/named"].private  # made before the training, with --hub_private_repo
    assert here.files("model", "ada/named") == [".gitattributes"]
    program, *words = shlex.split(error.split("push it with: ")[1])
    run([Path(sys.executable).with_name(program), *words], here.environment(tmp_path, WRITE))
    local = {name for name in contents(output) if not name.startswith(".lock")} - {"lora2.safetensors", FLAGS_NAME}
    expected = {LORA_NAME, "README.md", REPORT_NAME, COMPARISON_NAME, "pictures/0.png", f"{output.name}.safetensors"}
    assert expected | {WORD_NAME, "embeddings/sks-star.safetensors"} <= local
    assert set(here.files("model", "ada/named")) == local | {".gitattributes"}
    assert here.read("model", "ada/named", LORA_NAME) == (output / LORA_NAME).read_bytes()
    card = here.read("model", "ada/named", "README.md").decode()
    assert 'load_lora_weights("ada/named")' in card and "- ada/secret-too" in card  # trained on a private bundle
    assert 'load_textual_inversion("ada/named")' in card
    (word,) = words_beside("ada/named")
    (rows,) = load_file(output / WORD_NAME).values()
    assert word.token == "sks-star" and torch.equal(word.rows["text_encoder"], rows)
    seed(here, "model", "ada/plain", {LORA_NAME: (output / LORA_NAME).read_bytes()})
    assert words_beside("ada/plain") == []


def test_the_logs_of_this_run_alone_are_published(tmp_path, monkeypatch):
    PartialState()  # which accelerate's loggers ask for
    args = SimpleNamespace(output_dir=tmp_path, logging_dir=Path("logs"), hub_model_id="a/b", hub_private_repo=False)
    args.pretrained_model_name_or_path, args.instance_prompt, args.hub_token = "m", ["p"], None
    args.word_only, args.base_model = False, BaseModel("m", tmp_path)
    (tmp_path / "logs" / "run").mkdir(parents=True)
    for name in ("old", "run/goes-on"):
        (tmp_path / "logs" / name).write_text("before")
    earlier = log_files(args)
    for name in ("run/goes-on", "run/new", ".hidden"):
        (tmp_path / "logs" / name).write_text("this run's")
    (tmp_path / "logs" / "link").symlink_to(tmp_path / "logs" / "old")
    pushed = []
    monkeypatch.setattr("nullspace.results.push_folder", lambda *given: pushed.append(given) or "Pushed")
    push([LORA_NAME], earlier, args)
    assert sorted(pushed[0][3]) == ["logs/run/goes-on", "logs/run/new", LORA_NAME]


# ---- No token is shown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "all"])
def test_trackers_that_record_the_command_line_are_refused_with_a_token(tracker, capsys):
    words = training(BUNDLE, "lora", "--report_to", tracker, "--hub_token", WRITE)
    with pytest.raises(SystemExit) as stopped:
        trainer.parse_args([str(word) for word in words])
    assert stopped.value.code == 1
    assert f"--report_to {tracker} with --hub_token would record the token" in capsys.readouterr().err
    trainer.parse_args([str(word) for word in words[:-2]])  # without the token


def test_a_token_is_left_out_of_the_command_line():
    for given in (["--hub_token", WRITE], [f"--hub_token={WRITE}"], ["--hub_tok", WRITE], [f"--hub_t={WRITE}"]):
        words = without_token(["--push_to_hub", *given, "--hub_dataset_id", "a/b"])
        assert words == ["--push_to_hub", "--hub_dataset_id", "a/b"]


WORDS = {
    trainer: lambda: training(BUNDLE, "lora"),
    build_nullspace: lambda: ["--push_to_hub"],
    nullspace_utils: lambda: ["find", "--pretrained_model_name_or_path", MODEL],
}


@pytest.mark.parametrize("script", WORDS)
def test_white_space_around_a_token_is_left_out(script, capsys):
    words = WORDS[script]()
    assert script.parse_args([*words, "--hub_token", f" {WRITE}\r\n"]).hub_token == WRITE
    said = capsys.readouterr().err
    assert said == "The white space around --hub_token is left out.\n"


@pytest.mark.parametrize("script", WORDS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hub_token", "a-secret pen"], "has white space or other characters in it"),
        (["--hub_token", "a-secret\npen"], "has white space or other characters in it"),
        (["--hub_token", "a-secret\x1bpen"], "has white space or other characters in it"),
        (["--hub_token=ä-secret"], "has white space or other characters in it"),
        (["--hub_token", " \n"], "is empty"),
        (["--hub_token", "a-secret", "pen"], "unrecognized arguments: ***"),  # the quotes forgotten
        (["--hub-token", "a-secret"], "unrecognized arguments: --hub-token ***"),
        (["--hub-token=a-secret"], "unrecognized arguments: --hub-token"),
        (["--hub_login", WRITE], "unrecognized arguments: --hub_login ***"),
        (["--access_token", WRITE], "unrecognized arguments: --access_token ***"),
    ],
)
def test_a_token_that_is_none_is_refused_without_being_shown(script, given, said, capsys):
    words = WORDS[script]()
    with pytest.raises(SystemExit) as stopped:
        script.parse_args([*words, *given])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not any(part in error.lower() for part in ("secret", "pen"))


def test_the_client_shows_no_signature(caplog):
    logging.getLogger("huggingface_hub.utils._http").warning("%s on PUT %s", 503, "https://x/y?X-Amz-Signature=secret")
    assert caplog.messages == ["503 on PUT https://x/y"]


def test_no_sentence_and_no_log_shows_a_token_or_obeys_a_name():
    hostile = f"x\x1b[2J\r\n\u202e Illegal header value b'Bearer odd-token' {WRITE} https://u:{WRITE}@hub/x"
    record = logging.LogRecord("name", logging.WARNING, "path", 1, "%s", (hostile,), None)
    try:
        raise OSError(hostile)
    except OSError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    said, (logged, *trace) = str(NullSpaceError(hostile)), PrintableFormatter("%(message)s").format(record).split("\n")
    assert said == logged == "x\\x1b[2J\\r\\n\\u202e Illegal header value b'Bearer ***' *** https://u:***@hub/x"
    assert "Secret" not in "".join(trace) and "odd-token" not in "".join(trace) and "\x1b" not in "".join(trace)
