"""Bundles and LoRAs over the Hub: the scripts in processes of their own, against a Hub on loopback.

All launches are started at once and run a few at a time; each test waits for the one that it looks at.
"""

import json
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub_server import LFS_SUFFIXES, Commit, Entry, HubServer, Repo, User, git_oid, lfs_pointer
from safetensors.torch import load_file

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace.bundle import Bundle, check_files
from nullspace.collection import without_token
from nullspace.hashes import config_sha256
from nullspace.names import COMPARISON_NAME, CONFIG_NAME, LORA_NAME, REPORT_NAME, TABLE_NAME, TEXT_INPUT
from shapes import DEMO


ROOT = Path(__file__).resolve().parent.parent
WRITE, READ = "hf_adas_secret_pen", "hf_adas_glasses"
TOKENS = {WRITE: User("ada"), READ: User("ada", can_write=False)}
MODEL, BUNDLE, LORA = "ada/tiny-model", "ada/tiny-bundle", "ada/sks-star"
PROMPT, OTHER_PROMPT = "a photo of a sks star", "the sks star"
STEPS = 12  # of the sampler, each a group of its own
JOINT_FILES = {CONFIG_NAME, "joint.safetensors", f"{TEXT_INPUT}.safetensors"}

# What the trainer says of bundles that it cannot use, each before it looks for the base model.
REFUSALS = {
    "missing": "no Hub dataset of that name that you may read",
    "private": "if it is private, log in with `hf auth login` or pass --hub_token",
    "wrong-token": "401 Invalid credentials in Authorization header.*log in again",
    "model": f"{MODEL} is a model on the Hub, not a dataset",
    "revision": "has no revision v2",
    "no-bundle": f"has no {CONFIG_NAME}: it is not a bundle",
    "newer": "has format 99, newer than the 2 known here",
    "damaged": "joint.safetensors is truncated or altered",
    "offline": "not in the local cache and cannot be downloaded now .*offline mode is enabled",
    "unwritable": "cannot be stored in the cache .*Not a directory.*set HF_HOME",
    "truncated": "cannot be downloaded .*should be of size.*try again",
    "dropped": "cannot be downloaded .*try again",
    "busy": "cannot be downloaded .500 Failed on demand.; try again",
}
TRANSIENT = ("truncated", "dropped", "busy")


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


def run(command, env, check=True):
    """Run a command line with plain python, for what `accelerate launch` does not change."""
    done = subprocess.run(
        [str(word) for word in command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def run_named(command, env):
    """Run the command that an error has named, with the programs of this environment."""
    program, *words = shlex.split(command)
    return run([Path(sys.executable).with_name(program), *words], env)


def python(code, env, *args):
    """Run code in a new process and return what it leaves in `out`."""
    prelude = "import json, sys; from pathlib import Path; args = sys.argv[1:]"
    done = run([sys.executable, "-W", "ignore", "-c", f"{prelude}\n{code}\nprint(json.dumps(out))", *args], env)
    return json.loads(done.stdout.splitlines()[-1])


IN_TURN = """
import contextlib, io, runpy
out = []
for sys.argv in json.loads(args[0]):
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=sys.stderr)  # the sentence, which Python prints where nothing catches it
    out.append([code, "", said.getvalue()])
"""


def run_in_turn(commands, env):
    """Run command lines of scripts, which differ in no environment, in one process: what they import takes seconds."""
    commands = [[str(word) for word in words] for words in commands]
    found = python(IN_TURN, env, json.dumps(commands))
    return [subprocess.CompletedProcess(words, *row) for words, row in zip(commands, found, strict=True)]


def sentence(done):
    """The one sentence with which a script has stopped."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1 and said[0] == done.stderr.splitlines()[-1] and said[0].startswith("error: "), done.stderr
    assert ". " not in said[0], said[0]
    return said[0]


def fetched(requests, repo_id):
    """Bytes sent of each file of a repository: `dict[str, int]` by path."""
    files = {}
    for request in requests:
        if request.method == "GET" and f"{repo_id}/resolve/" in request.path:
            path = request.path.split("/resolve/")[1].split("/", 1)[1]
            files[path] = files.get(path, 0) + request.bytes_sent
    return files


def training(bundle, output_dir, *flags, model=MODEL):
    """A short training's command line, the script first."""
    words = ["train_dreambooth_nullspace.py", "--pretrained_model_name_or_path", model]
    words += ["--nullspace_name_or_path", bundle, "--output_dir", output_dir]
    words += ["--instance_prompt", PROMPT, OTHER_PROMPT]
    words += ["--instance_data_dir", DEMO / "instance_images" / "star", "--resolution", 32, "--max_train_steps", 2]
    words += ["--num_validation_images", 1, "--train_batch_size", 2, "--learning_rate", 1e-2, "--seed", 0]
    return [*words, *flags]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(home):
    with HubServer(home / "server", TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def runs(hub, home, tiny_sd1, tiny_sd2, run_script):
    """Every launch of this module: name -> future of its finished process, or of what a job found."""
    prompts = home / "prompts.txt"
    prompts.write_text("a red star\na blue heart on a white background\na ring\n")
    card = "---\nlicense: creativeml-openrail-m\n---\n# A model\n"
    seed(hub, "model", MODEL, contents(tiny_sd1) | {"README.md": card.encode()})

    def env(name, token=None, server=hub, **more):
        """A cache of this name, and one thread: launches share the processors."""
        return server.environment(home / f"cache-{name}", token) | {"OMP_NUM_THREADS": "1"} | more

    def build():
        words = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", prompts, "--num_inference_steps", STEPS]
        words += ["--timestep_groups", "steps", "--output_dir", home / "tiny-bundle", "--push_to_hub"]
        return run_script("build_nullspace.py", *words, "--hub_token", WRITE, env=env("build"))

    def build_in_two():
        words = ["--pretrained_model_name_or_path", tiny_sd1, "--prompts_file", prompts, "--num_inference_steps", 2]
        words += ["--output_dir", home / "two", "--push_to_hub", "--hub_dataset_id", "ada/secret", "--batch_size", 2]
        return run_script("build_nullspace.py", *words, "--hub_private_repo", env=env("two", WRITE), processes=2)

    def train_in_two():
        futures["build in two"].result()  # also because two launches at once would take the same port
        words = training("ada/secret", home / "pair", "--push_to_hub", model=tiny_sd1)
        return run_script(*words, "--report_to", "none", env=env("pair", WRITE), processes=2)

    def train():
        futures["build"].result()
        words = training(BUNDLE, home / "sks-star", "--push_to_hub", "--hub_token", WRITE)
        return run_script(*words, "--checkpointing_steps", 1, env=env("train"))

    def train_offline():
        futures["train"].result()
        return run([sys.executable, *training(BUNDLE, home / "offline")], env("train", HF_HUB_OFFLINE="1"))

    def train_nearest():
        """At the commit that holds the bundle; the one after it is of another format."""
        futures["build"].result()
        files = contents(home / "tiny-bundle")
        commit = seed(hub, "dataset", "ada/history", files)
        seed(hub, "dataset", "ada/history", files | {CONFIG_NAME: newer(files)})
        flags = ["--nullspace_revision", commit, "--nullspace_timesteps", "nearest", "--report_to", "none"]
        return run([sys.executable, *training("ada/history", home / "nearest", *flags, model=tiny_sd1)], env("near"))

    def train_without_publishing():
        """On a private bundle, with a push that the Hub refuses in the end."""
        futures["build in two"].result()
        hub.fail_next("POST", "ada/named/commit/", 403)
        words = training("ada/secret", home / "lora", "--push_to_hub", "--hub_model_id", "ada/named", model=tiny_sd1)
        return run([sys.executable, *words, "--hub_private_repo"], env("named", WRITE), check=False)

    def publish_in_the_name_of_another():
        """From both scripts."""
        futures["seed"].result()
        words = ["build_nullspace.py", "--pretrained_model_name_or_path", MODEL, "--prompts_file", prompts]
        words += ["--output_dir", home / "none", "--push_to_hub", "--hub_dataset_id", "eve/bundle"]
        built = run([sys.executable, *words], env("refusals", WRITE), check=False)
        words = training("ada/other-model", home / "none", "--push_to_hub", "--hub_model_id", "eve/lora")
        return built, run([sys.executable, *words], env("refusals", WRITE), check=False)

    def train_on_another_model():
        futures["seed"].result()
        words = training("ada/other-model", home / "none-other-model", model=tiny_sd2)
        return run([sys.executable, *words], env("refusals"), check=False)

    def newer(files):
        return json.dumps(json.loads(files[CONFIG_NAME]) | {"format_version": 99}).encode()

    def refuse(names, token=None, **more):
        """What is said of each of these bundles."""
        futures["seed"].result()
        commands = []
        for name in names:
            flags = ["--nullspace_revision", "v2"] if name == "revision" else []
            bundle = MODEL if name == "model" else f"ada/{name}"
            commands.append(training(bundle, home / f"none-{name}", *flags, model=f"ada/nowhere-{name}"))
        return dict(zip(names, run_in_turn(commands, env("refusals", token, **more)), strict=True))

    def seed_refusals():
        futures["build"].result()
        files = contents(home / "tiny-bundle")
        for name in ("private", "wrong-token", "revision", "offline", "unwritable", "other-model", *TRANSIENT):
            seed(hub, "dataset", f"ada/{name}", files, private=name == "private")
        seed(hub, "dataset", "ada/no-bundle", {"README.md": b"# Pictures", "data.csv": b"a,b\n1,2\n"})
        seed(hub, "dataset", "ada/newer", files | {CONFIG_NAME: newer(files)})
        seed(hub, "dataset", "ada/damaged", damaged(files))
        hub.fail_next("GET", "ada/truncated/.*joint", "truncate")
        hub.fail_next("GET", "ada/dropped/.*joint", "drop", times=100)
        hub.fail_next("GET", "ada/busy/.*joint", 500)

    def push_later(token, repo_id=None, server=hub, **more):
        """Push a copy of the finished build, whose card will name the repository, from a cache that holds no model."""
        futures["build"].result()
        folder = home / secrets.token_hex(4) / "tiny-bundle"
        shutil.copytree(home / "tiny-bundle", folder)
        words = ["build_nullspace.py", "--output_dir", folder, "--push_to_hub"]
        words += ["--hub_dataset_id", repo_id] if repo_id else []
        return folder, run([sys.executable, *words], env("push", token, server, **more), check=False)

    def push_over_a_lost_connection():
        """To a Hub of its own, which has none of the files yet."""
        with HubServer(home / "other-server", TOKENS) as other:
            other.fail_next("PUT", "/lfs/", "drop", times=100)
            folder, failed = push_later(WRITE, server=other)
            check_files(folder)
            Bundle.load(folder, "nearest")
            commits = list(other.repos["dataset", BUNDLE].commits)
            other.faults.clear()
            run_named(sentence(failed).split("push it with: ")[1], env("push", WRITE, other))
            return failed, commits, other.repos["dataset", BUNDLE].commits

    with ThreadPoolExecutor(3) as pool:
        futures = {}
        for name, job in {
            "build": build,
            "build in two": build_in_two,
            "lost upload": push_over_a_lost_connection,  # sleeps most of its time
            "train": train,
            "seed": seed_refusals,
            "train in two": train_in_two,
            "offline": train_offline,
            "nearest": train_nearest,
            "failed push": train_without_publishing,
            "another model": train_on_another_model,
            "another's name": publish_in_the_name_of_another,
        }.items():
            futures[name] = pool.submit(job)
        special = {
            "wrong-token": {"token": "wrong"},
            "offline": {"HF_HUB_OFFLINE": "1"},
            "unwritable": {"HF_HUB_CACHE": str(prompts / "cache")},
        }
        futures["refusals"] = pool.submit(refuse, [name for name in REFUSALS if name not in special])
        for name, arguments in special.items():
            futures[f"refusal {name}"] = pool.submit(refuse, [name], **arguments)
        for name, arguments in {
            "later": (WRITE, "ada/later"),
            "no token": (None,),
            "wrong token": ("wrong",),
            "read token": (READ, "ada/other"),
        }.items():
            futures[f"push {name}"] = pool.submit(push_later, *arguments)
        futures["push unreachable"] = pool.submit(push_later, WRITE, HF_ENDPOINT="http://127.0.0.1:9")
        yield futures


# ---- A bundle is published -------------------------------------------------------------------------------------------


def test_a_build_is_pushed_in_one_commit(runs, hub, home):
    done = runs["build"].result()
    repo = hub.repos["dataset", BUNDLE]  # named after the folder
    assert [commit.message for commit in repo.commits] == [
        "initial commit",
        f"Null-space bundle of {MODEL}: 4 prompts, ddim, format 2",
    ]
    assert not repo.private
    local = contents(home / "tiny-bundle")
    assert hub.files("dataset", BUNDLE) == sorted([".gitattributes", *local])
    assert all(hub.read("dataset", BUNDLE, name) == content for name, content in local.items())
    assert f"Pushed to {hub.url}/datasets/{BUNDLE}" in done.stdout
    assert not any(WRITE.encode() in content for content in local.values())


def test_two_processes_push_once(runs, hub, home):
    done = runs["build in two"].result()
    assert " 2/2 " in done.stderr  # 2 steps of a batch: the other process draws the other 2 of 4 prompts
    repo = hub.repos["dataset", "ada/secret"]
    assert repo.private
    assert [commit.message for commit in repo.commits] == [
        "initial commit",
        "Null-space bundle of tiny-sd1: 4 prompts, ddim, format 2",  # not where it lies on this machine
    ]
    assert done.stdout.count("Pushed to") == 1
    assert "Num processes: 2" in runs["train in two"].result().stderr
    repo = hub.repos["model", "ada/pair"]
    assert [commit.message for commit in repo.commits][1:] == [f"Null-space DreamBooth LoRA of tiny-sd1: {PROMPT}"]
    assert LORA_NAME in repo.commits[-1].files and not repo.private


def test_a_finished_build_is_pushed_later_without_computing(runs, hub, home):
    folder, done = runs["push later"].result()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"Pushed to {hub.url}/datasets/ada/later"]
    # No progress bar of any work. What libraries say at import, of torchvision or of kernels, is not ours.
    assert not any(mark in done.stderr for mark in ("%|", "\r", "it/s", "step", "Collecting", "Loading"))
    assert len(hub.repos["dataset", "ada/later"].commits) == 2
    assert hub.files("dataset", "ada/later") == hub.files("dataset", BUNDLE)
    assert "--nullspace_name_or_path ada/later" in hub.read("dataset", "ada/later", "README.md").decode()
    check_files(folder)
    assert not any((home / "cache-push").rglob("*.safetensors"))  # nor any model


@pytest.mark.parametrize(
    ("name", "said", "command"),
    [
        ("no token", "needs a token of the Hub; log in with `hf auth login`", ""),
        ("wrong token", r"refuses the token \(401 Invalid credentials in Authorization header\)", ""),
        ("read token", "needs a token that can write, and this one can only read", " --hub_dataset_id ada/other"),
        ("unreachable", "The Hub cannot be reached .*Connection refused", ""),
    ],
)
def test_a_push_that_fails_names_the_command_for_later(runs, hub, home, name, said, command):
    folder, done = runs[f"push {name}"].result()
    error = sentence(done)
    assert re.search(said, error), error
    assert error.endswith(f"push it with: python build_nullspace.py --output_dir {folder} --push_to_hub{command}")
    assert contents(folder) == contents(home / "tiny-bundle")
    assert ("dataset", "ada/other") not in hub.repos


def test_the_repository_is_made_before_any_work(runs, home):
    built, trained = map(sentence, runs["another's name"].result())
    refusal = "cannot be created (403 This takes a write token of the namespace); once it can, run this command again"
    assert built == f"error: The Hub repository eve/bundle {refusal}"
    assert trained == f"error: The Hub repository eve/lora {refusal}"
    seen = {path.name for folder in (home / "cache-refusals").rglob("unet") for path in folder.iterdir()}
    assert seen <= {"config.json"}  # of the model, what tells its type, and no weights
    assert not (home / "none").exists()


def test_a_lost_connection_leaves_nothing_half_there_and_the_named_command_pushes(runs, home):
    failed, before, after = runs["lost upload"].result()
    assert re.search("Everything is whole in .*, but was not pushed to ada/tiny-bundle .*", sentence(failed))
    assert len(before) == 1 and list(before[0].files) == [".gitattributes"]
    assert len(after) == 2
    assert after[1].files.keys() == {".gitattributes", *contents(home / "tiny-bundle")}


def test_a_damaged_or_missing_bundle_is_not_pushed(runs, home, tmp_path):
    runs["build"].result()
    for name, content in damaged(contents(home / "tiny-bundle")).items():
        (tmp_path / name).write_bytes(content)
    found = {tmp_path: "joint.safetensors is truncated or altered", tmp_path / "none": "holds no bundle"}
    for folder, said in found.items():  # before the Hub is asked anything
        args = build_nullspace.parse_args(["--output_dir", str(folder), "--push_to_hub", "--hub_token", "x"])
        with pytest.raises(build_nullspace.NullSpaceError, match=said):
            build_nullspace.main(args)


def test_a_second_push_replaces_the_groups_of_the_first(runs, hub, home, tmp_path):
    runs["build"].result(), runs["build in two"].result()
    seed(hub, "dataset", "ada/again", contents(home / "tiny-bundle") | {"notes.txt": b"by hand"})
    shutil.copytree(home / "two", tmp_path / "two")
    words = [sys.executable, "build_nullspace.py", "--output_dir", tmp_path / "two", "--push_to_hub"]
    run([*words, "--hub_dataset_id", "ada/again"], hub.environment(tmp_path, WRITE))
    assert hub.files("dataset", "ada/again") == sorted([*contents(home / "two"), "notes.txt"])
    assert len(hub.repos["dataset", "ada/again"].commits) == 2


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
    table = Bundle.load(home / "tiny-bundle", "nearest").table()
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


def test_nearest_mode_at_a_revision_downloads_the_groups(runs, hub, home):
    runs["nearest"].result()
    files = fetched(hub.requests, "ada/history")
    groups = json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())["groups"]
    assert set(files) == JOINT_FILES | {f"{group['name']}.safetensors" for group in groups}
    report = json.loads((home / "nearest" / REPORT_NAME).read_text())
    assert report["nullspace"]["revision"] == hub.repos["dataset", "ada/history"].commits[0].id
    assert report["nullspace"]["timesteps"] == "nearest"


def test_a_warm_cache_is_enough_offline(runs, home):
    runs["offline"].result()
    online, offline = (load_file(home / name / LORA_NAME) for name in ("sks-star", "offline"))
    assert online.keys() == offline.keys() and all(torch.equal(online[key], offline[key]) for key in online)


@pytest.mark.parametrize("name", REFUSALS)
def test_an_unusable_bundle_is_refused_before_the_model_is_looked_for(runs, hub, home, name):
    error = sentence(runs.get(f"refusal {name}", runs["refusals"]).result()[name])
    assert re.search(REFUSALS[name], error), error
    assert error.endswith(".")
    assert not any(f"nowhere-{name}" in request.path for request in hub.requests)
    assert not (home / f"none-{name}").exists()


def test_the_bundle_of_another_model_is_refused(runs, home):
    assert re.search(f"built for {MODEL}, .* use the bundle of this model", sentence(runs["another model"].result()))
    assert not (home / "none-other-model").exists()


LOAD = """
from nullspace_utils import Bundle, NullSpaceError
out = []
for name in args[1:]:
    try:
        bundle = Bundle.load(name, args[0])
        out.append([bundle.config["sha256"], sorted(bundle.spectra)])
    except NullSpaceError as error:
        out.append(str(error))
"""


def test_the_next_run_succeeds_once_the_fault_is_gone(runs, hub, home):
    """In the same cache: nothing half-written is left in it."""
    runs["refusals"].result()
    hub.faults[:] = [fault for fault in hub.faults if "ada/dropped" not in fault[1]]
    env = hub.environment(home / "cache-refusals")
    whole = [json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())["sha256"], [TEXT_INPUT, "joint"]]
    assert python(LOAD, env, "joint", *(f"ada/{name}" for name in TRANSIENT)) == [whole] * len(TRANSIENT)


def test_what_was_damaged_on_the_way_is_downloaded_again(runs, hub, home, tmp_path):
    """The client does not notice an altered byte, and would give it from its cache for ever.

    It also passes over an error, once its cache has something of a commit, and returns what it has of it.
    """
    runs["build"].result()
    names = ["flipped-joint", "flipped-config", "resumed", "partial", "lacking"]
    for name in names:
        seed(hub, "dataset", f"ada/{name}", contents(home / "tiny-bundle"))
    hub.fail_next("GET", "ada/flipped-joint/.*joint", "flip")
    hub.fail_next("GET", f"ada/flipped-config/.*{CONFIG_NAME}", "flip")
    hub.fail_next("GET", "ada/resumed/.*joint", "drop")
    hub.fail_next("GET", "/api/datasets/ada/partial/", 500)
    del hub.repos["dataset", "ada/lacking"].commits[-1].files["joint.safetensors"]
    env = hub.environment(tmp_path)
    *found, lacking = python(LOAD, env, "joint", *(f"ada/{name}" for name in names))
    whole = [json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())["sha256"], [TEXT_INPUT, "joint"]]
    assert found == [whole] * 4
    assert lacking == "The Hub dataset ada/lacking at revision {} has no joint.safetensors: {}.".format(
        hub.repos["dataset", "ada/lacking"].commits[-1].id, "it is not a bundle, or not a whole one"
    )
    assert not [path for _, path, _ in hub.faults if any(name in path for name in names)]  # every fault has struck
    assert fetched(hub.requests, "ada/flipped-joint")["joint.safetensors"] == 2 * len(
        hub.read("dataset", BUNDLE, "joint.safetensors")
    )

    # What the cache now has is whole, with no Hub to ask; what rots in it later is mended when there is one
    path = next(path for path in tmp_path.rglob("joint.safetensors") if "resumed" in str(path))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    mended, rotten = python(LOAD, env | {"HF_HUB_OFFLINE": "1"}, "joint", "ada/flipped-joint", "ada/resumed")
    assert mended == whole and "joint.safetensors is truncated or altered" in rotten
    assert python(LOAD, env, "joint", "ada/resumed") == [whole]


def test_files_come_from_the_commit_of_their_configuration(runs, hub, home, tmp_path):
    """While the Hub falters, the client takes an old configuration from its cache, and then files from the new one."""
    runs["build"].result(), runs["build in two"].result()
    first = contents(home / "tiny-bundle")
    seed(hub, "dataset", "ada/moving", first)
    env = hub.environment(tmp_path)
    (old,) = python(LOAD, env, "joint", "ada/moving")
    seed(hub, "dataset", "ada/moving", contents(home / "two"))
    hub.fail_next("HEAD", f"ada/moving/.*{CONFIG_NAME}", 500)
    (still,) = python(LOAD, env, "nearest", "ada/moving")
    assert still[0] == old[0]
    assert len(still[1]) == STEPS + 2
    (new,) = python(LOAD, env, "joint", "ada/moving")
    assert new[0] == json.loads((home / "two" / CONFIG_NAME).read_text())["sha256"] != old[0]


def test_the_configuration_is_checked_against_its_own_digest(runs, home, tmp_path):
    runs["build"].result()
    config = json.loads((home / "tiny-bundle" / CONFIG_NAME).read_text())
    assert config["sha256"] == config_sha256(config)
    shutil.copytree(home / "tiny-bundle", tmp_path / "bundle")
    config["tokens"]["joint"] = {name: count + 1 for name, count in config["tokens"]["joint"].items()}
    (tmp_path / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(build_nullspace.NullSpaceError, match="altered"):
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
    assert any("tfevents" in name for name in logs)
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
    assert "energy 0.9, softness 1e-05, joint, timesteps 0 to 999" in text


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


def test_a_lora_that_is_not_published_is_whole_and_the_named_command_publishes_it(runs, hub, home, tmp_path):
    done = runs["failed push"].result()
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = f"error: Everything is whole in {home / 'lora'}, but was not pushed to ada/named (403 Failed on demand)"
    assert error.startswith(said)
    assert hub.repos["model", "ada/named"].private  # made before the training, with --hub_private_repo
    assert hub.files("model", "ada/named") == [".gitattributes"]
    run_named(error.split("push it with: ")[1], hub.environment(tmp_path, WRITE))
    local = {name for name in contents(home / "lora") if "checkpoint" not in name}
    assert {LORA_NAME, "README.md", REPORT_NAME, COMPARISON_NAME, "pictures/0.png"} <= local
    assert set(hub.files("model", "ada/named")) == local | {".gitattributes"}
    assert hub.read("model", "ada/named", LORA_NAME) == (home / "lora" / LORA_NAME).read_bytes()
    card = hub.read("model", "ada/named", "README.md").decode()
    assert 'load_lora_weights("ada/named")' in card and "- ada/secret" in card  # trained on a private bundle


@pytest.mark.parametrize("tracker", ["wandb", "all"])
def test_trackers_that_record_the_command_line_are_refused_with_a_token(tracker, capsys):
    words = training(BUNDLE, "lora", "--report_to", tracker, "--hub_token", WRITE)[1:]
    with pytest.raises(SystemExit) as stopped:
        trainer.parse_args([str(word) for word in words])
    assert stopped.value.code == 1
    assert f"--report_to {tracker} with --hub_token would record the token" in capsys.readouterr().err
    trainer.parse_args([str(word) for word in words[:-2]])  # without the token


def test_a_token_is_left_out_of_the_command_line():
    for given in (["--hub_token", WRITE], [f"--hub_token={WRITE}"], ["--hub_tok", WRITE], [f"--hub_t={WRITE}"]):
        words = without_token(["--push_to_hub", *given, "--hub_dataset_id", "a/b"])
        assert words == ["--push_to_hub", "--hub_dataset_id", "a/b"]
