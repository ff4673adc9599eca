"""Whether a bundle protects what its model reads: what its projectors let through, claimed and measured."""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel

from nullspace.checks import check_clip_skip
from nullspace.errors import NullSpaceError
from nullspace.families import get_family, recognise
from nullspace.models import download_model, load_config, loading
from nullspace.moments import SecondMoments
from nullspace.names import JOINT, TEXT_INPUT, TIMELESS, tokenizer_of
from nullspace.prompts import spread
from nullspace.samplers import make_scheduler
from nullspace.spectrum import in_double, tf32
from nullspace.validation import load_pipeline
from nullspace.word import spelled


# What the trainer draws: little, for it comes before every training.
PROMPTS, STEPS = 2, 4
TEXTS_AT_ONCE, DRAWN_AT_ONCE = 16, 8
# An input may let through this many times the energy that its bundle says, and this share of all energy besides.
TIMES, BESIDES = 5, 1e-3
# And the energy itself may be this many times what the bundle says, or that part of it: by it a bundle weighs against
# others that it is added to. Those of honest bundles of the demo's models are within a factor of 2.4.
ENERGY = 10


class Finding(NamedTuple):
    """What the projector of one input lets through: tr(S C S) / tr(C), as shares of the energy from 0 to 1.

    S is the projector at the default threshold and softness, `claimed` is with the bundle's own C, `measured` with that
    of the inputs which the model read. `closed` of its `size` directions are closed, which hold the shares
    `closed_claimed` and `closed_measured` of the energy. `energy` is tr(C') / tr(C), for a token.
    """

    source: str
    size: int
    closed: int
    claimed: float
    measured: float
    closed_claimed: float
    closed_measured: float
    energy: float

    @property
    def limit(self):
        """The largest share that is taken for the claimed one."""
        return TIMES * self.claimed + BESIDES

    @property
    def holds(self):
        """Whether the bundle protects what the model reads there: neither share nor energy is beyond its limit."""
        return self.measured <= self.limit and 1 / ENERGY <= self.energy <= ENERGY  # not so for NaN


# ---- What is asked for -----------------------------------------------------------------------------------------------


def check_against_model(bundle, components, device, dtype, args):
    """Raise `NullSpaceError` unless a bundle protects what the model reads that the trainer has loaded.

    Args:
        components (`dict`): of the base model's pipeline, without LoRA, on the device.
        args: the trainer's flags.
    """
    if args.tokenizer_name:  # a bundle is judged with the model's own
        components = components | get_family(args.model_type).load_tokenizers(args.base_model)
    refuse(verify(bundle, load_pipeline(args, dtype, device, **components)))


def load_verified(bundle, loras=(), name_or_path=None, revision=None, variant=None, token=None, config=None):
    """The pipeline of the base model, in float32, once it turned out to be the one that a bundle was built from.

    Args:
        loras (`tuple[Earlier]`): that were in it.
        name_or_path, revision, variant, token (`str`, *optional*): of the base model, see `Bundle.base_model`.
        config (`str`, *optional*): folder or Hub id of the configuration of a single file, see `find_configuration`.

    Raises:
        NullSpaceError: if it cannot be had, or is another.
    """
    name_or_path, revision, variant = bundle.base_model(name_or_path, revision, variant)
    bundle.check_family(load_config(UNet2DConditionModel, "unet", name_or_path, revision, token, config))
    family = recognise(name_or_path, revision, token, bundle.config["model_type"], config)
    model = download_model(name_or_path, revision, variant, token, config)._replace(loras=loras)
    with loading(model.name):
        pipeline = family.load_pipeline(model)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    text_encoders, tokenizers = readers(pipeline, family)
    for part, text_encoder in text_encoders.items():
        check_clip_skip(bundle.clip_skip, text_encoder.config.num_hidden_layers, family.unread_layers(part))
    bundle.check(pipeline.unet, **text_encoders, **tokenizers, noise_scheduler=pipeline.scheduler)
    return pipeline


def refuse(findings):
    """Raise `NullSpaceError`, naming the worst, if one of the `Finding`s does not hold."""
    broken = [item for item in findings if not item.holds]
    if broken:
        worst = max(broken, key=lambda item: item.measured / item.limit)
        others = f", and so for {len(broken) - 1} of the other {len(findings) - 1} inputs" if len(broken) > 1 else ""
        found = (
            f"of the energy of {worst.source} it claims to let {worst.claimed:.1e} through and lets "
            f"{worst.measured:.1e}"
        )
        if worst.measured <= worst.limit:
            found = f"of {worst.source} it reads {worst.energy:.1e} times the energy that the bundle says"
        raise NullSpaceError(
            f"The bundle does not protect what this model reads: {found}{others}; use another, or build one with "
            "build_nullspace.py."
        )


# ---- Measuring -------------------------------------------------------------------------------------------------------


def verify(bundle, pipeline, prompts=PROMPTS, whole=False, seed=None):
    """Have a model read some of a bundle's prompts, and compare: `list[Finding]`, one for each input that is loaded.

    Arguments as for `read`, which says what is raised.
    """
    return compare(bundle, read(bundle, pipeline, prompts, whole, seed))


def read(bundle, pipeline, prompts=PROMPTS, whole=False, seed=None):
    """Second moments of what a model reads on some of a bundle's prompts: `dict[str, Tensor (in, in)]` by input.

    They are means over tokens. The global random number generators are left as they were.

    Args:
        bundle (`Bundle`): with its joint group loaded.
        pipeline (`DiffusionPipeline`): of the model, without LoRA, on its device; its scheduler is left as it is.
        prompts (`int`): how many to draw.
        whole (`bool`): whether they are drawn, and all inputs read, as when the bundle was built. Otherwise they are
            drawn in a few steps, and the text encoder reads all prompts that the bundle ships, and the empty one.
        seed (`int`, *optional*): in place of the bundle's own, with which a bundle of up to `EXAMPLES` prompts gets the
            noise again that it was built with: one of very few is of that alone.

    Raises:
        NullSpaceError: if the sampler visits none of the bundle's timesteps.
    """
    device = pipeline.unet.device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        moments = draw(bundle, pipeline, prompts, whole, seed)
        return moments if whole else moments | read_texts(bundle, pipeline)


def examples(bundle):
    """The prompts that a bundle ships, `list[str]`."""
    return bundle.config["prompts"]["examples"]


def inputs_of(bundle, timeless):
    """The inputs that are loaded of those that do not depend on the timestep, or of the others, by module."""
    loaded, names = bundle.group(JOINT), tuple(TIMELESS)
    inputs = {name: info["input"] for name, info in bundle.modules.items() if info["input"] in loaded}
    return {name: source for name, source in inputs.items() if source.startswith(names) == timeless}


def readers(pipeline, family):
    """The text encoders of a pipeline and their tokenizers: two `dict`s by their names in it."""
    text_encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    return text_encoders, {name: getattr(pipeline, name) for name in map(tokenizer_of, text_encoders)}


def draw(bundle, pipeline, prompts, whole, seed):
    """Second moments of what is read at the joint group's timesteps: `dict[str, Tensor (in, in)]` by input.

    Arguments as for `read`, which says what is raised.
    """
    config, family = bundle.config, get_family(bundle.config["model_type"])
    first, last = bundle.joint["range"]
    inputs = inputs_of(bundle, timeless=False) | (inputs_of(bundle, timeless=True) if whole else {})
    group_of = dict.fromkeys(range(first, last + 1), JOINT)
    moments = SecondMoments(pipeline.unet, inputs, group_of, **readers(pipeline, family)[0])
    numbered = spread(list(enumerate(examples(bundle), 1)), prompts) or [(0, "")]  # as when it was built
    seed = config["seed"] if seed is None else seed
    all_steps = config["num_inference_steps"]
    few_steps = [min(STEPS, max(all_steps))]
    own = pipeline.scheduler
    pipeline.scheduler = make_scheduler(config["sampler"], own.config)
    try:
        for steps in [all_steps] if whole else [few_steps, all_steps]:
            if not any(first <= timestep <= last for timestep in visited(pipeline.scheduler, steps)):
                continue
            with moments.collect():
                for start in range(0, len(numbered), DRAWN_AT_ONCE):
                    numbers, batch = zip(*numbered[start : start + DRAWN_AT_ONCE], strict=True)
                    moments.start_batch()
                    family.sample(
                        pipeline, list(batch), [seed + number for number in numbers], steps,
                        config["guidance_scale"], config["resolution"], clip_skip=bundle.clip_skip,
                    )  # fmt: skip
            return means(moments)
    finally:
        pipeline.scheduler = own
    raise NullSpaceError(
        f"The bundle's sampler visits no timestep from {first} to {last}, which it is said to protect."
    )


def read_texts(bundle, pipeline):
    """Second moments of what does not depend on the timestep, from the text encoder alone, as `draw`."""
    family = get_family(bundle.config["model_type"])
    text_encoders, tokenizers = readers(pipeline, family)
    inputs = {name: source for name, source in inputs_of(bundle, timeless=True).items() if source != TEXT_INPUT}
    moments = SecondMoments(pipeline.unet, inputs, {}, **text_encoders)
    texts = ["", *examples(bundle)]
    tokens = {}
    for name, text_encoder in text_encoders.items():
        tokenizer = tokenizers[tokenizer_of(name)]
        found = tokenizer(
            spelled(texts, tokenizer), max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        ).to(text_encoder.device)  # fmt: skip
        uses_mask = getattr(text_encoder.config, "use_attention_mask", False)  # as its pipeline asks
        tokens[name] = {kind: found[kind] for kind in ("input_ids", *["attention_mask"] * uses_mask)}
    with moments.collect():
        moments.start_batch()
        for part in torch.arange(len(texts)).split(TEXTS_AT_ONCE):
            few = {name: {kind: each[part] for kind, each in kinds.items()} for name, kinds in tokens.items()}
            encoded = family.encode(text_encoders, few, bundle.clip_skip)
            moments.add(TEXT_INPUT, TEXT_INPUT, encoded[TEXT_INPUT])
    return means(moments)


def means(moments):
    """E[x x^T] over the tokens of one group's `SecondMoments`, `dict[str, Tensor (in, in)]` by input."""
    return {source: total / moments.tokens[group, source] for (group, source), total in moments.sums.items()}


def visited(scheduler, num_inference_steps):
    """The timesteps that a sampler visits in these numbers of steps."""
    for steps in num_inference_steps:
        scheduler.set_timesteps(steps)
        yield from scheduler.timesteps.tolist()


# ---- Comparing -------------------------------------------------------------------------------------------------------


def compare(bundle, moments):
    """`list[Finding]`: what the bundle's projectors let through of second moments, `dict[str, Tensor (in, in)]`.

    Raises:
        NullSpaceError: if these are not finite.
    """
    protected = {bundle.modules[name]["input"]: item for name, item in bundle.protected().items()}
    findings = []
    for source, item in protected.items():
        spectrum, total = bundle.group(JOINT)[source], moments[source]
        if not torch.isfinite(total).all():
            raise NullSpaceError(
                f"What this model reads at {source} contains NaN or infinity, so the bundle cannot be verified; use "
                "--mixed_precision no or bf16."
            )
        claimed = spectrum.eigenvalues.double().sum()
        share = spectrum.eigenvalues.double() / claimed
        weights = torch.ones_like(share)
        weights[: item.rank] = 0
        if item.gains is not None:
            weights[item.rank :] = item.gains.double().square()
        basis = item.basis.to(total.device)
        with tf32(False, total.device):
            energy = in_double(((total @ basis) * basis).sum(0))  # of each direction
        measured = in_double(total.trace())
        energy = energy / measured
        findings.append(
            Finding(
                source, len(share), item.rank, (weights @ share).item(), (weights @ energy).item(),
                share[: item.rank].sum().item(), energy[: item.rank].sum().item(), (measured / claimed).item(),
            )
        )  # fmt: skip
    return findings
