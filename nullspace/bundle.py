"""The bundle: the decomposed second moments of a base model's layer inputs, as a folder and a Hub dataset."""

import copy
import csv
import hashlib
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.logging import get_logger
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nullspace.checks import check_softness, check_writable, drawing_fault
from nullspace.errors import DamagedError, NullSpaceError
from nullspace.families import family_of, get_family
from nullspace.fingerprints import fingerprint, fingerprints
from nullspace.hashes import config_sha256, sha256
from nullspace.hub import fetch_files
from nullspace.layers import attention_inputs, base_layer, find_module, text_encoder_inputs
from nullspace.markdown import csv_cell
from nullspace.names import (
    CARD_NAME,
    CONFIG_NAME,
    DEFAULT_SOFTNESS,
    DEFAULT_THRESHOLDS,
    ENERGIES,
    FORMAT_VERSION,
    JOINT,
    TABLE_NAME,
    TEXT_ENCODER,
    TEXT_ENCODERS,
    TEXT_INPUT,
    TIMELESS,
)
from nullspace.projector import Protected
from nullspace.prompts import EXAMPLES, spread
from nullspace.schema import (
    CONFIG_BYTES,
    PARTS,
    check_config,
    check_header,
    check_plain,
    check_size,
    check_spectrum,
    check_traces,
    file_bytes,
    parse_config,
    tensor_specs,
)
from nullspace.spectrum import Spectrum, in_double
from nullspace.system import replacing
from nullspace.timesteps import groups_inside, joint_group, split_groups


logger = get_logger(__name__)


@dataclass
class Bundle:
    """The second moments of one base model's layer inputs, decomposed, by timestep group.

    On disk: `nullspace_config.json` describes it and holds the sha256 of all files; each group is a safetensors
    file with, for each input, `<input>.eigenvalues` (in,) float32, `<input>.eigenvectors` (in, k) float32, those that
    may be closed, see `save`, the others as `<input>.rest`, see `Spectrum`, and `<input>.distances` (in,) float32, how
    far each is from the builder's own float64 decomposition: infinity where that is not known. k is in `exact` of the
    configuration, by group and input. `base_model.fingerprint` there is that of `fingerprints`.

    Formats 1 and 2 are still read. They have all eigenvectors in one (in, in), of float16 and float32; format 2 has the
    norm of the distances in its configuration, format 1 none, and the hash of the covered projections in place of the
    fingerprints.

    The text encoder's output does not depend on the timestep and has a file of its own, and so have the inputs of the
    text encoder's own layers, where they were collected. The group "joint", the sum over all timesteps, is always
    there.

    Attributes:
        config (`dict`): what `nullspace_config.json` holds.
        spectra (`dict[str, dict[str, Spectrum]]`): group -> input -> spectrum, for the groups that were loaded;
            the text encoder's output is the group "encoder_hidden_states", its own layers "text_encoder".
        revision (`str` or `None`): the commit that it was read from, where that was on the Hub.
        last_timestep (`int` or `None`): the last that it protects, whatever it was restricted to since it was read.
    """

    config: dict
    spectra: dict = field(default_factory=dict)
    revision: str | None = None
    last_timestep: int | None = None

    @classmethod
    def from_moments(cls, moments, groups, config):
        """Decompose what `SecondMoments` collected. `groups` are those of `timestep_groups`, `config` the rest."""
        spectra = {
            name: {source: Spectrum.from_sum(*pair, name=source) for source, pair in collected.items()}
            for name, collected in _with_joint(moments, groups)
        }
        if JOINT not in [group["name"] for group in groups]:
            groups = [joint_group(groups)] + groups
        config = {"format_version": FORMAT_VERSION, **config, "groups": groups}
        return cls(config, spectra)

    # Reading

    @classmethod
    def load(cls, name_or_path, timestep_range=None, revision=None, token=None, text_encoder=False, every_group=False):
        """Read a bundle from a folder or from a dataset repository on the Hub, only the files that are needed.

        Args:
            name_or_path (`str` or `Path`): a folder or a Hub id.
            timestep_range (`tuple[int, int]`, *optional*): see `restrict`.
            revision, token (`str`, *optional*): as in huggingface_hub.
            text_encoder (`bool`): whether to read what the text encoder's own layers see, where the bundle has it.
            every_group (`bool`): whether to read the groups that the bundle splits the timesteps into, too, as `merge`
                asks for.

        Raises:
            NullSpaceError: if it cannot be had, is of a newer format, a file differs from its recorded sha256, or what
                it holds is not what `nullspace.schema` asks for.
        """
        try:
            return cls._load(name_or_path, timestep_range, revision, token, text_encoder, every_group)
        except DamagedError:
            if Path(name_or_path).is_dir() or is_offline_mode():
                raise
            # Without force, the cache would give the damaged file for ever.
            return cls._load(name_or_path, timestep_range, revision, token, text_encoder, every_group, force=True)

    @classmethod
    def _load(cls, name_or_path, timestep_range, revision, token, text_encoder, every_group, force=False):
        folder = fetch_files(name_or_path, [CONFIG_NAME], revision, token, force)
        config = read_config(folder)
        names = needed_groups(config, timestep_range, text_encoder, every_group)
        if not Path(name_or_path).is_dir():
            revision = folder.name  # a snapshot is named after its commit: a push in between must not mix two bundles
        folder = fetch_files(name_or_path, [group_file(name) for name in names], revision, token, force)
        bundle = cls(
            config,
            revision=None if Path(name_or_path).is_dir() else revision,
            last_timestep=config["groups"][0]["range"][1],
        )
        bundle.spectra = {name: bundle._read_group(folder, name) for name in names}
        split = [group["name"] for group in split_groups(config)]
        if JOINT not in split and {JOINT, *split} <= bundle.spectra.keys():
            check_traces(folder, bundle.spectra, split)
        return bundle if timestep_range is None else bundle.restrict(*timestep_range)

    def _read_group(self, folder, name):
        path, specs = folder / group_file(name), tensor_specs(self.config, name)
        check_plain(folder, path.name)
        check_size(path, file_bytes(specs))
        try:
            whole = sha256(path) == self.config["files"][path.name]
            if whole:
                with safe_open(path, "pt") as file:
                    check_header(path, file, specs)
                    # Copies: the tensors themselves change with the file, which somebody may write over
                    tensors = {key: file.get_tensor(key).clone() for key in specs}
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path} cannot be read ({error}); download or build the bundle again.") from error
        if not whole:
            raise DamagedError(
                f"{path} is truncated or altered (its sha256 differs from the one in {CONFIG_NAME}); "
                "download or build the bundle again."
            )
        spectra, norms = {}, {}
        if self.config["format_version"] < 3:
            norms = self.config.get("distances", {}).get(name, {})
        for source, tokens in self.config["tokens"][name].items():
            parts = {key: tensors[f"{source}.{key}"] for key in PARTS if f"{source}.{key}" in tensors}
            check_spectrum(path, source, **parts)
            if norms.get(source) is not None:  # format 2 has that of all directions: as if it were the first one's
                parts["distances"] = torch.zeros_like(parts["eigenvalues"])
                parts["distances"][0] = norms[source]
            elif "distances" in parts and parts["distances"].isinf().any():
                del parts["distances"]
            spectra[source] = Spectrum(tokens=tokens, **parts)
        return spectra

    def group(self, name):
        """The spectra (`dict[str, Spectrum]`) of all inputs in a group, and of those that all timesteps share."""
        return {source: item for key in (name, *TIMELESS) for source, item in self.spectra.get(key, {}).items()}

    def group_hashes(self):
        """The sha256 of each group's file, by which a bundle is known whatever its card and its configuration say."""
        return {name: digest for name, digest in self.config["files"].items() if name.endswith(group_file(""))}

    def base_model(self, name_or_path=None, revision=None, variant=None):
        """Name, revision and variant of the base model: as given, or without a name what it was built from."""
        base = self.config["base_model"]
        if name_or_path:
            return name_or_path, revision, variant
        return base["id"], revision or base["revision"], variant or base["variant"]

    @property
    def joint(self):
        """The group of all of its timesteps, as the configuration has it: the first."""
        return self.config["groups"][0]

    @property
    def clip_skip(self):
        """How many of the text encoder's last layers were skipped."""
        return self.config.get("clip_skip", 0)  # which earlier bundles do not name

    @property
    def modules(self):
        """What is covered in the UNet and text encoders: `dict[str, dict]` with input name and sizes, by module."""
        covered = [self.config, *(self.config.get(name, {}) for name in TEXT_ENCODERS)]
        return {name: info for part in covered for name, info in part.get("modules", {}).items()}

    def protected(self, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"], softness=DEFAULT_SOFTNESS):
        """What the joint group protects in each covered module whose input is loaded: `dict[str, Protected]`.

        Modules that share an input share the object. A layer in which the criterion closes no direction is left
        free of any damping too.

        Args:
            criterion, threshold: which directions are closed, see `Spectrum.rank`.
            softness (`float`): how little the other directions are held back, see `Spectrum.gains`; `math.inf` is
                not at all.

        Raises:
            NullSpaceError: if `ranks` refuses the threshold, a value is out of range, or the softness is lower than
                what is stored can hold back.
        """
        check_softness(softness)
        ranks, made_of = self.ranks(criterion, threshold), self._made_of()
        shared, spectra = {}, self.group(JOINT)
        for (source, spectrum), basis in zip(
            spectra.items(), Spectrum.orthonormal_all(list(spectra.values())), strict=True
        ):
            rank, gains = ranks[source], None
            if rank and softness < math.inf:
                gains = spectrum.gains(softness)[rank:]
                for part in made_of[source]:
                    closed = part.rank(criterion, threshold)
                    if not part.is_finer_than(softness, closed):
                        raise NullSpaceError(
                            f"--nullspace_softness {softness:g} is too low for {source}, whose directions the bundle "
                            f"stores in 16 bits; choose at least {part.finest_softness(closed):.1g}."
                        )
            shared[source] = Protected(basis, rank, gains, spectrum.distance(rank))
        return {module: shared[info["input"]] for module, info in self.modules.items() if info["input"] in shared}

    def ranks(self, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"]):
        """How many directions a threshold closes for each input: `dict[str, int]`; see `Spectrum.rank`.

        Raises:
            NullSpaceError: if an input is left without a free direction, or a direction would be closed that is not
                stored in full: what its rounding lets through is more than may be promised.
        """
        ranks, made_of = {}, self._made_of()
        for source, spectrum in self.group(JOINT).items():
            ranks[source] = rank = spectrum.rank(criterion, threshold)
            flags = f"--nullspace_criterion {criterion} --nullspace_threshold {threshold}"
            choose = f"choose a {'lower' if criterion == 'energy' else 'higher'} threshold"
            if rank == len(spectrum.eigenvalues):
                raise NullSpaceError(
                    f"{flags} leaves no free direction in {source} ({rank} of {rank} protected); {choose}."
                )
            for part in made_of[source]:
                if (closed := part.rank(criterion, threshold)) > part.exact:
                    raise NullSpaceError(
                        f"{flags} closes {closed} directions in {source}, of which the bundle stores {part.exact} in "
                        f"full and the others in 16 bits; {choose}, or build a bundle with build_nullspace.py {flags}."
                    )
        return ranks

    def _made_of(self):
        """The spectra whose rounding is in the joint group's, `dict[str, list[Spectrum]]` by input: itself, and others.

        That of a range of timesteps is the sum of its groups, which are loaded with it.
        """
        parts = {source: [spectrum] for source, spectrum in self.group(JOINT).items()}
        for name in self.spectra.keys() - {JOINT, *TIMELESS}:
            for source, spectrum in self.spectra[name].items():
                parts[source].append(spectrum)
        return parts

    # Checking

    def check_clip_skip(self, clip_skip):
        """Raise `NullSpaceError` unless the bundle was built with this clip skip, which makes other inputs."""
        if clip_skip != self.clip_skip:
            raise NullSpaceError(
                f"--clip_skip {clip_skip} is not the {self.clip_skip} that the bundle was built with: prompts then "
                f"give other inputs than those it protects; pass --clip_skip {self.clip_skip}, or build a bundle with "
                f"build_nullspace.py --clip_skip {clip_skip}."
            )

    def check_model_type(self, kind):
        """Raise `NullSpaceError` unless this bundle was built for a model of this family, by its name.

        Sizes and weights may agree all the same: another family sees other inputs, at other timesteps.
        """
        built_for = self.config["model_type"]
        if kind != built_for:
            raise NullSpaceError(
                f"The bundle was built for {get_family(built_for).title} ({self.config['base_model']['id']}) and "
                f"protects nothing of {get_family(kind).title}, even one of the same sizes; use the bundle of this "
                "model or build one with build_nullspace.py."
            )

    def check_family(self, unet_config):
        """Raise `NullSpaceError` unless this bundle was built for a model of the family that has such a UNet."""
        if not get_family(self.config["model_type"]).recognises(unet_config):
            self.check_model_type(family_of(unet_config).name)

    def check(self, unet, text_encoder=None, **others):
        """Raise `NullSpaceError` unless this bundle was built from the model that these are parts of.

        Args:
            unet (`UNet2DConditionModel`), text_encoder (`CLIPTextModel`, *optional*): with or without LoRA layers.
            others: `tokenizer`, `noise_scheduler`, and those of a second text encoder by their names in a pipeline;
                what is not given is not compared.
        """
        self.check_family(unet.config)
        present = dict(unet.named_modules())
        if not any(name in present for name in self.config["modules"]):
            raise NullSpaceError("The bundle covers no layer of this UNet; build one for this model.")
        if fault := drawing_fault(self.config["resolution"], unet.config.sample_size):
            raise NullSpaceError(f"The bundle is of {fault}; use another or build one with build_nullspace.py.")
        given = {"unet": unet, TEXT_ENCODER: text_encoder, **others}
        given = {name: part for name, part in given.items() if part is not None}
        if "noise_scheduler" in given and self.last_timestep is not None:
            last = given["noise_scheduler"].config.num_train_timesteps - 1
            if self.last_timestep != last:
                raise NullSpaceError(
                    f"The bundle is for timesteps 0 to {self.last_timestep}, and this model has them up to {last}; use "
                    "another bundle or build one with build_nullspace.py."
                )
        text_encoders = {name: given[name] for name in TEXT_ENCODERS if name in given}
        reads = attention_inputs(unet, "all")
        for name, model in text_encoders.items():
            reads |= text_encoder_inputs(model, name)
        for name, info in self.modules.items():
            if name.partition(".")[0] in TEXT_ENCODERS and name.partition(".")[0] not in text_encoders:
                continue
            self._check_size(name, info, unet, **text_encoders)
            if reads.get(name) != info["input"]:
                raise NullSpaceError(
                    f"The bundle gives {name} the input {info['input']}, and in the model it reads {reads.get(name)}; "
                    "use another bundle or build one with build_nullspace.py."
                )
        expected = self.config["base_model"]["fingerprint"]
        if isinstance(expected, str):
            differing = self._check_projections(unet, text_encoder)
        else:
            found = fingerprints(**given)
            differing = [part.replace("_", " ") for part in found if found[part] != expected.get(part)]
        if differing:
            raise NullSpaceError(
                f"The bundle was built from other weights or settings ({self.config['base_model']['id']}): the "
                f"fingerprints differ ({', '.join(differing)}); use the bundle of this model or build one with "
                "build_nullspace.py."
            )

    def _check_projections(self, unet, text_encoder):
        """Names of the models whose covered weights differ from what a bundle of format 1 says, and a warning."""
        parts = [("unet", self.config["modules"], self.config["base_model"]["fingerprint"])]
        if text_encoder is not None and TEXT_ENCODER in self.config:
            parts.append(("text encoder", *(self.config[TEXT_ENCODER][key] for key in ("modules", "fingerprint"))))
        logger.warning(
            f"The bundle of {self.config['base_model']['id']} is of the old format: only the projections that it "
            "covers are known to be this model's; whether the other weights, the text encoder, the tokenizer and the "
            "noise schedule are those that it was built from is not known, nor how far rounding has turned its "
            "directions; build it again with build_nullspace.py."
        )
        return [
            part
            for part, modules, expected in parts
            if fingerprint(unet, modules, text_encoder=text_encoder) != expected
        ]

    def _check_size(self, name, info, unet, **text_encoders):
        expected = (info["out_features"], info["in_features"])
        try:
            found = tuple(base_layer(find_module(name, unet, **text_encoders)).weight.shape)
        except AttributeError:  # which is how torch says that there is no such module
            found = "missing"
        if found != expected:
            raise NullSpaceError(
                f"The bundle was built for {self.config['base_model']['id']}, where {name} is {expected}, but here "
                f"it is {found}; use the bundle of this model or build one."
            )

    # Adding and restricting: second moments add up

    def emphasize(self, moments, groups):
        """The bundle in which other prompts, of any number, weigh as much as all of its own.

        Equal weight is this project's choice; benchmarks/README.md has figures for a tenth of it.

        Args:
            moments (`SecondMoments`): of what the model reads on those prompts, of inputs that are loaded.
            groups (`list[dict]`): of timesteps, by which they were collected.
        """
        emphasized = replace(self, config=copy.deepcopy(self.config))
        emphasized.spectra = {name: dict(spectra) for name, spectra in self.spectra.items()}
        for name, collected in _with_joint(moments, groups):
            for source, (total, tokens) in collected.items():
                mine = self.spectra[name][source]
                total = mine.sum() + in_double(total) * (mine.tokens / tokens)
                emphasized.spectra[name][source] = Spectrum.from_rounded(total, 2 * mine.tokens, name=source)
        return emphasized

    def _sum(self, names):
        if len(names) == 1:
            return dict(self.spectra[names[0]])
        totals = {}
        for name in names:
            for source, spectrum in self.spectra[name].items():
                before, counted = totals.get(source, (0, 0))
                totals[source] = (before + spectrum.sum(), counted + spectrum.tokens)
        return {source: Spectrum.from_rounded(*parts, name=source) for source, parts in totals.items()}

    def merge(self, other):
        """The bundle of both bundles' prompts together, as if built at once, to the precision that is stored.

        Both must describe the same weights, have drawn in the same way, and hold the same groups, all loaded.

        Raises:
            NullSpaceError: if they do not.
        """
        sampling = ("sampler", "guidance_scale", "resolution", "clip_skip")
        for key in ("model_type", "base_model", "modules", "groups", *TEXT_ENCODERS, *sampling):
            mine, theirs = (config.get(key) or None for config in (self.config, other.config))
            if key == "base_model":
                mine, theirs = mine["fingerprint"], theirs["fingerprint"]
                if isinstance(mine, str) != isinstance(theirs, str):
                    raise NullSpaceError(
                        "These bundles cannot be merged: one is of the old format, which knows less of its model; "
                        "build it again with build_nullspace.py."
                    )
            if mine != theirs:
                raise NullSpaceError(f"These bundles cannot be merged: their {key.replace('_', ' ')} differ.")
        for bundle in (self, other):
            needed = {group["name"] for group in bundle.config["groups"]} | set(TEXT_ENCODERS) & set(bundle.config)
            if not needed <= set(bundle.spectra):
                raise NullSpaceError("These bundles cannot be merged: they were loaded in part; load all groups.")
        merged = Bundle(copy.deepcopy(self.config))
        for name in self.spectra:
            merged.spectra[name] = Bundle({}, {0: self.spectra[name], 1: other.spectra[name]})._sum([0, 1])
        mine, theirs = self.config["prompts"], other.config["prompts"]
        merged.config["prompts"] = {
            "source": f"{mine['source']} + {theirs['source']}",
            "count": mine["count"] + theirs["count"],
            "sha256": hashlib.sha256((mine["sha256"] + theirs["sha256"]).encode()).hexdigest(),
            "examples": spread(mine["examples"] + theirs["examples"], EXAMPLES),
        }
        return merged

    def restrict(self, first, last):
        """The bundle of the timesteps from `first` to `last`, both included; all groups in it must be loaded.

        Raises:
            NullSpaceError: if no timestep lies in the range, or it cuts through a group.
        """
        kept = groups_inside(self.config, first, last)
        names = [group["name"] for group in kept]
        restricted = Bundle(copy.deepcopy(self.config), revision=self.revision, last_timestep=self.last_timestep)
        restricted.spectra = {name: self.spectra[name] for name in [*names, *TIMELESS] if name in self.spectra}
        if len(kept) == len(split_groups(self.config)):
            restricted.spectra[JOINT] = self.spectra[JOINT]
        else:
            restricted.spectra[JOINT] = self._sum(names)
        restricted.config["groups"] = [joint_group(kept)] + [group for group in kept if group["name"] != JOINT]
        return restricted

    # Writing

    def save(self, folder, extras=(), criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"]):
        """Write the bundle, and pack it, as a folder, whole or not at all; an earlier bundle there is replaced.

        Args:
            folder (`Path`): where.
            criterion, threshold: what these close, or the default does, is stored in full, see `Spectrum.pack`.
            extras (`Iterable[Callable[[Bundle, Path], None]]`): each writes more files into the folder (the card, a
                picture) before it is moved into place.

        Raises:
            NullSpaceError: if the folder holds something other than a bundle, or cannot be written.
        """
        folder = Path(folder).resolve()
        check_output_folder(folder)
        written = ("tokens", "exact", "files", "sha256", "distances", "dtype")  # the last two by earlier formats alone
        config = {key: value for key, value in self.config.items() if key not in written}
        config["format_version"] = FORMAT_VERSION
        self.spectra = {
            name: {source: spectrum.pack(criterion, threshold) for source, spectrum in spectra.items()}
            for name, spectra in self.spectra.items()
        }
        for key in ("tokens", "exact"):
            config[key] = {
                name: {source: getattr(spectrum, key) for source, spectrum in spectra.items()}
                for name, spectra in self.spectra.items()
            }
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder, self.nbytes()) as partial:
            partial.mkdir()
            for name, spectra in self.spectra.items():
                tensors = {
                    f"{source}.{key}": tensor for source, item in spectra.items() for key, tensor in item.parts()
                }
                save_file(tensors, partial / group_file(name), metadata={"format": "pt"})
            self._write_table(partial / TABLE_NAME)
            for write in extras:
                write(self, partial)
            config["files"] = {path.name: sha256(path) for path in sorted(partial.iterdir())}
            config["sha256"] = config_sha256(config)
            (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        self.config = config

    def nbytes(self):
        """What the tensors of the loaded groups take on the disk, in bytes."""
        return sum(
            tensor.nbytes
            for spectra in self.spectra.values()
            for item in spectra.values()
            for _, tensor in item.parts()
        )

    def table(self):
        """A row (`dict`) for each covered module and group: sizes, tokens, and the rank at each of `ENERGIES`."""
        rows = []
        for name in self.spectra:
            for module, info in self.modules.items():
                spectrum = self.spectra[name].get(info["input"])
                if spectrum is not None:
                    row = {"module": module, "group": name, "input": info["input"]}
                    row |= {key: info[key] for key in ("in_features", "out_features")}
                    row["tokens"] = spectrum.tokens
                    rows.append(row | {f"rank_{energy}": spectrum.rank("energy", energy) for energy in ENERGIES})
        return rows

    def _write_table(self, path):
        rows = self.table()
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)


def _with_joint(moments, groups):
    """What `SecondMoments` collected, by group: yields its name, and sums (in, in) with their tokens by input.

    The joint group comes last, where it is not one of the `groups` of timesteps but their sum.
    """
    names = [group["name"] for group in groups]
    for name in names + TIMELESS:
        if collected := moments.group(name):
            yield name, collected
    if JOINT not in names:
        totals = {}
        for name in names:
            for source, (total, tokens) in moments.group(name).items():
                before, counted = totals.get(source, (0, 0))
                totals[source] = (before + in_double(total), counted + tokens)
        yield JOINT, totals


def needed_groups(config, timestep_range, text_encoder, every_group):
    """Names of the groups that a use of a bundle reads, `list[str]`; arguments as for `Bundle.load`.

    Args:
        config (`dict`): the bundle's, from `read_config`.

    Raises:
        NullSpaceError: if `groups_inside` refuses the range.
    """
    split = split_groups(config)
    kept = split if timestep_range is None else groups_inside(config, *timestep_range)
    names = [JOINT] if len(kept) == len(split) else []
    if every_group or not names:
        names += [group["name"] for group in kept if group["name"] != JOINT]
    timeless = TIMELESS if text_encoder else [TEXT_INPUT]
    return names + [name for name in timeless if name in config["tokens"]]


def group_file(name):
    """File name of a group."""
    return f"{name}.safetensors"


def check_output_folder(folder):
    """Raise `NullSpaceError` if a bundle cannot be written to a folder: it holds other files or is not writable."""
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NullSpaceError(f"{folder} is a file; choose a folder for --output_dir.")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_NAME).exists():
        raise NullSpaceError(f"{folder} holds something that is not a bundle; choose an empty folder for --output_dir.")
    if os.path.ismount(folder):
        raise NullSpaceError(f"--output_dir {folder} is a mount point, which is never renamed; choose a folder in it.")
    check_writable(folder)


def read_config(folder):
    """The parsed and checked `nullspace_config.json` of a bundle's folder.

    Raises:
        NullSpaceError: if there is none, it is no bundle's or altered, a field is not what `check_config` asks for, or
            its format is newer than this code.
    """
    path = fetch_files(folder, [CONFIG_NAME]) / CONFIG_NAME
    check_plain(path.parent, path.name)
    check_size(path, CONFIG_BYTES)
    try:
        config = parse_config(path.read_text(encoding="utf-8"))
        newer = config["format_version"] > FORMAT_VERSION
        whole = newer or config["sha256"] == config_sha256(config)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is not a bundle's configuration; download or build the bundle again.") from error
    if newer:
        raise NullSpaceError(
            f"The bundle in {folder} has format {config['format_version']}, newer than the {FORMAT_VERSION} known "
            "here; update this project."
        )
    if not whole:
        raise DamagedError(
            f"{path} is altered (its sha256 differs from the one in it); download or build the bundle again."
        )
    check_config(config, path)
    return config


def check_files(folder):
    """Raise `NullSpaceError` unless a folder holds all files of a bundle as they were built; its card may be edited."""
    for name, digest in read_config(folder)["files"].items():
        check_plain(Path(folder), name)
        if sha256(fetch_files(folder, [name]) / name) != digest and name != CARD_NAME:
            raise DamagedError(f"{Path(folder) / name} is truncated or altered; download or build the bundle again.")
