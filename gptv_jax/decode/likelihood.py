"""How likely a network finds an image, token by token or spread over its pixels."""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.train import objective


def nats(
    network: Network,
    params: dict,
    tokens: Int[np.ndarray, "B T"],
    labels: Int[np.ndarray, "B"] | None = None,
) -> Float[np.ndarray, "B T"]:
    """Float32 negative log-probability of every token given those before it, in nats.

    Call it under the mesh of `params`; every process gets all.

    Args:
      network: predicts one token after the other.
      params: its weights.
      tokens: the same in every process.
      labels: class of each sequence; None: none is told.
    """
    variant = variants(network, labels, len(tokens))
    found = _nats(network, params, sharding.filled(tokens), sharding.filled(variant))
    return multihost_utils.process_allgather(found, tiled=True)[: len(tokens)]


def variants(
    network: Network, labels: Int[np.ndarray, "B"] | None, rows: int
) -> Int[np.ndarray, "B"]:
    """Start vectors of these classes, or of none."""
    return np.full(rows, network.unconditional, np.int32) if labels is None else labels


@functools.partial(jax.jit, static_argnums=0)
def _nats(network: Network, params: dict, tokens: jax.Array, variant: jax.Array) -> jax.Array:
    model, targets = network.bind(params), jax.sharding.reshard(tokens, sharding.HIDDEN)
    return objective.token_nats(model, model(tokens, variant), targets)


def by_pixel(
    nats: Float[np.ndarray, "B T"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[np.ndarray, "B H W"]:
    """The nats of each token spread evenly over its pixels, so that sums stay as they are.

    Args:
      nats: of tokens in raster order.
      grid: their rows and columns.
      size: height and width of the image in pixels.
    """
    height, width = (pixels // tokens for pixels, tokens in zip(size, grid, strict=True))
    spread = (nats / (height * width)).reshape(-1, *grid)
    return spread.repeat(height, axis=1).repeat(width, axis=2)
