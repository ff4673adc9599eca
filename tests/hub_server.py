"""A Hugging Face Hub on loopback, for tests that point `HF_ENDPOINT` at it.

It speaks what `huggingface_hub` and `datasets` call to create a repo, upload to it, list it and download
from it over plain HTTP and git LFS, keeps what it is given in one folder, logs every request, and fails on
demand. It knows model and dataset repos with one branch, `main`, and the commit hashes on it.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".bin", ".npy", ".npz", ".parquet", ".png", ".pt", ".safetensors", ".zip")
LFS_ABOVE_BYTES = 1_000_000
# As on the real Hub, a new repo has one commit of this one file.
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class User(NamedTuple):
    """Whom a token belongs to, and whether that token may write in the user's namespace."""

    name: str
    can_write: bool = True


class Request(NamedTuple):
    """An answered request. Status 0: the connection was closed without an answer."""

    method: str
    path: str
    status: int
    bytes_sent: int


class Entry(NamedTuple):
    """A file of a commit; `oid` is git's name for it (for an LFS file, for its pointer)."""

    sha256: str
    size: int
    is_lfs: bool
    oid: str


class Commit(NamedTuple):
    id: str
    message: str
    files: dict[str, Entry]


class Repo(NamedTuple):
    private: bool
    commits: list[Commit]


class Reply(NamedTuple):
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class HubError(Exception):
    """An error answer; by its `X-Error-Code` the client picks the exception to raise."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.reply = Reply(json.dumps({"error": message}).encode(), status, headers)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def find_commit(repo: Repo, revision: str) -> Commit:
    for commit in reversed(repo.commits):
        if revision in ("main", commit.id):
            return commit
    raise HubError(404, "Invalid rev id", "RevisionNotFound")


class HubServer:
    """The server and what it stores, as a context manager. `tokens` maps every valid token to its user."""

    def __init__(self, root: Path, tokens: dict[str, User]) -> None:
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, str, int | str, dict[str, str]]] = []
        self.gated: set[tuple[str, str]] = set()  # repos whose files nobody is granted
        self.renamed: dict[tuple[str, str], str] = {}  # old key -> new id
        self.lock = threading.RLock()
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, tmp_path: Path, token: str | None = None) -> dict[str, str]:
        """This process's environment with this Hub, a cache under tmp_path, and no token but the given one."""
        ambient = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ambient)}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(tmp_path / "hf-home")} | ({"HF_TOKEN": token} if token else {})
        # Without Xet, which is a service of its own, uploads take the LFS route.
        disabled = ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        ours |= {f"HF_HUB_DISABLE_{feature}": "1" for feature in disabled}
        return kept | ours | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    @contextmanager
    def used_here(self, cache: Path, token: str | None = None, **constants: Any) -> Iterator[None]:
        """Have this process, whose client has long read its environment, use this Hub as `environment` says.

        Further constants of the client may be given: `HF_HUB_OFFLINE=True`.
        """
        import huggingface_hub

        given = {"ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True}
        given |= {"HF_TOKEN_PATH": str(cache / "token"), "HF_HUB_OFFLINE": False} | constants
        given["HUGGINGFACE_CO_URL_TEMPLATE"] = given["ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        with (
            mock.patch.multiple(huggingface_hub.constants, **given),
            mock.patch.object(huggingface_hub.hf_api.api, "endpoint", given["ENDPOINT"]),  # which is made at import
            mock.patch.dict(os.environ, kept | ({"HF_TOKEN": token} if token else {}), clear=True),
        ):
            yield

    def fail_next(self, method: str, path_regex: str, how: int | str, times: int = 1, **headers: str) -> None:
        """Spoil the next `times` requests of this method whose path (unquoted, without query) matches.

        A number answers with that status, and with the headers: `Retry_After="3"`. "lose" does as it is asked and
        closes the connection without an answer. "drop" closes the connection half way: through the answer to a
        GET, through the body of a POST or PUT, which then gets no answer. For a GET, "truncate" serves the
        first half as if it were all, and "flip" serves everything with one byte altered.
        """
        cuts = {"GET": ("drop", "truncate", "flip"), "POST": ("drop", "lose"), "PUT": ("drop",)}
        if not isinstance(how, int) and how not in cuts.get(method, ()):
            raise ValueError(f"a {method} cannot fail by {how!r}")
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.lock:
            self.faults += [(method, path_regex, how, named)] * times

    def rename(self, repo_type: str, old: str, new: str) -> None:
        """Give a repo another id; whoever asks for the old one is sent there, as by the real Hub."""
        self.repos[repo_type, new] = self.repos.pop((repo_type, old))
        self.renamed[repo_type, old] = new

    def files(self, repo_type: str, repo_id: str) -> list[str]:
        """The paths on main, among them the `.gitattributes` that every repo starts with."""
        return sorted(self.repos[repo_type, repo_id].commits[-1].files)

    def read(self, repo_type: str, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The stored content of a file."""
        entry = find_commit(self.repos[repo_type, repo_id], revision).files[path]
        return (self.blobs / entry.sha256).read_bytes()

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        part = self.blobs / f"{sha256}.{secrets.token_hex(4)}"
        part.write_bytes(content)
        part.replace(self.blobs / sha256)  # so that a blob which is there is whole
        return sha256

    def store_regular(self, content: bytes) -> Entry:
        return Entry(self.store(content), len(content), False, git_oid(content))


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # clients open many connections at once, and a full queue stalls them for a second
    hub: HubServer


_API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/((?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/validate-yaml": "validate_card",
    r"POST /api/repos/create": "create",
    r"GET /api/datasets": "list_datasets",
    rf"GET {_API}(/revision/{_REVISION})?": "info",
    rf"GET {_API}/tree/{_REVISION}(/(?P<path>.+))?": "tree",
    rf"POST {_API}/paths-info/{_REVISION}": "paths_info",
    rf"(GET|HEAD) {_WEB}/resolve/{_REVISION}/(?P<path>.+)": "resolve",
    rf"POST {_API}/preupload/{_REVISION}": "preupload",
    rf"POST {_WEB}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<sha256>[0-9a-f]{64})": "lfs_put",
    rf"POST {_API}/commit/{_REVISION}": "commit",
}


class _Handler(BaseHTTPRequestHandler):
    """One request: `answer` finds its route, and the method that the route names makes the reply."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for the first
    server: _Server

    def answer(self) -> None:
        self.hub, self.target, url = self.server.hub, self.path, urlsplit(self.path)
        self.path, self.query = unquote(url.path), parse_qs(url.query)
        fault, headers = self.take_fault()
        length = int(self.headers.get("Content-Length", 0))
        # All of it, even for an error: closing on unread data could take the answer away from the client.
        self.body = self.rfile.read(length // 2 if fault == "drop" else length)
        if len(self.body) < length:
            self.log(0, 0)
            self.close_connection = True
            return
        try:
            if isinstance(fault, int):
                raise HubError(fault, "Failed on demand", headers=headers)
            reply = self.route(f"{self.command} {url.path}")
        except HubError as error:
            reply = error.reply
        if fault == "lose":
            self.log(0, 0)
            self.close_connection = True
            return
        self.send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def take_fault(self) -> tuple[int | str | None, dict[str, str]]:
        with self.hub.lock:
            for number, (method, path_regex, how, headers) in enumerate(self.hub.faults):
                if method == self.command and re.search(path_regex, self.path):
                    del self.hub.faults[number]
                    return how, headers
        return None, {}

    def route(self, request: str) -> Reply:
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                self.at = {group: unquote(value) for group, value in match.groupdict(default="").items()}
                self.key = self.at.get("kind", "").removesuffix("s") or "model", self.at.get("id", "")
                if new := self.hub.renamed.get(self.key):
                    return Reply(b"", 307, {"Location": self.target.replace(self.key[1], new, 1)})
                reply = getattr(self, name)()
                return reply if isinstance(reply, Reply) else Reply(json.dumps(reply).encode())
        raise HubError(404, "Not found")

    def send(self, reply: Reply, fault: int | str | None) -> None:
        body, middle = reply.body, len(reply.body) // 2
        if fault == "truncate":
            body = body[:middle]
        if fault == "flip":
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        sent = b"" if self.command == "HEAD" else body[:middle] if fault == "drop" else body
        self.log(reply.status, len(sent))  # first, so that whoever has the answer finds it in the log
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection |= fault == "drop"

    def log(self, status: int, bytes_sent: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, status, bytes_sent))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the requests are in the log."""

    def user(self) -> User | None:
        """Whose token the request carries. As on the real Hub, a wrong one fails even where none is needed."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def known_user(self) -> User:
        if (user := self.user()) is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def check_writer(self, namespace: str) -> None:
        user = self.known_user()
        if not user.can_write or user.name != namespace:
            raise HubError(403, "This takes a write token of the namespace")

    def repo(self, write: bool = False) -> Repo:
        user, namespace = self.user(), self.key[1].split("/")[0]
        repo = self.hub.repos.get(self.key)
        if repo is None or (repo.private and (user is None or user.name != namespace)):
            # To others a private repo is missing; 401, without any token, says that one might help.
            raise HubError(401 if repo and user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_writer(namespace)
        return repo

    def head(self, write: bool = False) -> Commit:
        """The commit that the request is about."""
        return find_commit(self.repo(write), self.at["revision"] or "main")

    def page_url(self) -> str:
        return f"{self.hub.url}/{'datasets/' if self.key[0] == 'dataset' else ''}{self.key[1]}"

    def whoami(self) -> dict[str, Any]:
        user = self.known_user()
        token = {"displayName": "test", "role": "write" if user.can_write else "read"}
        return {"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": token}}

    def validate_card(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}  # the standard library has no YAML: any card passes

    def create(self) -> Reply:
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or self.known_user().name
        self.check_writer(namespace)
        self.key = wanted.get("type", "model"), f"{namespace}/{wanted['name']}"
        if self.key[0] not in ("model", "dataset"):
            raise HubError(400, "Only model and dataset repos")
        about = {"url": self.page_url(), "name": self.key[1]}
        with self.hub.lock:
            if self.key in self.hub.repos:  # the client that says exist_ok reads the url from this, too
                return Reply(json.dumps(about | {"error": "You already created this repo"}).encode(), 409)
            first = Commit(secrets.token_hex(20), "initial commit", {})
            first.files[".gitattributes"] = self.hub.store_regular(GITATTRIBUTES)
            self.hub.repos[self.key] = Repo(wanted.get("visibility") == "private", [first])
        return Reply(json.dumps(about).encode())

    def list_datasets(self) -> list[dict[str, Any]]:
        """Those of an author with a tag, which is looked for as a line of the card: the library has no YAML."""
        (author,), (tag,) = self.query["author"], self.query["filter"]
        found, user = [], self.user()
        for (kind, repo_id), repo in self.hub.repos.items():
            if kind != "dataset" or not repo_id.startswith(f"{author}/"):
                continue
            card = repo.commits[-1].files.get("README.md")
            is_tagged = card and f"- {tag}\n" in self.hub.read(kind, repo_id, "README.md").decode()
            if is_tagged and not (repo.private and (user is None or user.name != author)):
                found.append({"id": repo_id, "private": repo.private, "tags": [tag]})
        return found

    def listing(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Every file and folder of a commit by path, in the words of the tree."""
        found: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(commit.files.items()):
            for parent in map(str, list(PurePosixPath(path).parents)[-2::-1]):
                found[parent] = {"type": "directory", "path": parent, "oid": git_oid(parent.encode()), "size": 0}
            found[path] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
            if entry.is_lfs:
                pointer_size = len(lfs_pointer(entry.sha256, entry.size))
                found[path]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
                found[path]["lfs"]["sha256"] = entry.sha256  # what the repo info calls the same
        return found

    def info(self) -> dict[str, Any]:
        commit = self.head()
        files = [shown for shown in self.listing(commit).values() if shown["type"] == "file"]
        siblings = [{"rfilename": file["path"]} for file in files]
        if "blobs" in self.query:
            siblings = [file | {"rfilename": file["path"], "blobId": file["oid"]} for file in files]
        about = {"id": self.key[1], "author": self.key[1].split("/")[0], "sha": commit.id, "siblings": siblings}
        return about | {"private": self.repo().private, "gated": False, "disabled": False, "tags": []}

    def tree(self) -> list[dict[str, Any]]:
        listing, folder = self.listing(self.head()), self.at["path"]
        if folder and listing.get(folder, {}).get("type") != "directory":
            raise HubError(404, "Entry not found", "EntryNotFound")
        prefix, deep = f"{folder}/" if folder else "", self.query["recursive"] == ["true"]
        inside = [path for path in listing if path.startswith(prefix)]
        return [listing[path] for path in inside if deep or "/" not in path.removeprefix(prefix)]

    def paths_info(self) -> list[dict[str, Any]]:
        listing, paths = self.listing(self.head()), parse_qs(self.body.decode()).get("paths", [])
        return [listing[path] for path in paths if path in listing]

    def resolve(self) -> Reply:
        commit = self.head()
        if self.key in self.hub.gated:
            raise HubError(403, "Access to this repo is restricted", "GatedRepo")
        if (entry := commit.files.get(self.at["path"])) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.sha256 if entry.is_lfs else entry.oid}"'}
        if entry.is_lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
        content = (self.hub.blobs / entry.sha256).read_bytes()
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return Reply(content, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or entry.size) + 1, entry.size)
        if start >= end:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{entry.size}"})
        return Reply(content[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{entry.size}"})

    def preupload(self) -> dict[str, Any]:
        present, files = self.head(write=True).files, []
        for wanted in json.loads(self.body)["files"]:
            is_lfs = wanted["path"].endswith(LFS_SUFFIXES) or wanted["size"] > LFS_ABOVE_BYTES
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False})
            if old := present.get(wanted["path"]):
                # Told what is there, the client leaves unchanged files out of its commit.
                files[-1]["oid"] = old.sha256 if old.is_lfs else old.oid
        return {"files": files}

    def lfs_batch(self) -> dict[str, Any]:
        self.repo(write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if not (self.hub.blobs / wanted["oid"]).exists():
                objects[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self) -> dict[str, Any]:
        """An upload that a batch has granted; as to a signed URL, the client sends no token here."""
        if hashlib.sha256(self.body).hexdigest() != self.at["sha256"]:
            raise HubError(400, "The content does not have the announced sha256")
        self.hub.store(self.body)
        return {}

    def commit(self) -> dict[str, Any]:
        """All of the operations or, if one of them fails, none."""
        repo = self.repo(write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        message, parent = header["value"]["summary"], header["value"].get("parentCommit")
        if self.at["revision"] != "main" or "create_pr" in self.query:
            raise HubError(400, "Commits go to main")
        with self.hub.lock:
            if parent not in (None, repo.commits[-1].id):
                raise HubError(412, "The branch has moved on from the parent commit")
            files = dict(repo.commits[-1].files)
            for operation in operations:
                self.apply(files, operation["key"], operation["value"])
            repo.commits.append(Commit(secrets.token_hex(20), message, files))
            commit_id = repo.commits[-1].id
        return {"success": True, "commitOid": commit_id, "commitUrl": f"{self.page_url()}/commit/{commit_id}"}

    def apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path, oid = value["path"], value.get("oid", "")
        if key == "file":
            files[path] = self.hub.store_regular(base64.b64decode(value["content"]))
        elif key == "lfsFile" and (self.hub.blobs / oid).is_file():
            size = (self.hub.blobs / oid).stat().st_size
            files[path] = Entry(oid, size, True, git_oid(lfs_pointer(oid, size)))
        elif key == "lfsFile":
            raise HubError(400, "The LFS pointer points to a file that was not uploaded")
        elif key != "deletedFile":
            raise HubError(400, f"No such operation: {key}")
        elif files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
