"""Drawing tokens: one compiled program reads the prompts, another draws all tokens that follow.

Known tokens may lie anywhere in a sequence. A token depends on all tokens before it, known or
drawn, and on none after it. With classifier-free guidance every row is read twice in one batch,
with its class and without.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode import cached
from gptv_jax.model.gpt import Network

UNKNOWN = -1  # stands in place of a token that is to be drawn
DEFAULTS = config_lib.Drawing()


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
    labels: Int[Array, "G"] | None = None,
    samples: int = 1,
    stopwatch: Stopwatch | None = None,
) -> Int[Array, "B N"]:
    """The first N tokens of B = G * samples sequences, with the UNKNOWN ones of `given` drawn.

    The first `prefix` tokens, none of them unknown, are read at once, and the `samples` of a row,
    which lie next to each other, share the cache of them. `labels` are the class of each row; None:
    the network is told no class, and there is no guidance. A `stopwatch` measures the programs,
    which are then compiled anew. `token_key` makes the key of each position from `key`.
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
    restriction = (jnp.float32(drawing.temperature), top_k, top_p)
    scales = None if scales is None else jnp.asarray(scales)
    static, arguments = (network, prefix, samples), (params, given, logits, prompt, key)
    return run(_draw, static, *arguments, scales, restriction)


def token_key(key: PRNGKeyArray, position: int | Int[Array, ""]) -> PRNGKeyArray:
    """Key of the draw at a position, from the key of a batch."""
    return jax.random.fold_in(key, position)


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    network: Network,
    guided: bool,
    params: dict,
    prefix: Int[Array, "G P"],
    labels: Int[Array, "G"] | None,
) -> tuple[Float[Array, "N V"], tuple[cached.KeyValue, ...]]:
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
    return cached.read_prompt(model, model.embed(prefix, variant, spec=sharding.BATCH_FIRST))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    network, prefix, samples, params, given, logits, prompt, key, scales, restriction
) -> Int[Array, "B N"]:
    model, blocks = cached.decoding_weights(network, params)
    tokens, last = _repeat_rows(given, samples), given.shape[1] - 1

    def draw(position, tokens, logits):
        if scales is not None:
            logits = guide(logits, scales[position], samples)
        drawn = jax.random.categorical(token_key(key, position), restrict(logits, *restriction))
        known = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        token = jnp.where(known == UNKNOWN, drawn[:, None].astype(jnp.int32), known)
        return jax.lax.dynamic_update_slice(tokens, token, (0, position))

    def step(position, carry):
        tokens, logits, cache = carry
        tokens = draw(position, tokens, logits)
        x = model.embed_one(tokens, position + 1)
        if scales is not None:  # the rows with and without the class continue with the same token
            x = _repeat_rows(x, 2, group=samples)
        logits, cache = cached.extend(model, blocks, x, prompt, cache, position - prefix)
        return tokens, logits, cache

    position, logits = prefix, _repeat_rows(logits, samples)
    cache = cached.empty_cache(network, len(logits), 0)
    for capacity in cached.cache_capacities(last - prefix):
        carry = tokens, logits, cached.pad_cache(cache, capacity)
        tokens, logits, cache = jax.lax.fori_loop(position, prefix + capacity, step, carry)
        position = prefix + capacity
    return draw(last, tokens, logits)


def _repeat_rows(x: Array, times: int, group: int = 1) -> Array:
    """Repeats each `group` of neighbouring rows `times` times, next to each other."""
    if times == 1:
        return x
    groups, rows, spec = len(x) // group, len(x) * times, sharding.BATCH_FIRST
    grouped = x.reshape(groups, 1, group, *x.shape[1:], out_sharding=spec)
    repeated = jnp.broadcast_to(grouped, (groups, times, group, *x.shape[1:]))
    return repeated.reshape(rows, *x.shape[1:], out_sharding=spec)


def guidance_scales(drawing: config_lib.Drawing, length: int) -> Float[np.ndarray, "length"] | None:
    """Scale of classifier-free guidance at each of T positions; None where there is no guidance.

    The schedule "cosine" is 1 + (guidance - 1) (1 - cos(pi (t / T)^power)) / 2 at position t.
    """
    if drawing.guidance == 1:
        return None
    risen = {
        "constant": np.ones(length),
        "cosine": (1 - np.cos(np.pi * (np.arange(length) / length) ** drawing.guidance_power)) / 2,
    }
    return (1 + (drawing.guidance - 1) * risen[drawing.guidance_schedule]).astype(np.float32)


def guide(
    logits: Float[Array, "N V"], scale: Float[Array, ""], samples: int
) -> Float[Array, "B V"]:
    """Logits of the class, moved away from the logits without a class (Ho & Salimans 2022).

    N = 2 B rows: `samples` rows with their class, these rows without it, and so on. The scale 1
    leaves the logits of the class as they are; it is w + 1 in arXiv:2207.12598.
    """
    shape, spec = (-1, 2, samples, logits.shape[-1]), sharding.BATCH_FIRST
    pairs = logits.reshape(shape, out_sharding=spec)
    conditional, unconditional = pairs[:, 0], pairs[:, 1]
    guided = conditional + (scale - 1) * (conditional - unconditional)
    return guided.reshape(-1, logits.shape[-1], out_sharding=spec)


def restrict(
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf for the tokens that top-k and top-p leave out.

    The most likely token always stays; of equally likely tokens the lower one ranks first.
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)
    top_k = jnp.where(temperature == 0, 1, top_k)

    def restricted(scaled):
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        ranked = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked  # probability of all more likely tokens
        keep = (jnp.arange(logits.shape[-1])[None] < top_k) & ((before < top_p) | (top_p >= 1))
        rank = jnp.argsort(order, axis=-1)
        return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), scaled, -jnp.inf)

    # Sorting takes longer than the rest of a small network's step, so it is skipped if not needed.
    unrestricted = (top_k >= logits.shape[-1]) & (top_p >= 1)
    return jax.lax.cond(unrestricted, lambda scaled: scaled, restricted, scaled)
