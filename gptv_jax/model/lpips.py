"""LPIPS: the distance of two images in the features of a network that recognises objects.

VGG-16's features at five depths are compared (Zhang et al. 2018, arXiv:1801.03924, version 0.1 of
the weights). The distance agrees with people's judgement better than the mean squared difference.
The user provides the weights: docs/tokenizer.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptv_jax.model.autoencoder import LAYOUT

# 3 x 3 convolutions by slice: the layer's number in torchvision's VGG-16 and its output channels.
# Each slice but the first begins with max pooling; features are taken at the end of each slice.
SLICES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)  # as in the authors' code
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10

Weights = dict[str, np.ndarray | jax.Array]  # by the names of the authors' state dict


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by name."""
    found, inputs = {}, 3
    for i, convolutions in enumerate(SLICES):
        for number, outputs in convolutions:
            name = f"net.slice{i + 1}.{number}"
            found |= {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}
            inputs = outputs
        found[f"lin{i}.model.1.weight"] = (1, inputs, 1, 1)
    return found


def distance(
    weights: Weights, one: Float[Array, "B H W 3"], other: Float[Array, "B H W 3"]
) -> Float[Array, " B"]:
    """LPIPS of pairs of images from -1 to 1, at least 16 pixels a side; 0 for equal images."""
    total = 0.0
    pairs = zip(_features(weights, one), _features(weights, other), strict=True)
    for i, (a, b) in enumerate(pairs):
        linear = weights[f"lin{i}.model.1.weight"].reshape(1, 1, 1, -1)
        total += (jnp.square(_unit(a) - _unit(b)) * linear).sum(axis=-1).mean(axis=(1, 2))
    return total


def _features(weights: Weights, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w N"]]:
    x, found = (images - SHIFT[None, None, None]) / SCALE[None, None, None], []
    for i, convolutions in enumerate(SLICES):
        if i:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for number, _ in convolutions:
            name = f"net.slice{i + 1}.{number}"
            kernel = jnp.transpose(weights[f"{name}.weight"], (2, 3, 1, 0))
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
            x = jax.nn.relu(x + weights[f"{name}.bias"][None, None, None])
        found.append(x)
    return found


def _unit(x: Float[Array, "B h w N"]) -> Float[Array, "B h w N"]:
    return x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)) + EPSILON)
