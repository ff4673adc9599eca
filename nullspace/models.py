"""Base models: fetching and loading what a folder, a file or the Hub has, whole or not at all."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from nullspace.errors import NullSpaceError, cannot_be_had, listed, reason
from nullspace.hub import patiently
from nullspace.single_file import find_configuration, is_single_file


class BaseModel(NamedTuple):
    """A base model on this machine.

    Attributes:
        name (`str`): as cards and reports call it: a folder or Hub id as it was given, of a file the name alone.
        folder (`Path`): with its configurations and tokenizers, and its weights unless `file` has them.
        revision (`str`, *optional*): its commit on the Hub.
        variant (`str`, *optional*): that of the files, for those parts that have it.
        file (`Path`, *optional*): one file with the weights of all parts.
        vae (`str`, *optional*): another VAE than its own, as cards and reports call it.
        vae_folder (`Path`, *optional*): that of the other VAE.
        loras (`tuple[Earlier]`): that are added to it whenever it is loaded, see `nullspace.stack`.
    """

    name: str
    folder: Path
    revision: str | None = None
    variant: str | None = None
    file: Path | None = None
    vae: str | None = None
    vae_folder: Path | None = None
    loras: tuple = ()

    def is_in_file(self, part):
        """Whether the weights of a part of the pipeline are in the one file."""
        return self.file is not None and not (part == "vae" and self.vae_folder)

    def record(self):
        """What bundles and reports say of it, besides its fingerprints."""
        loras = {"loras": [lora.record() for lora in self.loras]} if self.loras else {}
        return {"id": self.name, "revision": self.revision, "variant": self.variant, **loras}


def download_model(name_or_path, revision=None, variant=None, token=None, config=None, vae=None, skip=()):
    """The `BaseModel` of a folder, a file or the Hub, with all that a pipeline of it loads.

    Args:
        config (`str`, *optional*): folder or Hub id of the configuration of a single file, see `find_configuration`.
        vae (`str`, *optional*): folder or Hub id of a VAE to take in place of its own.
        skip (`Iterable[str]`): parts that are not needed, and not downloaded.

    Raises:
        NullSpaceError: if it cannot be had, if a flag is not for such a model, or the VAE does not fit it.
    """
    model = _find_model(name_or_path, revision, variant, token, config, skip)
    return model if vae is None else _with_vae(model, vae, token)


def _find_model(name_or_path, revision, variant, token, config, skip):
    from diffusers import DiffusionPipeline

    path = Path(name_or_path)
    if is_single_file(name_or_path):
        for flag, value in (("revision", revision), ("variant", variant)):
            if value is not None:
                raise NullSpaceError(f"--{flag} {value} chooses among files, and {path} is one file; leave it out.")
        return BaseModel(path.name, find_configuration(path, config, token), file=path)
    if config is not None:
        raise NullSpaceError(
            f"--single_file_config is for a base model in one .safetensors file, and {name_or_path} is none; leave it "
            "out."
        )
    if path.is_dir():
        if revision:
            raise NullSpaceError(f"--revision {revision} is of the Hub's files, and {path} is a folder; leave it out.")
        if variant and not any(path.glob(f"*/*.{variant}*")):
            raise NullSpaceError(f"No part of {path} has files of --variant {variant}; leave it out.")
        return BaseModel(str(name_or_path), path, variant=variant)
    try:
        where = {"revision": revision, "variant": variant, "token": token}
        left_out = dict.fromkeys(("safety_checker", *skip))
        folder = patiently(
            lambda: DiffusionPipeline.download(name_or_path, **left_out, **where), f"model {name_or_path}"
        )
    except Exception as error:
        raise NullSpaceError(cannot_be_had(name_or_path, error)) from error
    folder = Path(folder)
    return BaseModel(name_or_path, folder, folder.name, variant)  # a snapshot is named after its commit


def load_config(kind, part, name_or_path, revision=None, token=None, config=None):
    """The configuration of a model of class `kind` in the folder `part` of a base model: that file alone.

    Args:
        config (`str`, *optional*): see `download_model`.

    Raises:
        NullSpaceError: if it cannot be had.
    """
    if is_single_file(name_or_path):
        name_or_path, revision = find_configuration(Path(name_or_path), config, token), None
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
    except NullSpaceError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise NullSpaceError(
            f"The base model {name_or_path} cannot be loaded ({reason(error)}): check its files, and --variant if "
            "there is one in their names."
        ) from error


def load_whole(kind, model, part):
    """A part of a `BaseModel`, of class `kind`, in float32, from the folder of that part.

    transformers and diffusers draw weights that its file lacks at random, and say so in a log only.

    Raises:
        OSError, ValueError: if its file is missing or lacks weights, with their names.
    """
    is_other = part == "vae" and model.vae_folder
    folder = model.vae_folder if is_other else model.folder / part
    variant = model.variant if model.variant and any(folder.glob(f"*.{model.variant}*")) else None
    loaded, info = kind.from_pretrained(folder, output_loading_info=True, variant=variant)
    if missing := sorted(info["missing_keys"]):
        whose = f"the VAE {model.vae}" if is_other else f"its {part}"
        raise ValueError(f"the file of {whose} lacks the weights {listed(missing, 3)}")
    return loaded.float()  # transformers gives the type of the file


# ---- Another VAE -----------------------------------------------------------------------------------------------------

# By diffusers' defaults, for configurations that do not say it.
LATENTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}


def _with_vae(model, name_or_path, token):
    """A base model with the VAE of a folder or of the Hub, which may be a pipeline's with a VAE in it."""
    from diffusers import AutoencoderKL

    folder, name = Path(name_or_path), Path(name_or_path).resolve().name
    if not folder.is_dir():
        name, files = name_or_path, ("config.json", "diffusion_pytorch_model*.safetensors*")
        patterns = [*files, *(f"vae/{file}" for file in files)]
        try:
            found = patiently(
                lambda: snapshot_download(name_or_path, allow_patterns=patterns, token=token), f"model {name_or_path}"
            )
        except Exception as error:
            raise NullSpaceError(cannot_be_had(name_or_path, error, "VAE")) from error
        folder = Path(found)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        config = AutoencoderKL.load_config(folder)
    except (OSError, ValueError) as error:
        raise NullSpaceError(
            f"The VAE {name_or_path} cannot be loaded ({reason(error)}); name the folder or Hub id of a VAE, or of a "
            "model with one."
        ) from error
    if config.get("_class_name") != AutoencoderKL.__name__:
        raise NullSpaceError(
            f"The VAE {name_or_path} is a {config.get('_class_name')} and not an {AutoencoderKL.__name__}; choose one "
            "that is."
        )
    with loading(model.name):
        own = AutoencoderKL.load_config(model.folder, subfolder="vae")
    given, wanted = map(_latents, (config, own))
    for key, value in wanted.items():
        if given[key] != value:
            raise NullSpaceError(
                f"The VAE {name_or_path} does not fit {model.name}: its {key} is {given[key]}, and that of the model's "
                f"own is {value}; choose one that was made for such a model."
            )
    return model._replace(vae=name, vae_folder=folder)


def _latents(config):
    """What a UNet takes for granted of the latents of a VAE, by its configuration."""
    found = {key: config.get(key, default) for key, default in LATENTS.items()}
    return found | {"number of levels": len(config["block_out_channels"])}
