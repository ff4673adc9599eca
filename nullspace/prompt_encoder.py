"""Captions, encoded for training."""

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from nullspace.errors import NullSpaceError, reason
from nullspace.families import get_family
from nullspace.layers import is_trained
from nullspace.models import loading
from nullspace.names import tokenizer_of
from nullspace.word import spelled


def load_tokenizers(args):
    """The model's tokenizers by their names in the pipeline, or that of --tokenizer_name.

    Raises:
        NullSpaceError: if they cannot be had.
    """
    if not args.tokenizer_name:
        with loading(args.pretrained_model_name_or_path):
            return get_family(args.model_type).load_tokenizers(args.base_model)
    try:
        return {"tokenizer": CLIPTokenizer.from_pretrained(args.tokenizer_name, token=args.hub_token)}
    except (OSError, ValueError) as error:
        raise NullSpaceError(f"--tokenizer_name {args.tokenizer_name} cannot be had ({reason(error)}).") from error


class PromptEncoder:
    """What the denoiser is told of captions: encoded anew for each batch where text encoders learn, else once.

    Args:
        tokenizers (`dict`), text_encoders (`dict`): by their names in the pipeline.
        captions (`list[str]`): different ones; batches name them by number.
        device (`torch.device`): of the text encoders.
        args: --model_type, --tokenizer_max_length, --text_encoder_use_attention_mask and --clip_skip.

    Raises:
        NullSpaceError: if --tokenizer_max_length is more than a text encoder reads.
    """

    def __init__(self, tokenizers, text_encoders, captions, device, args):
        self.tokens = {}
        for name, text_encoder in text_encoders.items():
            tokenizer, longest = tokenizers[tokenizer_of(name)], text_encoder.config.max_position_embeddings
            length = args.tokenizer_max_length or tokenizer.model_max_length
            if length > longest:
                raise NullSpaceError(
                    f"--tokenizer_max_length {length} is more than the text encoder's {longest} tokens."
                )
            self.tokens[name] = tokenizer(
                spelled(captions, tokenizer),
                max_length=length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(device)
        self.family = get_family(args.model_type)
        self.use_mask, self.clip_skip = args.text_encoder_use_attention_mask, args.clip_skip
        self.encoded = None
        if not any(is_trained(text_encoder) for text_encoder in text_encoders.values()):
            batches = torch.arange(len(captions)).split(16)
            disable = len(batches) == 1 or not PartialState().is_local_main_process
            progress = tqdm(batches, desc="Encoding prompts", unit="batch", disable=disable)
            with torch.no_grad():
                parts = [self.encode(text_encoders, batch) for batch in progress]
            self.encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def encode(self, text_encoders, numbers):
        """What `__call__` gives, encoded anew by the text encoders as they are now."""
        kinds = ("input_ids", "attention_mask") if self.use_mask else ("input_ids",)
        tokens = {name: {kind: each[kind][numbers] for kind in kinds} for name, each in self.tokens.items()}
        return self.family.encode(text_encoders, tokens, self.clip_skip)

    def __call__(self, text_encoders, numbers):
        """The captions of these numbers (batch,), as keyword arguments of the denoiser: tensors (batch, ...)."""
        if self.encoded is None:
            return self.encode(text_encoders, numbers)
        return {name: value[numbers] for name, value in self.encoded.items()}
