"""Values and folders that the scripts refuse, and why: standard library only, so that it imports in milliseconds."""

import argparse
import difflib
import errno
import importlib.util
import math
import os
import re
import sys
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from nullspace.config_file import flags_in
from nullspace.errors import NullSpaceError
from nullspace.names import DEFAULT_THRESHOLDS
from nullspace.terminal import printable


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; `open_low` and `open_high` leave the ends out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value):
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self):
        words = []
        if self.low > -math.inf:
            words.append(f"{'above' if self.open_low else 'at least'} {self.low:.10g}")
        if self.high < math.inf:
            words.append(f"{'below' if self.open_high else 'at most'} {self.high:.10g}")
        return " and ".join(words) or "a finite number"


COUNT, NATURAL = Range(1), Range(0)
POSITIVE, SHARE = Range(0, open_low=True), Range(0, 1, open_high=True)
# Every numeric flag of the scripts; a text: other code decides, and this is what the help says of it.
RANGES = {
    **dict.fromkeys(
        "adam_epsilon learning_rate lr_power max_drift max_grad_norm snr_gamma text_encoder_lr "
        "word_learning_rate".split(),
        POSITIVE,
    ),
    **dict.fromkeys(
        "batch_size checkpointing_steps checkpoints_total_limit gradient_accumulation_steps lora_alpha "
        "lr_num_cycles max_prompts max_train_steps num_inference_steps num_train_epochs num_validation_images "
        "num_vectors rank repeats resolution tokenizer_max_length train_batch_size validation_epochs "
        "validation_steps".split(),
        COUNT,
    ),
    **dict.fromkeys(
        "adam_weight_decay clip_skip dataloader_num_workers guidance_scale lr_warmup_steps".split(), NATURAL
    ),
    **dict.fromkeys("adam_beta1 adam_beta2 lora_dropout".split(), SHARE),
    "local_rank": Range(-1),
    "noise_offset": Range(),
    "nullspace_timestep_range": Range(0, 999),
    "seed": Range(0, 2**32, open_high=True),  # what numpy's generator takes
    "nullspace_threshold": "energy at least 0 and below 1, eigenvalue above 0, percentile above 0 and at most 100",
    "nullspace_softness": "above 0 and below 0.01, or inf",
}


LARGEST = 32  # pixels that are drawn for each of the model's own latents, at most: mostly 8 make one


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence, expands `~` in paths, and knows and shows the range of every number.

    Its subparsers are of this kind too; `ranges` may be set where a flag has another range there.
    """

    ranges = RANGES

    def error(self, message):
        self.exit(1, f"error: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            if any(word.startswith("--hub") for word in words):  # they may be a token, or the second half of one
                rest = [word.split("=")[0] if word.startswith("-") else "***" for word in rest]
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest, found)}")
        return found

    def _meant(self, words, found):
        """What misspelt flags may have meant, as the end of a sentence; those of the command, where there is one."""
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        actions = [*self._actions, *(each for one in commands for each in one.choices[vars(found)[one.dest]]._actions)]
        flags = [flag for action in actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        close = [difflib.get_close_matches(word.split("=")[0], flags, 1) for word in words if word.startswith("--")]
        near = [match for matches in close for match in matches]
        return f"; did you mean {' and '.join(near)}?" if near else ""

    def format_help(self):
        plain = {action: action.help for action in self._actions}
        for action in plain:
            if action.dest in self.ranges and action.help not in (None, argparse.SUPPRESS):
                action.help = _with_range(action.help, self.ranges[action.dest])
        try:
            return super().format_help()
        finally:
            for action, text in plain.items():
                action.help = text

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        if "--config" in self._option_string_actions:
            words = self._from_file(words) + words
        found, rest = super().parse_known_args(words, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if isinstance(value, list):
                expanded = [os.path.expanduser(one) if str(one).startswith("~/") else one for one in value]
                setattr(found, action.dest, expanded)
            if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~")):
                value = type(value)(os.path.expanduser(value))
                setattr(found, action.dest, value)
                try:
                    os.stat(value)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # what else is wrong is told where it is used
                        self.error(f"--{action.dest} {value} is no path ({error.strerror}); choose another.")
                except ValueError:
                    self.error(f"--{action.dest} has a NUL in it, which no path has.")
            numbers = [one for one in (value if isinstance(value, list) else [value]) if is_number(one)]
            if not numbers or isinstance(self.ranges.get(action.dest), str):
                continue
            if action.dest not in self.ranges:
                raise KeyError(
                    f"--{action.dest} takes numbers and has no range: add it to RANGES of nullspace/checks.py"
                )
            wrong = [one for one in numbers if one not in self.ranges[action.dest]]
            if wrong:
                self.error(f"--{action.dest} must be {self.ranges[action.dest]}, not {wrong[0]}.")
        first, last = getattr(found, "nullspace_timestep_range", None) or (0, 0)
        if first > last:
            self.error(f"--nullspace_timestep_range {first} {last} is empty; give the smaller number first.")
        return found, rest

    def _from_file(self, words):
        """What a file of flags among the words stands for."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", type=Path)
        try:
            path = first.parse_known_args(words)[0].config
            return [] if path is None else flags_in(path.expanduser(), self, words)
        except argparse.ArgumentError:  # one without a value, which the whole parser refuses
            return []
        except NullSpaceError as error:
            self.error(str(error))


def launched():
    """How a script that several processes can run is called: with accelerate, but for the command that pip made."""
    return f"{'accelerate launch ' if sys.argv[0].endswith('.py') else ''}%(prog)s [flags]"


def token_fault(token):
    """What is wrong with a token of the Hub, as the rest of a sentence that does not show it, or None."""
    if not token:
        return "is empty"
    if not re.fullmatch("[!-~]+", token):
        return "has white space or other characters in it that no token has"
    return None


def hub_token(text):
    """The value of --hub_token, without the white space around it that a file or a copy may add."""
    token = text.strip()
    if fault := token_fault(token):  # any other error would have argparse show the value
        raise argparse.ArgumentTypeError(f"the token {fault}; copy it again, or log in with `hf auth login`.")
    if token != text:
        print("The white space around --hub_token is left out.", file=sys.stderr)
    return token


def is_number(value):
    """Whether a value of a flag is a number that needs a range."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _with_range(text, words):
    """A flag's help that says its range, before the default that ends it where one does."""
    shown, count = re.subn(r"(?<!%)\((?=defaults?:)", f"({words}; ", text)
    return shown if count else f"{text.removesuffix('.')} ({words})."


def output_folder_fault(output_dir, instance_dir=None, dataset=None):
    """What keeps the trainer from writing into a folder, or None; tried inside it where it is there already.

    Args:
        instance_dir, dataset: --instance_data_dir and --dataset_name, in which what is written would be trained on.
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and not folder.is_dir():
        return f"--output_dir {folder} is a file; choose a folder."
    dataset = dataset if dataset is not None and Path(dataset).is_dir() else None  # otherwise of the Hub
    for flag, source in (("--instance_data_dir", instance_dir), ("--dataset_name", dataset)):
        if source is not None and Path(source).resolve().is_relative_to(folder):
            return f"--output_dir {folder} is or holds {flag} {source}; choose a folder of its own."
        if source is not None and folder.is_relative_to(Path(source).resolve()):
            return (
                f"--output_dir {folder} is inside {flag} {source}, so that its pictures could be trained on; choose a "
                "folder outside of it."
            )
    for name, what in (("nullspace_config.json", "a bundle"), ("model_index.json", "a model")):
        if (folder / name).exists():
            return f"--output_dir {folder} holds {what}, whose card would be replaced; choose a folder of its own."
    if folder.is_dir():
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            return f"--output_dir {folder} cannot be written ({error.strerror}); choose another."
    return None


def own_resolution(unet_config, vae_config):
    """The side of the pictures, in pixels, that a base model draws by the configurations of its UNet and VAE.

    Raises:
        NullSpaceError: if the UNet's does not say it.
    """
    latents = unet_config.get("sample_size")
    if not isinstance(latents, int):
        raise NullSpaceError(
            "unet/config.json of the base model has no single sample_size, so that its resolution is not known; write "
            "it there (64 for Stable Diffusion 1.5)."
        )
    return latents * 2 ** (len(vae_config["block_out_channels"]) - 1)


def resolution_fault(resolution, block_out_channels):
    """What is wrong with a resolution for a VAE of as many levels as `block_out_channels`, or None.

    The VAE halves a picture between its levels.
    """
    step = math.lcm(8, 2 ** (len(block_out_channels) - 1))
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        return f"--resolution {resolution} is no multiple of {step}, as this model's VAE needs; try {near}."
    return None


def resolution_warning(resolution, unet_config, vae_config):
    """A sentence on a resolution that the base model is hardly made for, or None, as where its own is not known."""
    if isinstance(unet_config.get("sample_size"), int):
        own = own_resolution(unet_config, vae_config)
        if not own / 2 < resolution < own * 2:
            return (
                f"--resolution {resolution} is far from the {own} that the base model draws at; left out, it is that."
            )
    return None


def drawing_fault(resolution, sample_size):
    """What is wrong with drawing at a resolution with a UNet of latents (sample_size, sample_size), or None.

    A UNet that does not say its size, or two of them, is taken for the largest that is known: SDXL's.
    """
    most = LARGEST * (sample_size if isinstance(sample_size, int) else 128)
    if resolution % 8 or resolution > most:
        return f"{resolution} pixels, no multiple of 8 or more than {most}, {LARGEST // 8} times the model's own"
    return None


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of 100 columns, in which a value is named by the last word of its flag: --train_batch_size SIZE."""

    def __init__(self, prog):
        super().__init__(prog, width=100, max_help_position=36)

    def _get_default_metavar_for_optional(self, action):
        return action.dest.rpartition("_")[2].upper()


def refuse_unread(args, parser, **readers):
    """Refuse flags that nothing reads without another one, which was not given: `hub_model_id="push_to_hub"`."""
    for name, reader in readers.items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, reader):
            parser.error(f"--{name} is read with --{reader} alone; give that too, or leave it out.")


def check_threshold(criterion, threshold):
    """Raise `NullSpaceError` unless the threshold lies in the criterion's range; see `Spectrum.rank`."""
    valid = {
        "energy": ("0 <= threshold < 1", 0 <= threshold < 1),
        "eigenvalue": ("threshold > 0", 0 < threshold < math.inf),
        "percentile": ("0 < threshold <= 100", 0 < threshold <= 100),
    }
    if criterion not in valid:
        raise NullSpaceError(f"Unknown criterion '{criterion}'; choose one of {', '.join(valid)}.")
    if not valid[criterion][1]:
        raise NullSpaceError(
            f"--nullspace_threshold {threshold} is out of range: '{criterion}' needs {valid[criterion][0]}."
        )


def listed_thresholds():
    """The default thresholds of all criteria, for a help."""
    return ", ".join(f"{criterion} {threshold:g}" for criterion, threshold in DEFAULT_THRESHOLDS.items())


def settle_threshold(args, parser):
    """Set --nullspace_threshold to its criterion's default where it was not given; refuse one out of range."""
    if args.nullspace_threshold is None:
        args.nullspace_threshold = DEFAULT_THRESHOLDS[args.nullspace_criterion]
    try:
        check_threshold(args.nullspace_criterion, args.nullspace_threshold)
    except NullSpaceError as error:
        parser.error(str(error))


def check_softness(softness):
    """Raise `NullSpaceError` unless the softness is above 0; see `Spectrum.gains`."""
    if not softness > 0:
        raise NullSpaceError(f"--nullspace_softness {softness} is out of range: it must be above 0 (inf: no damping).")


def check_output_dir(folder):
    """Raise `NullSpaceError` if results cannot be written into a folder, which may not exist yet, or should not be."""
    if fault := output_folder_fault(folder):
        raise NullSpaceError(fault)
    if not Path(folder).is_dir():
        check_writable(folder)


def check_writable(folder, flag="--output_dir"):
    """Raise `NullSpaceError` if a folder cannot be made, or another beside it that would take its place."""
    folder = first = Path(folder).resolve()
    try:
        while not first.parent.exists():
            first = first.parent
        probe = first.with_name(f"{first.name}.probe-{os.getpid()}")  # of what would be made, the uppermost
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise NullSpaceError(f"{folder} cannot be written ({error.strerror}); choose another {flag}.") from error


def require(package, flag):
    """Raise `NullSpaceError` unless a package that only some need is installed."""
    if importlib.util.find_spec(package) is None:
        raise NullSpaceError(f"{flag} needs {package}, which is not installed: pip install {package}")


def check_clip_skip(clip_skip, layers, unread=0):
    """Raise `NullSpaceError` unless a text encoder of so many layers has one left when `clip_skip` are skipped.

    Args:
        unread (`int`): how many of its last layers are skipped anyway.
    """
    if not 0 <= clip_skip < layers - unread:
        raise NullSpaceError(
            f"--clip_skip {clip_skip} leaves nothing of the text encoder, which has {layers} layers; skip fewer."
        )


def rank_fault(rank, shapes):
    """What is wrong with a rank for layers of the given shapes, `dict[str, (outputs, inputs)]`, or None."""
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        return (
            f"--rank {rank} is more than {name} can have, whose weights are {shape[0]} x {shape[1]}; choose at most "
            f"{min(shape)}."
        )
    return None


def colour(text):
    """An (r, g, b) of 0 to 255 from a colour's name or #rrggbb, for argparse."""
    from PIL import ImageColor  # which only who names a colour waits for

    if ImageColor.getcolor(text, "RGBA")[3] in range(255):
        raise ValueError(f"{text} is transparent itself.")
    return ImageColor.getcolor(text, "RGB")
