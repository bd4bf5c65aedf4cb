"""Generative pretraining on images: one GPT that predicts image tokens."""

import sys
import types

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

    def __call__(self, config, workdir, stages: list[str] | None = None) -> Model | None:
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
train = sys.modules["gptv_jax.train"]
train.__class__ = _Train
