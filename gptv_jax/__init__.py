"""Generative pretraining on images: one GPT that predicts image tokens."""

import importlib
import types
from typing import TYPE_CHECKING, Any

from gptv_jax import train  # the folder alone, which imports nothing

if TYPE_CHECKING:
    from gptv_jax.api import (
        Limits,
        Model,
        from_huggingface,
        from_openai,
        load,
        load_image,
        load_tokenizer,
        to_huggingface,
    )

__all__ = [
    "Limits",
    "Model",
    "from_huggingface",
    "from_openai",
    "load",
    "load_image",
    "load_tokenizer",
    "to_huggingface",
    "train",
]


class _Train(types.ModuleType):
    """The package `gptv_jax.train`, which can be called as a function too."""

    def __call__(self, config, workdir, stages: list[str] | None = None) -> "Model | None":
        """Runs a configuration's stages in a run folder, as `python -m gptv_jax.main` does.

        The same call continues a run that was interrupted; an interrupt (Ctrl-C, or "interrupt the
        kernel") saves the training first. Errors that you can mend are a `ValueError`.

        Args:
          config: what `gptv_jax.config.default()` or a config file's `get_config()` returns, with
            your changes; or what --config takes: FILE, FILE:ARGUMENT or the folder of a run.
          workdir: the run folder; the same folder continues its run.
          stages: names of stages; None: all that the configuration and the data allow.

        Returns:
          The model of the latest stage that has trained a network; None where there is none.
        """
        from gptv_jax.stages import run

        return run.train(config, workdir, stages)


# The module itself becomes callable, so that `import gptv_jax.train.loop` works as well.
train.__class__ = _Train


def __getattr__(name: str) -> Any:
    """A name of the Python interface, or a module of the package, imported when it is first used.

    Importing the interface imports JAX, which takes seconds; the commands import this package
    before they know whether they need JAX.
    """
    if name in __all__:
        return getattr(importlib.import_module("gptv_jax.api"), name)
    missing = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):  # asked for by tools, and no module
        raise AttributeError(missing)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(missing) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
