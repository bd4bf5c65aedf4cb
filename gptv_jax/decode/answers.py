"""What a network says about images or clips: the parts of the sequence that follow the image."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from gptv_jax import sharding
from gptv_jax.decode import generation
from gptv_jax.decode.restriction import Restriction
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network


@functools.partial(jax.jit, static_argnames=("network", "allowed", "samples", "read"))
def answer(
    network: Network,
    params: dict,
    tokens: Int[Array, "G N"] | None,
    pixels: UInt8[Array, "G *F height width C"] | None,
    key: PRNGKeyArray,
    restriction: Restriction,
    allowed: Callable | None = None,
    samples: int = 1,
    numbers: Int[Array, " G"] | None = None,
    known: Int[Array, "G n"] | None = None,
    read: int = 0,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Whole sequences, with the parts after the image drawn `samples` times for each of G images.

    Returns B = G * samples sequences, and each drawn token's probability over the whole vocabulary
    of the token's part, before the grammar, temperature, top-k and top-p. Each image is read once;
    the samples of an image lie next to each other and share the image's cache.

    Args:
      network: the layout's first part is the image.
      params: of `Network.init`.
      tokens: of the image; None: the image has no tokens.
      pixels: of the image; None: the network has no stem.
      key: each position's key is folded from it.
      restriction: the settings of drawing, numbers or arrays [T] with a number for each position.
      allowed: `(part name, position in the part, tokens of the part [B, n]) -> bool [B or 1, V]`,
        static and hashable by value, such as `tasks.task.Grammar`; None: all tokens of a part.
      samples: sequences for each image.
      numbers: of the images; what is drawn for an image then depends on its number and not on the
        images beside it. None: it depends on the whole batch.
      known: the first n tokens after the image, at which the sequences end, with
        `generation.UNKNOWN` in place of those to be drawn. None: all tokens are drawn.
      read: so many of the first `known` tokens, none of them unknown, are read at once with the
        image; static.

    Raises InputError where a part after the image is not predicted.
    """
    image, *others = network.layout.parts
    if silent := [part.name for part in others if not part.predicted]:
        raise InputError(
            f"the parts {shorten(silent)} of the sequence are not predicted, so nothing can be "
            "drawn there; an answer takes a layout whose first part alone is read."
        )
    if tokens is None:
        tokens = jnp.zeros((len(pixels), image.size), jnp.int32)
    tokens = jax.sharding.reshard(tokens, sharding.BATCH_FIRST)
    unknown = ((0, 0), (0, network.length - image.size))
    given = jnp.pad(tokens, unknown, constant_values=generation.UNKNOWN)
    if known is not None:
        known = jax.sharding.reshard(known, sharding.BATCH_FIRST)
        given = jnp.concatenate([tokens, known], axis=1)
    model, prefix = network.bind(params), image.size + read
    x = model.embed(given[:, :prefix], pixels=pixels, spec=sharding.BATCH_FIRST)
    logits, prompt = generation.read_prompt(model, x)
    by_position = Restriction(*(jnp.broadcast_to(each, network.length) for each in restriction))
    arguments = params, given, logits, prompt, key, None, by_position
    if numbers is not None:
        numbers = jax.sharding.reshard(numbers, sharding.BATCH_FIRST)
        rows = numbers[:, None] * samples + jnp.arange(samples)[None]
        numbers = rows.reshape(-1, out_sharding=sharding.BATCH_FIRST)
    return generation.draw_tokens(
        *(network, prefix, samples, *arguments), allowed=allowed, scored=True, numbers=numbers
    )
