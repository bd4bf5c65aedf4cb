"""Trained weights outside of run folders, in this project's file format and in other programs'."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Palette, TokenDefinition
from gptv_jax.weights import hub, huggingface, native, openai
from gptv_jax.weights.native import WeightsFile

# Modules that each read one format: `recognizes(path)`, `read(path, palette)` and
# `read_definition(path)`, as the functions below describe them.
FORMATS = (native, huggingface, openai)


def locate(name: str | pathlib.Path, missing: str = "") -> pathlib.Path:
    """The file, folder or prefix on this machine that a user names.

    "hf://user/model" is downloaded from the Hugging Face Hub or found in the Hub's cache; nothing
    else is downloaded. `missing` is the error message where nothing has this name.
    """
    path = _local(name)
    if path.exists() or openai.recognizes(path):
        return path
    message = missing or f"{name} is not a run folder, nor a .safetensors file: it does not exist"
    user = re.fullmatch(r"([\w.-]+)/([\w.-]+)", str(name))
    is_file = re.search(r"\.[a-z]\w*$", str(name))  # its name has an ending
    if user and not is_file and not pathlib.Path(user[1]).exists():
        message += (
            ". By this name nothing is downloaded; for a model of the Hugging Face Hub write "
            f"hf://{name}, or run: hf download {name} --local-dir={user[2]}"
        )
    raise InputError(f"{message}.")


def _local(name: str | pathlib.Path) -> pathlib.Path:
    """The path on this machine, which need not exist unless the name is of the Hub."""
    if str(name).startswith(hub.SCHEME):
        return hub.download(str(name))
    if "://" in str(name):
        raise InputError(f"{name} is an address; name a path, or a model as hf://user/model.")
    return files.user_path(name)


def is_weights_path(path: str | pathlib.Path) -> bool:
    """Whether `path` names weights in one of the formats; a run folder is none of them."""
    path = _local(path)
    return any(module.recognizes(path) for module in FORMATS)


def read(path: str | pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """Reads weights in any of the formats.

    `path` is a .safetensors file of this project, the folder with Hugging Face's `config.json`, the
    prefix of an OpenAI TensorFlow checkpoint (`model.ckpt-1000000`), or `hf://user/model`.
    `palette` has the colours of the tokens, where the format does not have them; OpenAI's never
    has.
    """
    path = locate(path)
    for module in FORMATS:
        if module.recognizes(path):
            return module.read(path, palette)
    raise InputError(
        f"{path} is not a run folder, nor a .safetensors file, nor a folder with Hugging Face's "
        "config.json, nor the prefix of a TensorFlow checkpoint (PREFIX.index)."
    )


def read_stage(
    path: str | pathlib.Path,
    stage: str,
    palette: Palette | None = None,
    *,
    with_params: bool = True,
) -> tuple[WeightsFile, dict]:
    """As `native.read_run`, also of the weights that `read` takes, which are always read whole.

    Of weights that are no run, the stage "pretrain" leaves the class head out.
    """
    path = locate(path)
    if not is_weights_path(path):
        return native.read_run(path, stage, with_params)
    found = read(path, palette)
    found = found.headless() if stage == "pretrain" else found
    params = found.on_mesh() if with_params else {}
    return dataclasses.replace(found, params={}), params


def networks(
    names: Sequence[str], stage: str, palette: Palette | None = None
) -> tuple[Network, ...]:
    """The networks of weights that `read_stage` reads."""
    read = (read_stage(name, stage, palette, with_params=False) for name in names)
    return tuple(described.network for described, _ in read)


def read_definition(path: str | pathlib.Path) -> TokenDefinition | None:
    """The palette or tokenizer that is stored with the weights at `path`; None without one."""
    path = _local(path)
    return next((m.read_definition(path) for m in FORMATS if m.recognizes(path)), None)
