"""Cached generation: one compiled prefill, one compiled loop, whatever the tokens stand for."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import Cache, Network


def generate(
    network: Network,
    params: dict,
    prefix: Int[Array, "B P"],
    key: PRNGKeyArray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B T"]:
    """Sequences that begin with `prefix` and are drawn from the network from there on.

    Args:
      network: gives T.
      params: its weights.
      prefix: tokens to keep, P <= T of them; [B, 0] draws whole sequences.
      key: of the draws.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws among the k most likely tokens; None among all.
      top_p: draws among the fewest most likely tokens whose probabilities reach p; None all.
    """
    if prefix.shape[1] == network.length:
        return prefix
    logits, cache = _prefill(network, params, prefix)
    # Settings that change no shape are arguments of the compiled loop, not a reason to recompile.
    top_p = jnp.float32(1.0 if top_p is None else top_p)
    top_k = jnp.int32(network.vocabulary if top_k is None else top_k)
    return _continue(
        network, params, prefix, logits, cache, key, jnp.float32(temperature), top_k, top_p
    )


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    network: Network, params: dict, prefix: Int[Array, "B P"]
) -> tuple[Float[Array, "B V"], Cache]:
    model = network.bind(params)
    cache = network.empty_cache(prefix.shape[0])
    return model.extend(model.embed(prefix, spec=sharding.BATCH_FIRST), 0, cache)


@functools.partial(jax.jit, static_argnums=0)
def _continue(network, params, prefix, logits, cache, key, temperature, top_k, top_p):
    model, kept = network.bind(params), prefix.shape[1]
    tokens = jnp.pad(prefix, ((0, 0), (0, network.length - kept)))

    def draw(position, logits):
        allowed = restrict(logits, temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, position), allowed).astype(jnp.int32)

    def step(position, carry):
        tokens, logits, cache = carry
        token = draw(position, logits)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, position))
        x = model.embed_one(tokens, position + 1)
        logits, cache = model.extend(x, position + 1, cache)
        return tokens, logits, cache

    last = network.length - 1
    tokens, logits, _ = jax.lax.fori_loop(kept, last, step, (tokens, logits, cache))
    return tokens.at[:, last].set(draw(last, logits))


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
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # probability of all that is more likely
    keep = (jnp.arange(logits.shape[-1])[None] < top_k) & ((before < top_p) | (top_p >= 1))
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), scaled, -jnp.inf)


def kept_tokens(network: Network, keep: float) -> int:
    """Tokens in the first share `keep` of the rows, rounded to whole rows."""
    rows, columns = network.grid
    return round(keep * rows) * columns
