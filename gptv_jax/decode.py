"""Cached generation: one compiled prefill, one compiled program that draws all that is wanted."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model import cached
from gptv_jax.model.gpt import Network

FIRST_ROOM = 64  # positions that the cache has room for at first


def generate(
    network: Network,
    params: dict,
    prefix: Int[Array, "G P"],
    key: PRNGKeyArray,
    *,
    samples: int = 1,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B length"]:
    """Sequences that begin with `prefix` and are drawn from the network from there on.

    Args:
      network: gives T.
      params: its weights.
      prefix: tokens to keep, P <= T of them; [G, 0] draws whole sequences.
      key: of the draws.
      samples: continuations of each prefix, next to each other; its keys and values are held once.
      steps: tokens to draw after the prefix; None: up to T.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws among the k most likely tokens; None among all.
      top_p: draws among the fewest most likely tokens whose probabilities reach p; None all.

    Returns:
      G * samples sequences of P + steps tokens.

    Raises:
      ValueError: `steps` are more than are left of T.
    """
    left = network.length - prefix.shape[1]
    steps = left if steps is None else steps
    if not 0 <= steps <= left:
        raise ValueError(f"steps is {steps}; after the prefix there is room for {left} tokens.")
    if not steps:
        return _repeated(prefix, samples)
    logits, prompts = _prefill(network, params, prefix)
    # Settings that change no shape are arguments of the program, not a reason to recompile.
    top_p = jnp.float32(1.0 if top_p is None else top_p)
    top_k = jnp.int32(network.vocabulary if top_k is None else top_k)
    settings = (jnp.float32(temperature), top_k, top_p)
    return _continue(network, samples, steps, params, prefix, logits, prompts, key, settings)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    network: Network, params: dict, prefix: Int[Array, "G P"]
) -> tuple[Float[Array, "G V"], tuple[cached.Pair, ...]]:
    model = network.bind(params)
    return cached.read(model, model.embed(prefix, spec=sharding.BATCH_FIRST))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continue(network, samples, steps, params, prefix, logits, prompts, key, settings):
    model, blocks = cached.weights(network.bind(params), params)
    kept, last = prefix.shape[1], prefix.shape[1] + steps - 1
    tokens = jnp.pad(_repeated(prefix, samples), ((0, 0), (0, steps)))

    def draw(position, logits):
        allowed = restrict(logits, *settings)
        return jax.random.categorical(jax.random.fold_in(key, position), allowed).astype(jnp.int32)

    def step(position, carry):
        tokens, logits, cache = carry
        token = draw(position, logits)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, position))
        x = model.embed_one(tokens, position + 1)
        logits, cache = cached.extend(model, blocks, x, cache, position - kept)
        return tokens, logits, cache

    # Every position reads all the room there is, so the room grows with what is in it.
    position, cache = kept, cached.Cache(prompts, cached.empty(model, len(tokens), 0))
    carry = tokens, _repeated(logits, samples), cache
    for room in _rooms(steps - 1):
        tokens, logits, cache = carry
        carry = tokens, logits, cached.Cache(prompts, cached.grown(cache.own, room))
        carry = jax.lax.fori_loop(position, kept + room, step, carry)
        position = kept + room
    tokens, logits, _ = carry
    return tokens.at[:, last].set(draw(last, logits))


def _rooms(positions: int) -> list[int]:
    """Sizes that a cache grows through: doubled, so that of a later one at most half is empty."""
    sizes = [FIRST_ROOM * 2**i for i in range(positions.bit_length())]
    return [size for size in sizes if size < positions] + [positions] * (positions > 0)


def _repeated(x: Array, samples: int) -> Array:
    """Each row so many times, next to each other."""
    if samples == 1:
        return x
    rows = len(x) * samples
    x = jnp.broadcast_to(x[:, None], (len(x), samples, *x.shape[1:]))
    return x.reshape(rows, *x.shape[2:], out_sharding=sharding.BATCH_FIRST)


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
