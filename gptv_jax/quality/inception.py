"""InceptionV3 as the published FID uses it: the network of TensorFlow's weights of 2015-12-05.

pytorch-fid calls this network `fid_inception_v3`. The weights are that network's state dict as a
.safetensors file (docs/generation_quality.md says how to make one). The network differs from the
usual InceptionV3 in three ways: average pools do not count the padding, the last block takes a
maximum in place of an average, and there are 1,008 classes.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from gptv_jax import files, hardware
from gptv_jax.weights.strict_reader import read_state_dict

NAME = "Inception-v3 2015-12-05, bilinear to 299 pixels"
SIDE = 299  # height and width in pixels to which images are resized
WIDTH, CLASSES = 2048, 1008  # features of the last pool; classes of the weights of 2015
PREFIX = "Mixed_"  # begins names of this network's tensors and of no other network's
EPSILON = 1e-3  # of batch normalisation
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of batch normalisation


def load(path: str | pathlib.Path) -> tuple[Callable, str]:
    """A function of RGB or grey images of any size, 0 to 255, and the hash of its weights.

    The function computes 2,048 pool features and 1,008 class probabilities, in float32 on one
    device. Probabilities are the softmax of the logits without bias: the code of Salimans et al.
    2016 and ADM's evaluator leave the bias out of the Inception Score. Raises InputError where the
    file is missing or damaged, and lists all tensors that are missing, misshapen, left over or not
    finite.
    """
    path = files.user_path(path)
    network = "the FID's InceptionV3 (pt_inception-2015-12-05 of pytorch-fid)"
    # The counters are PyTorch's, and only some versions save them.
    weights = read_state_dict(path, weight_shapes(), network, ignored=r"num_batches_tracked$")
    device = hardware.devices(local=True)[0]
    placed = jax.device_put(_fold_batch_norm(weights), device)

    def extract(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Array, Array]:
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",))):
            return _forward(placed, _resize(jax.device_put(images, device)))

    return extract, files.hash_arrays(weights)


class Conv(NamedTuple):
    """A convolution of images, or with a kernel of three sides of clips, batch norm and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, ...] = (1, 1)
    stride: int = 1
    padding: bool = True  # with zeros, so that a stride of 1 keeps the size


# Blocks by the prefix of their tensors. A block is a list of branches, whose outputs are
# concatenated. A branch is a list of steps: convolutions and pools. XLA computes a convolution that
# begins two branches once.
Blocks = dict[str, list[list]]
SQUARE, ROW, COLUMN = (3, 3), (1, 7), (7, 1)
_max_pool = functools.partial(nnx.max_pool, window_shape=SQUARE, strides=(2, 2))
_average_pool = functools.partial(
    nnx.avg_pool, window_shape=SQUARE, padding="SAME", count_include_pad=False
)
STEM = [
    Conv("Conv2d_1a_3x3", 32, SQUARE, stride=2, padding=False),
    Conv("Conv2d_2a_3x3", 32, SQUARE, padding=False),
    Conv("Conv2d_2b_3x3", 64, SQUARE),
    _max_pool,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, SQUARE, padding=False),
    _max_pool,
]
DOUBLE = [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, SQUARE)]


def _chain(name: str, channels: int, *kernels: tuple[int, int]) -> list[Conv]:
    return [Conv(f"{name}_{i}", channels, kernel) for i, kernel in enumerate(kernels, start=1)]


def _block_a(channels: int) -> list[list]:
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))],
        [*DOUBLE, Conv("branch3x3dbl_3", 96, SQUARE)],
        [_average_pool, Conv("branch_pool", channels)],
    ]


def _block_c(channels: int) -> list[list]:
    once = _chain("branch7x7", channels, (1, 1), ROW)
    twice = _chain("branch7x7dbl", channels, (1, 1), COLUMN, ROW, COLUMN)
    return [
        [Conv("branch1x1", 192)],
        [*once, Conv("branch7x7_3", 192, COLUMN)],
        [*twice, Conv("branch7x7dbl_5", 192, ROW)],
        [_average_pool, Conv("branch_pool", 192)],
    ]


def _block_e(pool: Callable) -> list[list]:
    once = Conv("branch3x3_1", 384)
    double = [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, SQUARE)]
    return [
        [Conv("branch1x1", 320)],
        [once, Conv("branch3x3_2a", 384, (1, 3))],
        [once, Conv("branch3x3_2b", 384, (3, 1))],
        [*double, Conv("branch3x3dbl_3a", 384, (1, 3))],
        [*double, Conv("branch3x3dbl_3b", 384, (3, 1))],
        [pool, Conv("branch_pool", 192)],
    ]


BLOCKS: Blocks = {
    "": [STEM],  # from 299 x 299 to 35 x 35 positions
    **{f"Mixed_{name}.": _block_a(n) for name, n in (("5b", 32), ("5c", 64), ("5d", 64))},
    "Mixed_6a.": [  # from 35 x 35 to 17 x 17 positions
        [Conv("branch3x3", 384, SQUARE, stride=2, padding=False)],
        [*DOUBLE, Conv("branch3x3dbl_3", 96, SQUARE, stride=2, padding=False)],
        [_max_pool],
    ],
    **{f"Mixed_6{x}.": _block_c(n) for x, n in (("b", 128), ("c", 160), ("d", 160), ("e", 192))},
    "Mixed_7a.": [  # from 17 x 17 to 8 x 8 positions
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, SQUARE, stride=2, padding=False)],
        [
            *_chain("branch7x7x3", 192, (1, 1), ROW, COLUMN),
            Conv("branch7x7x3_4", 192, SQUARE, stride=2, padding=False),
        ],
        [_max_pool],
    ],
    "Mixed_7b.": _block_e(_average_pool),
    "Mixed_7c.": _block_e(functools.partial(nnx.max_pool, window_shape=SQUARE, padding="SAME")),
}


def kernels(blocks: Blocks, width: int = 3) -> dict[str, tuple[int, ...]]:
    """Shape of every convolution's kernel by its name, [O, I, *sides] as PyTorch stores kernels.

    `width` is the number of channels that the first block takes.
    """
    shapes = {}
    for prefix, branches in blocks.items():
        widths = []
        for branch in branches:
            inputs = width
            for step in (step for step in branch if isinstance(step, Conv)):
                shapes[prefix + step.name] = (step.channels, inputs, *step.kernel)
                inputs = step.channels
            widths.append(inputs)
        width = sum(widths)
    return shapes


@functools.cache
def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name, as PyTorch stores them: kernels are [O, I, H, W]."""
    shapes = {"fc.weight": (CLASSES, WIDTH), "fc.bias": (CLASSES,)}
    for name, shape in kernels(BLOCKS).items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{each}": shape[:1] for each in STATISTICS}
    return shapes


def fold(kernel: np.ndarray, gain, bias, mean, variance) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [*sides, I, O] and bias of a convolution [O, I, *sides] with its batch norm."""
    vectors = (np.asarray(each, np.float64) for each in (gain, bias, mean, variance))
    gain, bias, mean, variance = vectors
    scale = gain / np.sqrt(variance + EPSILON)
    kernel = np.moveaxis(kernel, (0, 1), (-1, -2)) * scale
    return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


def _fold_batch_norm(weights: dict[str, np.ndarray]) -> dict:
    """Kernel [H, W, I, O] and bias of every convolution with its batch normalisation, and `fc`."""
    names = kernels(BLOCKS)
    tensors = {n: [f"{n}.conv.weight", *(f"{n}.bn.{each}" for each in STATISTICS)] for n in names}
    folded = {name: fold(*(weights[each] for each in of)) for name, of in tensors.items()}
    return {"fc": weights["fc.weight"].T} | folded


@jax.jit
def _resize(images: UInt8[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """Values from -1 to 1. Like pytorch-fid, without antialiasing even of larger images."""
    size = (len(images), SIDE, SIDE, images.shape[-1])
    x = jax.image.resize(images.astype(jnp.float32), size, "bilinear", antialias=False)
    return jnp.broadcast_to(x / 127.5 - 1, (*size[:3], 3))


@jax.jit
def _forward(weights: dict, x: Float[Array, "B 299 299 3"]) -> tuple[Array, Array]:
    """The mean over positions of the last block's output, and the class probabilities."""
    pooled = run(BLOCKS, weights, x).mean(axis=(1, 2))
    logits = jnp.matmul(pooled, weights["fc"], precision=jax.lax.Precision.HIGHEST)
    return pooled, jax.nn.softmax(logits, axis=-1)


def run(blocks: Blocks, weights: dict, x: Float[Array, "B *sides C"]) -> Float[Array, "B *_ D"]:
    """The output of the last block; `weights` has kernel and bias of every convolution by name."""
    for prefix, branches in blocks.items():
        outputs = []
        for branch in branches:
            y = x
            for step in branch:
                convolves = isinstance(step, Conv)
                y = convolve(y, step, *weights[prefix + step.name]) if convolves else step(y)
            outputs.append(y)
        x = jnp.concatenate(outputs, axis=-1)
    return x


def convolve(x: Float[Array, "B *sides C"], conv: Conv, kernel, bias) -> Float[Array, "B *_ D"]:
    """The convolution and ReLU, in float32 on every device."""
    letters = "DHW"[-len(conv.kernel) :]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (conv.stride,) * len(conv.kernel),
        "SAME" if conv.padding else "VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=jax.lax.Precision.HIGHEST,  # or TPUs round to bfloat16, GPUs to TF32
    )
    return jax.nn.relu(y + bias[(None,) * (y.ndim - 1)])
