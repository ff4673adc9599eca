"""Families of models: one class in one file each, and this list of them. No other room names one."""

from functools import cache
from importlib import import_module
from pathlib import Path

from nullspace.errors import NullSpaceError, cannot_be_had


# What --model_type calls a family, and its class in this folder: imported when it is needed, for that takes seconds. Of
# families with one kind of UNet the first is taken unless a later one claims the model by its scheduler.
FAMILIES = {
    "sd": "stable_diffusion.StableDiffusion",
    "lcm": "latent_consistency.LatentConsistency",
    "sdxl": "sdxl.StableDiffusionXL",
    "sdxl-turbo": "sdxl.StableDiffusionXLTurbo",
    "sdxl-lcm": "sdxl.LatentConsistencyXL",
}


@cache
def get_family(name):
    """The family that --model_type calls by this name: one instance for all who ask."""
    module, kind = FAMILIES[name].split(".")
    return getattr(import_module(f"nullspace.families.{module}"), kind)()


def family_of(unet_config):
    """The first family that a UNet can be of, by its configuration, or None."""
    return next((each for each in map(get_family, FAMILIES) if each.recognises(unet_config)), None)


def recognise(name_or_path, revision=None, token=None, wanted="auto", config=None):
    """The family of a pipeline in a folder or on the Hub, or of a single file, by its configuration.

    Its UNet decides, and its scheduler between families with one kind of UNet, unless the user says which. Where
    pipeline or scheduler are another family's, only the user can know.

    Args:
        wanted (`str`): "auto", or the name of the family that the user says it is of.
        config (`str`, *optional*): folder or Hub id of the configuration of a single file, see `find_configuration`.

    Raises:
        NullSpaceError: if it cannot be had, is of no family, or not of the one that is wanted.
    """
    from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel  # take seconds to import

    from nullspace.hub import patiently
    from nullspace.single_file import find_configuration, is_single_file

    where = find_configuration(Path(name_or_path), config, token) if is_single_file(name_or_path) else name_or_path

    def load(kind, **part):
        try:
            return patiently(
                lambda: kind.load_config(where, revision=revision, token=token, **part),
                f"model {name_or_path}",
            )
        except Exception as error:  # among them those of the HTTP library, which differ between versions
            raise NullSpaceError(cannot_be_had(name_or_path, error)) from error

    index, families = load(DiffusionPipeline), [get_family(name) for name in FAMILIES]
    pipelines = list(dict.fromkeys(each.pipeline.__name__ for each in families))
    if index["_class_name"] not in pipelines:
        raise NullSpaceError(
            f"{name_or_path} is a {index['_class_name']}; only {', '.join(pipelines[:-1])} and {pipelines[-1]} "
            "models are supported."
        )
    unet_config = load(UNet2DConditionModel, subfolder="unet")
    fitting = [each for each in families if each.recognises(unet_config)]
    if not fitting:
        raise NullSpaceError(f"The UNet of {name_or_path} is of no kind that is supported; choose another base model.")
    classes = (index["_class_name"], index.get("scheduler", [None])[-1])
    if str(classes[1]).startswith("EDM"):
        raise NullSpaceError(
            f"{name_or_path} has a {classes[1]}: it was trained with EDM's noise (arXiv 2206.00364), which is not "
            "supported; choose another base model."
        )
    found = fitting[0]
    if len(fitting) > 1:
        scheduler_config = load(DDPMScheduler, subfolder="scheduler")  # of any scheduler, as it is written
        named = [each for each in fitting if each.name == wanted]
        found = next(iter(named or [each for each in fitting if each.claims(scheduler_config)]), found)
    marks = [
        (mark, each)
        for mark in classes
        for each in families
        if mark in each.marks and mark not in found.marks and each is not found
    ]
    if marks and wanted != found.name:
        mark, seeming = marks[0]
        raise NullSpaceError(
            f"{name_or_path} has a {mark}, but its UNet {found.evidence}, so it is not {seeming.title} that can be "
            f"trained; pass --model_type {found.name} to take it as {found.title}."
        )
    if wanted not in ("auto", found.name):
        raise NullSpaceError(
            f"--model_type {wanted} contradicts {name_or_path}, whose UNet {found.evidence}: it is {found.name}; leave "
            "--model_type out."
        )
    return found
