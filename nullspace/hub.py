"""The Hugging Face Hub: fetching the files of a bundle, and publishing bundles and LoRAs."""

import logging
import os
import re
import time
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nullspace.checks import token_fault
from nullspace.errors import NETWORK, NullSpaceError, answer, causes, kinds, listed, reason, status
from nullspace.names import CARD_NAME
from nullspace.terminal import printable


logger = logging.getLogger(__name__)

NAMED_BY = {"dataset": "--hub_dataset_id", "model": "--hub_model_id"}
PAUSES = (1, 4, 16)  # seconds before asking the Hub again
LONGEST_PAUSE = 300  # seconds: a Hub that wants to be left alone for longer is not waited for
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)  # 409 and 412: somebody else pushed meanwhile
CLONES = (".git", ".cache/huggingface")  # what `git clone` and `hf download --local-dir` leave in a folder


class PrintableFilter(logging.Filter):
    """Of the client, which warns of requests that fail with their whole addresses."""

    def filter(self, record):
        record.msg, record.args = printable(record.getMessage()), ()
        return True


logging.getLogger("huggingface_hub.utils._http").addFilter(PrintableFilter())


# ---- Patience --------------------------------------------------------------------------------------------------------


def patiently(ask, where, unreachable=False):
    """What `ask()` returns; where the Hub's next answer may be another one, it is asked again, after a pause.

    Each pause is announced on screen. What the Hub says in `Retry-After` is heeded.

    Args:
        where (`str`): the repository, for the announcement.
        unreachable (`bool`): whether to wait for a Hub that cannot be reached, too: after hours of work, but not
            before it, when the user is better told at once.
    """
    for number, pause in enumerate(PAUSES, 1):
        try:
            return ask()
        except Exception as error:
            wait = _pause(error, pause, unreachable)
            if wait is None:
                raise
            again = f"trying again in {wait} s ({number} of {len(PAUSES)})"
            logger.warning(printable(f"The Hub fails on {where} ({reason(error)}); {again}."))
            time.sleep(wait)
    return ask()


def _pause(error, pause, unreachable):
    """Seconds to wait after an error before asking again, or None if that would not help."""
    named = kinds(error)
    if "OfflineModeIsEnabled" in named or "RuntimeError" in named:  # the latter: uploads, which the client has retried
        return None
    if (response := answer(error)) is not None:
        asked = response.headers.get("Retry-After", "")
        wait = max(pause, int(asked)) if asked.isdigit() else pause
        return wait if response.status_code in TRANSIENT and wait <= LONGEST_PAUSE else None
    # One that never answers has been asked several times by the client
    if named & {"ConnectError", "TimeoutException", "ConnectionRefusedError", "gaierror"}:
        return pause if unreachable else None
    is_cut = named & NETWORK or any("onsistency check failed" in str(one) for one in causes(error))
    return pause if is_cut else None


# ---- Fetching --------------------------------------------------------------------------------------------------------


def fetch_files(name_or_path, names, revision=None, token=None, force=False):
    """The folder that holds the named files of a bundle: the given one, or a snapshot of a Hub dataset repository.

    Args:
        force (`bool`): download again what the cache holds.

    Raises:
        NullSpaceError: if they are not there.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if revision:
            raise NullSpaceError(
                f"The revision {revision} is of a bundle on the Hub, and {folder} is a folder; leave it out."
            )
        for name in names:
            if not (folder / name).is_file():
                raise NullSpaceError(f"{folder} has no {name}: it is not a bundle, or not a whole one.")
        return folder
    where = f"The Hub dataset {name_or_path}" + (f" at revision {revision}" if revision else "")
    asked = f"dataset {name_or_path}"
    options = {"repo_type": "dataset", "revision": revision, "token": token, "force_download": force}
    try:
        if len(names) > 1:
            folder = Path(patiently(lambda: snapshot_download(name_or_path, allow_patterns=names, **options), asked))
        for name in names:
            # snapshot_download passes over a file that is missing there and, where the Hub refuses or does not answer,
            # returns what the cache has of the snapshot: asked for alone, a file comes or says why not.
            if not (folder / name).is_file():
                folder = Path(patiently(lambda name=name: hf_hub_download(name_or_path, name, **options), asked)).parent
        return folder
    except HFValidationError as error:
        raise NullSpaceError(f"There is no folder {name_or_path}, and it is no Hub id either.") from error
    except GatedRepoError as error:
        raise NullSpaceError(f"{where} is gated; accept its conditions on the Hub and log in.") from error
    except RepositoryNotFoundError as error:
        if _is_model(name_or_path, token):
            raise NullSpaceError(
                f"{name_or_path} is a model on the Hub, not a dataset; give the repository of its bundle."
            ) from error
        raise NullSpaceError(
            f"There is no folder {name_or_path} and no Hub dataset of that name that you may read; if it is private, "
            "log in with `hf auth login` or pass --hub_token."
        ) from error
    except RevisionNotFoundError as error:
        raise NullSpaceError(f"The Hub dataset {name_or_path} has no revision {revision or 'main'}.") from error
    except LocalEntryNotFoundError as error:
        raise NullSpaceError(
            f"{where} is no folder here, not in the local cache and cannot be downloaded now ({reason(error)}); "
            "nullspace_utils.py find lists the bundles of a model."
        ) from error
    except EntryNotFoundError as error:
        raise NullSpaceError(f"{where} has no {name}: it is not a bundle, or not a whole one.") from error
    except Exception as error:  # among them those of the HTTP library, which differ between versions of huggingface_hub
        if isinstance(error, OSError) and error.filename:
            raise NullSpaceError(
                f"{where} cannot be stored in the cache ({reason(error)}); set HF_HOME to a folder that can be written."
            ) from error
        if status(error) in (401, 403):
            raise NullSpaceError(
                f"{where} cannot be downloaded ({reason(error)}); log in again with `hf auth login` or pass another "
                "--hub_token."
            ) from error
        if kinds(error) & NETWORK:
            raise NullSpaceError(
                f"{where} cannot be downloaded ({reason(error)}); check the network and run this command again: what "
                "has come already is kept."
            ) from error
        raise NullSpaceError(
            f"{where} cannot be downloaded ({reason(error)}); run this command again later."
        ) from error


def _is_model(name, token=None):
    try:
        return HfApi(token=token).repo_exists(name, repo_type="model")
    except Exception:
        return False  # it only makes an error clearer, and must not raise one of its own


def base_license(name_or_path, token=None):
    """The licence named in a model's card, or None where that is not known."""
    card = Path(name_or_path) / CARD_NAME
    if Path(name_or_path).exists() and not card.is_file():
        return None
    try:
        named = ModelCard.load(card if card.is_file() else name_or_path, token=token).data.license
    except Exception:
        return None  # no card, no metadata in it or no network: unknown, which is no error
    # Whatever else a stranger's card says there is not passed on
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]{1,64}", named) else None


# ---- Publishing ------------------------------------------------------------------------------------------------------


def hub_repository(repo_id, folder, repo_type, token=None, retry="run this command again"):
    """The full id of the repository to push to: the given one, or the folder's name under the user's account.

    Args:
        retry (`str`): what to do once that is mended, for the error.

    Raises:
        NullSpaceError: if nobody is logged in, the token is refused or cannot write, or the folder was cloned and no
            id is given.
    """
    flag = NAMED_BY[repo_type]
    if repo_id is None and (mark := clone_mark(folder)):
        raise NullSpaceError(
            f"{folder} was cloned from a repository ({mark}), over which it is not pushed unless you say so: name the "
            f"one to push to with {flag}."
        )
    login = f"log in with `hf auth login` or pass --hub_token, then {retry}"
    if token is None and (fault := token_fault(get_token() or "none")):
        raise NullSpaceError(f"The token that you are logged in with {fault}; {login}")
    try:
        account = patiently(HfApi(token=token).whoami, "your account")
    except LocalTokenNotFoundError as error:
        raise NullSpaceError(f"--push_to_hub needs a token of the Hub; {login}") from error
    except Exception as error:
        if status(error) in (401, 403):
            raise NullSpaceError(f"The Hub refuses the token ({reason(error)}); {login}") from error
        if status(error):
            raise NullSpaceError(
                f"The Hub does not say whose token this is ({reason(error)}); later, {retry}"
            ) from error
        raise NullSpaceError(f"The Hub cannot be reached ({reason(error)}); once it can, {retry}") from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise NullSpaceError(f"--push_to_hub needs a token that can write, and this one can only read; {login}")
    repo_id = repo_id or Path(folder).resolve().name
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def clone_mark(folder):
    """What shows that a folder is a copy of a repository, or None."""
    folder = Path(folder)
    if folder.resolve().parent.name == "snapshots":
        return "it is a snapshot in the Hub's cache"
    return next((f"it holds {name}" for name in CLONES if (folder / name).exists()), None)


def create_repository(repo_id, repo_type, private=None, token=None, retry="run this command again"):
    """Create a Hub repository, or find it there.

    Args:
        retry (`str`): what to do once that is mended, for the error.

    Raises:
        NullSpaceError: if that is not allowed, the Hub does not answer, the repository has been renamed, or it is
            there and public, but a private one is wanted.
    """
    api, flag, where = HfApi(token=token), NAMED_BY[repo_type], f"{repo_type} {repo_id}"
    try:
        try:  # first, since the name of a repository that was renamed could be taken again
            found = patiently(lambda: api.repo_info(repo_id, repo_type=repo_type), where)
        except RepositoryNotFoundError:
            patiently(
                lambda: api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True), where
            )
            return
    except HFValidationError as error:
        raise NullSpaceError(f"{repo_id} cannot be the name of a Hub repository; give another with {flag}.") from error
    except Exception as error:
        raise NullSpaceError(
            f"The Hub repository {repo_id} cannot be created ({reason(error)}); once it can, {retry}"
        ) from error
    if found.id.lower() != repo_id.lower():
        raise NullSpaceError(f"The Hub repository {repo_id} is now called {found.id}; pass {flag} {found.id}.")
    if private and not found.private:
        raise NullSpaceError(
            f"The Hub repository {repo_id} is there already and public, and --hub_private_repo does not change that; "
            f"make it private in its settings on the Hub, or name another with {flag}."
        )


def linked(folder, name):
    """Whether a file in a folder is reached through a link."""
    path = Path(folder) / name
    return any(part.is_symlink() for part in (path, *list(path.parents)[: len(Path(name).parts) - 1]))


def left_alone(folder, names):
    """The end of a sentence on what is in a folder but not among the published names, or ""; a hidden folder is one."""
    links, hidden, others = [], [], []
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(parent, name).relative_to(folder).as_posix()
            if (Path(parent) / name).is_symlink():
                links.append(path)
            elif name.startswith("."):
                hidden.append(path)
            elif name in files and path not in names:
                others.append(path)
        folders[:] = [name for name in folders if not name.startswith(".")]
    found = {"links": links, "hidden": hidden, "other files": others}
    counts = [f"{what}: {len(paths)} ({listed(paths, 3)})" for what, paths in found.items() if paths]
    return f"; not published from {folder}: {', '.join(counts)}" if counts else ""


def push_folder(repo_id, repo_type, folder, names, message, retry, token=None, outdated=None):
    """Upload files of a folder to a Hub repository in one commit and return a sentence on it.

    Args:
        names (`list[str]`): which files, relative to the folder. A link is none of them: it may lead anywhere.
        outdated (`str`, *optional*): pattern of the files there to delete when they are not among these.
        message (`str`): of the commit.
        retry (`str`): the command that tries again, for the error.

    Raises:
        NullSpaceError: if the upload fails, for whatever reason; the folder is as it was.
    """
    api, where = HfApi(token=token), f"{repo_type} {repo_id}"
    names = [name for name in names if not linked(folder, name)]

    def commit():
        """Anew each time: what the Hub has by now is not sent again, and a commit whose answer was lost is found."""
        there = api.repo_info(repo_id, repo_type=repo_type)
        old = [] if outdated is None else [file.rfilename for file in there.siblings]
        old = [name for name in old if fnmatchcase(name, outdated) and name not in names]
        return api.create_commit(
            repo_id=repo_id,
            repo_type=repo_type,
            operations=[
                *(CommitOperationAdd(name, Path(folder) / name) for name in names),
                *map(CommitOperationDelete, old),
            ],
            commit_message=message,
            parent_commit=there.sha,  # what was listed
        )

    try:
        url = patiently(commit, where, unreachable=True).repo_url
    except Exception as error:  # whatever it is, the user must learn how to push later
        login = "log in as somebody who may write there and " if status(error) in (401, 403) else ""
        raise NullSpaceError(
            f"Everything is whole in {folder}, but was not pushed to {repo_id} ({reason(error)}); {login}push it with: "
            f"{retry}"
        ) from error
    return printable(f"Pushed to {url}{left_alone(folder, names)}")
