"""What every kind of token implements, grey levels as tokens, and statistics of tokens."""

import abc
import math

import jax
import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax.config.data import ImageSize, height_and_width

AnyArray = np.ndarray | jax.Array  # what a user may pass


class Codec(abc.ABC):
    """Turns images into tokens and tokens into images; each kind of token is one subclass.

    `encode` and `decode` take and return NumPy arrays. Tokens are in raster order. Where images are
    clips, arrays of images have an axis of frames before the rows.
    """

    vocabulary: int  # V: tokens are 0 .. V-1
    grid: tuple[int, ...]  # (steps in time,) rows and columns of tokens; T is their product
    image_shape: tuple[int, ...]  # (F,) H, W, C of the images that are encoded
    lossless: bool = False  # whether `decode` restores every image that `encode` takes
    on_devices: bool = False  # whether a network encodes, best many images at once on JAX devices
    # The palette or the tokenizer that the tokens refer to; None where the settings say it all.
    definition: object = None

    @property
    def sides(self) -> tuple[Int[np.ndarray, " positions"], ...]:
        """Of each axis of the grid: the frames or pixels that each position stands for."""
        axes = zip(self.image_shape[:-1], self.grid, strict=True)
        return tuple(np.full(count, size // count) for size, count in axes)

    @property
    def similarity_order(self) -> Int[np.ndarray, " V"]:
        """All tokens, ordered so that similar tokens are neighbours, for smaller token caches."""
        return np.arange(self.vocabulary)

    @abc.abstractmethod
    def encode(self, images: UInt8[AnyArray, "B *F H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens; ValueError where a pixel has no token or the shape is another one."""

    @abc.abstractmethod
    def decode(
        self, tokens: Int[AnyArray, "B N"], grid: tuple[int, ...] | None = None
    ) -> UInt8[np.ndarray, "B *F height width C"]:
        """Images in the data set's range of values; `grid` is for tokens of another image size."""

    def picture(self, images: UInt8[np.ndarray, "B *F H W C"]) -> UInt8[np.ndarray, "B *F H W 3"]:
        """The images as RGB in 0..255, for display."""
        return np.broadcast_to(images, (*images.shape[:-1], 3))


class GreyCodec(Codec):
    """The token of a patch of pixels stands for their grey levels, each 0 .. levels-1.

    A patch of n pixels has levels^n tokens. Of a clip, a patch may reach over several frames.
    """

    lossless = True

    def __init__(self, levels: int, size: ImageSize, patch: tuple[int, ...] = (), frames: int = 0):
        pixels = (frames,) * (frames > 0) + height_and_width(size)
        self.levels, self.patch = levels, (1,) * (len(pixels) - len(patch)) + patch
        self.powers = levels ** np.arange(math.prod(self.patch))[::-1]
        self.vocabulary = levels ** len(self.powers)
        self.grid = tuple(n // side for n, side in zip(pixels, self.patch, strict=True))
        self.image_shape = (*pixels, 1)

    def encode(self, images: UInt8[np.ndarray, "B *F H W 1"]) -> Int[np.ndarray, "B T"]:
        if images.size and images.max() >= self.levels:
            levels = f"{self.levels} grey levels take 0 to {self.levels - 1}."
            raise ValueError(f"images hold the value {images.max()}; {levels}")
        axes = [n for pair in zip(self.grid, self.patch, strict=True) for n in pair]
        # From [B, rows, height of a patch, columns, width of a patch] to patches, pixels.
        order = [0, *range(1, len(axes), 2), *range(2, len(axes) + 1, 2)]
        patches = images.reshape(-1, *axes).transpose(order)
        patches = patches.reshape(len(images), -1, len(self.powers))
        return (patches @ self.powers).astype(np.int32)

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, ...] | None = None
    ) -> UInt8[np.ndarray, "B *F height width 1"]:
        grid, count = grid or self.grid, len(self.grid)
        values = (np.asarray(tokens)[..., None] // self.powers % self.levels).astype(np.uint8)
        patches = values.reshape(-1, *grid, *self.patch)
        order = [0, *(axis for i in range(1, count + 1) for axis in (i, count + i))]
        pixels = (n * side for n, side in zip(grid, self.patch, strict=True))
        return patches.transpose(order).reshape(len(tokens), *pixels, 1)

    def picture(self, images: UInt8[np.ndarray, "B *F H W 1"]) -> UInt8[np.ndarray, "B *F H W 3"]:
        """The levels, stretched over 0..255, in each of three channels."""
        stretched = np.rint(images * (255 / (self.levels - 1))).astype(np.uint8)
        return np.repeat(stretched, 3, axis=-1)


class FrameCodec(Codec):
    """Clips as tokens: the tokens of each of `frames` frames, made by the codec of an image."""

    def __init__(self, codec: Codec, frames: int):
        self.codec, self.definition = codec, codec.definition
        self.vocabulary, self.lossless = codec.vocabulary, codec.lossless
        self.grid, self.image_shape = (frames, *codec.grid), (frames, *codec.image_shape)
        self.on_devices = codec.on_devices

    @property
    def similarity_order(self) -> Int[np.ndarray, " V"]:
        return self.codec.similarity_order

    def encode(self, images: UInt8[AnyArray, "B F H W C"]) -> Int[np.ndarray, "B T"]:
        tokens = self.codec.encode(images.reshape(-1, *images.shape[2:]))
        return tokens.reshape(len(images), -1)

    def decode(
        self, tokens: Int[AnyArray, "B N"], grid: tuple[int, ...] | None = None
    ) -> UInt8[np.ndarray, "B F height width C"]:
        frames, *of_frame = grid or self.grid
        found = self.codec.decode(tokens.reshape(len(tokens) * frames, -1), tuple(of_frame))
        return found.reshape(len(tokens), frames, *found.shape[1:])

    def picture(self, images: UInt8[np.ndarray, "B F H W C"]) -> UInt8[np.ndarray, "B F H W 3"]:
        found = self.codec.picture(images.reshape(-1, *images.shape[2:]))
        return found.reshape(*images.shape[:2], *found.shape[1:])


class TokenStatistics:
    """Accumulates the floors that a network's loss in nats per token is compared with."""

    def __init__(self, codec: Codec):
        self.codec, self.counts = codec, np.zeros(codec.vocabulary, np.int64)
        self.images, self.squared_error, self.values, self.same_left = 0, 0.0, 0, 0

    def add(self, images: UInt8[np.ndarray, "B *F H W C"], tokens: Int[np.ndarray, "B T"]) -> None:
        self.images += len(images)
        self.counts += np.bincount(tokens.reshape(-1), minlength=len(self.counts))
        restored = self.codec.decode(tokens).astype(np.int32)
        self.squared_error += float(np.square(restored - images).sum())
        self.values += images.size
        self.same_left += int((tokens[:, 1:] == tokens[:, :-1]).sum())

    def numbers(self) -> dict[str, float | int | None]:
        """Statistics of all images so far.

        "mean_squared_error" is per channel value and "psnr" in dB (None: lossless); "tokens_used"
        counts the different tokens; "unigram_nats" is the entropy of single tokens; "same_as_left"
        is the share of tokens that equal the token before them in raster order.
        """
        share = self.counts[self.counts > 0] / max(self.counts.sum(), 1)
        error = self.squared_error / max(self.values, 1)
        return {
            "images": self.images,
            "mean_squared_error": error,
            "psnr": float(10 * np.log10(255**2 / error)) if error else None,
            "tokens_used": len(share),
            "unigram_nats": float(-(share * np.log(share)).sum()),
            "same_as_left": self.same_left / max(self.counts.sum() - self.images, 1),
        }
