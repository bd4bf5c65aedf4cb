"""How well images are restored: PSNR and SSIM to report, and losses to train by.

All functions take images [B, H, W, C] of the same range and return a number for each image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

RANGE = 2.0  # of values from -1 to 1
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window (Wang et al. 2004)
K1, K2 = 0.01, 0.03  # SSIM's constants, shares of the range: they keep the ratios finite
SCALES = 3  # of the gradient loss, each half as large as the one before


def l1(restored: Float[Array, "B H W C"], images: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Mean absolute difference."""
    return jnp.abs(restored - images).mean(axis=(1, 2, 3))


def l2(restored: Float[Array, "B H W C"], images: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Mean squared difference."""
    return jnp.square(restored - images).mean(axis=(1, 2, 3))


def gradient(
    restored: Float[Array, "B H W C"], images: Float[Array, "B H W C"]
) -> Float[Array, "B"]:
    """Mean absolute error of the differences between neighbouring pixels, at several scales.

    It asks for edges as sharp as the image's; the mean squared error accepts blurred ones. Each
    scale is the one before, averaged over squares of 2 x 2 pixels.
    """
    difference, total = restored - images, 0.0
    for _ in range(SCALES):
        down, right = jnp.diff(difference, axis=1), jnp.diff(difference, axis=2)
        total += jnp.abs(down).mean(axis=(1, 2, 3)) + jnp.abs(right).mean(axis=(1, 2, 3))
        if min(difference.shape[1:3]) < 4:
            break
        difference = _halved(difference)
    return total


def _halved(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means over squares of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (size - size % 2 for size in x.shape[1:3])
    rows = (x[:, 0:height:2] + x[:, 1:height:2]) / 2
    return (rows[:, :, 0:width:2] + rows[:, :, 1:width:2]) / 2


def psnr(mean_squared: Float[Array, "*any"], value_range: float = RANGE) -> Float[Array, "*any"]:
    """Peak signal-to-noise ratio in dB of mean squared errors; infinite for an error of 0."""
    return 10 * jnp.log10(value_range**2 / mean_squared)


def ssim(
    restored: Float[Array, "B H W C"],
    images: Float[Array, "B H W C"],
    value_range: float = RANGE,
) -> Float[Array, "B"]:
    """Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861); 1 for equal images.

    Channel by channel under the paper's Gaussian window of 11 x 11 pixels, wherever it fits into
    the image, as in skimage's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)` and TensorFlow's `image.ssim`. A smaller image has a window of its
    own size.
    """
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    x, y = _blurred(restored), _blurred(images)
    xx, yy = _blurred(restored**2) - x**2, _blurred(images**2) - y**2
    xy = _blurred(restored * images) - x * y
    luminance = (2 * x * y + c1) / (x**2 + y**2 + c1)
    structure = (2 * xy + c2) / (xx + yy + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _blurred(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means under the Gaussian window at every place where the whole window is in the image."""
    side = min(WINDOW, *x.shape[1:3])
    window = _window(side).astype(x.dtype)
    for axis in (1, 2):
        count = x.shape[axis] - side + 1
        parts = [jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(side)]
        x = sum(weight * part for weight, part in zip(window, parts, strict=True))
    return x


@functools.cache
def _window(side: int) -> np.ndarray:
    weights = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / SIGMA) ** 2)
    return weights / weights.sum()
