"""Cached attention: a prompt read at once, then one position at a time.

What decoding waits for is memory: every token reads all weights and all of the cache. So each layer
has arrays of its own, which nothing slices out of a stack: the weights in the compute dtype and
gathered once, keys and values as [B, H, S, K], which is how a product of one query reads them. A
prompt lies apart, once for all samples that continue it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptv_jax import sharding
from gptv_jax.model import attention, layers
from gptv_jax.model.gpt import GPT
from gptv_jax.model.splash_attention import LANES

SPEC = P(sharding.BATCH, "tensor")  # of keys and values


class Pair(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "B H S K"]
    values: Float[Array, "B H S K"]


class Cache(NamedTuple):
    """All layers' keys and values."""

    prompts: tuple[
        Pair, ...
    ]  # of G prompts; each is continued by B / G samples, next to each other
    own: tuple[Pair, ...]  # of the B samples' positions after the prompt; room for S of them


def weights(model: GPT, params: dict) -> tuple[GPT, list[layers.Block]]:
    """A model to decode with: weights in the compute dtype, gathered over fsdp; and its layers.

    Args:
      model: bound to `params`; gives the dtype.
      params: as `Network.init` makes them.
    """
    dtype = model.network.config.dtype
    model = model.network.bind(jax.tree.map(lambda leaf: sharding.gather(leaf, dtype), params))
    count = model.network.config.layers
    return model, [jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(count)]


def read(model: GPT, x: Float[Array, "G P D"]) -> tuple[Float[Array, "G V"], tuple[Pair, ...]]:
    """Reads whole prompts.

    Args:
      model: with any weights.
      x: embedded inputs of positions 0 .. P-1.

    Returns:
      Logits of the last position, and keys and values of every layer.
    """
    length = x.shape[1]
    if length > LANES:  # to what the fast forms of attention take; nothing sees what is later
        x = jnp.pad(x, ((0, 0), (0, -length % LANES), (0, 0)))

    rotation = model.rotation(0, x.shape[1])

    def layer(x, block):
        kept = None

        def attend(q, k, v):
            nonlocal kept
            kept = Pair(*(jnp.swapaxes(part[:, :length], 1, 2) for part in (k, v)))
            return attention.causal_attention(q, k, v)

        x, _ = block(x, attend, rotation=rotation)
        return x, kept

    x, stacked = model.walk(layer, x, model.blocks)
    pairs = [jax.tree.map(lambda part, i=i: part[i], stacked) for i in range(len(stacked.keys))]
    return model.predict(x[:, length - 1 : length]), tuple(pairs)


def extend(
    model: GPT,
    blocks: list[layers.Block],
    x: Float[Array, "B 1 D"],
    cache: Cache,
    count: Int[Array, ""],
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more position of every sample.

    Args:
      model: of `weights`.
      blocks: of `weights`.
      x: embedded inputs of that position.
      cache: of the prompts and of `count` more positions; has room for another.
      count: positions of the samples' own in the cache.

    Returns:
      Logits of the position, and the cache with its keys and values.
    """
    own, rotation = [], model.rotation(cache.prompts[0].keys.shape[2] + count, 1)
    for block, prompt, pair in zip(blocks, cache.prompts, cache.own, strict=True):

        def attend(q, k, v, prompt=prompt, pair=pair):
            q, new = jnp.swapaxes(q, 1, 2), Pair(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
            at = (0, 0, count, 0)
            pair = Pair(
                *(jax.lax.dynamic_update_slice(*z, at) for z in zip(pair, new, strict=True))
            )
            own.append(pair)
            return jnp.swapaxes(_attend(q, prompt, pair, count), 1, 2)

        x, _ = block(x, attend, rotation=rotation)
    return model.predict(x), Cache(cache.prompts, tuple(own))


def _attend(q: Float[Array, "B H 1 K"], prompt: Pair, own: Pair, last: Int[Array, ""]):
    """One query's attention to its prompt and to its own positions up to `last`."""
    B, H, _, K = q.shape
    G, length = prompt.keys.shape[0], prompt.keys.shape[2]
    # The samples of a prompt are as many queries to the same keys.
    shared = jnp.swapaxes(
        q.reshape(G, B // G, H, K, out_sharding=P(*SPEC[:1], None, "tensor")), 1, 2
    )
    accumulator = {"preferred_element_type": layers.accumulator(q)}
    of_prompt = jnp.einsum("ghnk,ghpk->ghnp", shared, prompt.keys, **accumulator)
    of_own = jnp.einsum("bhqk,bhsk->bhqs", q, own.keys, **accumulator)
    seen = jnp.arange(own.keys.shape[2]) <= last
    of_own = jnp.where(seen[None, None, None], of_own, -jnp.inf)
    scores = jnp.concatenate([_by_sample(of_prompt), of_own], axis=-1) / math.sqrt(K)
    p = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    to_prompt = p[..., :length].reshape(
        G, B // G, H, length, out_sharding=P(*SPEC[:1], None, "tensor")
    )
    mixed = jnp.einsum("ghnp,ghpk->ghnk", jnp.swapaxes(to_prompt, 1, 2), prompt.values)
    return _by_sample(mixed) + jnp.einsum("bhqs,bhsk->bhqk", p[..., length:], own.values)


def _by_sample(x: Float[Array, "G H N Z"]) -> Float[Array, "B H 1 Z"]:
    """Samples of one prompt as rows of their own."""
    G, H, N, Z = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(G * N, H, 1, Z, out_sharding=SPEC)


def empty(model: GPT, samples: int, room: int) -> tuple[Pair, ...]:
    """Room for that many positions of that many samples' own."""
    c = model.network.config
    shape = (samples, c.heads, room, c.width // c.heads)
    zeros = [jnp.zeros(shape, c.dtype, out_sharding=SPEC) for _ in range(2 * c.layers)]
    return tuple(Pair(*pair) for pair in zip(zeros[::2], zeros[1::2], strict=True))


def grown(own: tuple[Pair, ...], room: int) -> tuple[Pair, ...]:
    """The same with room for more positions."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0)))

    return jax.tree.map(pad, own)
