"""Base models: fetching and loading what a folder or the Hub has, whole or not at all."""

from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nullspace.errors import NullSpaceError, cannot_be_had, listed, reason
from nullspace.hub import patiently


def download_model(name_or_path, revision=None, variant=None, token=None):
    """The folder of a base model: the given one, or the snapshot of a Hub model, with all that a pipeline of it loads.

    Raises:
        NullSpaceError: if it cannot be had.
    """
    from diffusers import DiffusionPipeline

    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        where = {"revision": revision, "variant": variant, "token": token}
        return Path(
            patiently(
                lambda: DiffusionPipeline.download(name_or_path, safety_checker=None, **where), f"model {name_or_path}"
            )
        )
    except Exception as error:
        raise NullSpaceError(cannot_be_had(name_or_path, error)) from error


def load_config(kind, part, name_or_path, revision=None, token=None):
    """The configuration of a model of class `kind` in the folder `part` of a base model: that file alone.

    Raises:
        NullSpaceError: if it cannot be had.
    """
    where = {"subfolder": part, "revision": revision, "token": token}
    try:
        return patiently(lambda: kind.load_config(name_or_path, **where), f"model {name_or_path}")
    except Exception as error:
        raise NullSpaceError(cannot_be_had(name_or_path, error)) from error


@contextmanager
def loading(name_or_path):
    """Say in a sentence why a base model cannot be loaded.

    Raises:
        NullSpaceError: if a file of it is missing or damaged.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise NullSpaceError(
            f"The base model {name_or_path} cannot be loaded ({reason(error)}): check its files, and --variant if "
            "there is one in their names."
        ) from error


def load_whole(kind, name_or_path, part, variant=None, **where):
    """A model of class `kind` from the folder `part` of a base model.

    transformers and diffusers draw weights that its file lacks at random, and say so in a log only. Of a folder, the
    variant of the files is taken where there is one.

    Raises:
        ValueError: if its file lacks weights, with their names.
    """
    folder = Path(name_or_path) / part
    if variant and folder.is_dir() and not any(folder.glob(f"*.{variant}*")):
        variant = None
    model, info = kind.from_pretrained(name_or_path, subfolder=part, output_loading_info=True, variant=variant, **where)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the file of its {part} lacks the weights {listed(missing, 3)}")
    return model
