"""Drawing tokens: one compiled program reads the prompts, another draws all tokens that follow.

Known tokens may lie anywhere in a sequence. A token depends on all tokens before it, known or
drawn, and on no later token. Each part of a sequence has its own vocabulary. With
classifier-free guidance every row is read twice in one batch, with its class and without.

Memory traffic bounds decoding: every new token reads all weights and the whole key/value cache. So
weights are cast to the compute dtype and gathered over fsdp once, every layer has arrays of its own
(the loop slices nothing from a stack of layers), and keys and values lie as [B, H, S, K], the order
in which the product with a single query reads them. The keys and values of a prompt are held once
for all samples that continue the prompt.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode.restriction import Restriction, guidance_scales, guide, restrict
from gptv_jax.model import layers
from gptv_jax.model.attention import LANES, self_attention
from gptv_jax.model.gpt import GPT, Network
from gptv_jax.model.layout import Layout, Part

UNKNOWN = -1  # stands in place of a token that is to be drawn
DEFAULTS = config_lib.Drawing()
SPEC = jax.P(sharding.BATCH, "tensor")  # of cached keys and values
FIRST_CAPACITY = 64  # of the cache, in positions


class KeyValue(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "B H S K"]
    values: Float[Array, "B H S K"]


Cache = tuple[KeyValue, ...]  # one for each layer


@dataclasses.dataclass
class Stopwatch:
    """Adds up the seconds that programs run, without the time it takes to compile them."""

    seconds: float = 0.0

    def run(self, program: Callable, static: tuple, *arguments):
        """The result of the jitted `program`, whose first arguments `static` are static."""
        compiled = program.lower(*static, *arguments).compile()
        begin = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        self.seconds += time.perf_counter() - begin
        return result


def generate(
    network: Network,
    params: dict,
    given: Int[Array, "G N"],  # N <= T
    key: PRNGKeyArray,
    drawing: config_lib.Drawing = DEFAULTS,
    prefix: int = 0,
    labels: Int[Array, " G"] | None = None,
    samples: int = 1,
    stopwatch: Stopwatch | None = None,
) -> Int[Array, "B N"]:
    """The first N tokens of B = G * samples sequences, with the UNKNOWN ones of `given` drawn.

    The first `prefix` tokens, none of them unknown, are read at once; the `samples` of a row lie
    next to each other and share the prefix's cache. `labels` are the class of each row; None: the
    network is told no class, and there is no guidance. A `stopwatch` measures the programs, which
    are then compiled anew. `token_key` makes the key of each position from `key`.
    """
    if prefix == given.shape[1]:
        return _repeat_rows(given, samples)
    scales = None if labels is None else guidance_scales(drawing, network.length)
    run = stopwatch.run if stopwatch else lambda program, static, *rest: program(*static, *rest)
    static = network, scales is not None
    logits, prompt = run(prefill, static, params, given[:, :prefix], labels)
    # Settings that change no shape are arguments of the program, not a reason to recompile.
    top_p = jnp.float32(1.0 if drawing.top_p is None else drawing.top_p)
    top_k = jnp.int32(min(network.vocabulary, drawing.top_k or network.vocabulary))
    restriction = Restriction(jnp.float32(drawing.temperature), top_k, top_p)
    static, arguments = (network, prefix, samples), (params, given, logits, prompt, key)
    return run(draw_tokens, static, *arguments, scales, restriction)[0]


def token_key(key: PRNGKeyArray, position: int | Int[Array, ""]) -> PRNGKeyArray:
    """Key of the draw at a position, from the key of a batch."""
    return jax.random.fold_in(key, position)


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    network: Network,
    guided: bool,
    params: dict,
    prefix: Int[Array, "G P"],
    labels: Int[Array, " G"] | None,
) -> tuple[Float[Array, "N V"], Cache]:
    """Logits of the first position after the prefixes, and the cache of the prefixes.

    `guided` reads each row with its class and, in the next row, without: rows that are compared
    with each other then lie on the same device.
    """
    no_class = jnp.full(len(prefix), network.unconditional, jnp.int32)
    variant = no_class if labels is None else labels
    if guided:
        rows = jax.sharding.reshard((variant, no_class), sharding.BATCH_FIRST)
        variant = jnp.stack(rows, axis=1).reshape(-1, out_sharding=sharding.BATCH_FIRST)
        prefix = _repeat_rows(prefix, 2)
    model = network.bind(params)
    return read_prompt(model, model.embed(prefix, variant, spec=sharding.BATCH_FIRST))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("allowed", "scored"))
def draw_tokens(
    network,
    prefix,
    samples,
    params,
    given,
    logits,
    prompt,
    key,
    scales,
    restriction,
    allowed=None,
    scored=False,
    numbers=None,
) -> tuple[Int[Array, "B N"], Float[Array, "B N"] | None]:
    """Draws the unknown tokens after the prefix, one position at a time.

    `logits` and `prompt` are returned by `prefill`. `scales` is the guidance scale of each
    position, None without guidance; `restriction` has one number, or one for each position.
    `allowed` is a task's grammar, see `answers.answer`. With `scored`, every drawn token's
    probability is returned too, before `allowed` and `restriction`; 1 in the prefix. `numbers`,
    int [B], give each row a key of its own, which no other row changes.

    Raises InputError where `Layout.check_drawable` does.
    """
    network.layout.check_drawable(prefix, given.shape[1])
    model, blocks = decoding_weights(network, params)
    tokens, last = _repeat_rows(given, samples), given.shape[1] - 1
    probabilities = jnp.ones_like(tokens, jnp.float32) if scored else None

    def draw(part, position, tokens, probabilities, logits):
        if scales is not None:
            logits = guide(logits, scales[position], samples)
        possible = logits
        if allowed is not None:
            places = network.layout.slices[part.name]
            mask = allowed(part.name, position - places.start, tokens[:, places])
            possible = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        settings = (each if jnp.ndim(each) == 0 else each[position] for each in restriction)
        at, possible = token_key(key, position), restrict(possible, *settings)
        if numbers is None:
            drawn = jax.random.categorical(at, possible)
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(at, numbers)
            drawn = jax.vmap(jax.random.categorical)(keys, possible)
        known = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        # JAX 0.12 loses the sharding of a dimension of size 1, here that of a single row.
        known = jax.sharding.reshard(known, sharding.BATCH_FIRST)
        token = jnp.where(known == UNKNOWN, drawn[:, None].astype(jnp.int32), known)
        tokens = jax.lax.dynamic_update_slice(tokens, token, (0, position))
        if scored:  # by a one-hot product: a lookup would need the vocabulary whole on a device
            chosen = jax.nn.one_hot(token[:, 0], logits.shape[-1])
            likely = (jax.nn.softmax(logits, axis=-1) * chosen).sum(axis=1, keepdims=True)
            where = 0, position
            probabilities = jax.lax.dynamic_update_slice(probabilities, likely, where)
        return tokens, probabilities

    def step(part, next_part, position, carry):
        """Draws a token of `part`, and makes the logits of the position after it."""
        tokens, probabilities, logits, cache = carry
        tokens, probabilities = draw(part, position, tokens, probabilities, logits)
        x = model.embed_one(tokens, position + 1, part)
        if scales is not None:  # the rows with and without the class continue with the same token
            x = _repeat_rows(x, 2, group=samples)
        logits, cache = extend(model, blocks, x, prompt, cache, position - prefix, next_part)
        return tokens, probabilities, logits, cache

    logits = _repeat_rows(logits, samples)
    cache = empty_cache(network, len(logits), 0)
    carry = tokens, probabilities, logits, cache
    ends = [prefix + capacity for capacity in cache_capacities(last - prefix)]
    for start, end, capacity in stretches(network.layout, prefix, ends):
        filled = jax.tree.leaves(carry[-1])[0].shape[2]
        room = (0, 0), (0, 0), (0, capacity - filled), (0, 0)
        carry = *carry[:-1], jax.tree.map(lambda x, room=room: jnp.pad(x, room), carry[-1])
        parts = network.layout.part_at(start), network.layout.part_at(start + 1)
        take = functools.partial(step, *parts)
        # At the end of a part the logits change their vocabulary, which a loop's carry cannot.
        crosses = parts[0] != parts[1]
        carry = (
            take(jnp.int32(start), carry) if crosses else jax.lax.fori_loop(start, end, take, carry)
        )
    tokens, probabilities, logits, _ = carry
    return draw(network.layout.part_at(last), last, tokens, probabilities, logits)


def stretches(layout: Layout, first: int, ends: list[int]) -> list[tuple[int, int, int]]:
    """Positions that one loop draws: (start, end, capacity of the cache), from `first` on.

    A stretch ends where the cache is full, which is after the positions `ends`, and before and
    after the last position of a part.
    """
    if not ends:
        return []
    last = [where.stop - 1 for where in layout.slices.values()]
    cuts = sorted({*ends, *(c for at in last for c in (at, at + 1) if first < c < ends[-1])})
    starts = [first, *cuts[:-1]]
    rooms = [next(end for end in ends if end > start) - first for start in starts]
    return list(zip(starts, cuts, rooms, strict=True))


def _repeat_rows(x: Array, times: int, group: int = 1) -> Array:
    """Repeats each `group` of neighbouring rows `times` times, next to each other."""
    if times == 1:
        return x
    groups, rows, spec = len(x) // group, len(x) * times, sharding.BATCH_FIRST
    grouped = x.reshape(groups, 1, group, *x.shape[1:], out_sharding=spec)
    repeated = jnp.broadcast_to(grouped, (groups, times, group, *x.shape[1:]))
    return repeated.reshape(rows, *x.shape[1:], out_sharding=spec)


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
    return model.predict(x[:, length - 1 : length], layout.part_at(length - 1)), tuple(cache)


def extend(
    model: GPT,
    blocks: list[layers.Block],
    x: Float[Array, "B 1 D"],
    prompt: Cache,
    generated: Cache,
    count: Int[Array, ""],
    part: Part | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of one more position of every sample, and `generated` with the new keys and values.

    `model` and `blocks` are those of `decoding_weights`, `x` is the embedded input of the position.
    Each of the G prompts in the cache `prompt` is continued by B / G samples, which lie next to
    each other. `generated` caches the samples' positions after the prompt, `count` of them so far;
    its capacity must exceed `count`. The logits are over the vocabulary of `part`; None: of the
    first part.
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
    return model.predict(x, part), tuple(extended)


def _attend_one(
    q: Float[Array, "B H 1 K"], prompt: KeyValue, generated: KeyValue, last: Int[Array, ""]
) -> Float[Array, "B H 1 K"]:
    """Attention of one query to the whole prompt and to the generated positions up to `last`."""
    B, H, _, K = q.shape
    G, length = prompt.keys.shape[0], prompt.keys.shape[2]
    by_prompt = jax.P(*SPEC[:1], None, "tensor")  # [G, B / G, H, ...]
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


def empty_cache(network: Network, rows: int, capacity: int) -> Cache:
    """A cache of zeros with room for `capacity` positions of `rows` sequences."""
    c = network.config
    shape = (rows, c.heads, capacity, c.width // c.heads)
    zeros = functools.partial(jnp.zeros, shape, c.dtype, out_sharding=SPEC)
    return tuple(KeyValue(zeros(), zeros()) for _ in range(c.layers))


def cache_capacities(positions: int) -> list[int]:
    """Capacities of the key/value cache, doubling from 64, so at most half of the cache is unused.

    The last one is `positions`; every position reads the whole cache, used or not.
    """
    sizes = [FIRST_CAPACITY * 2**i for i in range(positions.bit_length())]
    return [size for size in sizes if size < positions] + [positions] * (positions > 0)
