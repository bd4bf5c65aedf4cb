"""What a run folder tells of its run: configuration, finished stages, place of checkpoints."""

import pathlib

from etils import epath

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.errors import InputError

STAGES = ("tokenizer", "pretrain", "probe", "finetune", "sample", "generate")
ON_REQUEST = {"generate"}  # stages that run only where --stages names them


def checkpoint_folder(config: config_lib.Config, folder: pathlib.Path) -> epath.Path:
    """Where the checkpoints of a run folder with this configuration are."""
    return epath.Path(config.checkpoint_dir or folder / "checkpoints")


def config_of(folder: pathlib.Path) -> config_lib.Config:
    """The configuration that a run folder was made by; fields it is older than have defaults.

    Raises:
      InputError: no run folder, or a record that this version cannot read.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} is not a run folder: it has no config.json.")
    record = files.read_json(path, {})
    if not isinstance(record.get("config"), dict):
        raise InputError(f"{path} is damaged (it holds no configuration); restore it.")
    return config_lib.resolve(config_lib.recorded(config_lib.Config, record["config"]))


def finished_stages(summary: dict) -> list[str]:
    """Names of the stages with numbers in the summary, in the order they ran."""
    return [stage for stage in STAGES if any(k.startswith(f"{stage}/") for k in summary)]
