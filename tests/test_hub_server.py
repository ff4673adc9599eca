"""The loopback Hub, driven by the real clients.

Each client runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

import http.client
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer, User


DATASET, MODEL = "ada/modules", "ada/detector"
CARD = "---\nconfigs:\n- config_name: default\n  data_files: modules.parquet\n---\n# Modules\n"
PRELUDE = """
import json, sys, time
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
api, args = HfApi(), json.loads(sys.argv[1])

def attempt(call, *arguments, **options):
    try:
        return {"value": str(call(*arguments, **options))}
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return {"error": type(error).__name__, "status": status, "message": str(error)}

"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    tokens = {"write": User("ada"), "read": User("ada", can_write=False), "other": User("eve")}
    with HubServer(tmp_path / "hub", tokens) as server:
        yield server


def client(hub: HubServer, home: Path, code: str, token: str | None = None, **args: Any) -> Any:
    """Run the code in a new process against the Hub; what it leaves in `out` comes back through JSON."""
    script = f"{PRELUDE}{code}\nprint(json.dumps(out))"
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(args, default=str)]
    run = subprocess.run(command, env=hub.environment(home, token), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


PUSH = """
for repo_type, repo_id, folder in args["pushes"]:
    api.create_repo(repo_id, repo_type=repo_type, private=args.get("private"), exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type=repo_type, folder_path=folder)
out = None
"""


def push(hub: HubServer, home: Path, *pushes: tuple[str, str, Path], private: bool = False) -> None:
    client(hub, home, PUSH, "write", pushes=pushes, private=private)


def fetched(hub: HubServer) -> set[str]:
    """The files whose content was asked for, each by the end of its address."""
    urls = [request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    return {url.split("/resolve/")[1].split("/", 1)[1] for url in urls}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "README.md").write_text("# Detector\n")
    (folder / "sub dir" / "config é.json").write_text('{"a": 1}\n')
    (folder / "empty.txt").touch()
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(200_000))
    (folder / "large.txt").write_bytes(b"0123456789" * 150_000)
    return folder


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "images").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "images" / "a.png").write_bytes(random.Random(1).randbytes(30_000))
    pq.write_table(pa.table({"name": ["a", "b", "c"], "size": [10, 16, 20]}), folder / "modules.parquet")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"}


def test_folders_come_back_as_they_were_pushed(
    hub: HubServer, tmp_path: Path, model_folder: Path, dataset_folder: Path
) -> None:
    push(hub, tmp_path / "a", ("model", MODEL, model_folder), ("dataset", DATASET, dataset_folder))
    pull = "out = [snapshot_download(repo_id, repo_type=kind) for kind, repo_id in args['pulls']]"
    pulls = [("model", MODEL), ("dataset", DATASET)]
    model_snapshot, dataset_snapshot = client(hub, tmp_path / "b", pull, pulls=pulls)
    assert tree(Path(model_snapshot)) == tree(model_folder)
    assert tree(Path(dataset_snapshot)) == tree(dataset_folder)
    assert hub.files("dataset", DATASET) == [".gitattributes", *sorted(tree(dataset_folder))]
    assert hub.read("dataset", DATASET, "README.md") == CARD.encode()
    stored = {**hub.repos["model", MODEL].commits[-1].files, **hub.repos["dataset", DATASET].commits[-1].files}
    lfs = {path for path, entry in stored.items() if entry.is_lfs}
    assert lfs == {"model.safetensors", "large.txt", "images/a.png", "modules.parquet"}
    assert len([request for request in hub.requests if request.method == "PUT"]) == len(lfs)


def test_a_second_push_sends_and_deletes_only_what_changed(hub: HubServer, tmp_path: Path, model_folder: Path) -> None:
    push(hub, tmp_path, ("model", MODEL, model_folder))
    first = hub.repos["model", MODEL].commits[-1]
    push(hub, tmp_path, ("model", MODEL, model_folder))
    assert hub.repos["model", MODEL].commits[-1] == first  # nothing to commit
    (model_folder / "model.safetensors").write_bytes(b"new")
    (model_folder / "empty.txt").unlink()
    hub.requests.clear()
    code = """
api.upload_folder(repo_id=args["id"], folder_path=args["folder"], delete_patterns="*")
old = hf_hub_download(args["id"], "model.safetensors", revision=args["first"])
out = [old, [file.rfilename for file in api.model_info(args["id"], files_metadata=True).siblings],
       [file.path for file in api.list_repo_tree(args["id"])],
       [file.path for file in api.list_repo_tree(args["id"], "sub dir")],
       [file.path for file in api.get_paths_info(args["id"], ["README.md", "sub dir", "none"])]]
"""
    answer = client(hub, tmp_path, code, "write", id=MODEL, folder=model_folder, first=first.id)
    old, siblings, root, inside, info = answer
    assert len([request for request in hub.requests if request.method == "PUT"]) == 1
    assert hub.read("model", MODEL, "model.safetensors") == b"new"
    assert Path(old).read_bytes() == hub.read("model", MODEL, "model.safetensors", first.id) != b"new"
    files = [".gitattributes", "README.md", "large.txt", "model.safetensors", "sub dir/config é.json"]
    assert hub.files("model", MODEL) == siblings == files
    assert sorted(root) == [".gitattributes", "README.md", "large.txt", "model.safetensors", "sub dir"]
    assert inside == ["sub dir/config é.json"]
    assert info == ["README.md", "sub dir"]


def test_patterns_fetch_only_the_files_they_name(hub: HubServer, tmp_path: Path, dataset_folder: Path) -> None:
    push(hub, tmp_path / "a", ("dataset", DATASET, dataset_folder))
    hub.requests.clear()
    pull = "out = snapshot_download(args['id'], repo_type='dataset', allow_patterns=['*.parquet', 'README.md'])"
    snapshot = client(hub, tmp_path / "b", pull, id=DATASET)
    assert fetched(hub) == set(tree(Path(snapshot))) == {"README.md", "modules.parquet"}


def test_tokens_decide_who_reads_and_who_writes(hub: HubServer, tmp_path: Path, model_folder: Path) -> None:
    push(hub, tmp_path / "a", ("model", MODEL, model_folder), private=True)
    assert hub.repos["model", MODEL].private
    commits = list(hub.repos["model", MODEL].commits)
    code = """
out = {}
for token in (False, "wrong", "other", "read"):
    out[str(token)] = [
        attempt(snapshot_download, args["id"], token=token, allow_patterns="README.md"),
        attempt(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=args["id"], token=token),
        attempt(api.create_repo, "ada/new", token=token),
        attempt(api.whoami, token=token),
    ]
"""
    answers = client(hub, tmp_path / "b", code, id=MODEL)
    seen = {
        token: [(answer.get("error"), answer.get("status")) for answer in given] for token, given in answers.items()
    }
    hidden, refused = "RepositoryNotFoundError", "HfHubHTTPError"
    assert seen["False"] == [(hidden, 401), (hidden, 401), (refused, 401), ("ValueError", None)]
    assert seen["wrong"] == [(refused, 401)] * 4
    assert seen["other"] == [(hidden, 404), (hidden, 404), (refused, 403), (None, None)]
    assert seen["read"] == [(None, None), (refused, 403), (refused, 403), (None, None)]
    assert "Invalid credentials in Authorization header" in answers["wrong"][0]["message"]
    assert "write token" in answers["read"][1]["message"]
    assert (hub.repos["model", MODEL].commits, len(hub.repos)) == (commits, 1)


def test_what_is_missing_is_named_by_its_own_error(hub: HubServer, tmp_path: Path, model_folder: Path) -> None:
    push(hub, tmp_path / "a", ("model", MODEL, model_folder))
    code = """
out = [
    attempt(snapshot_download, "ada/none"),
    attempt(snapshot_download, args["id"], repo_type="dataset"),
    attempt(snapshot_download, args["id"], revision="none"),
    attempt(hf_hub_download, args["id"], "README.md", revision="0" * 40),
    attempt(hf_hub_download, args["id"], "none.txt"),
    attempt(api.create_repo, args["id"], token="write"),
    attempt(api.create_commit, args["id"], [CommitOperationDelete("none.txt")], commit_message="m", token="write"),
    attempt(api.create_commit, args["id"], [CommitOperationAdd("x", b"x")], commit_message="m", token="write",
            parent_commit="0" * 40),
]
"""
    answers = client(hub, tmp_path / "b", code, id=MODEL)
    assert [(answer.get("error"), answer.get("status")) for answer in answers] == [
        ("RepositoryNotFoundError", 404),
        ("RepositoryNotFoundError", 404),
        ("RevisionNotFoundError", 404),
        ("RevisionNotFoundError", 404),
        ("RemoteEntryNotFoundError", 404),
        ("HfHubHTTPError", 409),
        ("RemoteEntryNotFoundError", 404),
        ("HfHubHTTPError", 412),
    ]
    assert len(hub.repos["model", MODEL].commits) == 2


def test_the_client_outlives_one_500_of_an_upload_and_of_a_head(
    hub: HubServer, tmp_path: Path, model_folder: Path
) -> None:
    hub.fail_next("PUT", "/lfs/", 500)
    push(hub, tmp_path / "a", ("model", MODEL, model_folder))
    hub.fail_next("HEAD", "model.safetensors", 500)
    hub.fail_next("GET", "large.txt", 500)
    code = """
out = [attempt(hf_hub_download, args["id"], "model.safetensors")]
out += [attempt(hf_hub_download, args["id"], "large.txt") for _ in range(2)]
"""
    weights, failed, second = client(hub, tmp_path / "b", code, id=MODEL)
    assert Path(weights["value"]).read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert (failed["error"], failed["status"]) == ("HfHubHTTPError", 500)  # a GET of a file is not tried again
    assert Path(second["value"]).read_bytes() == (model_folder / "large.txt").read_bytes()
    assert [request.method for request in hub.requests if request.status == 500] == ["PUT", "HEAD", "GET"]


def test_a_dropped_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    # The client writes down what it has in pieces of 10 MiB: a shorter file would start again from nothing.
    folder = tmp_path / "model"
    folder.mkdir()
    weights = random.Random(0).randbytes(22 * 2**20)
    (folder / "model.safetensors").write_bytes(weights)
    push(hub, tmp_path / "a", ("model", MODEL, folder))
    hub.fail_next("GET", "model.safetensors", "drop")
    got = client(hub, tmp_path / "b", "out = hf_hub_download(args['id'], 'model.safetensors')", id=MODEL)
    assert Path(got).read_bytes() == weights
    gets = [request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert [(get.status, get.bytes_sent) for get in gets] == [(200, 11 * 2**20), (206, 12 * 2**20)]


def test_a_truncated_file_is_refused_and_an_altered_one_is_not(
    hub: HubServer, tmp_path: Path, model_folder: Path
) -> None:
    push(hub, tmp_path / "a", ("model", MODEL, model_folder))
    hub.fail_next("GET", "model.safetensors", "truncate")
    hub.fail_next("GET", "large.txt", "flip")
    code = 'out = [attempt(hf_hub_download, args["id"], name) for name in ("model.safetensors", "large.txt")]'
    truncated, altered = client(hub, tmp_path / "b", code, id=MODEL)
    assert truncated["error"] == "OSError"
    assert "should be of size 200000 but has size 100000" in truncated["message"]
    pairs = zip(Path(altered["value"]).read_bytes(), (model_folder / "large.txt").read_bytes(), strict=True)
    assert sum(got != sent for got, sent in pairs) == 1


def test_a_dropped_upload_ends_in_an_error_and_no_commit(hub: HubServer, tmp_path: Path, model_folder: Path) -> None:
    hub.fail_next("PUT", "/lfs/", "drop", times=100)
    # The client tries six times, and would wait 23 s in between.
    code = f"""
time.sleep = lambda seconds: None
out = attempt(exec, {PUSH!r})
"""
    failed = client(hub, tmp_path, code, "write", pushes=[("model", MODEL, model_folder)])
    assert failed["error"] == "RuntimeError"
    assert "Error while uploading" in failed["message"]
    assert {request.status for request in hub.requests if request.method == "PUT"} == {0}
    assert hub.files("model", MODEL) == [".gitattributes"]
    assert len(hub.repos["model", MODEL].commits) == 1


def test_an_upload_that_is_not_what_was_announced_is_refused(hub: HubServer, tmp_path: Path) -> None:
    client(hub, tmp_path, "out = str(api.create_repo('ada/detector'))", "write")
    oid = "0" * 64
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)

    def ask(method: str, path: str, body: bytes) -> tuple[int, Any]:
        connection.request(method, path, body, {"Authorization": "Bearer write"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    batch = json.dumps({"objects": [{"oid": oid, "size": 5}]}).encode()
    status, granted = ask("POST", f"/{MODEL}.git/info/lfs/objects/batch", batch)
    upload = granted["objects"][0]["actions"]["upload"]["href"]
    assert (status, ask("PUT", upload.removeprefix(hub.url), b"hello")[0]) == (200, 400)
    lines = [{"key": "header", "value": {"summary": "m"}}, {"key": "lfsFile", "value": {"path": "a.bin", "oid": oid}}]
    assert ask("POST", f"/api/models/{MODEL}/commit/main", "\n".join(map(json.dumps, lines)).encode())[0] == 400
    assert hub.files("model", MODEL) == [".gitattributes"]
    connection.close()


def test_datasets_opens_the_table_that_the_card_names(hub: HubServer, tmp_path: Path, dataset_folder: Path) -> None:
    push(hub, tmp_path / "a", ("dataset", DATASET, dataset_folder), private=True)
    hub.requests.clear()
    code = """
import datasets
table = datasets.load_dataset(args["id"], split="train")
out = table.to_list()
"""
    rows = client(hub, tmp_path / "b", code, "read", id=DATASET)
    assert rows == [{"name": "a", "size": 10}, {"name": "b", "size": 16}, {"name": "c", "size": 20}]
    assert fetched(hub) == {"README.md", "modules.parquet"}


@pytest.mark.parametrize(("method", "how"), [("HEAD", "drop"), ("PUT", "flip"), ("GET", "burn")])
def test_a_failure_that_makes_no_sense_is_refused(hub: HubServer, method: str, how: str) -> None:
    with pytest.raises(ValueError, match="cannot fail"):
        hub.fail_next(method, "/", how)


def test_the_environment_holds_no_other_token_or_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    environment = hub.environment(tmp_path)
    assert {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}.isdisjoint(environment)
    code = "from huggingface_hub import constants, get_token; out = [get_token(), constants.HF_HUB_CACHE]"
    assert client(hub, tmp_path, code) == [None, str(tmp_path / "hf-home" / "hub")]
    assert client(hub, tmp_path, code, "read")[0] == "read"
