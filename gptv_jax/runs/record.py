"""What the files of a run folder say of its run: configuration, network, finished stages."""

import pathlib

from etils import epath

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import transforms
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network


def checkpoint_folder(config: config_lib.Config, folder: pathlib.Path) -> epath.Path:
    """Where the checkpoints of a run folder with this configuration are."""
    return epath.Path(config.checkpoint_dir or folder / "checkpoints")


def config_of(folder: pathlib.Path) -> config_lib.Config:
    """The configuration that made a run folder; fields that did not exist then have defaults.

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


def has_finished(summary: dict, stage: str) -> bool:
    """Whether a run's summary has numbers of the stage."""
    return any(name.startswith(f"{stage}/") for name in summary)


def stages_with_weights(summary: dict) -> list[str]:
    """Finished stages that trained the network, and so measured its test loss; the latest last."""
    ending = "/test_nats_per_token"
    return [name.removesuffix(ending) for name in summary if name.endswith(ending)]


def trained_part(config: config_lib.Config, stage: str) -> str:
    """The part of a stage's checkpoints that holds its weights, "params" or "ema".

    The settings of pretraining are `config.train`, of another stage `config.<stage>.train`.
    """
    return getattr(config, stage, config).train.weights


def network_of(config: config_lib.Config, classes: int = 0) -> Network:
    """The network of a configuration, with a class head where `classes` is not 0."""
    tokens, grid = config.tokens, config.tokens.grid(config.data.image_size)
    return Network(config.model, tokens.vocabulary, grid, start_vectors(config), classes)


def start_vectors(config: config_lib.Config) -> int:
    """Number of start vectors: one; one for each class and none; or one for each variant."""
    if config.model.class_tokens:
        return config.model.class_tokens + 1
    variants = transforms.variants(config.data.train_transforms)
    return variants if config.model.start_per_variant else 1
