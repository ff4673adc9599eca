"""A word of the subject's own: a new token, of whose rows in the embeddings alone the text encoders learn anything.

Textual inversion (arXiv 2208.01618), trained together with the LoRA as in Custom Diffusion (arXiv 2212.04488) and
Perfusion (arXiv 2305.01644), or alone. No prompt without the token reads its rows, so that they move none of what is
protected, whatever they become; and they take the subject's prompts away from the directions that are closed. The
other rows are no parameters of the optimizer, so that they stay as they are, to the last bit.
"""

import hashlib
import re

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn

from nullspace.captions import counted, distinct_captions
from nullspace.embeddings import read_word, save_words
from nullspace.errors import NullSpaceError, listed
from nullspace.names import WORD_NAME, tokenizer_of


def vector_names(token, count):
    """The tokens of the vectors of one, as `load_textual_inversion` calls them: token, token_1, token_2, ..."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def spelled(prompts, tokenizer):
    """Prompts (`list[str]`) as pipelines read them: each token of several vectors is followed by the others."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)


# ---- What is refused -------------------------------------------------------------------------------------------------


def check_named(captions, args):
    """Raise `NullSpaceError` unless all captions (`list[list[str]]`) hold --placeholder_token, if there is one."""
    token = args.placeholder_token
    lacking = [repr(caption) for caption in distinct_captions(captions) if token and token not in caption]
    if lacking:
        raise NullSpaceError(
            f"--placeholder_token {token} is missing in {counted(len(lacking), 'prompt')} to train on "
            f"({listed(lacking, 3)}); write it there for the subject, in --instance_prompt and in captions."
        )
    within = [repr(caption) for caption in distinct_captions(captions) if token and _is_within(token, caption)]
    if within:
        raise NullSpaceError(
            f"--placeholder_token {token} is part of another word in {listed(within, 3)}; write it as a word by itself."
        )


def _is_within(token, caption):
    """Whether a token stands nowhere but in longer words, of which tokenizers make other rows than its own."""
    letter = r"[\w-]"
    return not re.search(rf"(?<!{letter}){re.escape(token)}(?!{letter})", caption)


def check_not_protected(prompts, token):
    """Raise `NullSpaceError` if a prompt (`list[str]`) that a bundle is known to protect holds a token."""
    held = [prompt for prompt in prompts if token in prompt.lower()]
    if held:
        raise NullSpaceError(
            f"The bundle protects '{held[0]}', which holds --placeholder_token {token}, so that it could not be "
            "learned; choose another token."
        )


def add_token(tokenizers, args):
    """Teach tokenizers (`dict`, by name), in place, the tokens of --placeholder_token's vectors.

    Raises:
        NullSpaceError: if one knows the token, or a part of what it knows is it, or it would split it, or
            --initializer_token is not one token to it.
    """
    token, names = args.placeholder_token, vector_names(args.placeholder_token, args.num_vectors)
    for tokenizer in tokenizers.values():
        if known := sorted(entry for entry in tokenizer.get_vocab() if token in entry.removesuffix("</w>")):
            raise NullSpaceError(
                f"--placeholder_token {token} is no new token: the tokenizer knows '{min(known, key=len)}', so that "
                f"prompts with it would change; choose another, as sks-{token}."
            )
        initial = tokenizer.tokenize(args.initializer_token)
        if len(initial) != 1 or tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(initial):
            what = f"{len(initial)} tokens to the tokenizer ({listed(initial)})"
            what = "unknown to the tokenizer" if len(initial) == 1 else what
            raise NullSpaceError(
                f"--initializer_token {args.initializer_token} is {what}; choose a word that is one token, mostly the "
                "subject's class."
            )
        tokenizer.add_tokens(names)
        if (read := tokenizer.tokenize(" ".join(names))) != names:
            raise NullSpaceError(
                f"--placeholder_token {token} is split by the tokenizer ({listed(read)}), which has tokens of its own "
                "in it; choose another."
            )


def check_window(tokenizers, captions, args):
    """Raise `NullSpaceError` if the window cuts vectors off a caption (`list[list[str]]`).

    Args:
        tokenizers (`dict`): after `add_token`.
    """
    distinct = distinct_captions(captions)
    for tokenizer in tokenizers.values():
        length = args.tokenizer_max_length or tokenizer.model_max_length
        wanted = set(tokenizer.convert_tokens_to_ids(vector_names(args.placeholder_token, args.num_vectors)))
        read = tokenizer(spelled(distinct, tokenizer), max_length=length, truncation=True).input_ids
        for caption, ids in zip(distinct, read, strict=True):
            if not wanted <= set(ids):
                raise NullSpaceError(
                    f"--num_vectors {args.num_vectors} is more than fits into the {length} tokens of '{caption}'; "
                    "choose fewer vectors, or a shorter prompt."
                )


# ---- What is trained -------------------------------------------------------------------------------------------------


class WordEmbedding(nn.Module):
    """A text encoder's embedding that gives trainable rows for new tokens, and its own for all others.

    Args:
        known (`nn.Embedding`): its own, which stays as it is.
        first (`int`): the first new token's number; those of the others follow.
        rows (`Tensor`): (vectors, width) float32.
    """

    def __init__(self, known, first, rows):
        super().__init__()
        # In this order: a model takes the type of its first weights for its own
        self.known = known
        self.added = nn.Embedding.from_pretrained(rows, freeze=False)
        self.first = first

    def forward(self, input_ids):
        number = input_ids - self.first
        is_new = (number >= 0) & (number < self.added.num_embeddings)
        known = self.known(input_ids.masked_fill(is_new, 0))
        added = self.added(number.clamp(0, self.added.num_embeddings - 1))
        return torch.where(is_new.unsqueeze(-1), added.to(known.dtype), known)


class NewWord:
    """--placeholder_token in tokenizers and text encoders (`dict`s, by name), which are changed in place.

    Its rows begin as that of --initializer_token. Add it after the text encoders were cast and have their LoRA.

    Attributes:
        token (`str`): as prompts have it.
        rows (`dict[str, Parameter]`): (vectors, width) float32 of each text encoder.
    """

    def __init__(self, tokenizers, text_encoders, args):
        add_token(tokenizers, args)
        self.token, self.rows, self._known = args.placeholder_token, {}, {}
        for name, text_encoder in text_encoders.items():
            tokenizer, known = tokenizers[tokenizer_of(name)], text_encoder.get_input_embeddings()
            (initial,) = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(args.initializer_token))
            rows = known.weight[initial].detach().float().repeat(args.num_vectors, 1)
            embedding = WordEmbedding(known, tokenizer.convert_tokens_to_ids(self.token), rows)
            text_encoder.set_input_embeddings(embedding)
            self.rows[name], self._known[name] = embedding.added.weight, (known, _sha256(known.weight))

    def save(self, folder):
        """Write the rows to `learned_embeds.safetensors` in a folder.

        Raises:
            NullSpaceError: if any other row of an embedding is not what it was.
        """
        for name, (known, digest) in self._known.items():
            if _sha256(known.weight) != digest:
                raise NullSpaceError(
                    f"The word breaks its promise: rows of the {name}'s embedding other than its own have changed; "
                    "nothing is saved: report it with your command line."
                )
        save_words(folder, [self])

    def restore(self, folder):
        """Go on from the rows that a checkpoint has, see `take`."""
        self.take(read_word(folder / WORD_NAME), folder)

    @torch.no_grad()
    def take(self, word, source):
        """Go on from the rows of a `Word`; `source` is where that is from.

        Raises:
            NullSpaceError: if it is another, or of a model of other sizes.
        """
        shapes = [(each.token, {name: rows.shape for name, rows in each.rows.items()}) for each in (self, word)]
        if shapes[0] != shapes[1]:
            raise NullSpaceError(
                f"The word of {source} does not fit; go on with the flags and the model that it was made with."
            )
        for name, rows in self.rows.items():
            rows.copy_(word.rows[name])


def _sha256(weight):
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
