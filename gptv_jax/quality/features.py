"""Feature extractors: of averaged pixels, of a network of this project, of any function."""

import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax import api, files
from gptv_jax.errors import InputError
from gptv_jax.quality.inception import PREFIX, Inception
from gptv_jax.weights import native

PIXELS = "pixels"
CELLS = 8  # number of areas that `Pixels` averages along height and along width

Shape = tuple[int, int, int]  # H, W, C of an image
Extracted = tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"] | None]


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns uint8 images into float32 features [B, D] and class probabilities [B, C] or None.

    Numbers can be compared only where `name` and `hash` of the extractors are equal.
    """

    name: str
    hash: str  # of the weights; a fixed text for an extractor without weights
    size: int  # D
    of_pictures: bool  # expects images as people see them (0 to 255), not in the data set's range

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Extracted: ...


class FromFunction:
    """An extractor that calls a function."""

    of_pictures = False

    def __init__(self, function: Callable, name: str, hash: str, size: int):
        """Wraps the function.

        Args:
          function: maps uint8 images [B, H, W, C] to features [B, D], or to a pair of features and
            class probabilities [B, C], as NumPy or JAX arrays.
          name: a name that no other function has.
          hash: a text that no other weights of the function have.
          size: D.
        """
        self._function, self.name, self.hash, self.size = function, name, hash, size

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Extracted:
        """Raises ValueError where the function returns features of another shape than [B, D]."""
        returned = self._function(images)
        features, probabilities = returned if isinstance(returned, tuple) else (returned, None)
        features = np.asarray(features, np.float32)
        if features.shape != (len(images), self.size):
            raise ValueError(
                f"the function {self.name} returned features {list(features.shape)} for "
                f"{len(images)} images; it must return [{len(images)}, {self.size}]."
            )
        return features, None if probabilities is None else np.asarray(probabilities, np.float32)


class Pixels:
    """An extractor that averages pixels over 8 x 8 equal areas: colour and layout, no detail."""

    hash = "no weights"
    of_pictures = False

    def __init__(self, image_shape: Shape):
        """Takes images of that shape; a side of fewer than 8 pixels is not averaged."""
        height, width, channels = image_shape
        self._rows, self._columns = _areas(height), _areas(width)
        cells = (len(self._rows), len(self._columns), channels)
        self.size = int(np.prod(cells))
        self.name = "pixels {}x{}x{} of {}x{}".format(*cells, height, width)

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Extracted:
        rows, columns = self._rows, self._columns
        cells = np.einsum("ih,bhwc,jw->bijc", rows, images, columns, optimize=True)
        return cells.reshape(len(images), -1).astype(np.float32), None


class FromModel:
    """An extractor of one layer of a `Model`: the mean over positions, and the class head.

    The layer is the probe's best layer or, where the probe has not run, the middle layer.
    """

    of_pictures = False

    def __init__(self, model: api.Model):
        weights_file = model.weights_file()
        layers, best = weights_file.model.layers, weights_file.best_layer
        self._model, self._layer = model, layers // 2 if best is None else best
        self.size = weights_file.model.width
        self.name = f"gptv_jax, layer {self._layer} of {layers}"
        self.hash = files.hash_arrays(native.arrays(weights_file))

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Extracted:
        classifies = self._model.network.classes > 0
        features = self._model.features(images, self._layer)
        return features, self._model.classify(images) if classifies else None


def make_features(spec: str | None, image_shape: Shape) -> FeatureExtractor:
    """The extractor that `config.generate.features` names.

    Args:
      spec: None or "pixels"; a run folder, or a file or folder of weights that `gptv_jax.load`
        takes; or a .safetensors file of Inception's weights (docs/generation_quality.md).
      image_shape: H, W, C of the images.

    Raises:
      InputError: `spec` is none of these, is damaged, or takes images of another shape.
    """
    if spec in (None, PIXELS):
        return Pixels(image_shape)
    if _is_inception(pathlib.Path(spec)):
        if image_shape[-1] not in (1, 3):
            raise InputError(
                f"{spec} takes RGB or grey images, but these have {image_shape[-1]} channels; name "
                "a run folder or pixels as config.generate.features."
            )
        return Inception(spec)
    if not pathlib.Path(spec).exists():
        raise InputError(
            f"features are {spec!r}, but there is no such file or folder; name pixels, a run "
            "folder, or a .safetensors file of this project's or Inception's weights."
        )
    model = api.load(spec)
    if model.codec.image_shape != tuple(image_shape):
        theirs, ours = ("x".join(map(str, s)) for s in (model.codec.image_shape, image_shape))
        raise InputError(
            f"the model {spec} takes images of {theirs}, but these are of {ours}; name another "
            "model, or pixels, as config.generate.features."
        )
    return FromModel(model)


def _is_inception(path: pathlib.Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with files.open_safetensors(path) as file:
        return any(name.startswith(PREFIX) for name in file.keys())  # noqa: SIM118 - no mapping


def _areas(pixels: int) -> Float[np.ndarray, "cells pixels"]:
    """Weight of each pixel of a row in each of `CELLS` equally long cells."""
    cells = min(CELLS, pixels)
    edges = np.arange(cells + 1) * pixels / cells
    first, last = edges[:-1, None], edges[1:, None]
    left = np.arange(pixels)[None]
    covered = np.minimum(last, left + 1) - np.maximum(first, left)
    return (covered.clip(0) * cells / pixels).astype(np.float32)
