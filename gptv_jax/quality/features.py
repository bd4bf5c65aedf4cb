"""Feature extractors: of averaged pixels, of a network of this project, of any function."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax import api, files, weights
from gptv_jax.errors import InputError
from gptv_jax.quality import inception
from gptv_jax.weights import native

PIXELS = "pixels"
CELLS = 8  # number of areas that `pixels` averages along height and along width

Shape = tuple[int, int, int]  # H, W, C of an image
Extracted = tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"] | None]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """Turns uint8 images into float32 features [B, D] and class probabilities [B, C] or None.

    Numbers can be compared only where `name` and `hash` of the extractors are equal.
    """

    # Maps uint8 images [B, H, W, C] to features [B, D], or to a pair of features and class
    # probabilities [B, C], as NumPy or JAX arrays.
    function: Callable
    name: str  # a name that no other function has
    hash: str  # a text that no other weights of the function have
    size: int  # D
    # Expects images as people see them (0 to 255), not in the data set's range.
    of_pictures: bool = False

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Extracted:
        """Raises ValueError where the function returns features of another shape than [B, D]."""
        returned = self.function(images)
        features, probabilities = returned if isinstance(returned, tuple) else (returned, None)
        features = np.asarray(features, np.float32)
        if features.shape != (len(images), self.size):
            raise ValueError(
                f"the function {self.name} returned features {list(features.shape)} for "
                f"{len(images)} images; it must return [{len(images)}, {self.size}]."
            )
        return features, None if probabilities is None else np.asarray(probabilities, np.float32)


def pixels(image_shape: Shape) -> FeatureExtractor:
    """Pixels averaged over 8 x 8 equal areas: colour and layout, no detail.

    A side of fewer than 8 pixels is not averaged.
    """
    (height, width), (rows, columns) = image_shape[:2], map(_areas, image_shape[:2])
    cells = (len(rows), len(columns), image_shape[-1])

    def average(images: UInt8[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B D"]:
        averaged = np.einsum("ih,bhwc,jw->bijc", rows, images, columns, optimize=True)
        return averaged.reshape(len(images), -1)

    name = "pixels {}x{}x{} of {}x{}".format(*cells, height, width)
    return FeatureExtractor(average, name, "no weights", math.prod(cells))


def _areas(side: int) -> Float[np.ndarray, "cells side"]:
    """Weight of each pixel of a row in each of `CELLS` equally long cells."""
    cells = min(CELLS, side)
    edges = np.arange(cells + 1) * side / cells
    first, last = edges[:-1, None], edges[1:, None]
    left = np.arange(side)[None]
    covered = np.minimum(last, left + 1) - np.maximum(first, left)
    return (covered.clip(0) * cells / side).astype(np.float32)


def _of_model(model: api.Model) -> FeatureExtractor:
    """One layer of a `Model`, the mean over positions, and the class probabilities.

    The layer is the probe's best layer or, where the probe has not run, the middle layer.
    """
    weights_file, classifies = model.weights_file(), model.network.classes > 0
    layers, best = weights_file.model.layers, weights_file.best_layer
    layer = layers // 2 if best is None else best

    def read(images: UInt8[np.ndarray, "B H W C"]) -> Extracted:
        return model.features(images, layer), model.classify(images) if classifies else None

    name, arrays = f"gptv_jax, layer {layer} of {layers}", native.arrays(weights_file)
    return FeatureExtractor(read, name, files.hash_arrays(arrays), weights_file.model.width)


def make_features(spec: str | None, image_shape: Shape) -> FeatureExtractor:
    """The extractor that `config.generate.features` names, for images of [H, W, C].

    `spec` is None or "pixels"; a run folder, or a file or folder of weights that `gptv_jax.load`
    takes; or a .safetensors file of Inception's weights (docs/generation_quality.md). Raises
    InputError where `spec` is something else, is damaged, or takes images of another shape.
    """
    if spec in (None, PIXELS):
        return pixels(image_shape)
    kinds = "a run folder, or a .safetensors file of this project's or Inception's weights"
    missing = f"features are {spec!r}, but there is no such file or folder; name pixels, {kinds}"
    path, tensors = weights.locate(spec, missing), ()
    if path.suffix == ".safetensors" and path.is_file():
        with files.open_safetensors(path) as file:
            tensors = file.keys()
    if any(name.startswith(inception.PREFIX) for name in tensors):
        if image_shape[-1] not in (1, 3):
            problem = f"{spec} takes RGB or grey images, but these have {image_shape[-1]} channels"
            raise InputError(f"{problem}; name a run folder or pixels as config.generate.features.")
        function, hash = inception.load(path)
        return FeatureExtractor(function, inception.NAME, hash, inception.WIDTH, of_pictures=True)
    model = api.load(spec)
    if model.codec.image_shape != tuple(image_shape):
        theirs, ours = ("x".join(map(str, s)) for s in (model.codec.image_shape, image_shape))
        problem = f"the model {spec} takes images of {theirs}, but these are of {ours}"
        raise InputError(f"{problem}; name another model, or pixels, as config.generate.features.")
    return _of_model(model)
