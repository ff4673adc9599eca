"""Null-space projection for LoRA: second moments, the projection bundle, the projector and its audit.

A linear layer maps inputs x (in,) to W x. Over the inputs that it sees on knowledge to keep, C = E[x x^T] says which
directions they use. LoRA adds s * B @ A to W; with every row of A orthogonal to the leading eigenvectors of C, the
layer answers those inputs as before, whatever B is (AlphaEdit, arXiv 2410.02355, eq. 5 to 8, for closed-form edits;
Adam-NSCL, CVPR 2021, for training).

    bundle = Bundle.load("demo/output/bundle")
    bundle.check(unet)
    projector = NullSpaceProjector(unet, {"joint": bundle.protected("joint", "energy", 0.999)})
    projector.attach(optimizer)  # and call projector.project_gradients() after each backward pass

Run as a script, it audits any LoRA, in closed form, with no GPU and no picture:

    python nullspace_utils.py audit --lora lora --nullspace <your-username>/nullspace-sd15
"""

import argparse
import copy
import csv
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from nullspace.flags import parse_first


if __name__ == "__main__":
    parse_first(__file__)

import torch
from huggingface_hub import is_offline_mode
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nullspace.checks import RANGES, SHARE, Parser
from nullspace.errors import DamagedError, NullSpaceError
from nullspace.fingerprints import fingerprints
from nullspace.hub import (  # noqa: F401  # some for who imports them from here
    CARD_NAME,
    base_license,
    create_repository,
    fetch_files,
    hub_repository,
    push_folder,
    reason,
    status,
)
from nullspace.kohya import kohya_name, read_report, save_kohya
from nullspace.system import follow_umask, rename_folder


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CONFIG_NAME = "nullspace_config.json"
TABLE_NAME = "modules.csv"
LORA_NAME = "pytorch_lora_weights.safetensors"
TEXT_INPUT = "encoder_hidden_states"
TEXT_ENCODER = "text_encoder"  # names of the text encoder's own layers and inputs begin with it and a dot
TIMELESS = [TEXT_INPUT, TEXT_ENCODER]  # groups of inputs that do not depend on the timestep
JOINT = "joint"
PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
MODEL_TYPES = {"sd": "a Stable Diffusion model", "lcm": "a Latent Consistency Model"}
ENERGIES = (0.9, 0.99, 0.999, 0.9999)
DEFAULT_THRESHOLDS = {"energy": 0.9, "eigenvalue": 2e-2, "percentile": 10.0}
DEFAULT_SOFTNESS = 1e-5


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of 100 columns, in which a value is named by the last word of its flag: --train_batch_size SIZE."""

    def __init__(self, prog):
        super().__init__(prog, width=100, max_help_position=36)

    def _get_default_metavar_for_optional(self, action):
        return action.dest.rpartition("_")[2].upper()


# ---- How it is launched ----------------------------------------------------------------------------------------------


PROCESS_TIMEOUT = timedelta(days=7)  # how long processes wait for one that draws, decomposes or saves; 10 minutes else
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def check_launcher(distributed_type=None):
    """Raise `NullSpaceError` where a process does not see whole gradients, which the projector needs.

    Args:
        distributed_type (`str`, *optional*): accelerate's, once that is known; what `accelerate launch` puts into the
            environment is looked at in any case.
    """
    found = [name for key, name in SHARDING.items() if os.environ.get(key, "").lower() in ("1", "true", "yes", "on")]
    if distributed_type == "XLA":
        found.append("a TPU (XLA)")
    if found:
        raise NullSpaceError(
            f"accelerate is set up for {' and '.join(found)}, under which no process sees whole gradients, so that "
            "nothing could be protected; run `accelerate config` for plain data parallelism, or launch with "
            "--config_file and one such configuration."
        )


# ---- Which layers, and which of them share an input ------------------------------------------------------------------


def attention_inputs(unet, attention="cross"):
    """Map each attention projection of a UNet to the name of its input.

    to_k and to_v of every cross-attention layer read the text encoder's output, one input for all of them; to_q, to_k
    and to_v of a self-attention layer read the same hidden states. An input of its own is named after its layer.

    Args:
        unet (`UNet2DConditionModel`): the model, with or without LoRA layers.
        attention (`str`): "cross", "self" or "all".

    Returns:
        `dict[str, str]`: module name -> input name, in the order of the model's modules.
    """
    kinds = {"cross": ("attn2",), "self": ("attn1",), "all": ("attn1", "attn2")}[attention]
    inputs = {}
    for name, module in unet.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in kinds or not hasattr(module, "to_q"):
            continue
        shared = TEXT_INPUT if kind == "attn2" else f"{name}.to_q"
        inputs |= {f"{name}.to_q": f"{name}.to_q", f"{name}.to_k": shared, f"{name}.to_v": shared}
        inputs[f"{name}.to_out.0"] = f"{name}.to_out.0"
    return inputs


def text_encoder_inputs(text_encoder):
    """Map each attention projection of a CLIP text encoder to the name of its input, as `attention_inputs` does.

    q_proj, k_proj and v_proj of a layer read the same hidden states. Names begin with "text_encoder." and go on from
    the module that holds the layers, which is the model itself or its `text_model`, by version of transformers.
    """
    inputs = {}
    for name, module in _text_layers(text_encoder).named_modules():
        if hasattr(module, "q_proj"):
            name = f"{TEXT_ENCODER}.{name}"
            inputs |= {f"{name}.{kind}": f"{name}.q_proj" for kind in ("q_proj", "k_proj", "v_proj")}
            inputs[f"{name}.out_proj"] = f"{name}.out_proj"
    return inputs


def find_module(name, unet, text_encoder=None):
    """The module of a name that `attention_inputs` or `text_encoder_inputs` gave."""
    if name.startswith(f"{TEXT_ENCODER}."):
        return _text_layers(text_encoder).get_submodule(name.removeprefix(f"{TEXT_ENCODER}."))
    return unet.get_submodule(name)


def _text_layers(text_encoder):
    return getattr(text_encoder, "text_model", text_encoder)


def fingerprint(unet, modules, text_encoder=None):
    """Hash the weights of the named modules, (out, in) each, as bundles of format 1 did; today's is `fingerprints`."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        weight = base_layer(find_module(name, unet, text_encoder)).weight
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_type(name_or_path, revision=None, token=None, wanted="auto"):
    """Whether a pipeline in a folder or on the Hub is a Stable Diffusion ("sd") or a Latent Consistency one ("lcm").

    Its UNet decides: that of a Latent Consistency Model takes an embedding of the guidance scale. Where that is missing
    though pipeline or scheduler are a Latent Consistency Model's, only the user can know.

    Args:
        wanted (`str`): "auto", or the type that the user says it is.

    Raises:
        NullSpaceError: if it cannot be had, is of another kind, or not what is wanted.
    """
    from diffusers import DiffusionPipeline, UNet2DConditionModel  # take seconds to import

    def load(kind, **where):
        try:
            return kind.load_config(name_or_path, revision=revision, token=token, **where)
        except Exception as error:  # among them those of the HTTP library, which differ between versions
            raise NullSpaceError(f"The base model {name_or_path} cannot be had ({reason(error)}).") from error

    index = load(DiffusionPipeline)
    pipeline = index["_class_name"]
    if pipeline not in PIPELINES:
        raise NullSpaceError(f"{name_or_path} is a {pipeline}; only {' and '.join(PIPELINES)} models are supported.")
    unet = load(UNet2DConditionModel, subfolder="unet")
    found = "sd" if unet.get("time_cond_proj_dim") is None else "lcm"
    named = [name for name in (pipeline, index.get("scheduler", [None])[-1]) if name in (PIPELINES[1], "LCMScheduler")]
    if found == "sd" and named and wanted != "sd":
        raise NullSpaceError(
            f"{name_or_path} has a {named[0]}, but its UNet takes no guidance embedding (time_cond_proj_dim), so it "
            "is no Latent Consistency Model that can be trained; pass --model_type sd to take it as a Stable Diffusion."
        )
    if wanted not in ("auto", found):
        takes = "takes no guidance embedding" if found == "sd" else "takes a guidance embedding"
        raise NullSpaceError(
            f"--model_type {wanted} contradicts {name_or_path}, whose UNet {takes} (time_cond_proj_dim): it is "
            f"{found}; leave --model_type out."
        )
    return found


def download_model(name_or_path, revision=None, variant=None, token=None):
    """The folder of a base model: the given one, or the snapshot of a Hub model, with all that a pipeline of it loads.

    Raises:
        NullSpaceError: if it cannot be had.
    """
    from diffusers import DiffusionPipeline

    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(
            DiffusionPipeline.download(
                name_or_path, revision=revision, variant=variant, token=token, safety_checker=None
            )
        )
    except Exception as error:
        raise NullSpaceError(f"The base model {name_or_path} cannot be had ({reason(error)}).") from error


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


def load_whole(kind, name_or_path, part, **where):
    """A model of class `kind` from the folder `part` of a base model.

    transformers and diffusers draw weights that its file lacks at random, and say so in a log only.

    Raises:
        ValueError: if its file lacks weights, with their names.
    """
    model, info = kind.from_pretrained(name_or_path, subfolder=part, output_loading_info=True, **where)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"the file of its {part} lacks the weights {', '.join(missing[:3])}{more}")
    return model


def require(package, flag):
    """Raise `NullSpaceError` unless a package that only some need is installed."""
    if importlib.util.find_spec(package) is None:
        raise NullSpaceError(f"{flag} needs {package}, which is not installed: pip install {package}")


def base_layer(module):
    """The linear layer itself, below the LoRA layer that peft may have wrapped around it."""
    return getattr(module, "base_layer", module)


# ---- Clip skip -------------------------------------------------------------------------------------------------------


def encode_tokens(text_encoder, input_ids, attention_mask=None, clip_skip=0):
    """Embeddings (batch, tokens, width) of tokens (batch, tokens), without the last `clip_skip` layers.

    As `StableDiffusionPipeline.encode_prompt` computes them: what the layer before those gives, through the final norm.
    """
    if not clip_skip:
        return text_encoder(input_ids, attention_mask=attention_mask)[0]
    output = text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    norm = _text_layers(getattr(text_encoder, "module", text_encoder)).final_layer_norm  # below what DDP wraps
    return norm(output.hidden_states[-(clip_skip + 1)].to(norm.weight.dtype))


@torch.no_grad()
def prompt_arguments(pipeline, prompt, clip_skip=0):
    """How a pipeline is called with a prompt, or several, and a clip skip: keyword arguments.

    A pipeline's own `clip_skip` looks for `text_encoder.text_model`, which not every version of transformers has. As
    there, the negative prompt is encoded by all layers.
    """
    if not clip_skip:
        return {"prompt": prompt}
    tokens = pipeline.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    tokens = tokens.to(pipeline.text_encoder.device)
    uses_mask = getattr(pipeline.text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask if uses_mask else None
    return {"prompt_embeds": encode_tokens(pipeline.text_encoder, tokens.input_ids, mask, clip_skip)}


def check_clip_skip(clip_skip, layers):
    """Raise `NullSpaceError` unless a text encoder of so many layers has one left when `clip_skip` are skipped."""
    if not 0 <= clip_skip < layers:
        raise NullSpaceError(
            f"--clip_skip {clip_skip} leaves nothing of the text encoder, which has {layers} layers; skip fewer."
        )


def without_skipped(names, clip_skip, layers):
    """The names of a text encoder's modules that lie in none of its last `clip_skip` layers, of so many."""
    skipped = tuple(f"{TEXT_ENCODER}.encoder.layers.{index}." for index in range(layers - clip_skip, layers))
    return [name for name in names if not name.startswith(skipped)]


# ---- Second moments --------------------------------------------------------------------------------------------------


class SecondMoments:
    """Streams the uncentred second moments of layer inputs into one matrix for each input and timestep group.

    Nothing else is kept: each input x (tokens, in) adds x^T x to a float32 matrix (in, in) on the model's device.

    Args:
        unet (`UNet2DConditionModel`): the model whose inputs are read.
        inputs (`dict[str, str]`): module name -> input name, from `attention_inputs` and `text_encoder_inputs`.
        group_of (`dict[int, str]`): group name of each timestep, rounded to a whole number; at others that the
            sampler visits, only what does not depend on the timestep is read.
        text_encoder (`CLIPTextModel`, *optional*): needed where `inputs` names layers of it.
    """

    def __init__(self, unet, inputs, group_of, text_encoder=None):
        self.unet, self.inputs, self.group_of, self.text_encoder = unet, inputs, group_of, text_encoder
        self.sums = {}  # (group, input) -> (in, in), sum of x x^T
        self.tokens = {}  # (group, input) -> number of tokens summed
        self._group = None
        self._pending = set()  # of the groups that a batch of prompts adds to once

    @contextmanager
    def collect(self):
        """Read the inputs of every forward pass of the model while the context is open."""
        readers = {}  # one module stands for all that share its input
        for name, source in self.inputs.items():
            readers.setdefault(source, name)
        handles = [self.unet.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        for source, name in readers.items():
            module = base_layer(find_module(name, self.unet, self.text_encoder))
            handles.append(module.register_forward_pre_hook(self._reader(source)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def start_batch(self):
        """Say that new prompts follow: what does not depend on the timestep is then counted once."""
        self._pending = set(TIMELESS)

    def draw(
        self, pipeline, prompts, seeds, num_inference_steps, guidance_scale, resolution, on_step_end=None, clip_skip=0
    ):
        """Draw prompts as users of the model do, and add what its layers read; only within `collect`.

        Args:
            pipeline (`DiffusionPipeline`): of the model, with the sampler.
            prompts (`list[str]`): drawn as one batch.
            seeds (`list[int]`): each prompt's noise comes from its own, drawn on the CPU, so that it depends on
                neither batch, process nor device.
            num_inference_steps (`list[int]`): the prompts are drawn with each of these numbers of steps.
            guidance_scale (`float`), resolution (`int`, pixels), on_step_end (`Callable`): as the pipeline takes them.
            clip_skip (`int`): how many of the text encoder's last layers are skipped.
        """
        self.start_batch()
        for steps in num_inference_steps:
            pipeline(
                **prompt_arguments(pipeline, prompts, clip_skip),
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
                callback_on_step_end=on_step_end,
            )

    def _on_forward(self, unet, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._group = self.group_of.get(round(float(timestep)))
        self._pending.discard(TEXT_ENCODER)  # it has read the prompts, the empty one included

    def _reader(self, source):
        def read(module, args):
            group = source.partition(".")[0]
            if group not in TIMELESS:
                group = self._group
                if group is None:
                    return
            elif group not in self._pending:
                return
            elif group == TEXT_INPUT:
                self._pending.discard(TEXT_INPUT)
            self.add(group, source, args[0].detach())

        return read

    def add(self, group, source, x):
        """Add inputs x (..., in) of the layer input `source` to a group's matrix."""
        # What fits into 16 bits fits into TF32, which then loses nothing and is far faster than float32.
        fits_tf32 = x.dtype in (torch.float16, torch.bfloat16)
        x = x.reshape(-1, x.shape[-1]).float()
        key = (group, source)
        if key not in self.sums:
            self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.tokens[key] = 0
        with _tf32(fits_tf32, x.device):
            self.sums[key].addmm_(x.T, x)
        self.tokens[key] += x.shape[0]

    def reduce(self, reduce_sum):
        """Replace every sum and count by that over all processes.

        Args:
            reduce_sum (`Callable[[Tensor], Tensor]`): the sum of a tensor over all processes.
        """
        for key in sorted(self.sums):
            self.sums[key] = reduce_sum(self.sums[key])
            self.tokens[key] = int(reduce_sum(torch.tensor(self.tokens[key], device=self.sums[key].device)))

    def group(self, name):
        """The sums and token counts of one group: `dict[str, tuple[Tensor (in, in), int]]` by input."""
        return {
            source: (self.sums[key], self.tokens[key]) for key in self.sums for group, source in [key] if group == name
        }


class Spectrum(NamedTuple):
    """Eigenvalues (in,) float32, largest first, and eigenvectors (in, in) as columns, of C = E[x x^T]; its tokens.

    Eigenvectors are float32; those of bundles of format 1 are float16. `distance` is ||U - V||_F, V being them and U
    those of the decomposition in float64 that they were rounded from, or None where that is not known. It bounds what
    the rounding can hide, whichever k directions are closed: ||dW U_k||_F <= ||dW V_k||_F + ||dW||_F ||U_k - V_k||_2.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    tokens: int
    distance: float | None = None

    @classmethod
    def from_sum(cls, total, tokens, name="the input"):
        """Decompose a sum of x x^T (in, in) over `tokens` tokens in float64; the eigenvectors are rounded to float32.

        Raises:
            NullSpaceError: if the sum is not finite or counts no token.
        """
        if not tokens or not torch.isfinite(total).all():
            raise NullSpaceError(
                f"The inputs collected for {name} contain NaN or infinity (or nothing at all); "
                "build with --mixed_precision no or bf16."
            )
        eigenvalues, eigenvectors = torch.linalg.eigh(total.to("cpu", torch.float64) / tokens)
        stored = eigenvectors.flip(1).float().contiguous()
        distance = (stored - eigenvectors.flip(1)).norm().item()
        return cls(eigenvalues.flip(0).clamp_min(0).float().contiguous(), stored, tokens, distance)

    @classmethod
    def from_spectra(cls, total, tokens, spectra, name="the input"):
        """Decompose a sum that was made of stored spectra; the distance is known where all of theirs are.

        It is that from the decomposition of this sum: nothing else has seen what the spectra were rounded from.
        """
        spectrum = cls.from_sum(total, tokens, name)
        return spectrum if all(item.distance is not None for item in spectra) else spectrum._replace(distance=None)

    def orthonormal(self):
        """Eigenvectors (in, in) in float32, orthonormal to its rounding again.

        Those of format 1 take one Newton-Schulz step U (3 I - U^T U) / 2, which squares the deviation that float16
        storage left (about 5e-4), and turns no direction by more than that.
        """
        vectors = self.eigenvectors.float()
        if self.eigenvectors.dtype == torch.float32:
            return vectors
        with _tf32(False, vectors.device):
            return 1.5 * vectors - 0.5 * vectors @ (vectors.T @ vectors)

    def sum(self):
        """The sum of x x^T over the tokens, (in, in) float64, to the precision that is stored."""
        vectors = self.orthonormal().double()
        return (vectors * (self.eigenvalues.double() * self.tokens)) @ vectors.T

    def rank(self, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"]):
        """How many leading directions are protected.

        - "energy": the fewest that hold this share of the trace, in [0, 1); 0 protects nothing.
        - "eigenvalue": those whose eigenvalue is at least the threshold (AlphaEdit's absolute threshold).
        - "percentile": all but the lowest `threshold` percent of the directions, in (0, 100].

        Raises:
            NullSpaceError: if the criterion is unknown or the threshold is out of its range.
        """
        check_threshold(criterion, threshold)
        size = len(self.eigenvalues)
        if criterion == "eigenvalue":
            return int((self.eigenvalues >= threshold).sum())
        if criterion == "percentile":
            return size - math.floor(size * threshold / 100)
        energy = self.eigenvalues.double().cumsum(0)
        return int((energy < threshold * energy[-1]).sum()) + 1 if threshold > 0 else 0

    def gains(self, softness):
        """How much of a step each direction is given, (in,) float32: sqrt(softness / (softness + share of the energy)).

        They are the eigenvalues of (lambda (C + lambda I)^-1)^(1/2) with lambda = softness * tr(C). The matrix without
        the root is the soft projector of OWM (arXiv 1810.01256, eq. 1); a step is given the root twice, once for the
        gradient and once for the change that the optimizer makes of it, which optimizes A (C / lambda + I)^(1/2) in
        place of A. Infinite softness gives 1 everywhere.

        Raises:
            NullSpaceError: if the softness is not above 0.
        """
        check_softness(softness)
        share = self.eigenvalues.double() / self.eigenvalues.double().sum().clamp_min(1e-300)
        return (1 + share / softness).rsqrt().float()


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


def check_softness(softness):
    """Raise `NullSpaceError` unless the softness is above 0; see `Spectrum.gains`."""
    if not softness > 0:
        raise NullSpaceError(f"--nullspace_softness {softness} is out of range: it must be above 0 (inf: no damping).")


def timestep_groups(timesteps, count, num_train_timesteps=1000):
    """Split a sampler's timesteps into `count` groups of neighbours whose ranges tile the training timesteps.

    Args:
        timesteps (`Iterable[float]`): the timesteps that the sampler visits, in any order.
        count (`int`): number of groups; no more than there are different timesteps are made.

    Returns:
        `list[dict]`: `name`, `timesteps` (whole numbers, ascending) and `range` [first, last] of each group; a
        range ends half way to the next group's first timestep.
    """
    visited = sorted({round(float(timestep)) for timestep in timesteps})
    count = min(count, len(visited))
    bounds = [len(visited) * index // count for index in range(count + 1)]
    chunks = [visited[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    edges = [0] + [(left[-1] + right[0] + 1) // 2 for left, right in zip(chunks, chunks[1:], strict=False)]
    groups = []
    for chunk, first, last in zip(chunks, edges, edges[1:] + [num_train_timesteps], strict=True):
        name = JOINT if count == 1 else f"timesteps-{first:04d}-{last - 1:04d}"
        groups.append({"name": name, "timesteps": chunk, "range": [first, last - 1]})
    return groups


# ---- The bundle ------------------------------------------------------------------------------------------------------


@dataclass
class Bundle:
    """The second moments of one base model's layer inputs, decomposed, by timestep group.

    On disk: `nullspace_config.json` describes it and holds the sha256 of all files; each group is a safetensors
    file with, for each input, `<input>.eigenvalues` (in,) float32 and `<input>.eigenvectors` (in, in) float32, all of
    them, since any threshold may be chosen later; how far those are from the builder's own float64 decomposition is in
    `distances` of the configuration, by group and input, see `Spectrum`. `base_model.fingerprint` there is that of
    `fingerprints`. Format 1, which is still read, has float16 eigenvectors, no distances, and the hash of the covered
    projections in place of the fingerprints.

    The text encoder's output does not depend on the timestep and has a file of its own, and so have the inputs of the
    text encoder's own layers, where they were collected. The group "joint", the sum over all timesteps, is always
    there.

    Attributes:
        config (`dict`): what `nullspace_config.json` holds.
        spectra (`dict[str, dict[str, Spectrum]]`): group -> input -> spectrum, for the groups that were loaded;
            the text encoder's output is the group "encoder_hidden_states", its own layers "text_encoder".
        revision (`str` or `None`): the commit that it was read from, where that was on the Hub.
    """

    config: dict
    spectra: dict = field(default_factory=dict)
    revision: str | None = None

    @classmethod
    def from_moments(cls, moments, groups, config):
        """Decompose what `SecondMoments` collected. `groups` are those of `timestep_groups`, `config` the rest."""
        spectra = {}
        for name in [group["name"] for group in groups] + TIMELESS:
            collected = moments.group(name)
            if collected:
                spectra[name] = {source: Spectrum.from_sum(*pair, name=source) for source, pair in collected.items()}
        if JOINT not in [group["name"] for group in groups]:
            totals = {}
            for group in groups:
                for source, (total, tokens) in moments.group(group["name"]).items():
                    before, counted = totals.get(source, (0, 0))
                    totals[source] = (before + total.to("cpu", torch.float64), counted + tokens)
            spectra[JOINT] = {source: Spectrum.from_sum(*pair, name=source) for source, pair in totals.items()}
            groups = [joint_group(groups)] + groups
        config = {"format_version": FORMAT_VERSION, **config, "groups": groups, "dtype": "float32"}
        return cls(config, spectra)

    # Reading

    @classmethod
    def load(cls, name_or_path, timesteps=JOINT, timestep_range=None, revision=None, token=None, text_encoder=False):
        """Read a bundle from a folder or from a dataset repository on the Hub, only the files that are needed.

        Args:
            name_or_path (`str` or `Path`): a folder or a Hub id.
            timesteps (`str`): "joint", or "nearest" for the groups that the bundle splits the timesteps into.
            timestep_range (`tuple[int, int]`, *optional*): see `restrict`.
            revision, token (`str`, *optional*): as in huggingface_hub.
            text_encoder (`bool`): whether to read what the text encoder's own layers see, where the bundle has it.

        Raises:
            NullSpaceError: if it cannot be had, is of a newer format, or a file differs from its recorded sha256.
        """
        try:
            return cls._load(name_or_path, timesteps, timestep_range, revision, token, text_encoder)
        except DamagedError:
            if Path(name_or_path).is_dir() or is_offline_mode():
                raise
            # Without force, the cache would give the damaged file for ever.
            return cls._load(name_or_path, timesteps, timestep_range, revision, token, text_encoder, force=True)

    @classmethod
    def _load(cls, name_or_path, timesteps, timestep_range, revision, token, text_encoder, force=False):
        folder = fetch_files(name_or_path, [CONFIG_NAME], revision, token, force)
        config = read_config(folder)
        names = needed_groups(config, timesteps, timestep_range, text_encoder)
        if not Path(name_or_path).is_dir():
            revision = folder.name  # a snapshot is named after its commit: a push in between must not mix two bundles
        folder = fetch_files(name_or_path, [group_file(name) for name in names], revision, token, force)
        bundle = cls(config, revision=None if Path(name_or_path).is_dir() else revision)
        bundle.spectra = {name: bundle._read_group(folder, name) for name in names}
        return bundle if timestep_range is None else bundle.restrict(*timestep_range)

    def _read_group(self, folder, name):
        path = folder / group_file(name)
        expected = self.config["files"][path.name]
        try:
            actual = sha256(path)
            tensors = load_file(path) if actual == expected else None
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path} cannot be read ({error}); download or build the bundle again.") from error
        if tensors is None:
            raise DamagedError(
                f"{path} is truncated or altered (its sha256 differs from the one in {CONFIG_NAME}); "
                "download or build the bundle again."
            )
        distances = self.config.get("distances", {}).get(name, {})
        if not all(distance is None or 0 <= distance < math.inf for distance in distances.values()):
            raise DamagedError(f"{folder / CONFIG_NAME} holds distances that are none; build the bundle again.")
        return {
            source: Spectrum(
                tensors[f"{source}.eigenvalues"], tensors[f"{source}.eigenvectors"], tokens, distances.get(source)
            )
            for source, tokens in self.config["tokens"][name].items()
        }

    def group(self, name):
        """The spectra (`dict[str, Spectrum]`) of all inputs in a group, and of those that all timesteps share."""
        return {source: item for key in (name, *TIMELESS) for source, item in self.spectra.get(key, {}).items()}

    @property
    def clip_skip(self):
        """How many of the text encoder's last layers were skipped."""
        return self.config.get("clip_skip", 0)  # which earlier bundles do not name

    @property
    def modules(self):
        """What is covered in the UNet and the text encoder: `dict[str, dict]` with input name and sizes, by module."""
        return {**self.config["modules"], **self.config.get(TEXT_ENCODER, {}).get("modules", {})}

    def protected(
        self, name=JOINT, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"], softness=DEFAULT_SOFTNESS
    ):
        """What a group protects in each covered module whose input is loaded: `dict[str, Protected]`.

        Modules that share an input share the object. A layer in which the criterion closes no direction is left
        free of any damping too.

        Args:
            name (`str`): of the group.
            criterion, threshold: which directions are closed, see `Spectrum.rank`.
            softness (`float`): how little the other directions are held back, see `Spectrum.gains`; `math.inf` is
                not at all.

        Raises:
            NullSpaceError: if a layer is left without a free direction, or a value is out of range.
        """
        check_softness(softness)
        shared = {}
        for source, spectrum in self.group(name).items():
            rank = spectrum.rank(criterion, threshold)
            if rank == len(spectrum.eigenvalues):
                raise NullSpaceError(
                    f"--nullspace_criterion {criterion} --nullspace_threshold {threshold} leaves no free direction in "
                    f"{source} ({rank} of {rank} protected); choose a "
                    f"{'higher' if criterion in ('eigenvalue', 'percentile') else 'lower'} threshold."
                )
            gains = spectrum.gains(softness)[rank:] if rank and softness < math.inf else None
            shared[source] = Protected(spectrum.orthonormal(), rank, gains, spectrum.distance)
        return {module: shared[info["input"]] for module, info in self.modules.items() if info["input"] in shared}

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
        """Raise `NullSpaceError` unless this bundle was built for this kind of model, "sd" or "lcm".

        Sizes and weights may agree all the same: a Latent Consistency Model sees other inputs, at other timesteps.
        """
        built_for = self.config["model_type"]
        if kind != built_for:
            raise NullSpaceError(
                f"The bundle was built for {MODEL_TYPES[built_for]} ({self.config['base_model']['id']}) and protects "
                f"nothing of {MODEL_TYPES[kind]}, even one of the same sizes; use the bundle of this model or build "
                "one with build_nullspace.py."
            )

    def check(self, unet, text_encoder=None, **others):
        """Raise `NullSpaceError` unless this bundle was built from the model that these are parts of.

        Args:
            unet (`UNet2DConditionModel`), text_encoder (`CLIPTextModel`, *optional*): with or without LoRA layers.
            others: `tokenizer` and `noise_scheduler`; what is not given is not compared.
        """
        self.check_model_type("sd" if unet.config.time_cond_proj_dim is None else "lcm")
        present = dict(unet.named_modules())
        if not any(name in present for name in self.config["modules"]):
            raise NullSpaceError("The bundle covers no layer of this UNet; build one for this model.")
        covered = self.config["modules"] if text_encoder is None else self.modules
        for name, info in covered.items():
            self._check_size(name, info, unet, text_encoder)
        expected = self.config["base_model"]["fingerprint"]
        if isinstance(expected, str):
            differing = self._check_projections(unet, text_encoder)
        else:
            given = {"unet": unet, **({} if text_encoder is None else {TEXT_ENCODER: text_encoder}), **others}
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
        return [part for part, modules, expected in parts if fingerprint(unet, modules, text_encoder) != expected]

    def _check_size(self, name, info, unet, text_encoder):
        expected = (info["out_features"], info["in_features"])
        try:
            found = tuple(base_layer(find_module(name, unet, text_encoder)).weight.shape)
        except AttributeError:  # which is how torch says that there is no such module
            found = "missing"
        if found != expected:
            raise NullSpaceError(
                f"The bundle was built for {self.config['base_model']['id']}, where {name} is {expected}, but here "
                f"it is {found}; use the bundle of this model or build one."
            )

    # Adding and restricting: second moments add up

    def emphasize(self, other):
        """The bundle in which another's prompts, of any number, weigh as much as all of this one's; joint group only.

        Args:
            other (`Bundle`): with the same inputs in its joint group.
        """
        emphasized = Bundle(copy.deepcopy(self.config), revision=self.revision)
        emphasized.spectra = {name: dict(spectra) for name, spectra in self.spectra.items()}
        for name, spectra in other.spectra.items():
            for source, spectrum in spectra.items():
                mine = self.spectra[name][source]
                total = mine.sum() + spectrum.sum() * (mine.tokens / spectrum.tokens)
                emphasized.spectra[name][source] = Spectrum.from_spectra(
                    total, 2 * mine.tokens, (mine, spectrum), name=source
                )
        return emphasized

    def _sum(self, names):
        totals = {}
        for name in names:
            for source, spectrum in self.spectra[name].items():
                before, counted, spectra = totals.get(source, (0, 0, []))
                totals[source] = (before + spectrum.sum(), counted + spectrum.tokens, [*spectra, spectrum])
        return {source: Spectrum.from_spectra(*parts, name=source) for source, parts in totals.items()}

    def merge(self, other):
        """The bundle of both bundles' prompts together, as if built at once, to the precision that is stored.

        Both must describe the same weights and hold the same groups, all loaded.

        Raises:
            NullSpaceError: if they do not.
        """
        for key in ("model_type", "base_model", "modules", "groups", TEXT_ENCODER, "clip_skip"):
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
            needed = {group["name"] for group in bundle.config["groups"]} | {TEXT_ENCODER} & set(bundle.config)
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
            "examples": mine["examples"] + theirs["examples"],
        }
        return merged

    def restrict(self, first, last):
        """The bundle of the timesteps from `first` to `last`, both included; all groups in it must be loaded.

        Raises:
            NullSpaceError: if no timestep lies in the range, or it cuts through a group.
        """
        kept = groups_inside(self.config, first, last)
        names = [group["name"] for group in kept]
        restricted = Bundle(copy.deepcopy(self.config), revision=self.revision)
        restricted.spectra = {name: self.spectra[name] for name in [*names, *TIMELESS] if name in self.spectra}
        if len(kept) == len(split_groups(self.config)):
            restricted.spectra[JOINT] = self.spectra[JOINT]
        else:
            restricted.spectra[JOINT] = self._sum(names)
        restricted.config["groups"] = [joint_group(kept)] + [group for group in kept if group["name"] != JOINT]
        return restricted

    # Writing

    def save(self, folder, extras=()):
        """Write the bundle as a folder, whole or not at all; an earlier bundle there is replaced.

        Args:
            folder (`Path`): where.
            extras (`Iterable[Callable[[Bundle, Path], None]]`): each writes more files into the folder (the card, a
                picture) before it is moved into place.

        Raises:
            NullSpaceError: if the folder holds something other than a bundle.
            OSError: if it cannot be written.
        """
        folder = Path(folder).resolve()
        check_output_folder(folder)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = ("tokens", "distances", "files", "sha256")
        config = {key: value for key, value in self.config.items() if key not in written}
        config["tokens"] = {
            name: {source: spectrum.tokens for source, spectrum in spectra.items()}
            for name, spectra in self.spectra.items()
        }
        config["distances"] = {
            name: {source: spectrum.distance for source, spectrum in spectra.items()}
            for name, spectra in self.spectra.items()
        }
        for name, spectra in self.spectra.items():
            tensors = {}
            for source, spectrum in spectra.items():
                tensors[f"{source}.eigenvalues"] = spectrum.eigenvalues
                tensors[f"{source}.eigenvectors"] = spectrum.eigenvectors
            save_file(tensors, partial / group_file(name), metadata={"format": "pt"})
            follow_umask(partial / group_file(name))
        self._write_table(partial / TABLE_NAME)
        for write in extras:
            write(self, partial)
        config["files"] = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        config["sha256"] = config_sha256(config)
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        self.config = config
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            rename_folder(folder, old)
        rename_folder(partial, folder)
        shutil.rmtree(old, ignore_errors=True)

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
            writer.writerows(rows)


def joint_group(groups):
    """The group of all timesteps of the given ones."""
    return {
        "name": JOINT,
        "timesteps": sorted(timestep for group in groups for timestep in group["timesteps"]),
        "range": [min(group["range"][0] for group in groups), max(group["range"][1] for group in groups)],
    }


def split_groups(config):
    """The groups that a bundle splits its timesteps into: all but the joint one, or that one if it is alone."""
    return [group for group in config["groups"] if group["name"] != JOINT] or config["groups"]


def groups_inside(config, first, last):
    """The groups that a bundle splits its timesteps into which lie from `first` to `last`, both included.

    Raises:
        NullSpaceError: if there is none, or the range cuts through one.
    """
    kept = []
    for group in split_groups(config):
        inside = [first <= timestep <= last for timestep in group["timesteps"]]
        if any(inside) and not all(inside):
            raise NullSpaceError(
                f"The range {first} to {last} cuts through the group of timesteps {group['timesteps'][0]} to "
                f"{group['timesteps'][-1]}; choose another range, or build with --timestep_groups steps."
            )
        if all(inside):
            kept.append(group)
    if not kept:
        raise NullSpaceError(f"No timestep of the bundle lies between {first} and {last}.")
    return kept


def needed_groups(config, timesteps=JOINT, timestep_range=None, text_encoder=False):
    """Names of the groups that a use of a bundle reads; arguments as for `Bundle.load`."""
    split = split_groups(config)
    if timesteps == "nearest" and len(split) == 1:
        raise NullSpaceError(
            "This bundle holds its timesteps in one group, so there is no nearest one to choose; "
            "build with --timestep_groups stages or steps, or use --nullspace_timesteps joint."
        )
    kept = split if timestep_range is None else groups_inside(config, *timestep_range)
    names = [JOINT] if len(kept) == len(split) else []
    if timesteps == "nearest" or len(kept) < len(split):
        names += [group["name"] for group in kept]
    timeless = TIMELESS if text_encoder else [TEXT_INPUT]
    return names + [name for name in timeless if name in config["tokens"]]


def group_file(name):
    """File name of a group."""
    return f"{name}.safetensors"


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def config_sha256(config):
    """Hex digest of what a configuration says, all but this digest itself."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def check_writable(folder):
    """Raise `NullSpaceError` if a folder, which may not exist yet, cannot be made or written to."""
    folder = first = Path(folder).resolve()
    try:
        while not first.parent.exists():
            first = first.parent
        probe = first.with_name(f"{first.name}.probe-{os.getpid()}")  # of what would be made, the uppermost
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise NullSpaceError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir.") from error


def read_config(folder):
    """The parsed and checked `nullspace_config.json` of a bundle's folder.

    Raises:
        NullSpaceError: if there is none, it is no bundle's or altered, or its format is newer than this code.
    """
    path = fetch_files(folder, [CONFIG_NAME]) / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
        if config["format_version"] > FORMAT_VERSION:
            raise NullSpaceError(
                f"The bundle in {folder} has format {config['format_version']}, newer than the {FORMAT_VERSION} known "
                "here; update this project."
            )
        whole = config["sha256"] == config_sha256(config)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is not a bundle's configuration; download or build the bundle again.") from error
    if not whole:
        raise DamagedError(
            f"{path} is altered (its sha256 differs from the one in it); download or build the bundle again."
        )
    return config


def check_files(folder):
    """Raise `NullSpaceError` unless a folder holds all files of a bundle as they were built; its card may be edited."""
    for name, digest in read_config(folder)["files"].items():
        if sha256(fetch_files(folder, [name]) / name) != digest and name != CARD_NAME:
            raise DamagedError(f"{Path(folder) / name} is truncated or altered; download or build the bundle again.")


# ---- The projector ---------------------------------------------------------------------------------------------------


class Protected(NamedTuple):
    """An orthonormal basis (in, in) float32 of a layer's input space, whose first `rank` columns are protected.

    The others are free, or held back by the factors `gains` (in - rank,) where there are any. `distance` is that of
    the `Spectrum`.
    """

    basis: torch.Tensor
    rank: int
    gains: torch.Tensor | None = None
    distance: float | None = None


class _Batch(NamedTuple):
    """Adapters projected in one batched product: bases of one size, each shared by the same number of adapters."""

    names: list  # of modules, those that share a basis next to each other
    directions: torch.Tensor  # (bases, in, k), padded with zeros to one k; scaled by the roots of the gains
    free: bool  # whether the directions span the free space, otherwise the protected one

    def project(self, tensors):
        """Project the rows of tensors (r, in), one for each name, in order, in float32."""
        stacked = torch.stack(tensors).float()
        x = stacked.view(len(self.directions), -1, stacked.shape[-1])
        with _tf32(False, x.device):  # it would leak about 1e-3
            inside = torch.bmm(torch.bmm(x, self.directions), self.directions.mT)
        return (inside if self.free else x - inside).view_as(stacked).unbind()


@contextmanager
def _tf32(use, device):
    """Let float32 matrix products on a GPU round what they read to TF32 (11 significant bits), or none at all.

    Whatever the surroundings have set, and as they have set it afterwards: `allow_tf32`, `fp32_precision` of a backend,
    `set_float32_matmul_precision`, which on some CPUs lets products read bfloat16 (8 bits), and autocast.
    """
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if use else "highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        # Here the other interface would raise where the surroundings have used this one, and reads what this one set.
        settings = [(torch.backends.cuda.matmul, "tf32" if use else "ieee"), (torch.backends.mkldnn.matmul, "ieee")]
        before = [setting.fp32_precision for setting, _ in settings]
        try:
            for setting, precision in settings:
                setting.fp32_precision = precision
            yield
        finally:
            for (setting, _), precision in zip(settings, before, strict=True):
                setting.fp32_precision = "none"  # which inherits from the backend, where that has been set
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


def _make_batches(protected, device, soft):
    """Group modules (`dict[str, Protected]`) into as few batched products as there are kinds of basis.

    `soft` says whether the free directions are held back, where they have gains, or given in full.
    """
    sharing = {}  # one basis -> its modules
    for name, item in protected.items():
        sharing.setdefault(id(item), []).append(name)
    kinds = {}
    for names in sharing.values():
        item = protected[names[0]]
        if item.rank:
            if soft and item.gains is not None:
                free, directions = True, item.basis[:, item.rank :] * item.gains.sqrt()
            else:
                free = item.rank > len(item.basis) // 2  # work with whichever half is smaller
                directions = item.basis[:, item.rank :] if free else item.basis[:, : item.rank]
            kinds.setdefault((len(item.basis), len(names), free), []).append((names, directions))
    batches = []
    for (size, _, free), members in kinds.items():
        padded = torch.zeros(len(members), size, max(directions.shape[1] for _, directions in members))
        for row, (_, directions) in zip(padded, members, strict=True):
            row[:, : directions.shape[1]] = directions
        batches.append(_Batch([name for names, _ in members for name in names], padded.to(device), free))
    return batches


class NullSpaceProjector:
    """Keeps the down-projections A (r, in) of LoRA layers in the null space of what is protected.

    B @ A then answers every protected input with zero, whatever B is. It takes three things: A's initial value is
    projected, its gradient is projected before it is clipped (so that the clip and the optimizer's moments see only
    what is allowed), and its value after every step, because Adam's division by each coordinate's own second moment
    leaves the subspace (Adam-NSCL, CVPR 2021). Free directions that are held back (`Protected.gains`) are so in all
    three: the initial value, the gradient and the change.

        projector = NullSpaceProjector(unet, {"joint": bundle.protected()})
        projector.attach(optimizer)
        ...
        loss.backward()
        projector.project_gradients()
        optimizer.step()

    That is the joint group's way. With others, no null space holds at all times, so the initial value is left as it
    is, and of each step the gradient and the change are projected with the group that is selected.

    Args:
        unet (`UNet2DConditionModel`): a model with LoRA layers on the protected modules.
        groups (`dict[str, dict[str, Protected]]`): group -> module name -> what it protects.
        adapter (`str`): name of the adapter.
        text_encoder (`CLIPTextModel`, *optional*): a model with LoRA layers, where groups name layers of it.
    """

    def __init__(self, unet, groups, adapter="default", text_encoder=None):
        self.groups = groups
        self.selected = next(iter(groups))
        names = dict.fromkeys(name for protected in groups.values() for name in protected)
        self.parameters = {name: find_module(name, unet, text_encoder).lora_A[adapter].weight for name in names}
        device = next(unet.parameters()).device
        self._batches = {group: _make_batches(protected, device, soft=True) for group, protected in groups.items()}
        self._closed = self._batches  # for the values: holding back is no projection, and would shrink them to nothing
        self._is_soft = any(item.gains is not None for protected in groups.values() for item in protected.values())
        if self._is_soft:
            self._closed = {group: _make_batches(protected, device, soft=False) for group, protected in groups.items()}
        self._before = None
        if JOINT in groups:
            with torch.no_grad():
                self._apply(lambda parameter: parameter, self._batches)

    def attach(self, optimizer):
        """Project after each of the optimizer's steps, whichever `torch.optim.Optimizer` it is."""
        if JOINT in self.groups and not self._is_soft:
            optimizer.register_step_post_hook(lambda *_: self.project_values())
        else:
            optimizer.register_step_pre_hook(lambda *_: self._remember_values())
            optimizer.register_step_post_hook(lambda *_: self._project_change())

    def select(self, group):
        """Project with this group's null space from now on; a name that is none of the groups protects nothing."""
        self.selected = group

    def _apply(self, tensor_of, batches):
        """Project, in place, the tensor (r, in) that belongs to each parameter; those without one are left out."""
        for batch in batches.get(self.selected, ()):
            tensors = [tensor_of(self.parameters[name]) for name in batch.names]
            present = [index for index, tensor in enumerate(tensors) if tensor is not None]
            if present:
                zero = torch.zeros_like(tensors[present[0]])
                projected = batch.project([zero if tensor is None else tensor for tensor in tensors])
                torch._foreach_copy_([tensors[i] for i in present], [projected[i] for i in present])

    @torch.no_grad()
    def project_values(self):
        """Project A itself, as the joint group's null space asks for after every change."""
        self._apply(lambda parameter: parameter, self._closed)

    @torch.no_grad()
    def project_gradients(self):
        """Project A's gradients; call it after the backward pass and before clipping."""
        self._apply(lambda parameter: parameter.grad, self._batches)

    @torch.no_grad()
    def _remember_values(self):
        self._before = {parameter: parameter.clone() for parameter in self.parameters.values()}

    @torch.no_grad()
    def _project_change(self):
        change = {parameter: parameter - before for parameter, before in self._before.items()}
        self._apply(change.get, self._batches)
        for parameter, before in self._before.items():
            parameter.copy_(before + change[parameter])
        self._before = None
        if JOINT in self.groups:  # what rounding has added up to
            self.project_values()

    @torch.no_grad()
    def leakage(self):
        """The largest share of any A's norm that lies in what the selected group protects: 0 is none."""
        worst = 0.0
        for name, item in self.groups.get(self.selected, {}).items():
            parameter = self.parameters[name].double().cpu()
            inside = (parameter @ item.basis[:, : item.rank].double()).norm()
            worst = max(worst, (inside / parameter.norm().clamp_min(1e-30)).item())
        return worst


# ---- The audit of a saved LoRA ---------------------------------------------------------------------------------------


class LoraLayer(NamedTuple):
    """One layer of a LoRA file: dW = scale * up @ down, with down (r, in) and up (out, r).

    Where there is a magnitude (out,), of DoRA, dW depends on the base weight as well, see `with_magnitude`.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


def with_magnitude(layer, weight):
    """The same change without a magnitude, for a base weight W (out, in); DoRA, arXiv 2402.09353, eq. 5.

    dW = m / ||V|| V - W with V = W + scale * up @ down and the norm over each row, as peft has it.
    """
    if layer.magnitude is None:
        return layer
    weight = weight.detach().to("cpu", torch.float64)
    turned = weight + layer.scale * layer.up.double() @ layer.down.double()
    magnitude = layer.magnitude.double().reshape(-1, 1)
    change = magnitude / turned.norm(dim=1, keepdim=True).clamp_min(1e-300) * turned - weight
    return LoraLayer(change, torch.eye(len(change), dtype=torch.float64), 1.0)


def load_lora(name_or_path):
    """The layers of a LoRA that holds nothing but such layers, see `read_lora`.

    Raises:
        NullSpaceError: if the file holds no LoRA layer of a UNet or a text encoder, or anything else.
    """
    layers, unknown = read_lora(name_or_path)
    if not layers:
        raise NullSpaceError(f"{name_or_path} holds no LoRA layer of a UNet or a text encoder.")
    if unknown:
        raise NullSpaceError(
            f"{name_or_path} holds what is not understood ({_first(unknown)}); only LoRA and DoRA layers of a UNet and "
            "of the first text encoder are."
        )
    return layers


def _first(names):
    """The first three of some names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
KOHYA_NEEDED = {"lora_down.weight", "lora_up.weight"}
KOHYA_OPTIONAL = {"alpha", "dora_scale"}


def _split_kohya(state_dict):
    """A file's tensors that diffusers reads, DoRA magnitudes by kohya's layer, and the other keys.

    diffusers drops `dora_scale` of kohya's files, and refuses a file for one layer that is no LoRA.
    """
    if not any(key.startswith(KOHYA_PREFIXES) for key in state_dict):
        unknown = sorted(key for key in state_dict if "dora_scale" in key)
        return {key: value for key, value in state_dict.items() if key not in unknown}, {}, unknown
    of_layer = {}
    for key in state_dict:
        of_layer.setdefault(key.partition(".")[0], []).append(key)
    known, magnitudes, unknown = {}, {}, []
    for layer, keys in of_layer.items():
        kinds = {key.partition(".")[2] for key in keys}
        if not layer.startswith(KOHYA_PREFIXES) or not KOHYA_NEEDED <= kinds <= KOHYA_NEEDED | KOHYA_OPTIONAL:
            unknown += keys
            continue
        known |= {key: state_dict[key] for key in keys if not key.endswith(".dora_scale")}
        if "dora_scale" in kinds:
            magnitudes[layer.replace("lora_te1_", "lora_te_")] = state_dict[f"{layer}.dora_scale"]
    return known, magnitudes, sorted(unknown)


def read_lora(name_or_path):
    """Read a LoRA in any format that diffusers reads: `dict[str, LoraLayer]` by module name, and what else it holds.

    Names are those of `attention_inputs` and `text_encoder_inputs`. The second is the list of the file's keys (as
    diffusers converts them) that are no part of these layers: LoHa, LoKr, a second text encoder, anything. Biases are
    among them, for what they do to a layer's output depends on the mean of its inputs, which no bundle holds.

    Raises:
        NullSpaceError: if it cannot be read.
    """
    from diffusers import StableDiffusionPipeline  # takes seconds to import, and only this needs it
    from diffusers.loaders.lora_base import _fetch_state_dict
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    try:
        # Beside it there may be one that failed its audit, which diffusers would as soon take
        weight_name = LORA_NAME if (Path(name_or_path) / LORA_NAME).is_file() else None
        options = ("local_files_only", "cache_dir", "force_download", "proxies", "token", "revision", "subfolder")
        tensors, config_of_file = _fetch_state_dict(
            str(name_or_path),
            weight_name=weight_name,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=True,
            **dict.fromkeys(options),
        )[:2]
        tensors, magnitudes, unknown = _split_kohya(tensors)
        state_dict, alphas = StableDiffusionPipeline.lora_state_dict(tensors) if tensors else ({}, {})
    except Exception as error:  # whatever diffusers and the HTTP library raise for a wrong path or a strange file
        raise NullSpaceError(f"{name_or_path} cannot be read as a LoRA: {reason(error)}") from error
    read, layers = (state_dict, alphas, config_of_file), {}
    unknown += sorted(key for key in state_dict if not key.startswith(("unet.", f"{TEXT_ENCODER}.")))
    for model in ("unet", TEXT_ENCODER):
        prefix = f"{model}."
        state_dict, alphas, config = (
            {key.removeprefix(prefix): value for key, value in (part or {}).items() if key.startswith(prefix)}
            for part in read
        )
        convert = _text_encoder_keys_to_peft if model == TEXT_ENCODER else convert_unet_state_dict_to_peft
        state_dict, alphas = convert(state_dict), convert(alphas)
        used = set()
        for key, down in state_dict.items():
            name = key.removesuffix(".lora_A.weight")
            if name != key and f"{name}.lora_B.weight" in state_dict:
                rank = len(down)
                alpha = alphas.get(f"{name}.alpha", alphas.get(f"{key}.alpha", rank))
                if config:  # of peft, which takes the place of the alphas
                    pattern = config.get("alpha_pattern") or {}
                    alpha = pattern.get(get_pattern_key(pattern, name), config["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                full_name = f"{TEXT_ENCODER}.{name}" if model == TEXT_ENCODER else name
                up = state_dict[f"{name}.lora_B.weight"]
                vectors = {key: state_dict.get(key) for key in _magnitude_keys(name)}
                found = [*vectors.values(), magnitudes.pop(kohya_name(full_name), None)]
                magnitude = next((each for each in found if each is not None), None)
                if magnitude is not None and magnitude.shape not in ((len(up),), (len(up), 1)):
                    unknown.append(f"magnitude of {full_name}, not of its {len(up)} outputs")
                    magnitude = None
                layers[full_name] = LoraLayer(down, up, scale, magnitude)
                used |= {key, f"{name}.lora_B.weight", *vectors}
        unknown += sorted(prefix + key for key in state_dict.keys() - used)
    return layers, unknown + sorted(f"{layer}.dora_scale" for layer in magnitudes)


def _magnitude_keys(name):
    return [f"{name}.lora_magnitude_vector", f"{name}.lora_magnitude_vector.weight"]


def _text_encoder_keys_to_peft(state_dict):
    """Keys of a text encoder's LoRA as peft names them, from the module that holds the layers."""
    names = {".lora_linear_layer.down.": ".lora_A.", ".lora_linear_layer.up.": ".lora_B."}
    for kind in ("q", "k", "v", "out"):  # as diffusers reads kohya's files
        names |= {f".to_{kind}_lora.down.": f".{kind}_proj.lora_A.", f".to_{kind}_lora.up.": f".{kind}_proj.lora_B."}
    converted = {}
    for key, value in state_dict.items():
        for old, new in names.items():
            key = key.replace(old, new)
        converted[key.removeprefix("text_model.")] = value
    return converted


def _compact(layer):
    """A matrix (r, in) float64 with the same norms as dW has: ||dW M|| = ||compact M|| for every M (in, ...)."""
    return layer.scale * torch.linalg.qr(layer.up.double()).R @ layer.down.double()


def leakage(layer, protected):
    """||dW U_k||_F / ||dW||_F, U_k (in, k) being the protected directions: 0 is the promise, 1 is no protection.

    At most this much: it is what is seen of the directions as they are stored, and what their rounding may hide.
    """
    compact = _compact(layer)
    inside = compact @ protected.basis[:, : protected.rank].double()
    return (inside.norm() / compact.norm().clamp_min(1e-300)).item() + (protected.distance or 0.0)


def predicted_drift(layer, weight, spectrum):
    """sqrt(tr(dW C dW^T) / tr(W C W^T)): relative RMS change of the layer's output on the protected inputs.

    Args:
        layer (`LoraLayer`): what is added to the layer.
        weight (`Tensor`): W, (out, in).
        spectrum (`Spectrum`): of C.
    """
    roots = spectrum.orthonormal().double() * spectrum.eigenvalues.double().sqrt()
    change = (_compact(layer) @ roots).norm()
    return (change / (weight.detach().to("cpu", torch.float64) @ roots).norm()).item()


def audit(layers, bundle, unet, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"], text_encoder=None):
    """What a LoRA does to the inputs that a bundle protects at all of its timesteps.

    Args:
        layers (`dict[str, LoraLayer]`): from `load_lora`.
        bundle (`Bundle`): with its joint group loaded, and that of the text encoder if the LoRA has layers there.
        unet (`UNet2DConditionModel`), text_encoder (`CLIPTextModel`, *optional*): the base model's.
        criterion, threshold: what counts as protected, see `Spectrum.rank`.

    Returns:
        `dict`: `layers`, one `dict` for each with `module`, `in_features`, `protected_rank`, `leakage` (None where
        nothing is protected) and `predicted_drift`, both None where the bundle does not cover the layer; the `max`,
        `mean` and root mean square (`rms`) of both over the layers that have them; and `unprotected`, the modules in
        which nothing is protected.
    """
    protected, spectra = bundle.protected(JOINT, criterion, threshold), bundle.group(JOINT)
    rows = []
    for name, layer in layers.items():
        row = {"module": name, "in_features": layer.down.shape[1]}
        row |= {"protected_rank": 0, "leakage": None, "predicted_drift": None}
        if name in protected:
            if layer.down.shape[1] != len(protected[name].basis):
                raise NullSpaceError(
                    f"The LoRA was made for another model than the bundle: their sizes of {name} differ."
                )
            spectrum = spectra[bundle.modules[name]["input"]]
            weight = base_layer(find_module(name, unet, text_encoder)).weight
            layer = with_magnitude(layer, weight)
            row["protected_rank"] = protected[name].rank
            row["leakage"] = leakage(layer, protected[name]) if protected[name].rank else None
            row["predicted_drift"] = predicted_drift(layer, weight, spectrum)
        rows.append(row)
    summary = {}
    for key in ("leakage", "predicted_drift"):
        values = [row[key] for row in rows if row[key] is not None]
        summary[key] = dict.fromkeys(("max", "mean", "rms"))
        if values:
            rms = math.sqrt(sum(value**2 for value in values) / len(values))
            summary[key] = {"max": max(values), "mean": sum(values) / len(values), "rms": rms}
    unprotected = [row["module"] for row in rows if not row["protected_rank"]]
    return {**summary, "unprotected": unprotected, "layers": rows}


# ---- The command line ------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description="Tools for LoRAs and null-space bundles.", formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "audit",
        help="Tell what any LoRA does to what a bundle protects, without drawing a picture.",
        formatter_class=HelpFormatter,
    )
    command.ranges = RANGES | {"nullspace_threshold": SHARE}
    command.add_argument("--lora", required=True, help="Folder, file or Hub id of the LoRA.")
    command.add_argument("--nullspace", required=True, help="Folder or Hub dataset id of the base model's bundle.")
    command.add_argument(
        "--pretrained_model_name_or_path", help="Folder or Hub id of the base model (default: what the bundle names)."
    )
    command.add_argument(
        "--nullspace_threshold",
        type=float,
        default=DEFAULT_THRESHOLDS["energy"],
        help="Leakage is that into the directions that hold this share of the energy (default: %(default)s).",
    )
    command = commands.add_parser(
        "export",
        help="Write a LoRA as one file that AUTOMATIC1111, Forge and ComfyUI load.",
        formatter_class=HelpFormatter,
    )
    command.add_argument("--lora", required=True, help="Folder, file or Hub id of the LoRA.")
    command.add_argument("--format", choices=["kohya"], default="kohya", help="Of the file (default: %(default)s).")
    command.add_argument("--output", required=True, help="The file, *.safetensors, which it replaces if there is one.")
    args = parser.parse_args(argv)
    if args.command == "export" and Path(args.output).suffix != ".safetensors":
        parser.error(f"--output {args.output} must end in .safetensors, by which the programs find it.")
    return args


def load_audited_models(bundle, name_or_path, with_text_encoder):
    """The base model's UNet, and its text encoder if asked for: arguments for `audit`.

    Args:
        name_or_path (`str` or `None`): of the base model; None is the one that the bundle names.

    Raises:
        NullSpaceError: if they cannot be had, or are not those that the bundle was built from.
    """
    from diffusers import UNet2DConditionModel  # slow to import, and only this needs them
    from transformers import CLIPTextModel

    base = bundle.config["base_model"]
    where = {key: base[key] for key in ("revision", "variant")} if name_or_path is None else {}
    kinds = {"unet": UNet2DConditionModel} | ({TEXT_ENCODER: CLIPTextModel} if with_text_encoder else {})
    try:
        models = {kind: load_whole(model, name_or_path or base["id"], kind, **where) for kind, model in kinds.items()}
    except (OSError, ValueError) as error:
        raise NullSpaceError(
            f"The base model {name_or_path or base['id']} cannot be had ({reason(error)}); name it with "
            "--pretrained_model_name_or_path."
        ) from error
    bundle.check(**models)
    return models


# Root mean square drifts of the layers between which the verdict changes. On the demo's model held-out pictures then
# move by about 2% and 4% of a pixel's range (benchmarks/preservation.py).
LITTLE, MUCH = 0.3, 0.6


def verdict(found, unknown=()):
    """One sentence on what `audit` found; `unknown` is what `read_lora` did not understand."""
    if unknown:
        return (
            f"Verdict: not known: the file also holds {_first(unknown)}, which the audit does not understand, and what "
            "that changes comes on top of what is listed."
        )
    drift, uncovered = found["predicted_drift"]["rms"], sum(row["predicted_drift"] is None for row in found["layers"])
    if drift is None:
        return "Verdict: the bundle covers no layer of this LoRA, so nothing can be said."
    word = "little" if drift < LITTLE else "noticeably" if drift < MUCH else "strongly"
    text = f"Verdict: on what the bundle protects, this LoRA changes its layers' outputs {word} (by {drift:.2g}, RMS)"
    if uncovered:
        text += f"; {uncovered} of its {len(found['layers'])} layers are not covered and not counted"
    return f"{text}."


def export(args):
    """Write a LoRA for the web UIs."""
    output, lora = Path(args.output), Path(args.lora)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise NullSpaceError(f"--output {output} is no file in a folder that there is; name one.")
    if output.exists() and any(source.exists() and output.samefile(source) for source in (lora, lora / LORA_NAME)):
        raise NullSpaceError(f"--output {output} is the LoRA itself; name another file.")
    layers = load_lora(args.lora)
    if any(layer.magnitude is not None for layer in layers.values()):
        raise NullSpaceError(f"{args.lora} is a DoRA, which is not exported; give the programs the file itself.")
    save_kohya(output, layers, read_report(args.lora))
    print(f"Wrote {len(layers)} layers to {output}")


def main(args):
    if args.command == "export":
        return export(args)
    layers, unknown = read_lora(args.lora)
    if not layers:
        print(verdict({}, unknown or ["nothing that is a LoRA layer"]))
        return
    with_text_encoder = any(name.startswith(f"{TEXT_ENCODER}.") for name in layers)
    bundle = Bundle.load(args.nullspace, text_encoder=with_text_encoder)
    models = load_audited_models(bundle, args.pretrained_model_name_or_path, with_text_encoder)
    found = audit(layers, bundle, **models, threshold=args.nullspace_threshold)

    width = max(len(row["module"]) for row in found["layers"])
    print(f"{'module':{width}}  inputs  closed   leakage     drift")
    for row in found["layers"]:
        values = ["-" if row[key] is None else f"{row[key]:.2e}" for key in ("leakage", "predicted_drift")]
        print(f"{row['module']:{width}}{row['in_features']:8}{row['protected_rank']:8}{values[0]:>10}{values[1]:>10}")
    print(verdict(found, unknown))


if __name__ == "__main__":
    try:
        main(parse_args())
    except NullSpaceError as error:
        sys.exit(f"error: {error}")
