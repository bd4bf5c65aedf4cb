"""Heads besides the token head, which is part of `GPT`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptv_jax import sharding
from gptv_jax.model import layers


class ClassHead(nnx.Module):
    """Bias-free, zero-initialised linear classifier of mean-pooled final features.

    `class_center` and `class_scale` standardise the features. They are 0 and 1 (which is iGPT's
    head exactly) until fine-tuning sets them, and are not trained.
    """

    def __init__(self, classes: int, width: int):
        self.class_head = layers.constant("class_head", (classes, width), 0.0)
        self.class_center = layers.constant("class_center", (width,), 0.0)
        self.class_scale = layers.constant("class_scale", (width,), 1.0)

    def __call__(self, pooled: Float[Array, "B D"]) -> Float[Array, "B C"]:
        center, scale = jax.lax.stop_gradient((self.class_center[...], self.class_scale[...]))
        standardised = (pooled - center[None]) * scale[None]
        weight = sharding.gather(self.class_head[...], pooled.dtype)
        return jnp.einsum("bd,cd->bc", standardised, weight)
