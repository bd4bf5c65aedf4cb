"""Drawing images a block of tokens at a time, from a network with `config.model.block`.

The tokens of a block are drawn independently of one another, given all blocks before. Programs hold
tokens in the order of the positions, block after block.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode.cache import decoding_weights, empty_cache, extend
from gptv_jax.decode.generation import (
    DEFAULTS,
    UNKNOWN,
    Stopwatch,
    prefill,
    repeat_rows,
    token_key,
)
from gptv_jax.decode.restriction import Restriction, guidance_scales, guide, restrict
from gptv_jax.model.gpt import Network
from gptv_jax.model.inputs import to_positions, to_raster


def generate(
    network: Network,
    params: dict,
    given: Int[Array, "G N"],
    key: PRNGKeyArray,
    drawing: config_lib.Drawing = DEFAULTS,
    prefix: int = 0,
    labels: Int[Array, " G"] | None = None,
    samples: int = 1,
    stopwatch: Stopwatch | None = None,
) -> Int[Array, "B N"]:
    """As `generation.generate`; N and the prefix are of whole rows of blocks."""
    scales = None if labels is None else guidance_scales(drawing, network.length)
    run = stopwatch.run if stopwatch else lambda program, static, *rest: program(*static, *rest)
    tokens = to_positions(network.layout.parts[0], given)
    static = network, scales is not None
    logits, prompt = run(prefill, static, params, tokens[:, :prefix], labels)
    restriction = Restriction.of(drawing, network.vocabulary)
    arguments = params, tokens, logits, prompt, key, scales, restriction
    drawn = run(draw_blocks, (network, prefix, samples), *arguments)
    return to_raster(network.layout.parts[0], drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw_blocks(
    network, prefix, samples, params, given, logits, prompt, key, scales, restriction
) -> Int[Array, "B N"]:
    """Draws the unknown tokens after the prefix; arguments as of `generation.draw_tokens`."""
    model, blocks = decoding_weights(network, params)
    size, tokens = network.layout.shift, repeat_rows(given, samples)
    count = (given.shape[1] - prefix) // size

    def draw(position, tokens, logits):
        places = position + jnp.arange(size)
        if scales is not None:
            each = jnp.broadcast_to(
                jnp.asarray(scales)[places][None, :, None], (len(tokens), size, 1)
            )
            logits = guide(logits, jax.sharding.reshard(each, sharding.BATCH_FIRST), samples)
        keys = jax.vmap(token_key, (None, 0))(key, places)
        possible = jax.vmap(restrict, (1, None, None, None))(logits, *restriction)
        drawn = jax.vmap(jax.random.categorical)(keys, possible).astype(jnp.int32).T
        known = jax.lax.dynamic_slice_in_dim(tokens, position, size, axis=1)
        drawn, known = jax.sharding.reshard((drawn, known), sharding.BATCH_FIRST)
        token = jnp.where(known == UNKNOWN, drawn, known)
        return jax.lax.dynamic_update_slice(tokens, token, (0, position))

    def step(number, carry):
        """Draws a block, and makes the logits of the block after it."""
        tokens, logits, cache = carry
        position = prefix + number * size
        tokens = draw(position, tokens, logits)
        places = position + size + jnp.arange(size)
        x = model.embed_rows(tokens, jnp.broadcast_to(places[None], (len(tokens), size)))
        if scales is not None:
            x = repeat_rows(x, 2, group=samples)
        logits, cache = extend(model, blocks, x, prompt, cache, number * size)
        return tokens, logits, cache

    logits = repeat_rows(logits, samples)
    cache = empty_cache(network, len(logits), (count - 1) * size)
    carry = tokens, logits, cache
    if count > 1:
        carry = jax.lax.fori_loop(0, count - 1, step, carry)
    tokens, logits, _ = carry
    return draw(prefix + (count - 1) * size, tokens, logits)
