"""Which tokens may be drawn: temperature, top-k, top-p, and classifier-free guidance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptv_jax import config as config_lib
from gptv_jax import sharding


class Restriction(NamedTuple):
    """The settings of `restrict`: numbers, or arrays with a number for each position."""

    temperature: Float[Array, " *positions"]
    top_k: Int[Array, " *positions"]
    top_p: Float[Array, " *positions"]

    @classmethod
    def of(cls, drawing: config_lib.Drawing, vocabulary: int) -> "Restriction":
        """The settings as arrays, so that another temperature, top_k or top_p compiles nothing."""
        top_k = min(vocabulary, drawing.top_k or vocabulary)
        top_p = 1.0 if drawing.top_p is None else drawing.top_p
        return cls(jnp.float32(drawing.temperature), jnp.int32(top_k), jnp.float32(top_p))


def guidance_scales(
    drawing: config_lib.Drawing, length: int
) -> Float[np.ndarray, " length"] | None:
    """Scale of classifier-free guidance at each of T positions; None where there is no guidance.

    The schedule "cosine" is 1 + (guidance - 1) (1 - cos(pi (t / T)^power)) / 2 at position t.
    """
    if drawing.guidance == 1:
        return None
    risen = np.ones(length)
    if drawing.guidance_schedule == "cosine":
        risen = (1 - np.cos(np.pi * (np.arange(length) / length) ** drawing.guidance_power)) / 2
    return (1 + (drawing.guidance - 1) * risen).astype(np.float32)


def guide(
    logits: Float[Array, "N *n V"], scale: Float[Array, "*B_n_1"], samples: int
) -> Float[Array, "B *n V"]:
    """Logits of the class, moved away from the logits without a class (Ho & Salimans 2022).

    N = 2 B rows: `samples` rows with their class, these rows without it, and so on. The scale, a
    number or [B, n, 1], leaves the logits of the class as they are where it is 1; it is w + 1 in
    arXiv:2207.12598.
    """
    shape, spec = logits.shape[1:], sharding.BATCH_FIRST
    pairs = logits.reshape(-1, 2, samples, *shape, out_sharding=spec)
    conditional, unconditional = pairs[:, 0], pairs[:, 1]
    if jnp.ndim(scale):
        scale = scale.reshape(-1, samples, *scale.shape[1:], out_sharding=spec)
    guided = conditional + (scale - 1) * (conditional - unconditional)
    return guided.reshape(-1, *shape, out_sharding=spec)


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
