"""Trained weights outside of run folders, in this project's file format and in other programs'."""

import pathlib

from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.tokens import Palette, TokenDefinition
from gptv_jax.weights import huggingface, native, openai
from gptv_jax.weights.native import WeightsFile

# Modules that each read one format: `recognizes(path)`, `read(path, palette)` and
# `read_definition(path)`, as the functions below describe them.
FORMATS = (native, huggingface, openai)


def is_weights_path(path: str | pathlib.Path) -> bool:
    """Whether `path` names weights in one of the formats; a run folder is none of them."""
    return any(module.recognizes(files.user_path(path)) for module in FORMATS)


def read(path: str | pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """Reads weights in any of the formats.

    `path` is a .safetensors file of this project, the folder with Hugging Face's `config.json`, or
    the prefix of an OpenAI TensorFlow checkpoint (`model.ckpt-1000000`). `palette` has the colours
    of the tokens, where the format does not have them; OpenAI's never has.

    Raises:
      InputError: `path` has none of the formats, is damaged, or holds another kind of network; or
        the palette is missing.
    """
    path = files.user_path(path)
    for module in FORMATS:
        if module.recognizes(path):
            return module.read(path, palette)
    raise InputError(
        f"{path} is not a run folder, nor a .safetensors file, nor a folder with Hugging Face's "
        "config.json, nor the prefix of a TensorFlow checkpoint (PREFIX.index)."
    )


def read_definition(path: str | pathlib.Path) -> TokenDefinition | None:
    """The palette or tokenizer that is stored with the weights at `path`; None without one."""
    path = files.user_path(path)
    return next((m.read_definition(path) for m in FORMATS if m.recognizes(path)), None)
