"""What a Python user calls: trained networks, with NumPy arrays in and NumPy arrays out."""

import dataclasses
import functools
import pathlib

import jax

from gptv_jax import config as config_lib
from gptv_jax import files, sharding, validation, weights
from gptv_jax.api.model import AnyPath, Model
from gptv_jax.config.data import ImageSize, Limits
from gptv_jax.data.images import load_image
from gptv_jax.errors import InputError, shorten
from gptv_jax.runs import record
from gptv_jax.tokens import LearnedCodec, Palette, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights import huggingface, native
from gptv_jax.weights.native import WeightsFile

__all__ = [
    "Limits", "Model", "from_huggingface", "from_openai", "load", "load_image", "load_tokenizer",
    "to_huggingface",
]  # fmt: skip


def load(source: AnyPath, stage: str | None = None, palette: AnyPath | None = None) -> Model:
    """The model in a run folder, in a file or folder of weights, or on the Hugging Face Hub.

    Args:
      source: the `--workdir` of a run; a .safetensors file of `Model.save`; what `from_huggingface`
        and `from_openai` take; or "hf://user/model", which is downloaded (needs the `hub` extra).
      stage: "pretrain" or "finetune" of a run; None: the latest of the two that has finished, but
        images are drawn with the pretrained weights. Fine-tuning makes the weights draw worse
        images, or none. Where neither has finished, it is the model that the run's `init_from`
        names.
      palette: kmeans_centers.npy, for weights that come without the colours of their tokens.

    Raises:
      ValueError: there is no such run or file, the stage has not finished, or a file is damaged.
    """
    path, mesh = weights.locate(source), sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        if path.is_dir() and not weights.is_weights_path(path):
            config = record.config_of(path)
            if stage is None and config.init_from and not _trained(path):
                found = load(config.init_from, palette=config.tokens.palette)
                if measured := record.typicality(path, "pretrain", None):  # on this run's images
                    found._described = dataclasses.replace(found._described, typicality=measured)
                return found
            described, params = native.read_run(path, stage)
            pretrained = None
            if stage is None and (described.classes or described.task):  # fine-tuned weights
                pretrained = functools.partial(_read_pretrained, path, described)
            return Model(described, params, mesh, path, pretrained)
        if stage is not None:
            raise InputError(f"stage={stage} is given, but {path} is no run folder.")
        colours = None
        if palette:
            colours = palettes.load(weights.locate(palette, f"there is no palette {palette}"))
        found = weights.read(path, colours)
        return Model(dataclasses.replace(found, params={}), found.on_mesh(), mesh)


def _trained(run: pathlib.Path) -> list[str]:
    """The run's finished stages that have weights."""
    return record.stages_with_weights(files.read_json(run / "summary.json", {}))


def _read_pretrained(run: pathlib.Path, described: WeightsFile) -> tuple[WeightsFile, dict]:
    """The weights with which the fine-tuning of a run began, as `native.read_run` returns them.

    `described` are the fine-tuned weights. InputError: the weights cannot be read, or have become
    those of another network.
    """
    config = record.config_of(run)
    if not config.init_from or "pretrain" in _trained(run):
        return native.read_run(run, "pretrain")
    source = weights.locate(config.init_from)
    if weights.is_weights_path(source):
        colours = described.definition if isinstance(described.definition, Palette) else None
        found = weights.read(source, colours).headless()
        params = found.on_mesh()
    else:
        found, params = native.read_run(source, "pretrain")
    if differing := found.differing(config, described.starts):
        raise InputError(f"{source} now holds another network: {shorten(differing, '; ')}.")
    return found, params


def from_huggingface(folder: AnyPath, palette: AnyPath | None = None) -> Model:
    """An ImageGPT of `transformers`, from a folder that `save_pretrained` wrote.

    The folder has `config.json`, safetensors and, unless `palette` names a kmeans_centers.npy,
    `preprocessor_config.json`. ValueError lists the tensors that do not fit.
    """
    return load(folder, palette=palette)


def to_huggingface(model: Model, folder: AnyPath, task: str = "generation") -> None:
    """Writes a folder from which `transformers` loads the model, without this package or pickle.

    The task "generation" is for `ImageGPTForCausalImageModeling`, "classification" for
    `ImageGPTForImageClassification`. ValueError names parts of the model that ImageGPT lacks.
    """
    if task not in huggingface.ARCHITECTURES:
        raise InputError(f"task is {task!r}; it takes {' or '.join(huggingface.ARCHITECTURES)}.")
    huggingface.write(model.weights_file(), files.user_path(folder), task)


def from_openai(prefix: AnyPath, palette: AnyPath) -> Model:
    """OpenAI's Image GPT, from the TensorFlow checkpoint; needs the `prepare` extra.

    `prefix` is the path without .index, ".../model.ckpt-1000000"; `palette` names
    kmeans_centers.npy. ValueError lists the variables that do not fit.
    """
    return load(prefix, palette=palette)


def load_tokenizer(
    source: AnyPath, image_size: ImageSize | None = None, frames: int | None = None
) -> LearnedCodec:
    """A learned encoder and decoder of images or clips, without a network that reads the codes.

    `source` is a run folder whose stage `tokenizer` has finished, or a file of `Tokenizer.save`,
    here or as "hf://user/model/FILE" on the Hugging Face Hub;
    `image_size` is in pixels, one number for squares or height and width; None: the size of the
    training images. `frames` is the number of frames of a clip, for a tokenizer whose tokens
    stand for several frames: one more than a multiple of config.tokens.autoencoder.frames. 0:
    images; None: the number of frames in training. Other tokenizers take the frames of clips as
    images.
    """
    tokenizer = learned.load(weights.locate(source, f"there is no tokenizer {source}"))
    size = tokenizer.provenance.get("image_size") if image_size is None else image_size
    pair, side = isinstance(size, tuple | list) and len(size) == 2, tokenizer.config.downsample
    size = (validation.whole(n, "image_size", 1, side=side) for n in (size if pair else [size] * 2))
    span = tokenizer.config.frames
    if frames is None and span > 1:
        frames = tokenizer.provenance.get("frames")
    if frames and (span == 1 or (validation.whole(frames, "frames") - 1) % span):
        taken = f"0, or 1 more than a multiple of {span}" if span > 1 else "0"
        raise InputError(f"frames is {frames!r}; this tokenizer takes {taken}.")
    return LearnedCodec(tokenizer, tuple(size), frames or 0)
