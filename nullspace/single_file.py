"""A base model in one `.safetensors` file, as web UIs load it: diffusers reads its weights by their original names.

The file has weights alone: configurations, noise schedule and tokenizers are those of a model of its kind.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from nullspace.errors import NullSpaceError, listed, reason
from nullspace.hub import patiently


SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# What the names of each part's weights begin with; of the UNet's, each is one weight of diffusers' UNet.
UNET = "model.diffusion_model."
PARTS = {
    "UNet": UNET,
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
NAME_IT = "pass --single_file_config with the folder or Hub id of a model of its kind"


def is_single_file(name_or_path):
    """Whether a base model is named as one file, which need not be there or be one that is read."""
    path = Path(name_or_path)
    return path.is_file() or (path.suffix in (SUFFIX, *PICKLES) and not path.is_dir())


def read_shapes(path):
    """The shapes of a checkpoint's weights, `dict[str, list[int]]` by name.

    Raises:
        NullSpaceError: if it is not there or no safetensors file, is not whole, or has not all parts of a model.
    """
    if not path.is_file():
        raise NullSpaceError(
            f"There is no file {path}; name that of the base model with --pretrained_model_name_or_path."
        )
    if path.suffix != SUFFIX:
        raise NullSpaceError(
            f"{path} is no {SUFFIX} file, and no other is opened, since a pickle can run code; name the model's "
            f"{SUFFIX} file or its folder."
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise NullSpaceError(
            f"{path} cannot be read ({reason(error)}): it is no safetensors file, or not a whole one; get it again."
        ) from error
    if any("lora" in name for name in shapes):
        raise NullSpaceError(f"{path} is a LoRA; name the file of the base model that it is for.")
    if missing := [part for part, names in PARTS.items() if not any(name.startswith(names) for name in shapes)]:
        raise NullSpaceError(
            f"{path} has no weights of a {' or '.join(missing)} under their original names, so it is no whole base "
            "model; name one that is."
        )
    return shapes


def find_configuration(path, config=None, token=None):
    """The folder with the configurations and tokenizers of a single file's model.

    Args:
        config (`str`, *optional*): folder or Hub id of a model of its kind; by default the one that diffusers takes a
            file with such weights for.

    Raises:
        NullSpaceError: if the file is no checkpoint, or the configuration cannot be had.
    """
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = read_shapes(path)
    if config is None and "v_pred" in shapes:  # as its maker marks it, and no weight tells
        raise NullSpaceError(f"{path} predicts velocities, which the usual configuration does not say; {NAME_IT}.")
    if config is None:
        weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        config = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    folder = Path(config)
    if not folder.is_dir():
        try:
            patterns = ["*.json", "*.txt"]
            folder = Path(
                patiently(lambda: snapshot_download(config, allow_patterns=patterns, token=token), f"model {config}")
            )
        except Exception as error:  # among them those of the HTTP library, which differ between versions
            raise NullSpaceError(
                f"The configuration and tokenizers of {path} are to be those of {config}, which cannot be had "
                f"({reason(error)}); {NAME_IT}."
            ) from error
    if not (folder / "model_index.json").is_file():
        raise NullSpaceError(f"{config} has no model_index.json, so it is no model to read {path} by; {NAME_IT}.")
    return folder


def load_from_file(pipeline, path, folder, parts, others):
    """Models of a single file, in float32: `dict[str, Module]`.

    Args:
        pipeline (`type`): the class of pipeline that they are of.
        folder (`Path`): with their configurations.
        parts (`Iterable[str]`): which, as the pipeline calls them.
        others (`Iterable[str]`): which not.

    Raises:
        NullSpaceError: if its weights are not those that the configurations ask for.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    def misfit(fault):
        return NullSpaceError(
            f"{path} does not fit the configuration in {folder} ({fault}); check the file, or {NAME_IT}."
        )

    try:
        loaded = pipeline.from_single_file(str(path), config=str(folder), **dict.fromkeys(others))
    except NotImplementedError as error:  # what has no weights cannot be put on a device
        raise misfit("weights of its UNet or VAE are missing") from error
    except (KeyError, ValueError, SingleFileComponentError) as error:
        raise misfit(reason(error)) from error
    models = {part: getattr(loaded, part) for part in parts}
    for part, model in models.items():
        if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
            raise misfit(f"its {part} lacks the weights {listed(missing, 3)}")
    if "unet" in models:
        # diffusers passes over what its UNet has no place for, as an LCM's embedding of the guidance scale
        found = sum(name.startswith(UNET) for name in read_shapes(path))
        if found != len(models["unet"].state_dict()):
            raise misfit(f"its UNet has {found} weights and not {len(models['unet'].state_dict())}")
    return models
