"""The ways to teach a model a subject that `preservation.py` compares, and the training that they share.

Each is a command of the trainer, whose own rooms do what it can do (the LoRA, the null space, the word, the optimizer),
and for the others what keeps the model as it was besides: a loss, or another adapter.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from peft import HRAConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from PIL import Image
from scoring import GENERAL, MODEL, ROOT, SINGLES, bundle_folder
from torch.nn.utils import parametrize


sys.path.insert(0, str(ROOT))
from nullspace.adapters import add_lora  # noqa: E402
from nullspace.audit import predicted_drift  # noqa: E402
from nullspace.budget import hold_drift  # noqa: E402
from nullspace.bundle import Bundle  # noqa: E402
from nullspace.captions import read_metadata  # noqa: E402
from nullspace.layers import base_layer  # noqa: E402
from nullspace.lora import LoraLayer  # noqa: E402
from nullspace.names import JOINT, TEXT_ENCODER, TEXT_INPUT  # noqa: E402
from nullspace.optimizers import make_optimizer, parameter_groups  # noqa: E402
from nullspace.projector import NullSpaceProjector  # noqa: E402
from nullspace.prompt_encoder import PromptEncoder  # noqa: E402
from nullspace.protection import moments_of, protect  # noqa: E402
from nullspace.samplers import make_scheduler  # noqa: E402
from nullspace.word import NewWord  # noqa: E402
from train_dreambooth_nullspace import parse_args  # noqa: E402
from world import FOLDER, RARE_TOKENS, RESOLUTION, UNTRAINED_TOKENS, with_articles  # noqa: E402


# ---- The methods -----------------------------------------------------------------------------------------------------

CLASS_PICTURES = 100  # of prior preservation: diffusers' default
UNTRAINED, TRAINED = UNTRAINED_TOKENS[0], RARE_TOKENS[0]  # in no caption; in a few, as a real model has met them


@dataclass(frozen=True)
class Method:
    """A way to teach a subject.

    Attributes:
        flags (`dict`): of the trainer, for all that it can do; `True` is a flag without a value.
        rates (`tuple`): the learning rates that are tried.
        keeps (`str`, *optional*): what is trained along, see `Loss`.
        weights (`tuple`): what is tried of that loss's weight, the usual one first; for OPLoRA of the share of each
            layer's singular directions that are left alone.
        adapter (`str`): "lora", or one of `ADAPTERS`.
        captions (`bool`): whether half of the steps have a caption that names the picture's background.
        token (`str`): the subject's identifier.
    """

    flags: dict
    rates: tuple
    keeps: str | None = None
    weights: tuple = (None,)
    adapter: str = "lora"
    captions: bool = True
    token: str = UNTRAINED

    @property
    def protects(self):
        return self.flags.get("nullspace_threshold") != 0 and "word_only" not in self.flags

    def called(self, subject):
        """What prompts call the subject: a token of its own, or the identifier and its class."""
        return f"{self.token}-{subject}" if self.flags.get("placeholder_token") else f"{self.token} {subject}"


# Every method is tried at four rates, a factor of 10 from first to last, around those at which it learns a subject in
# these steps; and at weights a factor of 10 apart where it has one. Those that the null space is compared with have
# rank 8, which served them better than 4.
RATES, HIGHER, HIGHEST = (5e-4, 1e-3, 2e-3, 5e-3), (1e-3, 2e-3, 5e-3, 1e-2), (2e-3, 5e-3, 1e-2, 2e-2)
WEIGHTS = (1.0, 0.3, 3.0)
ONE_ROW = {"placeholder_token": True, "initializer_token": True}  # both of the subject's name
WORD = ONE_ROW | {"num_vectors": 4}
LAUNCHED = WORD | {"max_drift": 0.05}
PLAIN = Method({"nullspace_threshold": 0, "rank": 8}, RATES)
OUTPUT = replace(PLAIN, keeps="class prompt", weights=WEIGHTS)
OURS = Method({}, HIGHER)  # the trainer's defaults
SHIPPED = "null space, word"  # what the README's launch lines say
REFERENCES = {"plain": "plain LoRA", "prior": "prior preservation", "output": "output preservation"}
TIER_ONE = {
    REFERENCES["plain"]: PLAIN,
    REFERENCES["prior"]: replace(PLAIN, keeps="class pictures", weights=WEIGHTS),
    REFERENCES["output"]: OUTPUT,
    "null space": OURS,
    "null space, word, no budget": replace(OURS, flags=WORD, rates=HIGHEST),
    SHIPPED: replace(OURS, flags=LAUNCHED, rates=HIGHEST),
}


def ours(rates=HIGHEST, **flags):
    return replace(OURS, flags=OURS.flags | flags, rates=rates)


TIER_TWO = {
    "prior prediction": replace(PLAIN, keeps="many prompts", weights=WEIGHTS),
    "penalty of the predicted drift": replace(PLAIN, keeps="predicted drift", weights=(0.03, 0.01, 0.1)),
    "DCO": replace(PLAIN, keeps="consistency", weights=(1000.0, 300.0, 3000.0)),
    "OPLoRA": replace(PLAIN, adapter="oplora", weights=(0.1, 0.03, 0.3)),
    "OFT": replace(PLAIN, adapter="oft", rates=HIGHER),
    "HRA": replace(PLAIN, adapter="hra", rates=HIGHER),
    "DoRA": replace(PLAIN, adapter="dora"),
    "textual inversion": Method(WORD | {"word_only": True}, HIGHEST),
    "plain LoRA, word": replace(PLAIN, flags=PLAIN.flags | WORD),
    "null space, word of one row": ours(**LAUNCHED | {"num_vectors": 1}),
    "null space, word of eight rows": ours(**LAUNCHED | {"num_vectors": 8}),
    "null space, word of one row, rank 16, no budget": ours(**ONE_ROW, rank=16),
    "null space, word, rank 16": ours(**LAUNCHED, rank=16),
    "null space, word at half its rate": ours(**LAUNCHED, word_learning_rate=5e-3),
    "null space, word, half of the budget": ours(**LAUNCHED | {"max_drift": 0.025}),
    "null space, word, softness 1e-5": ours(HIGHER, **LAUNCHED, nullspace_softness=1e-5),
    "null space, word, softness 1e-7": ours(**LAUNCHED, nullspace_softness=1e-7),
    "null space, word, no scenes protected": ours(**LAUNCHED, nullspace_name_or_path=True),
    "null space, word, class prompt protected": ours(**LAUNCHED, nullspace_extra_prompts=True),
    "null space, word, output preservation": replace(ours(**LAUNCHED), keeps="class prompt", weights=WEIGHTS),
    "null space, softness 1e-6, rank 16": ours(nullspace_softness=1e-6, rank=16),
    "null space, class prompt protected": ours(HIGHER, nullspace_extra_prompts=True),
    "null space, nothing held back, energy 0.999": ours(HIGHER, nullspace_softness=math.inf, nullspace_threshold=0.999),
    **{
        f"{name}, no captions": replace(method, captions=False, weights=method.weights[:1])
        for name, method in TIER_ONE.items()
    },
    **{
        f"{name}, {TRAINED}": replace(method, token=TRAINED, weights=method.weights[:1])
        for name, method in TIER_ONE.items()
    },
}
METHODS = TIER_ONE | TIER_TWO


def trainer_args(method, subject, rate):
    """The trainer's own arguments for a method, with all defaults that a user gets."""
    flags = {
        "pretrained_model_name_or_path": MODEL,
        "instance_data_dir": FOLDER / subject,
        "instance_prompt": f"a photo of a {method.called(subject)}",
        **method.flags,
    }
    named = {
        "placeholder_token": method.called(subject),
        "initializer_token": subject,
        "nullspace_extra_prompts": class_prompt(subject),
        "nullspace_name_or_path": bundle_folder(SINGLES),
    }
    flags |= {flag: value for flag, value in named.items() if flag in flags}
    flags["word_learning_rate" if "word_only" in flags else "learning_rate"] = rate
    words = [[f"--{flag}"] + ([] if value is True else [str(value)]) for flag, value in flags.items()]
    return parse_args(sum(words, []))


def class_prompt(subject):
    return with_articles(f"a photo of a {subject}")


# ---- Adapters --------------------------------------------------------------------------------------------------------


class Without(torch.nn.Module):
    """A weight's parametrization without its part in some directions (features, k): of its columns, or of its rows."""

    def __init__(self, directions, rows):
        super().__init__()
        self.directions, self.rows = directions, rows

    def forward(self, weight):
        if self.rows:
            return weight - weight @ self.directions @ self.directions.T
        return weight - self.directions @ (self.directions.T @ weight)


def keep_off(unet, names, share):
    """Keep LoRAs off the leading singular directions of the weights, on both sides: OPLoRA (arXiv 2510.13003).

    P_L B A P_R with P_L = I - U_k U_k^T and P_R = I - V_k V_k^T, for W = U S V^T and k a share of its rank.
    """
    for name in names:
        layer = unet.get_submodule(name)
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        kept = round(share * len(values))
        parametrize.register_parametrization(layer.lora_A.default, "weight", Without(right[:kept].T, rows=True))
        parametrize.register_parametrization(layer.lora_B.default, "weight", Without(left[:, :kept], rows=False))


ADAPTERS = {
    "dora": lambda rank, names: LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", use_dora=True, target_modules=names
    ),
    "oft": lambda rank, names: OFTConfig(oft_block_size=rank, target_modules=names),
    "hra": lambda rank, names: HRAConfig(r=rank, target_modules=names),
}


def add_adapter(base, unet, method, weight, args):
    """Put a method's adapter on a copy of the UNet."""
    names = list(base.weights)
    if method.adapter in ADAPTERS:
        inject_adapter_in_model(ADAPTERS[method.adapter](args.rank, names), unet)
    else:
        add_lora({"unet": unet}, names, args)
    if method.adapter == "oplora":
        keep_off(unet, names, weight)


@torch.no_grad()
def predicted_drifts(base, unet):
    """The closed-form drift of every layer that an adapter changes, whichever it is: by its answer to the identity."""
    spectra, drifts = base.bundle.group(JOINT), []
    for name, weight in base.weights.items():
        module = unet.get_submodule(name)
        if module is base_layer(module):
            continue
        size = weight.shape[1]
        answer = module(torch.eye(size)[None])[0] - (0 if base_layer(module).bias is None else base_layer(module).bias)
        change = LoraLayer(torch.eye(size), answer.T - weight, 1.0)
        drifts.append(predicted_drift(change, weight, spectra[base.bundle.modules[name]["input"]]))
    return drifts


# ---- What keeps the model as it was ----------------------------------------------------------------------------------


def drift_penalty(base, unet):
    """A function that gives the mean over the layers of tr(dW C dW^T) / tr(W C W^T), with gradients to their LoRA."""
    spectra, layers = base.bundle.group(JOINT), []
    for name, weight in base.weights.items():
        spectrum = spectra[base.bundle.modules[name]["input"]]
        root = spectrum.orthonormal() * spectrum.eigenvalues.sqrt()
        layers.append((unet.get_submodule(name), root, (weight @ root).square().sum()))

    def penalty():
        drifts = [
            (layer.scaling["default"] * layer.lora_B.default.weight @ (layer.lora_A.default.weight @ root))
            .square()
            .sum()
            / outputs
            for layer, root, outputs in layers
        ]
        return torch.stack(drifts).mean()

    return penalty


def kept_pictures(base, method, subject, seed):
    """Latents (n, 4, h, w) and prompt embeddings (n, tokens, width) of pictures to train along, or None."""
    prompts = {
        "class pictures": [class_prompt(subject)] * CLASS_PICTURES,
        "many prompts": GENERAL.read_text().splitlines()[:CLASS_PICTURES],
    }.get(method.keeps)
    if prompts is None:
        return None
    drawn = base.draw(base.pipeline, prompts, seed=10_000 + 1000 * seed, steps=25)
    return base.latents(drawn), base.encode(prompts)


class Loss:
    """The loss of a step: that of the subject's pictures, and of what a method trains along so that the model stays.

    - "class pictures", prior preservation (arXiv 2208.12242): the noise of pictures that the model drew of the class.
    - "class prompt", differential output preservation: what the model itself predicts for the subject's noisy
      pictures where the captions name the class in its place.
    - "many prompts", prior prediction: what the model itself predicts for pictures that it drew of protected prompts.
    - "predicted drift": the layers' closed-form drift on what the bundle protects, squared, their mean.
    - "consistency", direct consistency optimization (arXiv 2402.12004): -log sigmoid of -weight times what the loss is
      above that of the model itself.

    Args:
        unet (`UNet2DConditionModel`): in training.
        subject, seed: of the run.
        random_numbers (`torch.Generator`): draws timesteps, noise and pictures.
    """

    def __init__(self, base, unet, method, weight, subject, seed, random_numbers):
        self.base, self.unet, self.keeps, self.weight = base, unet, method.keeps, weight
        self.random_numbers, self.others = random_numbers, kept_pictures(base, method, subject, seed)
        self.penalty = drift_penalty(base, unet) if self.keeps == "predicted drift" else None

    def __call__(self, latents, conditions, class_conditions):
        """The loss of latents (n, 4, h, w) with the embeddings of captions that name the subject, and of its class."""
        noisy, timesteps, noise = self._noised(latents)
        inputs, targets = [(noisy, timesteps, conditions)], [noise]
        if self.keeps == "class prompt":
            inputs.append((noisy, timesteps, class_conditions))
        elif self.others:
            known, embeddings = self.others
            chosen = torch.randint(len(known), (len(latents),), generator=self.random_numbers)
            *others, other_noise = self._noised(known[chosen])
            inputs.append((*others, embeddings[chosen]))
        if len(inputs) == 2:
            targets.append(other_noise if self.keeps == "class pictures" else self._of_base(*inputs[1]))
        prediction = self.unet(*map(torch.cat, zip(*inputs, strict=True))).sample
        losses = [F.mse_loss(*pair) for pair in zip(prediction.split(len(latents)), targets, strict=True)]
        if self.keeps == "consistency":
            own = F.mse_loss(self._of_base(*inputs[0]), noise)
            return F.softplus(self.weight * (losses[0] - own))
        if self.penalty:
            losses.append(self.penalty())
        return losses[0] + (self.weight * losses[1] if len(losses) == 2 else 0)

    def _noised(self, latents):
        scheduler = self.base.noise_scheduler
        end = scheduler.config.num_train_timesteps
        timesteps = torch.randint(end, (len(latents),), generator=self.random_numbers)
        noise = torch.randn(latents.shape, generator=self.random_numbers)
        return scheduler.add_noise(latents, noise, timesteps), timesteps, noise

    @torch.no_grad()
    def _of_base(self, noisy, timesteps, conditions):
        return self.base.unet(noisy, timesteps, conditions).sample


# ---- Training --------------------------------------------------------------------------------------------------------


def captions_of(method, subject):
    """The captions of each picture of a subject, which take turns: bare, and with its background."""
    column = "word" if method.flags.get("placeholder_token") else "identifier"
    captions = []
    for path, (several, _) in sorted(read_metadata(FOLDER / subject, column, print).items()):
        several = [caption.replace(UNTRAINED, method.token) for caption in several]
        captions.append((path, several if method.captions else several[:1]))
    return captions


def protecting(base, args):
    """The bundle, with the prompts of --nullspace_extra_prompts as the trainer adds them."""
    bundle = Bundle.load(args.nullspace_name_or_path) if args.nullspace_name_or_path else base.bundle
    if args.nullspace_extra_prompts:
        pipeline, groups = base.tuned(), [bundle.joint]
        pipeline.scheduler = make_scheduler(bundle.config["sampler"], pipeline.scheduler.config)
        moments = moments_of(
            args.nullspace_extra_prompts, bundle, groups, pipeline, args.train_batch_size, "Extra prompts", disable=True
        )
        bundle = bundle.emphasize(moments, groups)
    return bundle


def train(base, method, subject, seed, rate, weight, marks):
    """Teach a subject; yield (step, CPU seconds of the personalisation up to it, pipeline) at each of the marks.

    All pictures are in every batch; the learning rate is constant.
    """
    start = time.process_time()
    args = trainer_args(method, subject, rate)
    random_numbers = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    # Pictures and captions
    captions = captions_of(method, subject)
    side = (RESOLUTION, RESOLUTION)
    pictures = [Image.open(path).convert("RGB").resize(side, Image.Resampling.LANCZOS) for path, _ in captions]
    latents = base.latents([np.asarray(picture) / 255 for picture in pictures])
    prompts = list(dict.fromkeys(caption for _, several in captions for caption in several))
    numbers = torch.tensor(
        [[prompts.index(several[turn % len(several)]) for turn in (0, 1)] for _, several in captions]
    )
    of_class = base.encode([with_articles(prompt.replace(method.called(subject), subject)) for prompt in prompts])

    # What is trained
    unet, tokenizer, text_encoder, word = copy.deepcopy(base.unet), base.pipeline.tokenizer, base.text_encoder, None
    if not args.word_only:
        add_adapter(base, unet, method, weight, args)
    if args.placeholder_token:
        tokenizer, text_encoder = copy.deepcopy(tokenizer), copy.deepcopy(text_encoder)
        word = NewWord({"tokenizer": tokenizer}, {TEXT_ENCODER: text_encoder}, args)
    groups = parameter_groups({} if args.word_only else {"unet": unet}, word, args)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, args)
    projector = None
    if method.protects:
        bundle = protecting(base, args)
        projector = NullSpaceProjector(unet, protect(bundle, args))
        projector.attach(optimizer)
        hold_drift(optimizer, bundle, list(base.weights), {"unet": unet}, args)
    args.model_type = "sd"
    prompt_encoder = PromptEncoder({"tokenizer": tokenizer}, {TEXT_ENCODER: text_encoder}, prompts, "cpu", args)
    loss = Loss(base, unet, method, weight, subject, seed, random_numbers)

    # Training loop
    for step in range(1, max(marks) + 1):
        unet.train()
        turns = torch.randint(2, (len(latents),), generator=random_numbers)
        chosen = numbers[torch.arange(len(latents)), turns]
        conditions = prompt_encoder({TEXT_ENCODER: text_encoder}, chosen)[TEXT_INPUT]
        loss(latents, conditions, of_class[chosen]).backward()
        if projector:
            projector.project_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            seconds = time.process_time() - start
            unet.eval()
            yield step, seconds, base.tuned(unet=unet, tokenizer=tokenizer, text_encoder=text_encoder)
            start = time.process_time() - seconds  # scoring is not training
