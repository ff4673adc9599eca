"""Files of a word, the trained rows of a new token: what pipelines and web UIs read, and how it is loaded again."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nullspace.errors import NullSpaceError, reason
from nullspace.markdown import python_string
from nullspace.names import TEXT_ENCODERS, TOKEN_NAME, WORD_NAME, tokenizer_of
from nullspace.system import replacing, sort_header


# What files call the rows of each of two text encoders; those of one alone are called in different ways.
OF_TWO = dict(zip(TEXT_ENCODERS, ("clip_l", "clip_g"), strict=True))
OF_COMFYUI = "emb_params"
OF_BUNDLED = "string_to_param.*"
BUNDLED = "bundle_emb."  # begins the keys of an embedding in a LoRA's file: then its token, a dot, and the key
TOKEN = "placeholder_token"  # in the metadata of WORD_NAME


class Word(NamedTuple):
    """A token and its rows (vectors, width) float32, by text encoder."""

    token: str
    rows: dict


def _tensors(word, of_one):
    """The rows by what a file calls them; `of_one` is what it calls those of one text encoder."""
    keys = {name: of_one for name in word.rows} if len(word.rows) == 1 else OF_TWO
    return {keys[name]: _plain(rows) for name, rows in word.rows.items()}


def _plain(rows):
    return rows.detach().to("cpu", torch.float32).contiguous()


def key_of(token, text_encoder, tokens, text_encoders):
    """What WORD_NAME calls the rows of one of its tokens for one of the text encoders that it has rows for."""
    if len(text_encoders) == 1:
        return token
    return OF_TWO[text_encoder] if len(tokens) == 1 else f"{token}.{OF_TWO[text_encoder]}"


def _save(path, tensors, metadata):
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial, metadata)
        sort_header(partial)


def save_words(folder, words):
    """Write `learned_embeds.safetensors`, of one word as diffusers' textual inversion does, whole or not at all.

    Its keys are the tokens, or clip_l and clip_g where there are two text encoders, behind the token of several.
    """
    tokens = [word.token for word in words]
    tensors = {
        key_of(word.token, name, tokens, word.rows): _plain(rows) for word in words for name, rows in word.rows.items()
    }
    _save(Path(folder) / WORD_NAME, tensors, {TOKEN: " ".join(tokens)})


def read_word(path):
    """The `Word` of a file that `save_words` wrote of one.

    Raises:
        NullSpaceError: if it is none, or has several.
    """
    words = read_words(path)
    if len(words) > 1:
        raise NullSpaceError(f"{path} has {len(words)} words, and here is room for one; name another folder.")
    return words[0]


def read_words(path):
    """The words, `list[Word]`, of a file that `save_words` wrote.

    Raises:
        NullSpaceError: if it is none.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            tokens = (file.metadata() or {}).get(TOKEN, "").split()
    except (OSError, SafetensorError) as error:
        raise NullSpaceError(f"{path} cannot be read as an embedding: {reason(error)}") from error
    sound = all(rows.dim() == 2 and rows.is_floating_point() and rows.isfinite().all() for rows in tensors.values())
    if sound and tokens and all(map(TOKEN_NAME.fullmatch, tokens)):
        for names in (TEXT_ENCODERS[:1], TEXT_ENCODERS):
            keys = {token: {name: key_of(token, name, tokens, names) for name in names} for token in tokens}
            if {key for each in keys.values() for key in each.values()} == tensors.keys():
                return [Word(token, {name: tensors[key] for name, key in each.items()}) for token, each in keys.items()]
    raise NullSpaceError(f"{path} is no embedding that the trainer wrote; remove it, or name another folder.")


def is_word(path):
    """Whether a file is one that `save_words` wrote."""
    try:
        return bool(read_words(path))
    except NullSpaceError:
        return False


def words_beside(lora, token=None):
    """The words, `list[Word]`, that were trained along with a LoRA, given as its folder or Hub id.

    Args:
        token (`str`, *optional*): of the Hub.

    Raises:
        NullSpaceError: if there are some that cannot be had.
    """
    path = Path(lora) / WORD_NAME
    if not Path(lora).exists():
        try:
            path = hf_hub_download(str(lora), WORD_NAME, token=token)
        except LocalEntryNotFoundError as error:
            raise NullSpaceError(f"Whether {lora} comes with a word cannot be asked now ({reason(error)}).") from error
        except EntryNotFoundError:
            return []
    return read_words(path) if Path(path).is_file() else []


# ---- In pipelines ----------------------------------------------------------------------------------------------------


def load_words(pipeline, words):
    """Load words into a pipeline as `loading_code` does."""
    for word in words:
        for name, rows in word.rows.items():
            pipeline.load_textual_inversion(
                rows, token=word.token, text_encoder=getattr(pipeline, name),
                tokenizer=getattr(pipeline, tokenizer_of(name)),
            )  # fmt: skip


def loading_code(source, is_on_hub, tokens, text_encoders):
    """Python that loads the words of one file into `pipeline`: the lines of its imports, and the lines that do it.

    Args:
        source (`str`): the folder or Hub id.
        tokens (`list[str]`): of the words.
        text_encoders (`list[str]`): names of the model's.
    """
    if len(tokens) == len(text_encoders) == 1:
        return [], [f"pipeline.load_textual_inversion({python_string(source)})"]
    imports = ["from safetensors.torch import load_file"]
    path = python_string(str(Path(source) / WORD_NAME))
    if is_on_hub:
        imports.insert(0, "from huggingface_hub import hf_hub_download")
        path = f"hf_hub_download({python_string(source)}, {python_string(WORD_NAME)})"
    lines = [f"rows = load_file({path})"]
    for token in tokens:
        for name in text_encoders:
            parts = f", text_encoder=pipeline.{name}, tokenizer=pipeline.{tokenizer_of(name)}"
            parts = parts if len(text_encoders) > 1 else ""
            key = python_string(key_of(token, name, tokens, text_encoders))
            lines.append(f"pipeline.load_textual_inversion(rows[{key}], token={python_string(token)}{parts})")
    return imports, lines


# ---- For the web UIs -------------------------------------------------------------------------------------------------


def bundled(word):
    """The tensors of a word in a LoRA's file, as AUTOMATIC1111 and SD.Next look for them there: `dict[str, Tensor]`."""
    return {f"{BUNDLED}{word.token}.{key}": rows for key, rows in _tensors(word, OF_BUNDLED).items()}


def unbundled(tensors):
    """The words, `list[Word]`, that `bundled` gave tensors of; embeddings that others have bundled are left out."""
    words = []
    for token in bundled_tokens(tensors):
        for names, keys in ((TEXT_ENCODERS[:1], [OF_BUNDLED]), (TEXT_ENCODERS, OF_TWO.values())):
            rows = [tensors.get(f"{BUNDLED}{token}.{key}") for key in keys]
            if all(each is not None and each.dim() == 2 for each in rows):
                words.append(Word(token, dict(zip(names, rows, strict=True))))
    return words


def bundled_tokens(keys):
    """The tokens of the embeddings that a LoRA's file bundles, by its keys (`Iterable[str]`), sorted."""
    return sorted({key.removeprefix(BUNDLED).partition(".")[0] for key in keys if key.startswith(BUNDLED)})


def holds(path, word):
    """Whether a file is what `save_embedding` writes of a word, but for metadata."""
    try:
        found, tensors = load_file(path), _tensors(word, OF_COMFYUI)
    except (OSError, SafetensorError):
        return False
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def save_embedding(path, word, metadata):
    """Write a word by itself, whole or not at all: ComfyUI and Forge read it in no other way."""
    _save(Path(path), _tensors(word, OF_COMFYUI), metadata)
