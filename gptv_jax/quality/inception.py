"""InceptionV3 as the published FID uses it: the network of TensorFlow's weights of 2015-12-05.

It is the network that pytorch-fid calls `fid_inception_v3`, and takes its weights under the names
of that state dict, from a .safetensors file (docs/generation_quality.md says how to make one). It
differs from the usual InceptionV3: average pools do not count the padding, the last block has a
maximum in the place of one, and there are 1,008 classes.
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

SIDE = 299  # pixels, height and width of what the network sees
WIDTH, CLASSES = 2048, 1008  # features of the last pool; the classes of 2015
MARK = "Mixed_"  # with which names of its tensors begin, and no others'
EPSILON = 1e-3  # of batch normalisation
UNUSED = "num_batches_tracked"  # what PyTorch counts beside the statistics, where it does

# Applies the convolution of that name, batch normalisation and ReLU: (x, name, channels, kernel,
# stride, padding), the last three along height and width.
Conv = Callable[..., Float[Array, "B H W C"]]


class Inception:
    """2,048 pool features and 1,008 class probabilities of images, float32, on one device.

    Probabilities are a softmax of the logits without their bias, as the published Inception Score
    has them: the code of Salimans et al. 2016 and ADM's evaluator leave it out.
    """

    name = "Inception-v3 2015-12-05, bilinear to 299 pixels"
    size = WIDTH
    of_pictures = True

    def __init__(self, path: str | pathlib.Path):
        """Reads the weights.

        Args:
          path: of the .safetensors file.

        Raises:
          InputError: no such file, or tensors that are missing, misshapen or left over; all are
            listed.
        """
        path = pathlib.Path(path).absolute()
        given = {n: a for n, a in files.read_safetensors(path)[0].items() if not n.endswith(UNUSED)}
        accounted = StrictReader.of_arrays(given)
        taken = {name: accounted.take(name, shape) for name, shape in weight_shapes().items()}
        accounted.close(path, "the FID's InceptionV3 (pt_inception-2015-12-05 of pytorch-fid)")
        if odd := [name for name, array in taken.items() if not np.isfinite(array).all()]:
            raise InputError(f"{path} holds values that are not finite, in {', '.join(odd)}.")
        self.hash = files.hash_arrays(taken)
        self._weights = jax.device_put(_folded(taken), jax.local_devices()[0])

    def __call__(
        self, images: UInt8[np.ndarray, "B H W C"]
    ) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B classes"]]:
        """Features and probabilities of pictures, 0 to 255, RGB or grey, of any size."""
        device = jax.local_devices()[0]
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",))):
            resized = _resized(jax.device_put(images, device))
            pooled, probabilities = _read(self._weights, resized)
        return np.asarray(pooled), np.asarray(probabilities)


@functools.cache
def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their names in PyTorch, which stores kernels [O, I, H, W]."""
    shapes = {"fc.weight": (CLASSES, WIDTH), "fc.bias": (CLASSES,)}

    def conv(x, name, channels, kernel, stride, padding):
        shapes[f"{name}.conv.weight"] = (channels, x.shape[-1], *kernel)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{statistic}"] = (channels,)
        zeros = jnp.zeros((*kernel, x.shape[-1], channels)), jnp.zeros(channels)
        return _convolved(x, *zeros, stride, padding)

    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    jax.eval_shape(functools.partial(_pooled, conv), image)
    return shapes


def _folded(weights: dict[str, np.ndarray]) -> dict:
    """Kernels [H, W, I, O] that normalise too, their biases, and the class weights [D, C]."""
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
def _read(weights: dict, images: Float[Array, "B 299 299 3"]) -> tuple[Array, Array]:
    def conv(x, name, channels, kernel, stride, padding):
        return _convolved(x, *weights[name], stride, padding)

    pooled = _pooled(conv, images)
    logits = jnp.matmul(pooled, weights["fc"], precision=jax.lax.Precision.HIGHEST)
    return pooled, jax.nn.softmax(logits, axis=-1)


@jax.jit
def _resized(images: UInt8[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """From -1 to 1; without antialiasing, as pytorch-fid resizes, also where that makes smaller."""
    size = (len(images), SIDE, SIDE, images.shape[-1])
    x = jax.image.resize(images.astype(jnp.float32), size, "bilinear", antialias=False)
    return jnp.broadcast_to(x / 127.5 - 1, (*size[:3], 3))


def _convolved(x, kernel, bias, stride, padding) -> Float[Array, "B H W C"]:
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(each, each) for each in padding],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # or TPUs round to bfloat16, GPUs to TF32
    )
    return jax.nn.relu(x + bias[None, None, None])


def _pooled(conv: Conv, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B D"]:
    """The whole network: the mean over positions of the last block's output."""

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
    """The convolutions of one block; each keeps the size of the image unless it has a stride."""

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
    """17 x 17 positions, with kernels that are rows or columns of seven."""
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
    """8 x 8 positions; `pool` is what the two blocks of this form differ in."""
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
    """Of 3 x 3 positions."""
    return _windows(x, -jnp.inf, jax.lax.max, stride, padding)


def _average_pool(x):
    """Of those of 3 x 3 positions that are not padding."""
    ones = jnp.ones((1, *x.shape[1:3], 1))
    total, count = (_windows(each, 0.0, jax.lax.add, 1, 1) for each in (x, ones))
    return total / count


def _windows(x, initial, combine, stride, padding):
    around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return jax.lax.reduce_window(x, initial, combine, (1, 3, 3, 1), (1, stride, stride, 1), around)
