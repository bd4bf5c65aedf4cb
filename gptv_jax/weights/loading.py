"""Models from wherever weights are: a run folder, a file of ours, other programs' formats."""

import dataclasses
import pathlib

import jax

from gptv_jax import config as config_lib
from gptv_jax import files, sharding, tokens, validation, weights
from gptv_jax.api import Model
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError
from gptv_jax.runs.record import (
    checkpoint_folder,
    config_of,
    network_of,
    stages_with_weights,
    trained_part,
)
from gptv_jax.tokens import LearnedTokens, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights import huggingface
from gptv_jax.weights.file import WeightsFile


def load(
    source: str | pathlib.Path,
    stage: str | None = None,
    palette: str | pathlib.Path | None = None,
) -> Model:
    """The model that a run folder holds, or a file or folder of weights.

    Args:
      source: the `--workdir` of a run; a .safetensors file of `Model.save`; or what
        `from_huggingface` and `from_openai` take.
      stage: of a run, "pretrain" or "finetune"; None: the latest of them that has finished.
      palette: file of the colours, for weights that come without them.

    Raises:
      ValueError: neither of these, the stage has not finished, or something there is damaged.
    """
    path = pathlib.Path(source).absolute()
    if not weights.is_weights_path(path) and path.is_dir():
        return _of_run(path, stage)
    if stage is not None:
        raise InputError(f"stage={stage} is asked for, but {path} is no run folder, with stages.")
    found = weights.read(path, palettes.load(palette) if palette else None)
    mesh = sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        return Model(dataclasses.replace(found, params={}), found.on_mesh(), mesh)


def from_huggingface(
    folder: str | pathlib.Path, palette: str | pathlib.Path | None = None
) -> Model:
    """An ImageGPT of `transformers`, from the folder that `save_pretrained` wrote.

    Args:
      folder: with `config.json`, safetensors (in one file or several) and, for the palette,
        `preprocessor_config.json`.
      palette: kmeans_centers.npy, where that is missing.

    Raises:
      ValueError: a tensor is missing, left over or misshapen (all are listed), a bias is not zero,
        or the network is another one than Image GPT.
    """
    return load(folder, palette=palette)


def to_huggingface(model: Model, folder: str | pathlib.Path, task: str = "generation") -> None:
    """Writes a folder from which `transformers` loads the model, without code of ours or pickle.

    Args:
      model: the model.
      folder: made where it is not there.
      task: "generation" for `ImageGPTForCausalImageModeling`, "classification" for
        `ImageGPTForImageClassification`.

    Raises:
      ValueError: the model has what that form cannot express (named).
    """
    if task not in huggingface.ARCHITECTURES:
        shown = ", ".join(huggingface.ARCHITECTURES)
        raise InputError(f"task is {task!r}; it takes one of {shown}.")
    huggingface.write(model.weights_file(), pathlib.Path(folder).absolute(), task)


def from_openai(prefix: str | pathlib.Path, palette: str | pathlib.Path) -> Model:
    """OpenAI's Image GPT, from the TensorFlow checkpoint; needs the `prepare` extra.

    Args:
      prefix: path of the checkpoint without .index: ".../model.ckpt-1000000".
      palette: its colours, kmeans_centers.npy.

    Raises:
      ValueError: as `from_huggingface`.
    """
    return load(prefix, palette=palette)


def load_tokenizer(source: str | pathlib.Path, image_size: int | None = None) -> LearnedTokens:
    """Images to codes of a learned encoder and back, apart from any network that reads them.

    Args:
      source: a run folder whose stage `tokenizer` has finished, or a file of `Tokenizer.save`.
      image_size: height and width in pixels; None: those that it was trained on.

    Raises:
      ValueError: there is none, it is damaged, or its grid does not divide the size.
    """
    tokenizer = learned.load(source)
    size = tokenizer.provenance["image_size"] if image_size is None else image_size
    down = tokenizer.config.downsample
    if not validation.is_whole(size) or size < 1 or size % down:
        raise InputError(
            f"image_size is {size!r}; a token stands for {down} x {down} pixels, so it takes a "
            f"multiple of {down}."
        )
    return LearnedTokens(tokenizer, size)


def _of_run(folder: pathlib.Path, stage: str | None) -> Model:
    config, summary = config_of(folder), files.read_json(folder / "summary.json", {})
    finished = stages_with_weights(summary)
    if stage is None and finished:
        stage = finished[-1]
    if stage not in finished:
        shown = ", ".join(finished) or "none"
        raise InputError(
            f"{folder} has no finished stage {stage or 'with weights'}; of those with weights, "
            f"finished: {shown}."
        )
    network = network_of(config, summary.get(f"{stage}/classes", 0))
    step = summary[f"{stage}/steps"]
    described = WeightsFile(
        model=config.model,
        tokens=config.tokens,
        image_size=config.data.image_size,
        params={},
        lexicon=tokens.load_lexicon(config.tokens.kind, folder),
        starts=network.starts,
        classes=network.classes,
        step=step,
        best_layer=summary.get("probe/best_layer"),
    )
    mesh, place = sharding.make_mesh(config_lib.Mesh()), checkpoint_folder(config, folder) / stage
    weights = trained_part(config, stage)
    with jax.set_mesh(mesh), Checkpoints(place, read_only=True) as saved:
        state, _ = saved.restore(step, {weights: sharding.abstract(network.init)})
    return Model(described, state[weights], mesh)
