"""A head that reads the classes of the image's cells from the positions that hold the image."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gptv_jax import sharding
from gptv_jax.model import layers


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
        self, features: Float[Array, "B N F"], grid: tuple[int, int]
    ) -> Float[Array, "B h w C"]:
        """Float32 logits of every cell, given the features of the positions of a grid."""
        (rows, columns), p, C = grid, self.reading.cells, self.reading.classes
        dtype = layers.accumulator(features)
        weight = sharding.gather(self.head[...], features.dtype)
        x = jnp.einsum("bnf,of->bno", features, weight, preferred_element_type=dtype)
        x = x + self.bias[...].astype(dtype)[None, None]
        spec = sharding.BATCH_FIRST
        x = x.reshape(len(x), rows, columns, p, p, C, out_sharding=spec).swapaxes(2, 3)
        return x.reshape(len(x), rows * p, columns * p, C, out_sharding=spec)


def enlarge(logits: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """The logits at `size` pixels, interpolated bilinearly between the centers of the cells."""
    if logits.shape[1:3] == size:
        return logits
    rows, columns = (
        jnp.array(_interpolation(*pair), logits.dtype)
        for pair in zip(logits.shape[1:3], size, strict=True)
    )
    return jnp.einsum("yh,bhwc,xw->byxc", rows, logits, columns)


def _interpolation(cells: int, pixels: int) -> Float[np.ndarray, "pixels cells"]:
    """Weights of the cells in every pixel along one axis; pixels at the border repeat a cell."""
    at = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0)
