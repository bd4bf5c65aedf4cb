"""I3D (Carreira and Zisserman 2017, arXiv:1705.07750), whose features make the published FVD.

The Frechet video distance of Unterthiner et al. 2018 (arXiv:1812.01717) compares the 400 logits of
Kinetics, as means over time. The weights are a .safetensors file under the names of PyTorch's port
or of MAGVIT's (docs/generation_quality.md says how to make one).
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
from gptv_jax.errors import InputError
from gptv_jax.quality.inception import Blocks, Conv, fold, kernels, run
from gptv_jax.weights.strict_reader import read_state_dict

WIDTH, CLASSES = 1024, 400  # channels of the last block; classes of Kinetics-400
FRAMES = 9  # the fewest: time is halved three times, and the last pool takes two steps
SIDE = 224  # height and width in pixels that the network reads
AT_ONCE = 8  # clips in a batch of the network
FIRST, LOGITS = "Conv3d_1a_7x7", "logits"  # names of the first and of the last convolution
# Sides in pixels to which frames are resized, one after the other, and the place of a pixel's
# centre: TensorFlow 1 takes the pixel's corner. The protocol of BAIR's robots begins with 64.
RESIZES = {
    "tensorflow": ((SIDE,), 0.0),
    "tensorflow_64": ((64, SIDE), 0.0),
    "pytorch": ((SIDE,), 0.5),
}


class Names(NamedTuple):
    """How a program names the tensors of a convolution, after the convolution's own name."""

    kernel: str
    statistics: tuple[str, ...]  # of batch normalisation: gain, bias, mean, variance
    bias: str  # of the logits


# Kernels are [O, I, T, H, W] in PyTorch and [T, H, W, I, O] in Flax. MAGVIT's file has no gains.
PYTORCH = Names(
    "conv3d.weight", ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), "conv3d.bias"
)
FLAX = Names(
    "conv_3d.kernel",
    tuple(f"batch_norm.{each}" for each in ("gamma", "beta", "moving_mean", "moving_variance")),
    "conv_3d.bias",
)
BRANCHES = {  # names of convolutions in PyTorch and in Flax
    "b0": "Branch_0.Conv3d_0a_1x1",
    "b1a": "Branch_1.Conv3d_0a_1x1",
    "b1b": "Branch_1.Conv3d_0b_3x3",
    "b2a": "Branch_2.Conv3d_0a_1x1",
    "b2b": "Branch_2.Conv3d_0b_3x3",
    "b3b": "Branch_3.Conv3d_0b_1x1",
    LOGITS: "Logits.Conv3d_0c_1x1",
}
ONE, CUBE = (1, 1, 1), (3, 3, 3)


def _pool(window: tuple[int, int, int], strides: tuple[int, int, int]) -> Callable:
    return functools.partial(nnx.max_pool, window_shape=window, strides=strides, padding="SAME")


def _mixed(*widths: int) -> list[list]:
    a, b, c, d, e, f = widths
    return [
        [Conv("b0", a, ONE)],
        [Conv("b1a", b, ONE), Conv("b1b", c, CUBE)],
        [Conv("b2a", d, ONE), Conv("b2b", e, CUBE)],
        [_pool(CUBE, ONE), Conv("b3b", f, ONE)],
    ]


STEM = [  # 224 x 224 pixels to 28 x 28 positions, and half of the frames
    Conv(FIRST, 64, (7, 7, 7), stride=2),
    _pool((1, 3, 3), (1, 2, 2)),
    Conv("Conv3d_2b_1x1", 64, ONE),
    Conv("Conv3d_2c_3x3", 192, CUBE),
    _pool((1, 3, 3), (1, 2, 2)),
]
BLOCKS: Blocks = {
    "": [STEM],
    "Mixed_3b.": _mixed(64, 96, 128, 16, 32, 32),
    "Mixed_3c.": _mixed(128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": [[_pool(CUBE, (2, 2, 2))]],
    "Mixed_4b.": _mixed(192, 96, 208, 16, 48, 64),
    "Mixed_4c.": _mixed(160, 112, 224, 24, 64, 64),
    "Mixed_4d.": _mixed(128, 128, 256, 24, 64, 64),
    "Mixed_4e.": _mixed(112, 144, 288, 32, 64, 64),
    "Mixed_4f.": _mixed(256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": [[_pool((2, 2, 2), (2, 2, 2))]],
    "Mixed_5b.": _mixed(256, 160, 320, 32, 128, 128),
    "Mixed_5c.": _mixed(384, 192, 384, 48, 128, 128),
}


def load(path: str | pathlib.Path, resize: str = "tensorflow") -> tuple[Callable, str]:
    """A function of RGB or grey clips, 0 to 255, of `FRAMES` frames or more, and its weights' hash.

    The function computes the 400 mean logits in float32 on one device. `resize` is one of
    `RESIZES`. Raises InputError where the file is missing or damaged, and lists all tensors that
    are missing, misshapen, left over or not finite. Batch norms without gains have gains of 1.
    """
    if resize not in RESIZES:
        raise InputError(f"clips are resized {resize!r}; take one of {', '.join(RESIZES)}.")
    path = files.user_path(path)
    with files.open_safetensors(path) as file:
        found = file.keys()
    form = FLAX if f"{FIRST}.{FLAX.kernel}" in found else PYTORCH
    wanted = tensors(form, gains=any(name.endswith(form.statistics[0]) for name in found))
    shapes = {name: shape for each in wanted.values() for name, shape in each.items()}
    network = "I3D with the 400 classes of Kinetics"
    weights = read_state_dict(path, shapes, network, ignored=r"num_batches_tracked$")
    device = hardware.devices(local=True)[0]
    placed = jax.device_put(_folded(form, wanted, weights), device)

    def extract(clips: UInt8[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B 400"]:
        made = []
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",))):
            for first in range(0, len(clips), AT_ONCE):
                part = jax.device_put(clips[first : first + AT_ONCE], device)
                made.append(np.asarray(_mean_logits(placed, resized(part, resize))))
        return np.concatenate(made)

    return extract, files.hash_arrays(weights)


def tensors(form: Names, *, gains: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of every convolution's tensors in a file: kernel, then batch norm or bias.

    `gains` says whether the batch norms have gains.
    """
    found, statistics = {}, form.statistics[not gains :]
    for name, shape in (kernels(BLOCKS) | {LOGITS: (CLASSES, WIDTH, *ONE)}).items():
        own = name
        if form is FLAX:
            shape, (*block, last) = (*shape[2:], shape[1], shape[0]), name.split(".")
            own = ".".join([*block, BRANCHES.get(last, last)])
        vector = shape[:1] if form is PYTORCH else shape[-1:]
        vectors = (form.bias,) if name == LOGITS else statistics
        found[name] = {f"{own}.{form.kernel}": shape} | {f"{own}.{v}": vector for v in vectors}
    return found


def _folded(form: Names, wanted: dict, weights: dict[str, np.ndarray]) -> dict:
    """Kernel [T, H, W, I, O] and bias of every convolution by the convolution's name."""
    folded = {}
    for name, own in wanted.items():
        kernel, *vectors = (weights[each] for each in own)
        if form is FLAX:
            kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
        if name == LOGITS:
            folded[name] = kernel[:, :, 0, 0, 0].T, *vectors
        else:
            gain = vectors[:-3] or [1.0]
            folded[name] = fold(kernel, *gain, *vectors[-3:])
    return folded


def _bilinear(side: int, new: int, centre: float) -> Float[np.ndarray, "new side"]:
    """Weight of each of `side` pixels in each of `new` ones, without antialiasing."""
    at = np.maximum((np.arange(new) + centre) * (side / new) - centre, 0)
    low = np.floor(at).astype(int)
    weights = np.zeros((new, side), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - (at - low))
    np.add.at(weights, (np.arange(new), np.minimum(low + 1, side - 1)), at - low)
    return weights


@functools.partial(jax.jit, static_argnums=1)
def resized(clips: UInt8[Array, "B F H W C"], resize: str) -> Float[Array, "B F 224 224 3"]:
    """Values from -1 to 1, resized as one of `RESIZES` says."""
    (sides, centre), x = RESIZES[resize], clips.astype(jnp.float32)
    for side in sides:
        rows, columns = (_bilinear(n, side, centre) for n in x.shape[2:4])
        highest = {"precision": jax.lax.Precision.HIGHEST}
        x = jnp.einsum("ih,bfhwc,jw->bfijc", rows, x, columns, **highest)
    return jnp.broadcast_to(x / 127.5 - 1, (*x.shape[:-1], 3))


@jax.jit
def _mean_logits(weights: dict, x: Float[Array, "B F 224 224 3"]) -> Float[Array, "B 400"]:
    pooled = nnx.avg_pool(run(BLOCKS, weights, x), (2, 7, 7)).mean(axis=(1, 2, 3))
    kernel, bias = weights[LOGITS]
    return jnp.matmul(pooled, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]
