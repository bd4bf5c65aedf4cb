"""What images are compared by: feature vectors, from nothing, from a network, from a function."""

import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax import api, files
from gptv_jax.errors import InputError
from gptv_jax.quality.inception import MARK, Inception
from gptv_jax.weights import native

PIXELS = "pixels"
CELLS = 8  # that pixel features have along height and width, where the image has as many pixels

Shape = tuple[int, int, int]  # of an image: H, W, C
Values = tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"] | None]


@runtime_checkable
class Features(Protocol):
    """Numbers are comparable where `name` and `hash` of the features are the same.

    Called with images, uint8 [B, H, W, C] in the data set's own range, it gives float32 features
    [B, D] and, where it classifies, float32 class probabilities [B, C], else None.
    """

    name: str  # what they are
    hash: str  # of the weights; where there are none, a word for that
    size: int  # D
    of_pictures: bool  # whether it expects images as people see them, 0 .. 255

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Values:
        """Features and probabilities, or None."""


class FromFunction:
    """Whatever a function gives."""

    of_pictures = False

    def __init__(self, function: Callable, name: str, hash: str, size: int):
        """Says what the function is.

        Args:
          function: from uint8 images [B, H, W, C] to features [B, D], or to a pair of them and
            class probabilities [B, C]; arrays of NumPy or JAX.
          name: what another function has not.
          hash: what other weights have not.
          size: D.
        """
        self._function, self.name, self.hash, self.size = function, name, hash, size

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Values:
        """See `Features`.

        Raises:
          ValueError: the function gave other shapes.
        """
        given = self._function(images)
        features, probabilities = given if isinstance(given, tuple) else (given, None)
        features = np.asarray(features, np.float32)
        if features.shape != (len(images), self.size):
            raise ValueError(
                f"the features {self.name} gave {list(features.shape)} for {len(images)} images; "
                f"they must give [{len(images)}, {self.size}]."
            )
        return features, None if probabilities is None else np.asarray(probabilities, np.float32)


class Pixels:
    """The pixels themselves, averaged over 8 x 8 equal areas: colour and layout, no detail."""

    hash = "no weights"
    of_pictures = False

    def __init__(self, image_shape: Shape):
        """Of images of that shape; a side of fewer than 8 pixels stays as it is."""
        height, width, channels = image_shape
        self._rows, self._columns = _areas(height), _areas(width)
        cells = (len(self._rows), len(self._columns), channels)
        self.size = int(np.prod(cells))
        self.name = "pixels {}x{}x{} of {}x{}".format(*cells, height, width)

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Values:
        """See `Features`."""
        rows, columns = self._rows, self._columns
        cells = np.einsum("ih,bhwc,jw->bijc", rows, images, columns, optimize=True)
        return cells.reshape(len(images), -1).astype(np.float32), None


class FromModel:
    """One layer of a network of this project, mean over positions; probabilities by its head.

    The layer is the one that the probe chose or, where it has not run, the middle one.
    """

    of_pictures = False

    def __init__(self, model: api.Model):
        """Of a loaded model."""
        weights_file = model.weights_file()
        layers, chosen = weights_file.model.layers, weights_file.best_layer
        self._model, self._layer = model, layers // 2 if chosen is None else chosen
        self.size = weights_file.model.width
        self.name = f"gptv_jax, layer {self._layer} of {layers}"
        self.hash = files.hash_arrays(native.arrays(weights_file))

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Values:
        """See `Features`."""
        classifies = self._model.network.classes > 0
        features = self._model.features(images, self._layer)
        return features, self._model.classify(images) if classifies else None


def make_features(spec: str | None, image_shape: Shape) -> Features:
    """The features that a configuration names.

    Args:
      spec: None or "pixels"; a run folder or a file or folder of weights that `gptv_jax.load`
        takes; or a .safetensors file of Inception's weights (docs/generation_quality.md).
      image_shape: of the images, H, W, C.

    Raises:
      InputError: none of these, damaged, or made for other images.
    """
    if spec in (None, PIXELS):
        return Pixels(image_shape)
    if _is_inception(pathlib.Path(spec)):
        if image_shape[-1] not in (1, 3):
            raise InputError(
                f"{spec} takes RGB or grey images, but these have {image_shape[-1]} channels; name "
                "other features."
            )
        return Inception(spec)
    if not pathlib.Path(spec).exists():
        raise InputError(
            f"features are {spec!r}, and there is nothing of that name; name pixels, a run folder, "
            "or a .safetensors file of this project's or Inception's weights."
        )
    model = api.load(spec)
    if model.codec.image_shape != tuple(image_shape):
        theirs, ours = ("x".join(map(str, s)) for s in (model.codec.image_shape, image_shape))
        raise InputError(
            f"the features' model {spec} takes images of {theirs}, but these are of {ours}; name "
            "another model, or pixels."
        )
    return FromModel(model)


def _is_inception(path: pathlib.Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with files.open_safetensors(path) as file:
        return any(name.startswith(MARK) for name in file.keys())  # noqa: SIM118 - no mapping


def _areas(pixels: int) -> Float[np.ndarray, "cells pixels"]:
    """The share that each pixel of a row has in each of the cells, which are equally long."""
    cells = min(CELLS, pixels)
    edges = np.arange(cells + 1) * pixels / cells
    first, last = edges[:-1, None], edges[1:, None]
    left = np.arange(pixels)[None]
    covered = np.minimum(last, left + 1) - np.maximum(first, left)
    return (covered.clip(0) * cells / pixels).astype(np.float32)
