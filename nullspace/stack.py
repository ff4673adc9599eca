"""--base_lora: the base model with LoRAs that were trained earlier, which a new one is trained on top of.

They are added to the weights when a model is loaded, in float64 and rounded once, and their words to tokenizers and
embeddings, so that all else sees one base model with weights and a vocabulary of its own. Its bundle is therefore not
that of the model alone: what the layers read depends on all weights. One that is named must be of the stack
(`check_bundle`); one that is found or built is, and protects prompts of the earlier subjects as well
(`subject_prompts`), so that the new LoRA leaves them alone: AlphaEdit's sequence (arXiv 2410.02355, sec. 3.3), in which
what was taught earlier joins what is kept.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download

from nullspace.adapters import check_layers, model_of
from nullspace.embeddings import read_words
from nullspace.errors import NullSpaceError, cannot_be_had, listed
from nullspace.fingerprints import fingerprints
from nullspace.hub import patiently
from nullspace.lora import LoraLayer, check_finite, digest_with_words, load_lora, read_embeddings
from nullspace.names import LORA_NAME, REPORT_NAME, TEXT_ENCODERS, WORD_NAME, tokenizer_of
from nullspace.prompts import prompts_of_model, spread
from nullspace.word import vector_names


PER_SUBJECT = 48  # prompts that are protected of a subject
TRAINED = 16  # of them at most are those that it was trained on
KINDS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}", "a close-up photo of {}")
PLACE = re.compile(r" (?:on|in|at|against|by|under|near|beside|behind|between) .+")
LONGEST = 1000  # characters of a prompt, and prompts of a report: it may be a stranger's


class Earlier(NamedTuple):
    """A LoRA of a stack.

    Attributes:
        name (`str`): the folder, file or Hub id as it was given.
        sha256 (`str`): of its weights and words, whatever the files are called.
        layers (`dict[str, LoraLayer]`): none of a word alone.
        words (`list[Word]`): that were learned with it.
        report (`dict`): what `nullspace_report.json` beside it says; empty where there is none.
    """

    name: str
    sha256: str
    layers: dict
    words: list
    report: dict

    def record(self):
        """What bundles and reports say of it."""
        path = Path(self.name)  # of a folder the name alone: where it lies is nobody else's business
        return {"id": path.resolve().name if path.exists() else self.name, "sha256": self.sha256}

    def stands_on(self):
        """The sha256 of the LoRAs that it was trained on top of itself."""
        return stack_of(self.report)


def stack_of(config):
    """The sha256 of the LoRAs in the base model that a bundle's configuration or a report names: `list[str]`."""
    return [lora["sha256"] for lora in config.get("base_model", {}).get("loras", [])]


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_stack(names, token=None, placeholder_token=None, flag="--base_lora"):
    """The LoRAs of a stack, in order: `tuple[Earlier]`; what is wrong with them is said before a model is loaded.

    Args:
        names (`list[str]` or `None`): folders, files or Hub ids.
        placeholder_token (`str`, *optional*): the word that is to be learned on top of them.

    Raises:
        NullSpaceError: if one cannot be had or added up, is there twice, lacks those that it stands on, or two words
            are the same.
    """
    loras, owners = [], {placeholder_token: "--placeholder_token"}
    for name in names or ():
        lora = _read(name, token, flag)
        if twin := next((each for each in loras if each.sha256 == lora.sha256), None):
            raise NullSpaceError(
                f"{flag} {name} is the same LoRA as {twin.name}, which would count twice; leave it out."
            )
        missing = [each for each in lora.stands_on() if each not in [before.sha256 for before in loras]]
        if missing:
            shown = [each["id"] for each in lora.report["base_model"]["loras"] if each["sha256"] in missing]
            raise NullSpaceError(
                f"{flag} {name} was trained on top of {listed(shown)} (sha256 {missing[0][:12]}...); name that before "
                "it, as it was then."
            )
        for word in lora.words:
            if word.token in owners:
                raise NullSpaceError(
                    f"The word {word.token} of {flag} {name} is that of {owners[word.token]}, too, and one word has "
                    "one meaning; train one of them with another --placeholder_token."
                )
            owners[word.token] = name
        loras.append(lora)
    return tuple(loras)


def _read(name, token, flag):
    try:
        path = _fetch(name, token)
        is_folder = Path(path).is_dir()
        word, report = (Path(path) / each if is_folder else None for each in (WORD_NAME, REPORT_NAME))
        words = read_words(word) if word and word.is_file() else []
        alone = words and not any(each.name != WORD_NAME for each in Path(path).glob("*.safetensors"))
        layers = {} if alone else load_lora(path, token)
        bundled = {} if is_folder or alone else read_embeddings(path)
        report = read_training(report) if report and report.is_file() else {}
    except NullSpaceError as error:
        raise NullSpaceError(f"{flag}: {error}") from error
    if bundled:
        raise NullSpaceError(
            f"{flag} {name} bundles a word, which is not read from there; name the folder of the LoRA."
        )
    if any(layer.magnitude is not None for layer in layers.values()):
        raise NullSpaceError(f"{flag} {name} is a DoRA, which does not add up with others; give a plain LoRA.")
    check_finite(layers, f"{flag} {name}")
    return Earlier(str(name), digest_with_words(layers, words), layers, words, report)


def _fetch(name, token):
    """A LoRA's folder on this machine; or what was given, where that is another file or a repository of others."""
    path = Path(name)
    if path.exists():
        return path.parent if path.name == LORA_NAME else path
    wanted = [LORA_NAME, WORD_NAME, REPORT_NAME]
    try:
        folder = patiently(lambda: snapshot_download(str(name), allow_patterns=wanted, token=token), f"LoRA {name}")
    except Exception as error:  # whatever the HTTP library raises
        raise NullSpaceError(cannot_be_had(name, error, "LoRA")) from error
    return folder if any((Path(folder) / each).is_file() for each in wanted[:2]) else name


def read_training(path):
    """The report of a LoRA, as far as a stack needs it.

    Raises:
        NullSpaceError: if it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        # The report of one's own loop names no prompt
        prompts, loras = report["training"].get("instance_prompt", []), report["base_model"].get("loras", [])
        texts = [*prompts, *(each[key] for each in loras for key in ("id", "sha256"))]
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("what should be text is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NullSpaceError(f"{path} is no report of the trainer; mend it or move it away.") from error
    return report


def describe_stack(loras):
    """What a run's result depends on of --base_lora: their weights and order; None without any."""
    return ", ".join(f"sha256 {lora.sha256}" for lora in loras) or None


# ---- The model with them ---------------------------------------------------------------------------------------------


def load_checked(family, model):
    """Text encoders, UNet and VAE of a `BaseModel` with its LoRAs, once their reports turned out to be of this model.

    Raises:
        NullSpaceError: if one is of another.
        OSError, ValueError: if a file is missing or lacks weights.
    """
    models = family.load_models(model._replace(loras=()))
    given = [(lora, lora.report.get("base_model", {}).get("fingerprint")) for lora in model.loras]
    if any(isinstance(expected, dict) for _, expected in given):
        found = fingerprints(unet=models["unet"], **{name: models[name] for name in family.text_encoders})
    for lora, expected in given:
        # That of one that stands on others is of the model with them, which are known by their contents
        if isinstance(expected, dict) and not lora.stands_on():
            differing = [part for part in found if found[part] != expected.get(part)]
            if differing:
                raise NullSpaceError(
                    f"--base_lora {lora.name} was trained on other weights than those of {model.name}: its report's "
                    f"fingerprints differ ({', '.join(differing)}); give a LoRA of this model."
                )
    add_to_models(family, model, models)
    return models


@torch.no_grad()
def add_to_models(family, model, models):
    """Add the LoRAs of a `BaseModel` to those of its parts, in float32, that were loaded (`dict`, by name), in place.

    Raises:
        NullSpaceError: if a layer or a row does not fit.
    """
    text_encoders = {name: models[name] for name in family.text_encoders if name in models}
    absent = {"unet", *family.text_encoders} - models.keys()
    for lora in model.loras:
        layers = {name: layer for name, layer in lora.layers.items() if model_of(name) not in absent}
        modules = check_layers(f"--base_lora {lora.name}", layers, model.name, models.get("unet"), text_encoders)
        for name, layer in layers.items():
            weight = modules[name].weight
            change = layer.scale * layer.up.flatten(1).double() @ layer.down.flatten(1).double()
            weight.copy_(weight.double() + change.reshape(weight.shape))
    words = [(lora, word) for lora in model.loras for word in lora.words]
    tokenizers = family.load_tokenizers(model) if words and text_encoders else {}
    for name, text_encoder in text_encoders.items() if words else ():
        tokenizer = tokenizers[tokenizer_of(name)]
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # as `load_textual_inversion` does
        table = text_encoder.get_input_embeddings().weight
        for lora, word in words:
            rows = word.rows[name]
            if rows.shape[1] != table.shape[1]:
                raise NullSpaceError(
                    f"--base_lora {lora.name} was made for another model: the rows of {word.token} have "
                    f"{rows.shape[1]} numbers, and in {model.name} they have {table.shape[1]}; give one of this model."
                )
            table[tokenizer.convert_tokens_to_ids(vector_names(word.token, len(rows)))] = rows.to(table)


def add_to_tokenizers(model, tokenizers):
    """Teach a `BaseModel`'s tokenizers (`dict`, by name), in place, the words of its LoRAs.

    Raises:
        NullSpaceError: if one has rows for other text encoders, or is known already.
    """
    for lora in model.loras:
        for word in lora.words:
            if {tokenizer_of(name) for name in word.rows} != tokenizers.keys():
                raise NullSpaceError(
                    f"The word {word.token} of --base_lora {lora.name} has rows for {len(word.rows)} text "
                    f"encoder{'s' * (len(word.rows) > 1)}, and {model.name} has {len(tokenizers)}; give a LoRA of this "
                    "model."
                )
            for name, rows in word.rows.items():
                tokenizer = tokenizers[tokenizer_of(name)]
                if word.token in tokenizer.get_vocab():
                    raise NullSpaceError(
                        f"The word {word.token} of --base_lora {lora.name} is no new one to the tokenizer of "
                        f"{model.name}; give a LoRA of this model."
                    )
                tokenizer.add_tokens(vector_names(word.token, len(rows)))


def check_bundle(config, name, loras, flag="--nullspace_name_or_path"):
    """Raise `NullSpaceError` unless a bundle, by its configuration, is of the base model with just these LoRAs."""
    asked, built = [lora.sha256 for lora in loras], stack_of(config)
    if asked == built:
        return
    base = config["base_model"]
    if not built:
        raise NullSpaceError(
            f"{flag} {name} is of {base['id']} alone, and with --base_lora the layers read something else; leave it "
            "out, so that one is built, or build one with build_nullspace.py --base_lora "
            f"{' '.join(lora.name for lora in loras)}."
        )
    shown = ", ".join(f"{each['id']} (sha256 {each['sha256'][:12]}...)" for each in base["loras"])
    raise NullSpaceError(
        f"{flag} {name} is of {base['id']} with {shown}; name just these in --base_lora, in this order."
    )


# ---- Their prompts ---------------------------------------------------------------------------------------------------


def subject_prompts(model):
    """The prompts to protect of a `BaseModel`'s LoRAs, up to `PER_SUBJECT` a subject: `list[str]`.

    They are made of what the report says: the prompts that it was trained on; its subject by itself, in kinds of
    pictures (`KINDS`) and in the places that the model's own list of prompts names. The subject is the LoRA's word, or
    else what the first of those prompts says after "of" and before a place.
    """
    places = []
    if model.loras:
        lines, _ = prompts_of_model(model.folder, 20 * PER_SUBJECT)
        places = list(dict.fromkeys(match[0] for line in lines if (match := PLACE.search(line))))
    return [prompt for lora in model.loras for prompt in _prompts_of(lora, places)]


def _prompts_of(lora, places):
    trained = lora.report.get("training", {}).get("instance_prompt", [])[:LONGEST]
    trained = [prompt[:LONGEST] for prompt in trained if prompt.strip()]
    subject = PLACE.sub("", (trained[0].partition(" of ")[2] or trained[0]) if trained else "")
    subjects = [f"a {word.token}" for word in lora.words] or [subject] * bool(subject)
    kinds = [kind.format(subject) for subject in subjects for kind in KINDS]
    made = dict.fromkeys([*spread(trained, TRAINED), *kinds])
    placed = [f"{subject}{place}" for subject in subjects for place in spread(places, PER_SUBJECT)]
    return list(dict.fromkeys([*made, *spread(placed, max(0, PER_SUBJECT - len(made)))]))[:PER_SUBJECT]


def unnamed_subjects(loras):
    """A sentence on the LoRAs of which no prompt is known, so that nothing of theirs is protected; or None."""
    unknown = [lora.name for lora in loras if not _prompts_of(lora, [])]
    if not unknown:
        return None
    return (
        f"No prompt of {listed(unknown)} is known, for no {REPORT_NAME} beside it names one, so that none is "
        "protected; name some in --nullspace_extra_prompts."
    )


# ---- One file of a stack ---------------------------------------------------------------------------------------------


def concatenated(loras):
    """Layers that change what those of several LoRAs change together, exactly: `dict[str, LoraLayer]`. Ranks add up.

    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].

    Raises:
        NullSpaceError: if layers of one name have different sizes.
    """
    together = {}
    for lora in loras:
        for name, layer in lora.layers.items():
            together.setdefault(name, []).append((lora, layer))
    merged = {}
    for name, found in together.items():
        sizes = {(len(layer.up), *layer.down.shape[1:]): lora.name for lora, layer in found}
        if len(sizes) > 1:
            (first, one), (second, other) = list(sizes.items())[:2]
            raise NullSpaceError(
                f"{one} and {other} are of different models: {name} is {first} in the one and {second} in the other."
            )
        down = torch.cat([layer.down.float() for _, layer in found])
        up = torch.cat([layer.scale * layer.up.float() for _, layer in found], dim=1)
        merged[name] = LoraLayer(down, up, 1.0)
    return merged


def check_one_model(loras):
    """Raise `NullSpaceError` if reports say that LoRAs, which stand on no others, were trained on different models."""
    parts = ("unet", *TEXT_ENCODERS)
    known = {}
    for lora in loras:
        found = lora.report.get("base_model", {}).get("fingerprint")
        if isinstance(found, dict) and not lora.stands_on():
            known.setdefault(tuple(found.get(part) for part in parts), lora.name)
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise NullSpaceError(
            f"{one} and {other} were trained on different models, as their reports say; leave one out."
        )
