"""The configuration of a run folder, as a file that --config takes: `run_file.py:FOLDER`."""

import pathlib

import ml_collections

from gptv_jax import config
from gptv_jax.config import fields


def get_config(folder: str) -> ml_collections.ConfigDict:
    """The configuration that made the folder, for overrides to change."""
    return fields.to_dict(config.of_run(pathlib.Path(folder)))
