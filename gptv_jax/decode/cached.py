"""Attention with a key/value cache: a prompt is read at once, then one position at a time.

Memory traffic bounds decoding: every new token reads all weights and the whole cache. So weights
are cast to the compute dtype and gathered over fsdp once, every layer has arrays of its own (the
loop slices nothing from a stack of layers), and keys and values lie as [B, H, S, K], the order in
which the product with a single query reads them. The keys and values of a prompt are held once for
all samples that continue the prompt.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptv_jax import sharding
from gptv_jax.model import attention, layers
from gptv_jax.model.gpt import GPT, Network
from gptv_jax.model.splash_attention import LANES

SPEC = P(sharding.BATCH, "tensor")  # of keys and values
FIRST_CAPACITY = 64  # positions


class KeyValue(NamedTuple):
    """Keys and values of one layer; a tuple with one `KeyValue` a layer is a cache."""

    keys: Float[Array, "B H S K"]
    values: Float[Array, "B H S K"]


def decoding_weights(network: Network, params: dict) -> tuple[GPT, list[layers.Block]]:
    """The model in the compute dtype, gathered over fsdp, and its layers one by one."""
    dtype = network.config.dtype
    model = network.bind(jax.tree.map(lambda leaf: sharding.gather(leaf, dtype), params))
    count = network.config.layers
    return model, [jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(count)]


def read_prompt(
    model: GPT, x: Float[Array, "G P D"]
) -> tuple[Float[Array, "G V"], tuple[KeyValue, ...]]:
    """Logits of the last position of every prompt, and the cache, from the embedded inputs."""
    length = x.shape[1]
    if length > LANES:  # the fast forms of attention take multiples of LANES; padding is not seen
        x = jnp.pad(x, ((0, 0), (0, -length % LANES), (0, 0)))
    rotation = model.rotation(0, x.shape[1])

    def layer(x, block):
        kept = None

        def attend(q, k, v):
            nonlocal kept
            kept = KeyValue(*(jnp.swapaxes(part[:, :length], 1, 2) for part in (k, v)))
            return attention.causal_attention(q, k, v)

        x, _ = block(x, attend, rotation=rotation)
        return x, kept

    x, stacked = model.walk(layer, x, model.blocks)
    cache = [jax.tree.map(lambda part, i=i: part[i], stacked) for i in range(len(stacked.keys))]
    return model.predict(x[:, length - 1 : length]), tuple(cache)


def extend(
    model: GPT,
    blocks: list[layers.Block],
    x: Float[Array, "B 1 D"],
    prompt: tuple[KeyValue, ...],
    generated: tuple[KeyValue, ...],
    count: Int[Array, ""],
) -> tuple[Float[Array, "B V"], tuple[KeyValue, ...]]:
    """Logits of one more position of every sample, and `generated` with the new keys and values.

    `model` and `blocks` are those of `decoding_weights`, `x` is the embedded input of the position.
    Each of the G prompts in the cache `prompt` is continued by B / G samples, which lie next to
    each other. `generated` caches the samples' positions after the prompt, `count` of them so far.
    """
    extended, rotation = [], model.rotation(prompt[0].keys.shape[2] + count, 1)
    for block, of_prompt, before in zip(blocks, prompt, generated, strict=True):

        def attend(q, k, v, of_prompt=of_prompt, before=before):
            q, *new = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
            at = (0, 0, count, 0)
            pairs = zip(before, new, strict=True)
            after = KeyValue(*(jax.lax.dynamic_update_slice(*pair, at) for pair in pairs))
            extended.append(after)
            return jnp.swapaxes(_attend_one(q, of_prompt, after, count), 1, 2)

        x, _ = block(x, attend, rotation=rotation)
    return model.predict(x), tuple(extended)


def _attend_one(
    q: Float[Array, "B H 1 K"], prompt: KeyValue, generated: KeyValue, last: Int[Array, ""]
) -> Float[Array, "B H 1 K"]:
    """Attention of one query to the whole prompt and to the generated positions up to `last`."""
    B, H, _, K = q.shape
    G, length = prompt.keys.shape[0], prompt.keys.shape[2]
    by_prompt = P(*SPEC[:1], None, "tensor")  # [G, B / G, H, ...]
    queries = jnp.swapaxes(q.reshape(G, B // G, H, K, out_sharding=by_prompt), 1, 2)
    accumulator = {"preferred_element_type": layers.accumulator(q)}
    to_prompt = jnp.einsum("ghnk,ghpk->ghnp", queries, prompt.keys, **accumulator)
    to_generated = jnp.einsum("bhqk,bhsk->bhqs", q, generated.keys, **accumulator)
    seen = jnp.arange(generated.keys.shape[2]) <= last
    to_generated = jnp.where(seen[None, None, None], to_generated, -jnp.inf)
    scores = jnp.concatenate([_row_per_sample(to_prompt), to_generated], axis=-1) / math.sqrt(K)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_prompt = weights[..., :length].reshape(G, B // G, H, length, out_sharding=by_prompt)
    mixed = jnp.einsum("ghnp,ghpk->ghnk", jnp.swapaxes(of_prompt, 1, 2), prompt.values)
    mixed_generated = jnp.einsum("bhqs,bhsk->bhqk", weights[..., length:], generated.values)
    return _row_per_sample(mixed) + mixed_generated


def _row_per_sample(x: Float[Array, "G H N Z"]) -> Float[Array, "B H 1 Z"]:
    """The N samples of each of G prompts as B = G * N rows."""
    G, H, N, Z = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(G * N, H, 1, Z, out_sharding=SPEC)


def empty_cache(network: Network, rows: int, capacity: int) -> tuple[KeyValue, ...]:
    """A cache of zeros with room for `capacity` positions of `rows` sequences."""
    c = network.config
    shape = (rows, c.heads, capacity, c.width // c.heads)
    zeros = [jnp.zeros(shape, c.dtype, out_sharding=SPEC) for _ in range(2 * c.layers)]
    return tuple(KeyValue(*pair) for pair in zip(zeros[::2], zeros[1::2], strict=True))


def pad_cache(cache: tuple[KeyValue, ...], capacity: int) -> tuple[KeyValue, ...]:
    """Pads every layer's keys and values to `capacity` positions."""
    new = capacity - cache[0].keys.shape[2]
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, new), (0, 0))), cache)


def cache_capacities(positions: int) -> list[int]:
    """Capacities of the key/value cache, doubling from 64, so at most half of the cache is unused.

    The last one is `positions`; every position reads the whole cache, used or not.
    """
    sizes = [FIRST_CAPACITY * 2**i for i in range(positions.bit_length())]
    return [size for size in sizes if size < positions] + [positions] * (positions > 0)
