"""How well the continuation of given frames meets the true frames, and floors without a network.

`copied` shows the last given frame for ever; `shifted` moves on at a constant velocity. A network
that has understood motion is far above both.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax.train.autoencoding import psnr, ssim

REACH = 16  # pixels a frame, the fastest motion that `shifted` looks for
# What moves in over an edge: what left at the other edge, or the edge's pixels once more.
EDGES = ("wrap", "edge")


def copied(
    frames: UInt8[np.ndarray, "B K H W C"], count: int
) -> UInt8[np.ndarray, "B count H W C"]:
    """The last given frame, `count` times."""
    return frames[:, -1:].repeat(count, axis=1)


def shifted(
    frames: UInt8[np.ndarray, "B K H W C"], count: int
) -> UInt8[np.ndarray, "B count H W C"]:
    """The last given frame moved on, `count` times, by the shift that led to it.

    The shift is by whole pixels, up to a quarter of a side and up to `REACH`, with one of `EDGES`.
    It is the shift with the least squared error between the last given frame and the shifted frame
    before it; among equal errors the smallest shift. A single given frame is copied.
    """
    if frames.shape[1] < 2:
        return copied(frames, count)
    before, last = (frames[:, at].mean(axis=-1, dtype=np.float32)[..., None] for at in (-2, -1))
    reach = [min(side // 4, REACH) for side in last.shape[1:3]]
    steps = [(y, x) for y in range(-reach[0], reach[0] + 1) for x in range(-reach[1], reach[1] + 1)]
    moves = [
        (y, x, mode) for y, x in sorted(steps, key=lambda s: sum(map(abs, s))) for mode in EDGES
    ]
    errors = [np.square(_moved(before, *move) - last).mean(axis=(1, 2, 3)) for move in moves]
    best = np.argmin(errors, axis=0)
    made = [frames[:, -1]]
    for _ in range(count):
        after = [_moved(each[None], *moves[i])[0] for each, i in zip(made[-1], best, strict=True)]
        made.append(np.stack(after))
    return np.stack(made[1:], axis=1)


def _moved(images: np.ndarray, down: int, right: int, mode: str) -> np.ndarray:
    """Images [B, H, W, C] moved by whole pixels; `mode` is one of `EDGES`."""
    (_, height, width, _), y, x = images.shape, abs(down), abs(right)
    padded = np.pad(images, ((0, 0), (y, y), (x, x), (0, 0)), mode)
    return padded[:, y - down : y - down + height, x - right : x - right + width]


def scores(
    made: UInt8[np.ndarray, "B N H W C"], true: UInt8[np.ndarray, "B N H W C"]
) -> dict[str, Float[np.ndarray, "B N"]]:
    """Of each frame of pixels 0..255: "exact", 1 where all pixels are right; "psnr_db"; "ssim".

    A frame that is exactly right counts as one that misses by half a level, 54 dB, as where the
    distortion of tokens is measured.
    """
    squared = np.square(made.astype(np.float32) - true).mean(axis=(2, 3, 4))
    flat = (each.reshape(-1, *each.shape[2:]).astype(np.float32) for each in (made, true))
    return {
        "exact": (made == true).all(axis=(2, 3, 4)).astype(np.float32),
        "psnr_db": np.asarray(psnr(jnp.maximum(squared, 0.25), 255.0)),
        "ssim": np.asarray(_ssim(*flat)).reshape(squared.shape),
    }


_ssim = jax.jit(lambda made, true: ssim(made, true, 255.0))
