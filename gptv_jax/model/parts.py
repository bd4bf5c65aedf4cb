"""What a task adds to the network: parts after the image, a stem for pixels, a head for classes.

A token that names a height or width, such as a corner of a box, is embedded with the features of
this height or width. The head's weights of the token have them too: what the head learns of a place
then holds for the places beside it. A position that predicts a token of a grid over the image, such
as a label map, is given the features of the height and width of the token's cell. The positions
that hold the image are given the features of the height and width of their centers, so that
attention can compare the two. Without this, detection learns the statistics of boxes and not where
objects are (docs/architecture.md).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.autoencoder import Conv
from gptv_jax.model.layout import Part

CYCLES = 0.5, 4.0  # of the slowest and the fastest feature, from edge to edge of the image
# Initial sizes of the features of places and of embeddings: as large as what the first layers add,
# in which iGPT's 0.02 would drown.
PLACE, EMBEDDING = 0.7, 0.1
CHANNELS = 3  # of the stem's input; grey images have three equal ones
SLOPE = 0.1  # of the stem's leaky relu below zero
# Initial size of a stem's output without tokens: as large as what the first layers add to it.
SCALE = 0.7


class PartWeights(nnx.Module):
    """Embeddings, positions and head of a part; with places, the scales of their features."""

    def __init__(self, part: Part, width: int, *, rngs: nnx.Rngs):
        self.part = part
        if part.vocabulary:
            self.embedding = layers.normal(rngs, "embedding", (part.vocabulary, width), EMBEDDING)
        self.position = layers.normal(rngs, "position", (part.size, width), 0.01)
        if part.predicted:
            self.head = layers.constant("head", (part.vocabulary, width), 0.0)
            if part.bins:
                self.place_head = layers.constant("place_head", (width,), 0.0)
        if part.has_places:
            self.place = layers.constant("place", (width,), PLACE)

    def table(self, dtype: str) -> Float[Array, "V D"]:
        """The embedding of every token, with the features of the place that the token names."""
        table = sharding.gather(self.embedding[...], dtype)
        return table + scaled(self._named(), self.place, dtype) if self.part.bins else table

    def head_table(self, dtype: str) -> Float[Array, "V D"]:
        """The head's weights for every token, with the features of the place the token names."""
        table = sharding.gather(self.head[...], dtype)
        return table + scaled(self._named(), self.place_head, dtype) if self.part.bins else table

    def _named(self) -> Float[np.ndarray, "V D"]:
        """Features of the places that tokens name; 0 of the other tokens."""
        others = ((0, self.part.vocabulary - 2 * self.part.bins), (0, 0))
        return np.pad(coordinates(self.part.bins, self.position.shape[1]), others)

    def positions(self, dtype: str) -> Float[Array, "N D"]:
        """What every position of the part is given, whatever its input is."""
        table = sharding.gather(self.position[...], dtype)
        if not self.part.covers_image:
            return table
        return table + scaled(centers(self.part.shape, table.shape[1]), self.place, dtype)


def scaled(features: Float[np.ndarray, "N D"], scale: nnx.Param, dtype: str) -> Float[Array, "N D"]:
    """Features of places times their learned scale, [D]."""
    return scale[...].astype(dtype)[None] * jnp.array(features, dtype)


def coordinates(bins: int, width: int) -> Float[np.ndarray, "N D"]:
    """Features of heights, in the first half of the channels, and of widths, in the second.

    Bin k lies at k / (bins - 1) from edge to edge.
    """
    half, at = width // 2, np.arange(bins) / (bins - 1)
    heights = np.pad(waves(at, half), ((0, 0), (0, width - half)))
    return np.concatenate([heights, np.pad(waves(at, width - half), ((0, 0), (half, 0)))])


def centers(shape: tuple[int, ...], width: int) -> Float[np.ndarray, "N D"]:
    """Features of the centers of the cells of a grid, in raster order.

    Heights and widths have half of the channels each; of several frames, time, heights and widths
    have a third each.
    """
    axes = shape if shape[0] > 1 else shape[-2:]
    ends = [width * i // len(axes) for i in range(len(axes) + 1)]
    sizes, cells = np.diff(ends).tolist(), np.indices(axes).reshape(len(axes), -1)
    each = zip(axes, sizes, cells, strict=True)
    found = [waves((np.arange(n) + 0.5) / n, size)[cell] for n, size, cell in each]
    return np.concatenate(found, axis=1)


def waves(at: Float[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n count"]:
    """Sines, then cosines of `at`, which runs from 0 to 1, at frequencies that grow by a factor."""
    angles = 2 * np.pi * at[:, None] * np.geomspace(*CYCLES, -(-count // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :count].astype(np.float32)


class Halving(nnx.Module):
    """A 3x3 convolution with stride 2, a norm and a leaky relu; neighbouring windows overlap.

    The norm is over the whole image, all channels together (a group norm of one group). A norm of
    each position makes faint noise on a plain background as loud as the objects: with one,
    detection on `digit_scenes` learned boxes and no classes. Without a norm, units die at Muon's
    learning rates: on BCCD a stem of four convolutions passed on nothing of the image after 50
    steps.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.convolution = Conv("stem_conv", 3, inputs, outputs, rngs=rngs, gain=2**0.5, stride=2)

    def __call__(self, x: Float[Array, "B H W N"]) -> Float[Array, "B h w M"]:
        x = self.convolution(x)
        normed = jax.nn.standardize(x.astype(jnp.float32), axis=(1, 2, 3))
        return jax.nn.leaky_relu(normed, SLOPE).astype(x.dtype)


class Stem(nnx.Module):
    """Weights of the stem: a `Halving` for each of `widths`, and a projection to the width D.

    With `tokens` the projection begins at zero: the network begins as the one that reads tokens
    alone.
    """

    def __init__(self, widths: tuple[int, ...], width: int, tokens: bool, *, rngs: nnx.Rngs):
        pairs = zip((CHANNELS, *widths), widths, strict=False)
        self.layers = nnx.List([Halving(*pair, rngs=rngs) for pair in pairs])
        std = 0.0 if tokens else SCALE * widths[-1] ** -0.5
        self.from_stem = layers.normal(rngs, "from_stem", (widths[-1], width), std)

    def __call__(self, pixels: UInt8[Array, "B *F H W C"], dtype: str) -> Float[Array, "B N D"]:
        """Inputs of the N positions that hold the image or the clip, in raster order; C is 1 or 3.

        Each frame of a clip is an image of its own.
        """
        x = pixels.reshape(-1, *pixels.shape[-3:], out_sharding=sharding.BATCH_FIRST)
        # Each image is standardised: a dark or bright background would be most of the input.
        x = jax.nn.standardize(x.astype(jnp.float32), axis=(1, 2, 3)).astype(dtype)
        x = jnp.broadcast_to(x, (*x.shape[:3], CHANNELS))
        for layer in self.layers:
            x = layer(x)
        x = x.reshape(len(pixels), -1, x.shape[-1], out_sharding=sharding.BATCH_FIRST)
        return layers.project("bnm,md->bnd", x, self.from_stem[...], sharding.BATCH_FIRST)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Shape of a `ReadHead`; hashable."""

    classes: int  # C
    cells: int = 1  # p: each position predicts p x p cells
    # Layers whose normed features are read, 0 .. L as in `GPT.__call__`; (): the final norm alone.
    layers: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """Number of logits of a position."""
        return self.classes * self.cells**2


class ReadHead(nnx.Module):
    """A zero-initialised linear map of the features, those of several layers side by side."""

    def __init__(self, reading: Reading, width: int):
        features = width * max(len(reading.layers), 1)
        self.reading = reading
        self.head = layers.constant("head", (reading.outputs, features), 0.0)
        self.bias = layers.constant("bias", (reading.outputs,), 0.0)

    def __call__(
        self, features: Float[Array, "B N D"], grid: tuple[int, ...]
    ) -> Float[Array, "B *F h w C"]:
        """Float32 logits of every cell, given the features of the positions of a grid."""
        (*frames, rows, columns), p, C = grid, self.reading.cells, self.reading.classes
        dtype = layers.accumulator(features)
        weight = sharding.gather(self.head[...], features.dtype)
        x = jnp.einsum("bnf,of->bno", features, weight, preferred_element_type=dtype)
        x = x + self.bias[...].astype(dtype)[None, None]
        spec = sharding.BATCH_FIRST
        x = x.reshape(len(x), *frames, rows, columns, p, p, C, out_sharding=spec).swapaxes(-4, -3)
        return x.reshape(len(x), *frames, rows * p, columns * p, C, out_sharding=spec)


def enlarge(
    logits: Float[Array, "B *F h w C"], size: tuple[int, int]
) -> Float[Array, "B *F H W C"]:
    """The logits at `size` pixels, interpolated bilinearly between the centers of the cells."""
    if logits.shape[-3:-1] == size:
        return logits
    pairs = zip(logits.shape[-3:-1], size, strict=True)
    rows, columns = (jnp.array(_interpolation(*pair), logits.dtype) for pair in pairs)
    return jnp.einsum("yh,b...hwc,xw->b...yxc", rows, logits, columns)


def _interpolation(cells: int, pixels: int) -> Float[np.ndarray, "pixels cells"]:
    """Weights of the cells in every pixel along one axis; pixels at the border repeat a cell."""
    at = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0)


def soft_targets(tokens: Int[Array, "B n"], part: Part, deviation: float) -> Float[Array, "B n V"]:
    """Target distributions over a part's vocabulary; of a token that names no place, the token.

    The distribution of a token that names a height or a width is a Gaussian over all heights or
    widths, whose standard deviation is given in bins.
    """
    ids, token = jnp.arange(part.vocabulary)[None, None], tokens[..., None]
    place = (token < 2 * part.bins) & (ids < 2 * part.bins)
    place &= ids // part.bins == token // part.bins
    likely = jnp.exp(-0.5 * jnp.square((ids - token) / deviation))
    likely = jnp.where(place, likely, ids == token)
    return likely / likely.sum(axis=-1, keepdims=True)
