"""The key/value cache: reading prompts at once, and further positions one or several at a time.

Every layer has arrays of its own, [B, H, S, K]: loops slice nothing from a stack of layers, and a
product with few queries reads keys and values in the order in which they lie. The keys and values
of a prompt are held once for all samples that continue the prompt. The generated keys and values of
a single row are [H, S, K]: XLA removes axes of size 1 from products, and would copy a cache that a
loop holds with such an axis at every step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.attention import LANES, self_attention
from gptv_jax.model.gpt import GPT, Network
from gptv_jax.model.layout import Part

SPEC = jax.P(sharding.BATCH, "tensor")  # of cached keys and values
ONE_ROW = jax.P("tensor")  # of the generated keys and values of a single row
FIRST_CAPACITY = 64  # of the cache, in positions


class KeyValue(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "*B H S K"]  # without B: generated positions of a single row
    values: Float[Array, "*B H S K"]


Cache = tuple[KeyValue, ...]  # one for each layer


def decoding_weights(network: Network, params: dict) -> tuple[GPT, list[layers.Block]]:
    """The model in the compute dtype, gathered over fsdp, and its layers one by one."""
    dtype = network.config.dtype
    model = network.bind(jax.tree.map(lambda leaf: sharding.gather(leaf, dtype), params))
    count = network.config.layers
    return model, [jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(count)]


def read_prompt(model: GPT, x: Float[Array, "G P D"]) -> tuple[Float[Array, "G V"], Cache]:
    """Logits of the last position of every prompt, and the cache, from the embedded inputs.

    `model` has the weights of `Network.init`, not the result of `decoding_weights`.
    """
    length, layout = x.shape[1], model.network.layout
    if length > LANES:  # the fast forms of attention take multiples of LANES; padding is not seen
        x = jnp.pad(x, ((0, 0), (0, -length % LANES), (0, 0)))
    visible = layout.visible[:length] + tuple(range(length + 1, x.shape[1] + 1))
    rotation = model.rotation(0, x.shape[1])

    def layer(x, block):
        kept = None

        def attend(q, k, v):
            nonlocal kept
            kept = KeyValue(*(jnp.swapaxes(part[:, :length], 1, 2) for part in (k, v)))
            return self_attention(q, k, v, visible=visible)

        x, _ = block(x, attend, rotation=rotation)
        return x, kept

    x, stacked = model.walk(layer, x, model.blocks)
    cache = [jax.tree.map(lambda part, i=i: part[i], stacked) for i in range(len(stacked.keys))]
    logits = model.predict(x[:, length - 1 : length], layout.part_at(length - 1))
    return logits[:, 0], tuple(cache)


def extend(
    model: GPT,
    blocks: list[layers.Block],
    x: Float[Array, "B N D"],
    prompt: Cache,
    generated: Cache,
    counts: Int[Array, " *B"],
    part: Part | None = None,
) -> tuple[Float[Array, "B N V"], Cache]:
    """Logits of N more positions of every sample, and `generated` with their keys and values.

    `model` and `blocks` are what `decoding_weights` returns, `x` has the embedded inputs of the
    positions. Each of the G prompts in the cache `prompt` is continued by B / G samples, which lie
    next to each other. `generated` caches `counts` positions of each sample behind the prompt:
    one number for all rows, or a number for each row. Entries of `generated` further behind are
    overwritten and not seen; the capacity must reach to counts + N. A position sees the positions
    before it. The logits are over the vocabulary of `part`; None: of the first part.
    """
    N, extended = x.shape[1], []
    rotation = model.rotation(prompt[0].keys.shape[2] + counts, N)
    places = jnp.reshape(counts, (-1, 1)) + jnp.arange(N)[None]
    seen = jnp.arange(generated[0].keys.shape[-2])[None, None] <= places[..., None]
    for block, of_prompt, before in zip(blocks, prompt, generated, strict=True):

        def attend(q, k, v, of_prompt=of_prompt, before=before):
            q, *new = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
            after = KeyValue(*(_put(*pair, counts) for pair in zip(before, new, strict=True)))
            extended.append(after)
            return jnp.swapaxes(_attend(q, of_prompt, _with_rows(after), seen), 1, 2)

        x, _ = block(x, attend, rotation=rotation)
    return model.predict(x, part), tuple(extended)


def _put(
    cached: Float[Array, "*rows H S K"], new: Float[Array, "B H N K"], count: Int[Array, "*B"]
) -> Float[Array, "*rows H S K"]:
    """Writes the new positions behind the first `count` ones, which is a number or of each row."""
    if cached.ndim == 3:
        new = new.reshape(new.shape[1:], out_sharding=ONE_ROW)
        count = count.reshape((), out_sharding=jax.P())
        return jax.lax.dynamic_update_slice(cached, new, (0, count, 0))
    if count.ndim == 0:
        return jax.lax.dynamic_update_slice(cached, new, (0, 0, count, 0))

    def put(cached, new, count):
        return jax.lax.dynamic_update_slice(cached, new, (0, count, 0))

    # Rows and heads are local: the partitioner of a scatter would have to find that out.
    specs = (SPEC, SPEC, sharding.BATCH_FIRST)
    arguments = jax.sharding.reshard((cached, new, count), specs)
    return jax.shard_map(jax.vmap(put), in_specs=specs, out_specs=SPEC)(*arguments)


def _with_rows(generated: KeyValue) -> KeyValue:
    """Keys and values [B, H, S, K], of a single row too."""
    if generated.keys.ndim == 4:
        return generated
    return KeyValue(*(x.reshape(1, *x.shape, out_sharding=SPEC) for x in generated))


def _attend(
    q: Float[Array, "B H N K"],
    prompt: KeyValue,
    generated: KeyValue,
    seen: Bool[Array, "rows N S"],
) -> Float[Array, "B H N K"]:
    """Attention of N queries to the whole prompt and to the generated positions that are `seen`.

    `seen` has one row for all rows, or one for each.
    """
    N, K = q.shape[2:]
    G, length = prompt.keys.shape[0], prompt.keys.shape[2]
    queries = _by_prompt(q, G)
    accumulator = {"preferred_element_type": layers.accumulator(q)}
    to_prompt = jnp.einsum("ghnk,ghpk->ghnp", queries, prompt.keys, **accumulator)
    to_generated = jnp.einsum("bhqk,bhsk->bhqs", q, generated.keys, **accumulator)
    to_generated = jnp.where(seen[:, None], to_generated, -jnp.inf)
    scores = jnp.concatenate([_by_row(to_prompt, N), to_generated], axis=-1) / math.sqrt(K)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_prompt = _by_prompt(weights[..., :length], G)
    mixed = jnp.einsum("ghnp,ghpk->ghnk", of_prompt, prompt.values)
    mixed_generated = jnp.einsum("bhqs,bhsk->bhqk", weights[..., length:], generated.values)
    return _by_row(mixed, N) + mixed_generated


def _by_prompt(x: Float[Array, "B H N Z"], prompts: int) -> Float[Array, "G H M Z"]:
    """The N queries of all B / G samples of each of G prompts side by side: M = N * B / G."""
    B, H, N, Z = x.shape
    spec = jax.P(*SPEC[:1], None, "tensor")  # [G, B / G, H, ...]
    x = jnp.swapaxes(x.reshape(prompts, B // prompts, H, N, Z, out_sharding=spec), 1, 2)
    return x.reshape(prompts, H, -1, Z, out_sharding=SPEC)


def _by_row(x: Float[Array, "G H M Z"], queries: int) -> Float[Array, "B H N Z"]:
    """The inverse of `_by_prompt`, with N = `queries`."""
    G, H, M, Z = x.shape
    x = x.reshape(G, H, M // queries, queries, Z, out_sharding=SPEC)
    return jnp.swapaxes(x, 1, 2).reshape(-1, H, queries, Z, out_sharding=SPEC)


def empty_cache(network: Network, rows: int, capacity: int) -> Cache:
    """A cache of zeros with room for `capacity` positions of `rows` sequences."""
    c = network.config
    shape, spec = (c.heads, capacity, c.width // c.heads), ONE_ROW
    if rows > 1:
        shape, spec = (rows, *shape), SPEC
    zeros = functools.partial(jnp.zeros, shape, c.dtype, out_sharding=spec)
    return tuple(KeyValue(zeros(), zeros()) for _ in range(c.layers))


def pad_cache(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` positions."""
    room = capacity - cache[0].keys.shape[-2]

    def pad(x):
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)])
        return jax.sharding.reshard(padded, SPEC if x.ndim == 4 else ONE_ROW)

    return jax.tree.map(pad, cache)


def cache_capacities(positions: int) -> list[int]:
    """Capacities of the key/value cache, doubling from 64, so at most half of the cache is unused.

    The last one is `positions`; every position reads the whole cache, used or not.
    """
    sizes = [FIRST_CAPACITY * 2**i for i in range(positions.bit_length())]
    return [size for size in sizes if size < positions] + [positions] * (positions > 0)
