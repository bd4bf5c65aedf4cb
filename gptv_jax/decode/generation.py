"""Cached generation: one compiled prefill, one compiled program that draws all that is wanted.

What is known beforehand may lie anywhere. With classifier-free guidance every row is read twice,
with its class and without, in one batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.decode import cached
from gptv_jax.model.gpt import Network

FIRST_ROOM = 64  # positions that the cache has room for at first
UNKNOWN = -1  # stands where a token is to be drawn


def generate(
    network: Network,
    params: dict,
    given: Int[Array, "G N"],
    key: PRNGKeyArray,
    *,
    prefix: int | None = None,
    variant: Int[Array, "G"] | None = None,
    guidance: Float[np.ndarray, "T"] | None = None,
    samples: int = 1,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B length"]:
    """Sequences that keep what is `given` and are drawn from the network elsewhere.

    Each token is drawn in its turn from all before it, known or drawn; those after it, known or
    not, it does not see.

    Args:
      network: gives T.
      params: its weights.
      given: first N <= T tokens, UNKNOWN where one is to be drawn; [G, 0] draws whole sequences.
      key: of the draws.
      prefix: how many of the first tokens, none of them unknown, are read at once; None: N.
      variant: start vector of each row; None: that which tells no class.
      guidance: scale of classifier-free guidance by position, see `guidance_scales`; None: none,
        at half the cost.
      samples: sequences of each row, next to each other; keys and values of its prefix are held
        once.
      steps: tokens to draw after the given ones; None: up to T.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws among the k most likely tokens; None among all.
      top_p: draws among the fewest most likely tokens whose probabilities reach p; None all.

    Returns:
      G * samples sequences of N + steps tokens.

    Raises:
      ValueError: `steps` are more than are left of T.
    """
    left = network.length - given.shape[1]
    steps = left if steps is None else steps
    if not 0 <= steps <= left:
        raise ValueError(f"steps is {steps}; after what is given is room for {left} tokens.")
    prefix = given.shape[1] if prefix is None else prefix
    if prefix == given.shape[1] + steps:
        return _repeated(given, samples)
    guided = guidance is not None
    logits, prompts = _prefill(network, guided, params, given[:, :prefix], variant)
    # Settings that change no shape are arguments of the program, not a reason to recompile.
    top_p = jnp.float32(1.0 if top_p is None else top_p)
    top_k = jnp.int32(min(network.vocabulary, network.vocabulary if top_k is None else top_k))
    settings = (jnp.float32(temperature), top_k, top_p)
    scales = jnp.asarray(guidance, jnp.float32) if guided else None
    sizes = prefix, steps, samples
    return _continue(network, sizes, params, given, logits, prompts, key, scales, settings)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    network: Network,
    guided: bool,
    params: dict,
    prefix: Int[Array, "G P"],
    variant: Int[Array, "G"] | None,
) -> tuple[Float[Array, "N V"], tuple[cached.Pair, ...]]:
    """Logits, keys and values of the prefixes; guided: of each, and then of it without its class.

    What is compared with each other then lies next to each other, and so on the same device.
    """
    model, nothing = network.bind(params), jnp.full(len(prefix), network.unconditional, jnp.int32)
    variant = nothing if variant is None else variant
    if guided:
        variant, nothing = jax.sharding.reshard((variant, nothing), sharding.BATCH_FIRST)
        pairs = jnp.stack([variant, nothing], axis=1)
        variant = pairs.reshape(-1, out_sharding=sharding.BATCH_FIRST)
        prefix = _repeated(prefix, 2)
    return cached.read(model, model.embed(prefix, variant, spec=sharding.BATCH_FIRST))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(network, sizes, params, given, logits, prompts, key, scales, settings):
    model, blocks = cached.weights(network.bind(params), params)
    prefix, steps, samples = sizes
    tokens = jnp.pad(given, ((0, 0), (0, steps)), constant_values=UNKNOWN)
    tokens, last = _repeated(tokens, samples), given.shape[1] + steps - 1

    def draw(position, tokens, logits):
        if scales is not None:
            logits = guide(logits, scales[position], samples)
        allowed = restrict(logits, *settings)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), allowed)
        known = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        token = jnp.where(known == UNKNOWN, drawn[:, None].astype(jnp.int32), known)
        return jax.lax.dynamic_update_slice(tokens, token, (0, position))

    def step(position, carry):
        tokens, logits, cache = carry
        tokens = draw(position, tokens, logits)
        x = model.embed_one(tokens, position + 1)
        if scales is not None:  # with and without its class a token is the same
            x = _repeated(x, 2, group=samples)
        logits, cache = cached.extend(model, blocks, x, cache, position - prefix)
        return tokens, logits, cache

    # Every position reads all the room there is, so the room grows with what is in it.
    logits = _repeated(logits, samples)
    position, cache = prefix, cached.Cache(prompts, cached.empty(model, len(logits), 0))
    carry = tokens, logits, cache
    for room in _rooms(last - prefix):
        tokens, logits, cache = carry
        carry = tokens, logits, cached.Cache(prompts, cached.grown(cache.own, room))
        carry = jax.lax.fori_loop(position, prefix + room, step, carry)
        position = prefix + room
    tokens, logits, _ = carry
    return draw(last, tokens, logits)


def _rooms(positions: int) -> list[int]:
    """Sizes that a cache grows through: doubled, so that of a later one at most half is empty."""
    sizes = [FIRST_ROOM * 2**i for i in range(positions.bit_length())]
    return [size for size in sizes if size < positions] + [positions] * (positions > 0)


def _repeated(x: Array, times: int, group: int = 1) -> Array:
    """Each `group` of neighbouring rows so many times, next to each other."""
    if times == 1:
        return x
    groups, rows, spec = len(x) // group, len(x) * times, sharding.BATCH_FIRST
    grouped = x.reshape(groups, 1, group, *x.shape[1:], out_sharding=spec)
    repeated = jnp.broadcast_to(grouped, (groups, times, group, *x.shape[1:]))
    return repeated.reshape(rows, *x.shape[1:], out_sharding=spec)


def guidance_scales(
    schedule: str, scale: float, power: float, length: int
) -> Float[np.ndarray, "length"] | None:
    """Scales of classifier-free guidance by position, for `generate`.

    Args:
      schedule: "constant", or "cosine", which rises from 1 at the first position to `scale` after
        the last, 1 + (scale - 1) (1 - cos(pi (t / T)^power)) / 2, as in RAR (Yu et al. 2024,
        arXiv:2411.00776).
      scale: 1: what the network says of the class; more: away from what it says of any.
      power: of cosine; the higher, the later it rises.
      length: T.

    Returns:
      The scales; None where all of them are 1, and there is nothing to guide.
    """
    if scale == 1:
        return None
    risen = {
        "constant": np.ones(length),
        "cosine": (1 - np.cos(np.pi * (np.arange(length) / length) ** power)) / 2,
    }
    return (1 + (scale - 1) * risen[schedule]).astype(np.float32)


def guide(
    logits: Float[Array, "N V"], scale: Float[Array, ""], samples: int
) -> Float[Array, "B V"]:
    """Logits of the class, moved away from those of no class (Ho & Salimans 2022).

    Args:
      logits: of `samples` rows with their class, of the same rows without, and so on; N = 2 B.
      scale: 1 leaves those of the class as they are (arXiv:2207.12598 calls w what is scale - 1).
      samples: how many rows of each kind lie next to each other.
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
    """Logits over temperature, -inf where top-k or top-p leave a token out.

    The most likely token always stays; among equals the lower token ranks first.
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)
    top_k = jnp.where(temperature == 0, 1, top_k)

    def restricted(scaled):
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        ranked = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked  # probability of all that is more likely
        keep = (jnp.arange(logits.shape[-1])[None] < top_k) & ((before < top_p) | (top_p >= 1))
        rank = jnp.argsort(order, axis=-1)
        return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), scaled, -jnp.inf)

    # Sorting costs a small network more than the rest of a step.
    everything = (top_k >= logits.shape[-1]) & (top_p >= 1)
    return jax.lax.cond(everything, lambda scaled: scaled, restricted, scaled)


def kept_tokens(network: Network, keep: float) -> int:
    """Tokens in the first share `keep` of the rows, rounded to whole rows."""
    rows, columns = network.grid
    return round(keep * rows) * columns
