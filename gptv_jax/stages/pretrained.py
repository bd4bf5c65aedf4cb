"""The weights that later stages begin with: this run's own pretraining, or `config.init_from`."""

import pathlib
from typing import NamedTuple

from etils import epath

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding, tokens, weights
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network
from gptv_jax.runs import record
from gptv_jax.runs.context import Context
from gptv_jax.tokens import Codec
from gptv_jax.weights.native import WeightsFile


class Pretrained(NamedTuple):
    """Pretrained weights."""

    params: dict
    numbers: dict[str, int]  # for the summary of the stage: the step, where it is not the last one


def load(context: Context, network: Network) -> Pretrained:
    """The pretrained weights, from the newest checkpoint that can be read.

    Raises:
      InputError: pretraining has not finished, the weights are of another shape, or none of the
        checkpoints can be read.
    """
    config, given = context.config, context.config.init_from
    if given and weights.is_weights_path(given):
        return Pretrained(_imported(config, context.codec).on_mesh(), {})

    def in_folder() -> tuple[str, str, int | None]:
        folder, summary = _finished_folder(config, context.folder.path)
        made_by = record.config_of(folder)
        place = str(record.checkpoint_folder(made_by, folder) / "pretrain")
        return place, record.trained_part(made_by, "pretrain"), summary.get("pretrain/steps")

    place, part, last = hosts.from_first(in_folder)
    abstract = {part: sharding.abstract(network.init)}
    with Checkpoints(epath.Path(place), read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(abstract)
    if restored is None:
        raise InputError(
            f"{place} holds no checkpoint, though pretraining has finished; restore it, or "
            "pretrain anew in another --workdir."
        )
    state, step = restored[0], restored[1]["position"]
    # Where the newest checkpoint is damaged, numbers are of an earlier one.
    return Pretrained(state[part], {} if given or step == last else {"pretrain_steps": step})


def check(config: config_lib.Config, folder: pathlib.Path, codec: Codec | None) -> None:
    """Checks before any work that a run finds pretrained weights of its network; for process 0.

    Raises:
      InputError: there are no pretrained weights, or they are of another network.
    """
    if config.init_from and weights.is_weights_path(config.init_from):
        _imported(config, codec)
        return
    made_by = record.config_of(_finished_folder(config, folder)[0])
    size, starts = made_by.data.image_size, record.start_vectors(made_by)
    _must_fit(config, WeightsFile(made_by.model, made_by.tokens, size, {}, starts=starts))


def _finished_folder(config: config_lib.Config, folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The run folder with the pretrained weights, and its summary."""
    given = config.init_from
    found = weights.locate(given) if given else folder.absolute()
    summary = files.read_json(found / "summary.json", {})
    if not record.has_finished(summary, "pretrain"):
        where = f"config.init_from={found}" if given else found
        advice = "name a run folder that does" if given else "run --stages=pretrain first"
        raise InputError(f"{where} holds no finished pretraining; {advice}.")
    return found, summary


def _imported(config: config_lib.Config, codec: Codec | None) -> WeightsFile:
    """The weights of `config.init_from` that are no run folder, without their class head."""
    definition = codec and codec.definition
    palette = definition if isinstance(definition, tokens.Palette) else None
    found = weights.read(config.init_from, palette).headless()
    _must_fit(config, found)
    return found


def _must_fit(config: config_lib.Config, found: WeightsFile) -> None:
    if differing := found.differing(config, record.start_vectors(config)):
        raise InputError(
            f"config.init_from={config.init_from} holds another network: "
            f"{shorten(differing, '; ')}. Set these fields to its values."
        )
