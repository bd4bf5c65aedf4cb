"""Trained weights apart from any run: read from and written to the forms that others know."""

import pathlib

from gptv_jax.errors import InputError
from gptv_jax.tokens import Palette, TokenDefinition
from gptv_jax.weights import huggingface, native, openai
from gptv_jax.weights.file import WeightsFile

# Each form: whether a path is one, its weights, and its definition alone.
FORMS = (native, huggingface, openai)


def is_weights_path(path: str | pathlib.Path) -> bool:
    """Whether weights in one of the forms lie there (a run folder is none of them)."""
    return any(form.found(pathlib.Path(path)) for form in FORMS)


def read(path: str | pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """The weights at `path`: a .safetensors file of ours, or of Hugging Face or OpenAI.

    Args:
      path: the file, the folder with Hugging Face's `config.json`, or the prefix of a TensorFlow
        checkpoint (`model.ckpt-1000000`).
      palette: the colours of the tokens, where the form has none; OpenAI's never has.

    Raises:
      InputError: none of these, damaged, contradictory or beyond this network; or no palette.
    """
    path = pathlib.Path(path)
    for form in FORMS:
        if form.found(path):
            return form.read(path, palette)
    raise InputError(
        f"{path} is not a run folder, nor a .safetensors file, nor a folder with Hugging Face's "
        "config.json, nor the prefix of a TensorFlow checkpoint (PREFIX.index)."
    )


def read_definition(path: str | pathlib.Path) -> TokenDefinition | None:
    """What tokens stand for, as it lies with the weights at `path`; None where nothing does."""
    path = pathlib.Path(path)
    return next((form.read_definition(path) for form in FORMS if form.found(path)), None)
