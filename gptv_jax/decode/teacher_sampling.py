"""Draws token ids from a teacher's distribution at every position of known images.

The N points (u + k) / N, k = 0 .. N-1, with one uniform u for a position, fall on ids by the
cumulative distribution (systematic sampling; Kitagawa 1996). The expected count of an id is N times
its probability, as for N independent draws, but a count differs from its expectation by less than
1, so the targets of a position vary much less. Every position draws another u.

u depends on the seed, the split and the number of the example alone: neither the batch nor what was
drawn before changes an image's ids, except that another batch may round the distribution otherwise.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.train import objective
from gptv_jax.train.distillation import mean_log_probabilities


class Teacher(NamedTuple):
    """A trained network that predicts the tokens of images."""

    network: Network
    params: dict


def systematic(
    probabilities: Float[Array, "*P V"], offset: Float[Array, "*P"], samples: int
) -> Int[Array, "*P N"]:
    """N ids for every distribution, in ascending order; `offset` is uniform in [0, 1).

    Float32 sums of probabilities give the expected counts to some 1e-6 of N.
    """
    vocabulary = probabilities.shape[-1]
    cumulative = jnp.cumsum(probabilities, axis=-1)
    cumulative = cumulative * (samples / cumulative[..., -1:])
    points = offset[..., None] + jnp.arange(samples, dtype=jnp.float32).reshape(
        (1,) * offset.ndim + (-1,)
    )
    # The id of a point is the number of cumulative sums that are not above the point, found by
    # bisection. The last id takes what rounding puts beyond the last sum.
    found = jnp.zeros_like(points, jnp.int32)
    for bit in reversed(range((vocabulary - 1).bit_length())):
        tried = found + 2**bit
        sums = jnp.take_along_axis(cumulative, jnp.minimum(tried, vocabulary) - 1, axis=-1)
        found = jnp.where((sums <= points) & (tried < vocabulary), tried, found)
    return found


def offsets(key: PRNGKeyArray, index: Int[Array, " B"], length: int) -> Float[Array, "B T"]:
    """The uniform number of every position of the examples with these numbers."""

    def of_example(number: Int[Array, ""]) -> Float[Array, " T"]:
        return jax.random.uniform(jax.random.fold_in(key, number), (length,))

    return jax.vmap(of_example)(index)


@functools.cache
def make_draw(networks: tuple[Network, ...], samples: int, temperature: float) -> Callable:
    """`(params of each, tokens, labels, index, key) -> ids int32 [B, T, N]`, jitted.

    Ids are drawn from the mean of the networks' distributions at every position, for the tokens
    before this position. `labels`, int32 [B] or None, are what class-conditional networks are told.
    The logits are computed in the chunks of `objective.by_chunks`.
    """
    part = networks[0].layout.parts[0]

    def draw(params, tokens, labels, index, key):
        models = [net.bind(each) for net, each in zip(networks, params, strict=True)]
        told = [labels if net.config.class_tokens else None for net in networks]
        finals = [model(tokens, each).final for model, each in zip(models, told, strict=True)]

        def of_chunk(offset, *finals):
            logits = [model.token_logits(x) for model, x in zip(models, finals, strict=True)]
            likely = jnp.exp(mean_log_probabilities(logits, temperature))
            return systematic(likely, offset, samples)

        offset = jax.sharding.reshard(offsets(key, index, part.size), sharding.HIDDEN)
        return objective.by_chunks(of_chunk, networks[0], part, (offset, *finals), len(networks))

    return jax.jit(draw)
