"""How likely a network finds an image, token by token or spread over the pixels."""

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
    """Float32 negative log-probability of every token given the tokens before it, in nats.

    For networks with the objective "autoregressive", under the mesh of `params`; every process
    gives and gets the whole batch. Without `labels` the network is told no class.
    """
    variant = sharding.shard_rows(start_vectors(network, labels, len(tokens)))
    found = _nats(network, params, sharding.shard_rows(tokens), variant)
    return multihost_utils.process_allgather(found, tiled=True)[: len(tokens)]


def start_vectors(
    network: Network, labels: Int[np.ndarray, "B"] | None, rows: int
) -> Int[np.ndarray, "B"]:
    """Number of the start vector of each row: the class, or the vector that tells no class."""
    return np.full(rows, network.unconditional, np.int32) if labels is None else labels


@functools.partial(jax.jit, static_argnums=0)
def _nats(network: Network, params: dict, tokens: jax.Array, variant: jax.Array) -> jax.Array:
    model, targets = network.bind(params), jax.sharding.reshard(tokens, sharding.HIDDEN)
    return objective.token_nats(model, model(tokens, variant), targets)


def by_pixel(
    nats: Float[np.ndarray, "B T"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[np.ndarray, "B H W"]:
    """The nats of each token spread evenly over the token's pixels; sums over an image stay.

    `grid` is rows and columns of tokens, `size` height and width of the image in pixels.
    """
    height, width = (pixels // tokens for pixels, tokens in zip(size, grid, strict=True))
    spread = (nats / (height * width)).reshape(-1, *grid)
    return spread.repeat(height, axis=1).repeat(width, axis=2)
