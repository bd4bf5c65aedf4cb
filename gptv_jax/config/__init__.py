"""Every setting of a run, declared once: its name, type, unit and meaning.

A file in `configs/` starts from `default()` (an `ml_collections.ConfigDict`, so that any field can
be overridden on the command line as `--config.a.b=value`), and `resolve` turns the result into the
frozen, checked `Config` that the rest of the program reads.
"""

import ml_collections

from gptv_jax.config import fields, rules
from gptv_jax.config.data import Autoencoder, Data, Limits, Tokens
from gptv_jax.config.distill import Distill, Matching
from gptv_jax.config.stages import (
    Config,
    Drawing,
    Finetune,
    Generate,
    Probe,
    ProbeSgd,
    Robustness,
    Sample,
)
from gptv_jax.config.tasks import Detect, Segment, Task
from gptv_jax.config.train import Mesh, Model, Optimizer, Profile, Tokenizer, Train
from gptv_jax.errors import InputError, shorten

__all__ = [
    "Autoencoder", "Config", "Data", "Detect", "Distill", "Drawing", "Finetune", "Generate",
    "Limits", "Matching", "Mesh", "Model", "Optimizer", "Probe", "ProbeSgd", "Profile",
    "Robustness", "Sample", "Segment", "Task", "Tokenizer", "Tokens", "Train", "choose", "default",
    "recorded", "resolve",
]  # fmt: skip

# Fields of older files: renamed fields, and removed fields, each with the only value, as
# JSON has it, that this version can still read.
RENAMED = {"tokens.name": "tokens.kind"}
REMOVED = {
    "model.above_embedding": False,
    "model.block": [],
    "model.prefixes": [],
    "model.next_embedding": 0.0,
    "model.next_embedding_map": True,
}


def default() -> ml_collections.ConfigDict:
    """The defaults as a locked ConfigDict, for a file in `configs/` to change."""
    return fields.to_dict(Config())


def choose(argument: str, choices: dict):
    """What a config file's own argument, as in `--config=FILE:ARGUMENT`, stands for.

    InputError: `choices` does not have the argument.
    """
    if argument not in choices:
        raise InputError(f"its argument is {argument!r}; it takes one of {shorten(choices)}.")
    return choices[argument]


def recorded(cls: type, flat: dict[str, object], section: str = "") -> dict:
    """A section as nested dicts, from a file of an older version; "": the whole configuration.

    Renamed fields of `flat` get their new names, and fields that it lacks get their defaults.
    InputError: the file asks for something that this version no longer has.
    """
    prefix = f"{section}." if section else ""
    named = {RENAMED.get(prefix + name, prefix + name): value for name, value in flat.items()}
    for name in REMOVED.keys() & named.keys():
        if (value := named.pop(name)) != REMOVED[name]:
            raise InputError(
                f"config.{name} is {value!r} in this file. This version of gptv_jax no longer has "
                f"the field, and reads only {REMOVED[name]!r}. Use the version that wrote the file."
            )
    named = {name.removeprefix(prefix): value for name, value in named.items()}
    return fields.unflatten(fields.flatten(cls()) | named)


def resolve(settings: ml_collections.ConfigDict | dict) -> Config:
    """Typed, frozen and checked `Config`.

    Raises:
      InputError: an unknown or missing field, a wrong type, or a value that is not accepted; the
        message names the field, its value and what would be accepted.
    """
    config = fields.from_dict(Config, settings, "config")
    rules.check(config)
    return config
