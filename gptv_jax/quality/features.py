"""Feature extractors: of averaged pixels, of a network of this project, of any function.

The features of a clip are the features of its frames, side by side in the order of time.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax import api, files, sharding, weights
from gptv_jax.api.forward import network_output
from gptv_jax.errors import InputError
from gptv_jax.quality import i3d, inception
from gptv_jax.weights import native

PIXELS = "pixels"
CELLS = 8  # number of areas that `pixels` averages along height and along width
FRAME_CELLS = 4  # the same of the frames of clips, of which there are many
MOST = 2048  # features of a clip's frames together, as many as Inception's of an image

Shape = tuple[int, ...]  # (F,) H, W, C of an image, or of a clip of F frames
Extracted = tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"] | None]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """Turns uint8 images, or clips, into float32 features [B, D] and class probabilities or None.

    Numbers can be compared only where `name` and `hash` of the extractors are equal.
    """

    # Maps uint8 images [B, (F,) H, W, C] to features [B, D], or to a pair of features and class
    # probabilities [B, C], as NumPy or JAX arrays.
    function: Callable
    name: str  # a name that no other function has
    hash: str  # a text that no other weights of the function have
    size: int  # D
    # Expects images as people see them (0 to 255), not in the data set's range.
    of_pictures: bool = False

    def __call__(self, images: UInt8[np.ndarray, "B *F H W C"]) -> Extracted:
        """Features [B, D] and class probabilities [B, classes] or None.

        Raises ValueError where the function returns features of another shape than [B, D].
        """
        returned = self.function(images)
        features, probabilities = returned if isinstance(returned, tuple) else (returned, None)
        features = np.asarray(features, np.float32)
        if features.shape != (len(images), self.size):
            raise ValueError(
                f"the function {self.name} returned features {list(features.shape)} for "
                f"{len(images)} images; it must return [{len(images)}, {self.size}]."
            )
        return features, None if probabilities is None else np.asarray(probabilities, np.float32)


def pixels(image_shape: Shape, cells: int = CELLS) -> FeatureExtractor:
    """Pixels averaged over `cells` x `cells` equal areas: colour and layout, no detail.

    A side of fewer pixels than `cells` is not averaged.
    """
    height, width = image_shape[:2]
    rows, columns = (_areas(side, min(cells, side)) for side in (height, width))
    cells = (len(rows), len(columns), image_shape[-1])

    def average(images: UInt8[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B D"]:
        averaged = np.einsum("ih,bhwc,jw->bijc", rows, images, columns, optimize=True)
        return averaged.reshape(len(images), -1)

    name = "pixels {}x{}x{} of {}x{}".format(*cells, height, width)
    return FeatureExtractor(average, name, "no weights", math.prod(cells))


def _areas(side: int, cells: int) -> Float[np.ndarray, "cells side"]:
    """Weight of each pixel of a row in each of `cells` equally long cells."""
    edges = np.arange(cells + 1) * side / cells
    first, last = edges[:-1, None], edges[1:, None]
    left = np.arange(side)[None]
    covered = np.minimum(last, left + 1) - np.maximum(first, left)
    return (covered.clip(0) * cells / side).astype(np.float32)


def of_frames(extractor: FeatureExtractor, clip_shape: Shape) -> FeatureExtractor:
    """The features of each frame of clips, in order, by an extractor of images; see `_of_clips`."""
    frames = clip_shape[0]

    def read(clips: UInt8[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B F D"]:
        features, _ = extractor(clips.reshape(-1, *clips.shape[2:]))
        return features.reshape(len(clips), frames, -1)

    return _of_clips(read, extractor, clip_shape, frames)


def _of_clips(
    read: Callable, of_one: FeatureExtractor, clip_shape: Shape, times: int
) -> FeatureExtractor:
    """The features [B, times, D] that `read` makes of clips, and averaged changes of pixels.

    The changes are absolute differences between neighbouring frames, averaged over 4 x 4 areas;
    they need no weights, and see clips that stand still or jump. Where a clip has more than `MOST`
    features that way, those of each time are mapped to fewer at random, which keeps
    distances nearly (Johnson and Lindenstrauss 1984), always by the same matrix. `of_one` has the
    name, the hash and the number D of the features of one time.
    """
    frames, shape = clip_shape[0], clip_shape[1:]
    changes, kept = pixels(shape, FRAME_CELLS), min(of_one.size, MOST // times)
    rng = np.random.default_rng(0)
    matrix = None
    if kept < of_one.size:
        matrix = rng.normal(scale=kept**-0.5, size=(of_one.size, kept)).astype(np.float32)

    def features(clips: UInt8[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B N"]:
        found = read(clips)
        found = found if matrix is None else found @ matrix
        moved = np.abs(np.diff(clips.astype(np.int16), axis=1)).astype(np.uint8)
        moved, _ = changes(moved.reshape(-1, *shape))
        flat = (each.reshape(len(clips), -1) for each in (found, moved))
        return np.concatenate(list(flat), axis=1)

    mapped = "" if matrix is None else f", mapped to {kept}"
    name = f"{of_one.name}{mapped}, of {frames} frames, and changes of {changes.name}"
    size = times * kept + (frames - 1) * changes.size
    return dataclasses.replace(of_one, function=features, name=name, size=size)


def _of_model(model: api.Model) -> FeatureExtractor:
    """One layer of a `Model`, the mean over positions, and the class probabilities.

    Of a model of clips: the mean over the positions of each frame, see `_of_clips`.

    The layer is the probe's best layer or, where the probe has not run, the middle layer.
    """
    weights_file, classifies = model.weights_file(), model.network.classes > 0
    layers, best = weights_file.model.layers, weights_file.best_layer
    layer = layers // 2 if best is None else best

    def read(images: UInt8[np.ndarray, "B *F H W C"]) -> Extracted:
        return model.features(images, layer), model.classify(images) if classifies else None

    def read_frames(clips: UInt8[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B F D"]:
        network = dataclasses.replace(model.network, classes=0, pool=model.network.frames)
        params = {name: each for name, each in model.params.items() if name != "classifier"}
        with jax.set_mesh(model.mesh):
            batch = {"tokens": sharding.shard_rows(model.tokenize(clips))}
            found = np.asarray(network_output(network, params, batch, None, "pooled"))
        return found[: len(clips), layer].reshape(len(clips), network.frames, -1)

    name, arrays = f"gptv_jax, layer {layer} of {layers}", native.arrays(weights_file)
    made = FeatureExtractor(read, name, files.hash_arrays(arrays), weights_file.model.width)
    if model.network.frames:
        return _of_clips(read_frames, made, model.codec.image_shape, model.network.frames)
    return made


def make_features(
    spec: str | None, image_shape: Shape, i3d_resize: str = "tensorflow"
) -> FeatureExtractor:
    """The extractor that `config.generate.features` names, for images [H, W, C] or clips.

    `spec` is None or "pixels"; a run folder, or a file or folder of weights that `gptv_jax.load`
    takes; or a .safetensors file of Inception's weights, or for clips of I3D's, which resizes
    frames by `i3d_resize` (docs/generation_quality.md). Raises InputError where `spec` is something
    else, is damaged, or takes images of another shape. Extractors of images read the frames of
    clips one by one, see `of_frames`.
    """
    of_clips, one = len(image_shape) == 4, tuple(image_shape[-3:])
    if spec in (None, PIXELS):
        return of_frames(pixels(one, FRAME_CELLS), image_shape) if of_clips else pixels(one)
    kinds = "a run folder, or a .safetensors file of this project's, Inception's or I3D's weights"
    missing = f"features are {spec!r}, but there is no such file or folder; name pixels, {kinds}"
    path, tensors = weights.locate(spec, missing), ()
    if path.suffix == ".safetensors" and path.is_file():
        with files.open_safetensors(path) as file:
            tensors = file.keys()
    of_i3d = any(name.startswith(i3d.FIRST) for name in tensors)
    if of_i3d or any(name.startswith(inception.PREFIX) for name in tensors):
        if image_shape[-1] not in (1, 3):
            problem = f"{spec} takes RGB or grey images, but these have {image_shape[-1]} channels"
            raise InputError(f"{problem}; name a run folder or pixels as config.generate.features.")
        if of_i3d:
            return _of_i3d(path, image_shape[0] if of_clips else 1, i3d_resize)
        function, hash = inception.load(path)
        made = FeatureExtractor(function, inception.NAME, hash, inception.WIDTH, of_pictures=True)
        return of_frames(made, (*image_shape[:-1], 3)) if of_clips else made
    model = api.load(spec)
    if of_clips and model.codec.image_shape == one:
        return of_frames(_of_model(model), image_shape)
    if model.codec.image_shape != tuple(image_shape):
        theirs, ours = ("x".join(map(str, s)) for s in (model.codec.image_shape, image_shape))
        problem = f"the model {spec} takes images of {theirs}, but these are of {ours}"
        raise InputError(f"{problem}; name another model, or pixels, as config.generate.features.")
    return _of_model(model)


def _of_i3d(path: pathlib.Path, frames: int, resize: str) -> FeatureExtractor:
    """I3D's mean logits of clips of so many frames; InputError where there are too few."""
    if frames < i3d.FRAMES:
        problem = (
            f"I3D ({path}) takes clips of {i3d.FRAMES} frames or more, and these have {frames}"
        )
        raise InputError(f"{problem}; take config.data.frames=16, or other features.")
    function, hash = i3d.load(path, resize)
    name = f"I3D, {i3d.CLASSES} mean logits of {frames} frames, resized: {resize}"
    return FeatureExtractor(function, name, hash, i3d.CLASSES, of_pictures=True)
