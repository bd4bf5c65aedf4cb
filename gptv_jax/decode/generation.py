"""Drawing tokens: one compiled program reads the prompts, another draws all tokens that follow.

Known tokens may lie anywhere in a sequence. A token depends on all tokens before it, known or
drawn, and on no later token. Each part of a sequence has its own vocabulary. With
classifier-free guidance every row is read twice in one batch, with its class and without.

Memory traffic bounds decoding: every new token reads all weights and the whole key/value cache. So
weights are cast to the compute dtype and gathered over fsdp once; the cache is in `cache.py`.
`speculative.py` draws several tokens for each pass over the weights, with a second network.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode.cache import (
    Cache,
    cache_capacities,
    decoding_weights,
    empty_cache,
    extend,
    pad_cache,
    read_prompt,
)
from gptv_jax.decode.restriction import Restriction, guidance_scales, guide, restrict
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Layout

UNKNOWN = -1  # stands in place of a token that is to be drawn
DEFAULTS = config_lib.Drawing()


@dataclasses.dataclass
class Stopwatch:
    """Adds up the seconds that programs run, without the time it takes to compile them."""

    seconds: float = 0.0
    passes: int = 0  # through the network, counted for each row; of speculative sampling alone

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
        return repeat_rows(given, samples)
    scales = None if labels is None else guidance_scales(drawing, network.length)
    run = stopwatch.run if stopwatch else lambda program, static, *rest: program(*static, *rest)
    static = network, scales is not None
    logits, prompt = run(prefill, static, params, given[:, :prefix], labels)
    static, arguments = (network, prefix, samples), (params, given, logits, prompt, key)
    restriction = Restriction.of(drawing, network.vocabulary)
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
        prefix = repeat_rows(prefix, 2)
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
    tokens, last = repeat_rows(given, samples), given.shape[1] - 1
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
            x = repeat_rows(x, 2, group=samples)
        logits, cache = extend(model, blocks, x, prompt, cache, position - prefix, next_part)
        return tokens, probabilities, logits[:, 0], cache

    logits = repeat_rows(logits, samples)
    cache = empty_cache(network, len(logits), 0)
    carry = tokens, probabilities, logits, cache
    ends = [prefix + capacity for capacity in cache_capacities(last - prefix)]
    for start, end, capacity in stretches(network.layout, prefix, ends):
        carry = *carry[:-1], pad_cache(carry[-1], capacity)
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


def repeat_rows(x: Array, times: int, group: int = 1) -> Array:
    """Repeats each `group` of neighbouring rows `times` times, next to each other."""
    if times == 1:
        return x
    groups, rows, spec = len(x) // group, len(x) * times, sharding.BATCH_FIRST
    grouped = x.reshape(groups, 1, group, *x.shape[1:], out_sharding=spec)
    repeated = jnp.broadcast_to(grouped, (groups, times, group, *x.shape[1:]))
    return repeated.reshape(rows, *x.shape[1:], out_sharding=spec)
