"""InceptionV3 as the published FID uses it: the network of TensorFlow's weights of 2015-12-05.

pytorch-fid calls this network `fid_inception_v3`. The weights are that network's state dict as a
.safetensors file (docs/generation_quality.md says how to make one). The network differs from the
usual InceptionV3 in three ways: average pools do not count the padding, the last block takes a
maximum in place of an average, and there are 1,008 classes.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.weights.strict_reader import StrictReader

SIDE = 299  # height and width in pixels to which images are resized
WIDTH, CLASSES = 2048, 1008  # features of the last pool; classes of the weights of 2015
PREFIX = "Mixed_"  # begins names of this network's tensors and of no other network's
EPSILON = 1e-3  # of batch normalisation
UNUSED = "num_batches_tracked"  # PyTorch's counters, which some versions save

# Applies a convolution, batch normalisation and ReLU. Arguments: x, name of the convolution,
# channels, and kernel, stride and padding along height and width.
Conv = Callable[..., Float[Array, "B H W C"]]


class Inception:
    """An extractor of 2,048 pool features and 1,008 class probabilities, in float32 on one device.

    Probabilities are the softmax of the logits without bias: the code of Salimans et al. 2016 and
    ADM's evaluator leave the bias out of the Inception Score.
    """

    name = "Inception-v3 2015-12-05, bilinear to 299 pixels"
    size = WIDTH
    of_pictures = True

    def __init__(self, path: str | pathlib.Path):
        """Reads the weights from a .safetensors file.

        Raises:
          InputError: the file is missing or damaged, or tensors are missing, misshapen, left over
            or not finite; all of these are listed.
        """
        path = pathlib.Path(path).absolute()
        arrays, _ = files.read_safetensors(path)
        reader = StrictReader.of_arrays({n: a for n, a in arrays.items() if not n.endswith(UNUSED)})
        weights = {name: reader.take(name, shape) for name, shape in weight_shapes().items()}
        reader.close(path, "the FID's InceptionV3 (pt_inception-2015-12-05 of pytorch-fid)")
        if bad := [name for name, array in weights.items() if not np.isfinite(array).all()]:
            raise InputError(f"{path} holds values that are not finite, in {', '.join(bad)}.")
        self.hash = files.hash_arrays(weights)
        self._weights = jax.device_put(_fold_batch_norm(weights), jax.local_devices()[0])

    def __call__(
        self, images: UInt8[np.ndarray, "B H W C"]
    ) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"]]:
        """Takes RGB or grey images of any size, 0 to 255."""
        device = jax.local_devices()[0]
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",))):
            resized = _resize(jax.device_put(images, device))
            pooled, probabilities = _forward(self._weights, resized)
        return np.asarray(pooled), np.asarray(probabilities)


@functools.cache
def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name, as PyTorch stores them: kernels are [O, I, H, W]."""
    shapes = {"fc.weight": (CLASSES, WIDTH), "fc.bias": (CLASSES,)}

    def conv(x, name, channels, kernel, stride, padding):
        shapes[f"{name}.conv.weight"] = (channels, x.shape[-1], *kernel)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{statistic}"] = (channels,)
        zeros = jnp.zeros((*kernel, x.shape[-1], channels)), jnp.zeros(channels)
        return _convolve(x, *zeros, stride, padding)

    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    jax.eval_shape(functools.partial(_pool_features, conv), image)
    return shapes


def _fold_batch_norm(weights: dict[str, np.ndarray]) -> dict:
    """Kernel [H, W, I, O] and bias of every convolution with its batch normalisation, and `fc`."""
    folded = {"fc": weights["fc.weight"].T}
    for name in (n.removesuffix(".conv.weight") for n in weights if n.endswith(".conv.weight")):
        statistics = ("weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (
            weights[f"{name}.bn.{statistic}"].astype(np.float64) for statistic in statistics
        )
        scale = gain / np.sqrt(variance + EPSILON)
        kernel = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
        folded[name] = kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)
    return folded


@jax.jit
def _forward(weights: dict, images: Float[Array, "B 299 299 3"]) -> tuple[Array, Array]:
    def conv(x, name, channels, kernel, stride, padding):
        return _convolve(x, *weights[name], stride, padding)

    pooled = _pool_features(conv, images)
    logits = jnp.matmul(pooled, weights["fc"], precision=jax.lax.Precision.HIGHEST)
    return pooled, jax.nn.softmax(logits, axis=-1)


@jax.jit
def _resize(images: UInt8[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """Values from -1 to 1. Like pytorch-fid, without antialiasing even of larger images."""
    size = (len(images), SIDE, SIDE, images.shape[-1])
    x = jax.image.resize(images.astype(jnp.float32), size, "bilinear", antialias=False)
    return jnp.broadcast_to(x / 127.5 - 1, (*size[:3], 3))


def _convolve(x, kernel, bias, stride, padding) -> Float[Array, "B H W C"]:
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(each, each) for each in padding],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # or TPUs round to bfloat16, GPUs to TF32
    )
    return jax.nn.relu(x + bias[None, None, None])


def _pool_features(conv: Conv, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B D"]:
    """The mean over positions of the last block's output."""

    def stem(x, name, channels, side, stride=1, padding=0):
        return conv(x, name, channels, (side, side), stride, (padding, padding))

    x = stem(x, "Conv2d_1a_3x3", 32, 3, stride=2)
    x = stem(x, "Conv2d_2a_3x3", 32, 3)
    x = _max_pool(stem(x, "Conv2d_2b_3x3", 64, 3, padding=1), stride=2)
    x = stem(x, "Conv2d_3b_1x1", 80, 1)
    x = _max_pool(stem(x, "Conv2d_4a_3x3", 192, 3), stride=2)
    for name, channels in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(_Block(conv, name), x, channels)
    x = _block_b(_Block(conv, "Mixed_6a"), x)
    for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = _block_c(_Block(conv, f"Mixed_{name}"), x, channels)
    x = _block_d(_Block(conv, "Mixed_7a"), x)
    x = _block_e(_Block(conv, "Mixed_7b"), x, _average_pool)
    x = _block_e(_Block(conv, "Mixed_7c"), x, functools.partial(_max_pool, stride=1, padding=1))
    return x.mean(axis=(1, 2))


class _Block:
    """Convolutions of one block, padded to keep the image's size unless the stride is above 1."""

    def __init__(self, conv: Conv, name: str):
        self._conv, self._name = conv, name

    def __call__(self, x, branch, channels, kernel=(1, 1), stride=1):
        padding = tuple(side // 2 if stride == 1 else 0 for side in kernel)
        return self._conv(x, f"{self._name}.{branch}", channels, kernel, stride, padding)


def _block_a(conv: _Block, x, channels):
    """35 x 35 positions."""
    double = conv(conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3))
    parts = [
        conv(x, "branch1x1", 64),
        conv(conv(x, "branch5x5_1", 48), "branch5x5_2", 64, (5, 5)),
        conv(double, "branch3x3dbl_3", 96, (3, 3)),
        conv(_average_pool(x), "branch_pool", channels),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_b(conv: _Block, x):
    """From 35 x 35 to 17 x 17 positions."""
    double = conv(conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3))
    parts = [
        conv(x, "branch3x3", 384, (3, 3), stride=2),
        conv(double, "branch3x3dbl_3", 96, (3, 3), stride=2),
        _max_pool(x, stride=2),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_c(conv: _Block, x, channels):
    """17 x 17 positions, with kernels of 1 x 7 and 7 x 1."""
    row, column = (1, 7), (7, 1)
    once = conv(conv(x, "branch7x7_1", channels), "branch7x7_2", channels, row)
    twice = conv(x, "branch7x7dbl_1", channels)
    for i, kernel in ((2, column), (3, row), (4, column)):
        twice = conv(twice, f"branch7x7dbl_{i}", channels, kernel)
    parts = [
        conv(x, "branch1x1", 192),
        conv(once, "branch7x7_3", 192, column),
        conv(twice, "branch7x7dbl_5", 192, row),
        conv(_average_pool(x), "branch_pool", 192),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_d(conv: _Block, x):
    """From 17 x 17 to 8 x 8 positions."""
    seven = conv(conv(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, (1, 7))
    seven = conv(seven, "branch7x7x3_3", 192, (7, 1))
    parts = [
        conv(conv(x, "branch3x3_1", 192), "branch3x3_2", 320, (3, 3), stride=2),
        conv(seven, "branch7x7x3_4", 192, (3, 3), stride=2),
        _max_pool(x, stride=2),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_e(conv: _Block, x, pool):
    """8 x 8 positions; the two blocks of this kind differ only in `pool`."""
    once = conv(x, "branch3x3_1", 384)
    double = conv(conv(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, (3, 3))
    parts = [
        conv(x, "branch1x1", 320),
        conv(once, "branch3x3_2a", 384, (1, 3)),
        conv(once, "branch3x3_2b", 384, (3, 1)),
        conv(double, "branch3x3dbl_3a", 384, (1, 3)),
        conv(double, "branch3x3dbl_3b", 384, (3, 1)),
        conv(pool(x), "branch_pool", 192),
    ]
    return jnp.concatenate(parts, axis=-1)


def _max_pool(x, stride, padding=0):
    return _reduce_windows(x, -jnp.inf, jax.lax.max, stride, padding)


def _average_pool(x):
    """The mean over those of 3 x 3 positions that are not padding."""
    ones = jnp.ones((1, *x.shape[1:3], 1))
    total, count = (_reduce_windows(each, 0.0, jax.lax.add, 1, 1) for each in (x, ones))
    return total / count


def _reduce_windows(x, initial, combine, stride, padding):
    """Combines every 3 x 3 positions with `combine`."""
    around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return jax.lax.reduce_window(x, initial, combine, (1, 3, 3, 1), (1, stride, stride, 1), around)
