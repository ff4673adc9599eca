"""--init_lora: a LoRA that a training goes on from, projected first, and its word."""

from typing import NamedTuple

import torch
from accelerate.logging import get_logger

from nullspace.adapters import check_layers, kinds_of, layers_to_train, lora_modules, model_of, set_lora
from nullspace.captions import counted
from nullspace.embeddings import Word, unbundled
from nullspace.errors import NullSpaceError, listed
from nullspace.hub import patiently
from nullspace.lora import check_finite, digest_with_words, load_lora, read_embeddings
from nullspace.names import TEXT_ENCODERS
from nullspace.spectrum import in_double


logger = get_logger(__name__)


class Initial(NamedTuple):
    """What a training goes on from: layers, `dict[str, LoraLayer]`, and the `Word` that is trained on, or None."""

    layers: dict
    word: Word | None


def read_initial(accelerator, args):
    """What --init_lora is, `Initial`, None without it; settles --rank and --lora_alpha, its own.

    Raises:
        NullSpaceError: if it cannot be had or gone on from, or contradicts a flag.
    """
    if args.init_lora is None:
        return None
    where = f"--init_lora {args.init_lora}"
    try:
        with accelerator.main_process_first():
            layers = patiently(lambda: load_lora(args.init_lora, args.hub_token), f"LoRA {args.init_lora}")
            words = {word.token: word for word in unbundled(read_embeddings(args.init_lora, args.hub_token))}
    except NullSpaceError as error:
        raise NullSpaceError(f"--init_lora: {error}") from error
    if all(model_of(name) in TEXT_ENCODERS for name in layers):
        raise NullSpaceError(f"{where} has no layer of the UNet, which is what is trained; give one that has.")
    if any(layer.magnitude is not None for layer in layers.values()):
        raise NullSpaceError(f"{where} is a DoRA, whose magnitudes cannot be trained here; give a plain LoRA.")
    check_finite(layers, where)
    for flag, own in (
        ("rank", {len(layer.down) for layer in layers.values()}),
        ("lora_alpha", {round(layer.scale * len(layer.down), 9) for layer in layers.values()}),
    ):
        if len(own) > 1:
            raise NullSpaceError(
                f"{where} has several {flag.removeprefix('lora_')}s ({listed(sorted(own))}), and the layers that are "
                f"trained share one --{flag}; give a LoRA whose layers do."
            )
        (value,) = own
        given = getattr(args, flag)
        if given not in (None, value):
            raise NullSpaceError(
                f"--{flag} {given} contradicts {where}, whose own is {value:g}; leave --{flag} out, which takes that."
            )
        setattr(args, flag, int(value) if value == int(value) else value)
    has_text_encoder = any(model_of(name) in TEXT_ENCODERS for name in layers)
    if has_text_encoder != args.train_text_encoder:
        has, remedy = ("has", "pass") if has_text_encoder else ("has no", "leave out")
        raise NullSpaceError(f"{where} {has} layers of the text encoder; {remedy} --train_text_encoder.")
    word = words.pop(args.placeholder_token, None)
    if word and (count := len(next(iter(word.rows.values())))) != args.num_vectors:
        raise NullSpaceError(f"{where} has {counted(count, 'row')} of {word.token}; pass --num_vectors {count}.")
    if words:
        logger.warning(
            f"{where} was trained with {listed(words, 3)}, which is not taken along: the LoRA alone may not draw its "
            f"subject. Pass --placeholder_token {min(words)} to train that on."
        )
    return Initial(layers, word)


def describe_initial(initial):
    """What a run's result depends on of --init_lora: its weights, whatever the file is called; None without it."""
    return initial and f"sha256 {digest_with_words(initial.layers, [initial.word] if initial.word else [])}"


def settle_layers(initial, unet, text_encoders, args):
    """Set --lora_layers, where it is not given, to the layers of --init_lora.

    Raises:
        NullSpaceError: if it is of another model, or its layers are not those that are trained.
    """
    if initial is None:
        return
    where, layers = f"--init_lora {args.init_lora}", initial.layers
    check_layers(where, layers, args.pretrained_model_name_or_path, unet, text_encoders)
    remedy = "leave out --lora_layers, which takes its own"
    if args.lora_layers is None:
        args.lora_layers = ",".join(name for name in layers if model_of(name) == "unet")
        remedy = "only attention of text encoders, as far as it is read, is trained here, all of it"
    trained = layers_to_train(unet, text_encoders, None, args)
    lacking = [name for name in trained if name not in layers]
    beyond = [name for name, layer in layers.items() if name not in trained and layer.up.any()]
    if lacking or beyond:
        faults = [f"it lacks {kinds_of(lacking)}"] * bool(lacking) + [f"it has {kinds_of(beyond)}"] * bool(beyond)
        raise NullSpaceError(f"{where} has other layers than are trained: {' and '.join(faults)}; {remedy}.")


def fill(adapted, word, initial):
    """Give the LoRA of the adapted models, by name, and the `NewWord`, if there is one, what --init_lora has."""
    if initial is not None:
        set_lora(lora_modules(**adapted), initial.layers)
    if initial is not None and initial.word:
        word.take(initial.word, "--init_lora")


def removed_shares(layers, parameters):
    """||dW - dW P||_F / ||dW||_F of each layer: the share of its change that projecting A took away.

    Args:
        layers (`dict[str, LoraLayer]`): as they were.
        parameters (`dict[str, Tensor]`): the A (r, in) of some of them, as they are now.
    """
    shares = {}
    for name, parameter in parameters.items():
        down, triangle = layers[name].down.double(), torch.linalg.qr(layers[name].up.double()).R  # norms as with B
        whole = (triangle @ down).norm().item()
        if whole:
            shares[name] = (triangle @ (down - in_double(parameter))).norm().item() / whole
    return shares


def tell_cost(initial, projector, args):
    """Say in a line what the projector, which has just been made, took from --init_lora."""
    if initial is None:
        return
    closed = {name for name, rank in projector.ranks.items() if rank}
    shares = removed_shares(initial.layers, {name: projector.parameters[name] for name in closed}).values()
    if not shares:
        logger.info(f"Going on from {args.init_lora} as it is: nothing is closed to it.")
        return
    logger.info(
        f"Going on from {args.init_lora}, projected first, which removed {sum(shares) / len(shares):.1%} of its change "
        f"(mean of {len(shares)} layers, at most {max(shares):.1%})."
    )
