"""Grey levels as tokens: one token a pixel, lossless."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt8


@dataclasses.dataclass(frozen=True)
class GreyLevels:
    """Token = level of the pixel, 0 .. levels-1."""

    lossless: ClassVar = True
    on_devices: ClassVar = False
    definition: ClassVar = None
    levels: int
    size: int  # pixels, height and width

    @property
    def vocabulary(self) -> int:
        """V, the number of levels."""
        return self.levels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens: those of the pixels."""
        return (self.size, self.size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        return (self.size, self.size, 1)

    @property
    def similarity_order(self) -> Int[np.ndarray, "V"]:
        """Darker to brighter, which is the order of the tokens themselves."""
        return np.arange(self.levels)

    def encode(self, images: UInt8[np.ndarray, "B H W 1"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens in raster order.

        Raises:
          ValueError: a pixel at or above `levels`.
        """
        if images.size and images.max() >= self.levels:
            raise ValueError(
                f"images hold the value {images.max()}; {self.levels} grey levels take 0 to "
                f"{self.levels - 1}."
            )
        return images.reshape(len(images), -1).astype(np.int32)

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width 1"]:
        """The exact inverse of `encode`; of other rows and columns where `grid` says so."""
        return tokens.astype(np.uint8).reshape(len(tokens), *(grid or self.grid), 1)

    def picture(self, images: UInt8[np.ndarray, "B H W 1"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Levels stretched over 0..255, the same in each of three channels."""
        stretched = np.rint(images * (255 / (self.levels - 1))).astype(np.uint8)
        return np.repeat(stretched, 3, axis=-1)
