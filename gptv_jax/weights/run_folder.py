"""Weights from a run folder, restored from the checkpoint that a finished training left there."""

import pathlib

from gptv_jax import files, sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError
from gptv_jax.runs.record import (
    checkpoint_folder,
    config_of,
    network_of,
    stages_with_weights,
    trained_part,
)
from gptv_jax.weights.file import WeightsFile


def read(folder: pathlib.Path, stage: str | None = None) -> tuple[WeightsFile, dict]:
    """A description of a stage's weights, without arrays, and its parameters on the current mesh.

    Args:
      folder: the run folder.
      stage: "pretrain" or "finetune"; None: the latest of the two that has finished.

    Raises:
      InputError: no run folder, the stage has not finished, or the checkpoint is damaged.
    """
    config, summary = config_of(folder), files.read_json(folder / "summary.json", {})
    finished = stages_with_weights(summary)
    if stage is None and finished:
        stage = finished[-1]
    if stage not in finished:
        raise InputError(
            f"{folder} has no finished stage {stage or 'with weights'}; finished stages with "
            f"weights: {', '.join(finished) or 'none'}."
        )
    network = network_of(config, summary.get(f"{stage}/classes", 0))
    described = WeightsFile(
        model=config.model,
        tokens=config.tokens,
        image_size=config.data.image_size,
        params={},
        definition=tokens.load_definition(config.tokens.kind, folder),
        starts=network.starts,
        classes=network.classes,
        step=summary[f"{stage}/steps"],
        best_layer=summary.get("probe/best_layer"),
    )
    place, name = checkpoint_folder(config, folder) / stage, trained_part(config, stage)
    with Checkpoints(place, read_only=True) as saved:
        state, _ = saved.restore(described.step, {name: sharding.abstract(network.init)})
    return described, state[name]
