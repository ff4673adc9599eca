"""The bundle of a base model where nobody named one: from the cache, from a namespace on the Hub, or built here.

The cache is a folder of bundles. Each is named after its model and a hash of all that makes it what it is (`key`), so
that it is found at once or not at all. Beside it lie its lock, which whoever builds or removes it holds, and the
checkpoint of a build that was stopped.
"""

import os
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from accelerate.logging import get_logger
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError

from nullspace.bundle import Bundle, check_files, read_config
from nullspace.checks import check_writable, own_resolution, require
from nullspace.collection import PRECISIONS, collect
from nullspace.dataset_card import draw_spectra, write_dataset_card
from nullspace.errors import NullSpaceError, StaleError, reason
from nullspace.families import recognise
from nullspace.fingerprints import fingerprints
from nullspace.hashes import hash_json
from nullspace.hub import base_license, fetch_files
from nullspace.launch import on_main_process
from nullspace.layers import attention_inputs, text_encoder_inputs
from nullspace.locks import alone
from nullspace.models import download_model, loading
from nullspace.names import CONFIG_NAME, DEFAULT_THRESHOLDS, FORMAT_VERSION, JOINT
from nullspace.prompts import length_warnings, prompts_of_model
from nullspace.stack import read_stack, stack_of, subject_prompts
from nullspace.system import remove_leftovers


logger = get_logger(__name__)

TAG = "null-space"  # of the datasets that `write_dataset_card` describes
# What a bundle is built from where nobody says it: 400 steps of drawing, and 100 class pictures take 2,500.
# benchmarks/bundle_data.py: with 100 prompts, or with 4 steps, a LoRA moves others no more than with 400 prompts and 25
# steps, to within noise; with 30 prompts it moves pictures half as much again.
PROMPTS = 100  # the empty one included
STEPS = [4]
BATCH_SIZE = 4  # fits where a training does, for drawing keeps nothing for a backward pass
NAMED = re.compile(r"(.+-[0-9a-f]{16})(\..+)?")  # what in the cache is a bundle's, or lies beside one


# ---- What is looked for ----------------------------------------------------------------------------------------------


class Wanted:
    """What a bundle must be for a training: of these models, and covering the layers that it trains.

    Args:
        family: of the models.
        components (`dict`): `unet`, `vae`, text encoders, tokenizers and `noise_scheduler`, as they were loaded.
        args: the trainer's flags.

    Attributes:
        modules (`dict[str, str]`): module name -> input name of all that it covers, the text encoder's included.
        config (`dict`): what `lora_targets` asks a bundle for: `attention`, as the builder takes it.
    """

    def __init__(self, family, components, args):
        self.family, self.components, self.args = family, components, args
        unet = components["unet"]
        self.attention = attention_to_cover(unet, args.lora_layers)
        inputs = attention_inputs(unet, self.attention)
        self.config = {"attention": self.attention}
        self.modules = dict(inputs)
        for name in family.text_encoders if args.train_text_encoder else ():
            self.modules |= text_encoder_inputs(components[name], name)

    def settings(self):
        """The builder's flags that make the bundle what it is: `dict`."""
        criterion = self.args.nullspace_criterion
        least = DEFAULT_THRESHOLDS[criterion] if criterion == "energy" else 0  # is stored in full in any case
        return {
            "model_type": self.family.name,
            "attention": self.attention,
            "with_text_encoder": self.args.train_text_encoder,
            "sampler": self.family.collection["sampler"],
            "num_inference_steps": STEPS,
            "guidance_scale": self.family.collection["guidance_scale"],
            "clip_skip": self.args.clip_skip,
            "resolution": own_resolution(self.components["unet"].config, self.components["vae"].config),
            "timestep_groups": JOINT,
            "seed": 0,
            "nullspace_criterion": criterion,
            "nullspace_threshold": max(self.args.nullspace_threshold, least),
        }

    def matches(self, config, fingerprint):
        """Whether somebody's bundle, by its configuration, serves; its prompts and sampling were theirs to choose."""
        return (
            config["base_model"]["fingerprint"] == fingerprint
            and stack_of(config) == [lora.sha256 for lora in self.args.base_model.loras]
            and config["model_type"] == self.family.name
            and config["attention"] == self.attention
            and config.get("clip_skip", 0) == self.args.clip_skip
            and (set(self.family.text_encoders) <= config.keys() or not self.args.train_text_encoder)
        )


def attention_to_cover(unet, lora_layers):
    """The kind of attention, "cross", "self" or "all", that holds what --lora_layers names of the attention layers."""
    endings = [f".{ending.strip()}" for ending in (lora_layers or "").split(",") if ending.strip()]
    named = {name for name in attention_inputs(unet, "all") if any(f".{name}".endswith(end) for end in endings)}
    return next((kind for kind in ("cross", "self") if named <= attention_inputs(unet, kind).keys()), "all")


def fingerprint_of(components):
    """The fingerprints of the parts that a bundle is bound to."""
    return fingerprints(**{name: part for name, part in components.items() if name != "vae"})


def key(fingerprint, settings, prompts, loras=()):
    """16 hex digits of what makes a bundle: the model, the layers covered, the prompts, and how they are drawn.

    The LoRAs in the model count by themselves: the fingerprint is of weights in 16 bits, which may not show them.
    """
    made_of = {"format": FORMAT_VERSION, "fingerprint": fingerprint, "prompts": prompts.sha256, **settings}
    return hash_json(made_of | ({"loras": [lora.sha256 for lora in loras]} if loras else {}))[:16]


# ---- The cache -------------------------------------------------------------------------------------------------------


def cache_folder(cache_dir=None):
    """Where bundles are kept: --nullspace_cache_dir, or a folder among the Hugging Face libraries' own (HF_HOME)."""
    return Path(cache_dir or os.path.join(HF_HOME, "nullspace")).resolve()


def in_cache(folder, fingerprint, tell):
    """Whether a folder of the cache is a whole bundle of this very model; `tell` is called where it is something else.

    A folder that is not is built anew.
    """
    try:
        if not folder.exists():
            return False
        check_files(folder)
        if read_config(folder)["base_model"]["fingerprint"] == fingerprint:
            return True
        fault = "it is of another model"
    except (NullSpaceError, OSError) as error:
        fault = reason(error)
    tell(f"The bundle {folder} in the cache is not used ({fault}); it is built anew.")
    return False


@contextmanager
def writing(cache):
    """Say in a sentence why the cache cannot be written.

    Raises:
        NullSpaceError: if a file there cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NullSpaceError(
            f"The cache of bundles {cache} cannot be written ({reason(error)}); pass another --nullspace_cache_dir, or "
            "make room there: the same command then goes on from what was drawn so far."
        ) from error


def cached(cache):
    """The bundles in the cache, whole, unfinished or damaged: `dict[str, list[Path]]`, all that belongs to each."""
    found = {}
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        if (match := NAMED.fullmatch(path.name)) and path.suffix not in (".lock", ".lock-holder"):
            found.setdefault(match[1], []).append(path)
    return found


def size_of(paths):
    """Bytes of files, and of those in folders."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- The Hub ---------------------------------------------------------------------------------------------------------


def on_the_hub(namespace, accepts, token, tell):
    """The bundles of a namespace on the Hub that serve: a list of (repository, commit, configuration).

    Those with most prompts come first. What cannot be asked or read is passed over, and `tell` is called with why.

    Args:
        accepts (`Callable[[dict], bool]`): of a configuration.
    """
    if is_offline_mode():
        return []
    try:
        names = [info.id for info in HfApi(token=token).list_datasets(author=namespace, filter=TAG)]
    except Exception as error:  # among them those of the HTTP library, which differ between versions
        tell(f"The Hub was not asked for bundles of {namespace} ({reason(error)}).")
        return []
    found = []
    for name in names:
        try:
            folder = fetch_files(name, [CONFIG_NAME], token=token)
            config = read_config(folder)
            if accepts(config):
                found.append((name, folder.name, config))
        except NullSpaceError as error:
            tell(f"The Hub dataset {name} was passed over ({reason(error)}).")
    return sorted(found, key=lambda entry: (-entry[2]["prompts"]["count"], entry[0]))


# ---- For the trainer -------------------------------------------------------------------------------------------------


def find_or_build(wanted, accelerator, args):
    """Set --nullspace_name_or_path and --nullspace_revision to a bundle that serves; return whether it was built.

    The main process does it, the others wait. A build casts the models to the precision of the training.

    Args:
        wanted (`Wanted`): what serves.

    Raises:
        NullSpaceError: if the prompts of the model cannot be read, or the cache cannot be written.
    """
    found = on_main_process(lambda: _find_or_build(wanted, accelerator, args))
    args.nullspace_name_or_path, args.nullspace_revision, built = found
    return built


def _find_or_build(wanted, accelerator, args):
    loras = args.base_model.loras
    prompts, source = prompts_of_model(args.base_model.folder, PROMPTS)
    prompts = prompts.and_more(subject_prompts(args.base_model))
    fingerprint, cache = fingerprint_of(wanted.components), cache_folder(args.nullspace_cache_dir)
    model = Path(args.pretrained_model_name_or_path)
    name = re.sub(r"[^\w.-]+", "-", model.resolve().name if model.is_dir() else args.base_model.name)[:80]
    folder = cache / f"{name}-{key(fingerprint, wanted.settings(), prompts, loras)}"
    if in_cache(folder, fingerprint, logger.warning):
        logger.info(f"The bundle of this model is in the cache: {folder}")
        return str(folder), None, False
    if args.nullspace_namespace:
        found = on_the_hub(
            args.nullspace_namespace,
            lambda config: wanted.matches(config, fingerprint),
            args.hub_token,
            logger.warning,
        )
        for repository, commit, _ in found:
            try:
                bundle = Bundle.load(
                    repository, revision=commit, token=args.hub_token, text_encoder=args.train_text_encoder
                )
                bundle.ranks(args.nullspace_criterion, args.nullspace_threshold)
            except NullSpaceError as error:
                logger.warning(f"The Hub dataset {repository} was passed over ({reason(error)}).")
                continue
            logger.info(f"A bundle of this model is on the Hub: {repository}")
            return repository, commit, False
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        check_writable(folder, "--nullspace_cache_dir")
        with alone(Path(f"{folder}.lock"), logger.info):
            remove_leftovers(cache, logger.info, folder.name)
            if in_cache(folder, fingerprint, lambda sentence: None):  # built while this run waited
                return str(folder), None, False
            logger.info(
                f"No bundle of this model is in {cache}: building one of {len(prompts)} prompts ({source.name}), which "
                "later runs find there."
            )
            build(folder, wanted, prompts, source, accelerator, args)
    return str(folder), None, True


def build(folder, wanted, prompts, source, accelerator, args):
    """Build the bundle into a folder of the cache, by this process alone; go on from where an earlier one stopped.

    Raises:
        OSError, SafetensorError: if it cannot be written; no part of it is left then but the checkpoint.
    """
    require("matplotlib", "The picture of the spectra")
    parts = {name: part for name, part in wanted.components.items() if name != "noise_scheduler"}
    for sentence in length_warnings(parts["tokenizer"], prompts, f"the prompts of {source.name}"):
        logger.warning(sentence)
    flags = SimpleNamespace(
        **wanted.settings(),
        prompts_file=source,
        batch_size=BATCH_SIZE,
        checkpointing_steps=5,
        mixed_precision=accelerator.mixed_precision if accelerator.mixed_precision in PRECISIONS else "no",
        output_dir=folder,
    )
    this_process = SimpleNamespace(
        process_index=0,
        num_processes=1,
        device=accelerator.device,
        is_local_main_process=accelerator.is_local_main_process,
    )
    with loading(args.base_model.name):
        pipeline = wanted.family.load_pipeline(args.base_model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    try:
        moments, groups, config, checkpoint = collect(pipeline, prompts, args.base_model, flags, this_process)
    except StaleError as error:
        logger.warning(f"An earlier build cannot be gone on from and begins anew ({reason(error)}).")
        shutil.rmtree(error.folder)
        pipeline.scheduler = scheduler
        moments, groups, config, checkpoint = collect(pipeline, prompts, args.base_model, flags, this_process)
    config["command"] = shlex.join(
        ["accelerate", "launch", "train_dreambooth_nullspace.py", "--pretrained_model_name_or_path"]
        + [args.base_model.name]
    )
    license_name = base_license(args.pretrained_model_name_or_path, args.hub_token)
    extras = [draw_spectra, write_dataset_card(license_name)]  # it can be published as it is
    bundle = Bundle.from_moments(moments, groups, config)
    bundle.save(folder, extras, flags.nullspace_criterion, flags.nullspace_threshold)
    checkpoint.remove()


# ---- For nullspace_utils.py ------------------------------------------------------------------------------------------


def bundles_of_model(args, tell):
    """The bundles of a base model in the cache and in a namespace on the Hub: a list of (where, configuration).

    Args:
        args: --pretrained_model_name_or_path, --single_file_config, --base_lora, --revision, --variant, --model_type,
            --nullspace_cache_dir, --nullspace_namespace and --hub_token.
        tell (`Callable[[str], None]`): is called with what is passed over, and why.

    Raises:
        NullSpaceError: if the model cannot be had or is of no family.
    """
    name, config = args.pretrained_model_name_or_path, args.single_file_config
    family = recognise(name, args.revision, args.hub_token, args.model_type, config)
    model = download_model(name, args.revision, args.variant, args.hub_token, config, skip=["vae"])
    model = model._replace(loras=read_stack(args.base_lora, args.hub_token))
    with loading(model.name):
        components = family.load_models(model, [*family.text_encoders, "unet"])
        components |= family.load_tokenizers(model)
        components["noise_scheduler"] = family.load_noise_scheduler(model.folder)
    fingerprint = fingerprint_of(components)

    def is_of_model(config):
        return (
            config["base_model"]["fingerprint"] == fingerprint
            and stack_of(config) == [lora.sha256 for lora in model.loras]
            and config["model_type"] == family.name
        )

    found, cache = [], cache_folder(args.nullspace_cache_dir)
    for name in cached(cache):
        config = config_in_cache(cache / name)
        if config is not None and is_of_model(config):
            found.append((str(cache / name), config))
    if args.nullspace_namespace:
        on_hub = on_the_hub(args.nullspace_namespace, is_of_model, args.hub_token, tell)
        found += [(repository, config) for repository, _, config in on_hub]
    return found


def config_in_cache(folder):
    """The configuration of a whole bundle in the cache, or None where it is unfinished or damaged."""
    try:
        check_files(folder)
        return read_config(folder)
    except (NullSpaceError, OSError):
        return None


def describe_cache(cache):
    """A row (name, bytes, what it is) for each bundle in the cache."""
    rows = []
    for name, paths in cached(cache).items():
        config = config_in_cache(cache / name)
        if config is not None:
            what = f"{config['base_model']['id']}, {config['prompts']['count']} prompts"
        else:
            what = "damaged" if (cache / name).exists() else "unfinished"
        rows.append((name, size_of(paths), what))
    return rows


def remove_from_cache(cache, names):
    """Remove bundles from the cache, with what lies beside them.

    Raises:
        NullSpaceError: if one is not there, is in the making, or cannot be removed; those before it are gone then.
    """
    found = cached(cache)
    if missing := [name for name in names if name not in found]:
        raise NullSpaceError(f"The cache {cache} has no {missing[0]}; `nullspace_utils.py cache` lists what it has.")
    for name in names:
        try:
            with FileLock(cache / f"{name}.lock", timeout=0):
                for path in found[name]:
                    shutil.rmtree(path)
        except Timeout as error:
            raise NullSpaceError(f"{cache / name} is being built; stop that run, or wait for it.") from error
        except OSError as error:
            raise NullSpaceError(f"{cache / name} cannot be removed ({reason(error)}).") from error
