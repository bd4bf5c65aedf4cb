"""Grey levels as tokens: one token a pixel, lossless."""

import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax.tokens.codec import Codec


class GreyCodec(Codec):
    """The token of a pixel is its grey level, 0 .. levels-1."""

    lossless = True

    def __init__(self, levels: int, size: int):
        self.vocabulary, self.size = levels, size
        self.grid, self.image_shape = (size, size), (size, size, 1)

    def encode(self, images: UInt8[np.ndarray, "B H W 1"]) -> Int[np.ndarray, "B T"]:
        if images.size and images.max() >= self.vocabulary:
            raise ValueError(
                f"images hold the value {images.max()}; {self.vocabulary} grey levels take 0 to "
                f"{self.vocabulary - 1}."
            )
        return images.reshape(len(images), -1).astype(np.int32)

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width 1"]:
        return tokens.astype(np.uint8).reshape(len(tokens), *(grid or self.grid), 1)

    def picture(self, images: UInt8[np.ndarray, "B H W 1"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The levels, stretched over 0..255, in each of three channels."""
        stretched = np.rint(images * (255 / (self.vocabulary - 1))).astype(np.uint8)
        return np.repeat(stretched, 3, axis=-1)
