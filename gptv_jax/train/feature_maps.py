"""Distances between features, after linear maps that are trained beside a network and then dropped.

The maps are params[MAPS] of a loss, see `beside` of `step.state_of`. Distillation has a map for
each teacher, next-embedding prediction one for the embeddings.

Next-embedding prediction (NEPA, Xu et al. 2025, arXiv:2512.16922): the output of a position names
the embedding of the token that the position predicts, which is the content of the next position's
input. The distance is 1 - cosine; no gradient reaches the embedding, or all embeddings would become
one.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from gptv_jax import sharding
from gptv_jax.model.gpt import GPT, Network, Output

MAPS = "feature_maps"
EPSILON = 1e-12  # of squared lengths of features, so that zeros have a gradient


def init(width: int, widths: Mapping[str, int], keys: Mapping[str, PRNGKeyArray]) -> dict:
    """{MAPS: a random linear map for each name, from `width` to its own of `widths`}; {} of none.

    Call it under a mesh, inside jit.
    """
    maps, spec = {}, sharding.PARAMETERS["feature_map"]
    for name, own in widths.items():
        drawn = jax.random.normal(keys[name], (width, own), out_sharding=spec)
        maps[name] = {"feature_map": width**-0.5 * drawn}
    return {MAPS: maps} if maps else {}


def apart(params: dict) -> tuple[dict, dict]:
    """The network's weights, and the maps by name."""
    network = {name: value for name, value in params.items() if name != MAPS}
    return network, {n: each["feature_map"] for n, each in params.get(MAPS, {}).items()}


def feature_distance(
    features: Float[Array, "B T D"],
    target: Float[Array, "B T E"],
    weights: Float[Array, "D E"] | None = None,
) -> Float[Array, "B T"]:
    """1 - cosine between features, after a linear map where one is given, and other features."""
    features = features.astype(jnp.float32)
    if weights is not None:
        weights = sharding.gather(weights, jnp.float32)
        features = jnp.einsum("btd,de->bte", features, weights)
    return 1 - (unit(features) * unit(target.astype(jnp.float32))).sum(axis=-1)


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPSILON)


EMBEDDING = "next_embedding"  # name of the map of next-embedding prediction


def init_embedding(network: Network, key: PRNGKeyArray) -> dict:
    """The map of next-embedding prediction, see `init`; {} where the network has none."""
    if not (network.predicts_embeddings and network.config.next_embedding_map):
        return {}
    width = network.config.width
    return init(width, {EMBEDDING: width}, {EMBEDDING: key})


@jax.named_scope("next_embedding")
def embedding_distance(
    model: GPT,
    maps: dict,
    output: Output,
    targets: Int[Array, "B T"],
    pixels: UInt8[Array, "B height width C"] | None = None,
) -> Float[Array, "B T"]:
    """1 - cosine between every position's prediction and what is read of its target.

    That is the target's embedding, or for a network with `Network.patch` its pixels, mapped.
    """
    embeddings = jax.lax.stop_gradient(model.contents(targets, pixels))
    weights = maps[EMBEDDING] if model.network.config.next_embedding_map else None
    return feature_distance(output.final, embeddings, weights)
