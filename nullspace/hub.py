"""The Hugging Face Hub: fetching the files of a bundle, and publishing bundles and LoRAs."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nullspace.errors import NullSpaceError, reason, status
from nullspace.names import CARD_NAME


def fetch_files(name_or_path, names, revision=None, token=None, force=False):
    """The folder that holds the named files of a bundle: the given one, or a snapshot of a Hub dataset repository.

    Args:
        force (`bool`): download again what the cache holds.

    Raises:
        NullSpaceError: if they are not there.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise NullSpaceError(f"{folder} has no {name}: it is not a bundle, or not a whole one.")
        return folder
    where = f"The Hub dataset {name_or_path}" + (f" at revision {revision}" if revision else "")
    options = {"repo_type": "dataset", "revision": revision, "token": token, "force_download": force}
    try:
        if len(names) > 1:
            folder = Path(snapshot_download(name_or_path, allow_patterns=names, **options))
        for name in names:
            # snapshot_download passes over a file that is missing there and, where the Hub refuses or does not answer,
            # returns what the cache has of the snapshot: asked for alone, a file comes or says why not.
            if not (folder / name).is_file():
                folder = Path(hf_hub_download(name_or_path, name, **options)).parent
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
            f"{where} is not in the local cache and cannot be downloaded now ({reason(error)})."
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
        raise NullSpaceError(f"{where} cannot be downloaded ({reason(error)}); try again.") from error


def _is_model(name, token=None):
    try:
        return HfApi(token=token).repo_exists(name, repo_type="model")
    except Exception:
        return False  # it only makes an error clearer, and must not raise one of its own


def base_license(name_or_path, token=None):
    """The licence named in a model's card, or None where that is not known."""
    card = Path(name_or_path) / CARD_NAME
    if Path(name_or_path).is_dir() and not card.is_file():
        return None
    try:
        return ModelCard.load(card if card.is_file() else name_or_path, token=token).data.license
    except Exception:
        return None  # no card, no metadata in it or no network: unknown, which is no error


def hub_repository(repo_id, folder, token=None, retry="run this command again"):
    """The full id of the repository to push to: the given one, or the folder's name under the user's account.

    Args:
        retry (`str`): what to do once that is mended, for the error.

    Raises:
        NullSpaceError: if nobody is logged in, or the token is refused or cannot write.
    """
    login = f"log in with `hf auth login` or pass --hub_token, then {retry}"
    try:
        account = HfApi(token=token).whoami()
    except LocalTokenNotFoundError as error:
        raise NullSpaceError(f"--push_to_hub needs a token of the Hub; {login}") from error
    except Exception as error:
        if status(error) in (401, 403):
            raise NullSpaceError(f"The Hub refuses the token ({reason(error)}); {login}") from error
        raise NullSpaceError(f"The Hub cannot be reached ({reason(error)}); once it can, {retry}") from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise NullSpaceError(f"--push_to_hub needs a token that can write, and this one can only read; {login}")
    repo_id = repo_id or Path(folder).resolve().name
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def create_repository(repo_id, repo_type, private=None, token=None, retry="run this command again"):
    """Create a Hub repository, or find it there.

    Args:
        retry (`str`): what to do once that is mended, for the error.

    Raises:
        NullSpaceError: if that is not allowed or the Hub does not answer.
    """
    try:
        HfApi(token=token).create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
    except Exception as error:
        raise NullSpaceError(
            f"The Hub repository {repo_id} cannot be created ({reason(error)}); once it can, {retry}"
        ) from error


def push_folder(repo_id, repo_type, folder, patterns, message, retry, token=None, outdated=None):
    """Upload files of a folder to a Hub repository in one commit and return the repository's address.

    Args:
        patterns (`list[str]`): which files, as in huggingface_hub's `allow_patterns`.
        outdated (`str`, *optional*): pattern of the files there to delete when they are not among these.
        message (`str`): of the commit.
        retry (`str`): the command that tries again, for the error.

    Raises:
        NullSpaceError: if the upload fails, for whatever reason; the folder is as it was.
    """
    try:
        commit = HfApi(token=token).upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=patterns,
            delete_patterns=outdated,
            commit_message=message,
        )
    except Exception as error:  # whatever it is, the user must learn how to push later
        raise NullSpaceError(
            f"Everything is whole in {folder}, but was not pushed to {repo_id} ({reason(error)}); push it with: {retry}"
        ) from error
    return commit.repo_url
