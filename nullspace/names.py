"""The names that files, groups and layers have everywhere: standard library only."""

import re


FORMAT_VERSION = 3
BUILDER = "build_nullspace.py"
CONFIG_NAME = "nullspace_config.json"
TABLE_NAME = "modules.csv"
LORA_NAME = "pytorch_lora_weights.safetensors"
WORD_NAME = "learned_embeds.safetensors"  # which pipelines look for in a folder
TEXT_INPUT = "encoder_hidden_states"
TEXT_ENCODER = "text_encoder"  # names of a text encoder's own layers and inputs begin with its name and a dot
TEXT_ENCODERS = [TEXT_ENCODER, "text_encoder_2"]  # all that a model may have
TIMELESS = [TEXT_INPUT, *TEXT_ENCODERS]  # groups of inputs that do not depend on the timestep
JOINT = "joint"
ENERGIES = (0.9, 0.99, 0.999, 0.9999)
DEFAULT_THRESHOLDS = {"energy": 0.9, "eigenvalue": 2e-2, "percentile": 10.0}
DEFAULT_SOFTNESS = 1e-5
WORD_SOFTNESS = 1e-6  # with a word of the subject's own, which takes its prompts out of what is held back
DEFAULT_RATES = {"adamw": 5e-4, "prodigy": 1.0}  # by --optimizer; prodigy finds the size of a step by itself
DEFAULT_WORD_RATE = 1e-2
DEFAULT_RANK = 4
TOKEN_NAME = re.compile("[a-z0-9][a-z0-9_-]*")  # of --placeholder_token, which names files
REPORT_NAME = "nullspace_report.json"
FLAGS_NAME = "config.yaml"  # the flags of a run, for --config
COMPARISON_NAME = "comparison.png"
CHECKPOINTS_NAME = "checkpoints.png"
UNPROTECTED_NAME = f"unprotected_{LORA_NAME}"
CARD_NAME = "README.md"
EMBEDDINGS = "embeddings"  # a folder, which is called so in the web UIs too
# --image_interpolation_mode, by diffusers' names: Pillow's own
INTERPOLATION = {name: name.upper() for name in ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")}
INTERPOLATION["nearest_exact"] = "NEAREST"


def tokenizer_of(text_encoder):
    """What a pipeline calls the tokenizer of the text encoder of this name."""
    return text_encoder.replace(TEXT_ENCODER, "tokenizer")


def kohya_path(output_dir):
    """The file for the web UIs: named after the folder, as they show the name of the file."""
    return output_dir / f"{output_dir.resolve().name}.safetensors"


def embedding_path(output_dir, token):
    """A word's file for the web UIs: named after it, as ComfyUI's prompts name the file."""
    return output_dir / EMBEDDINGS / f"{token}.safetensors"
