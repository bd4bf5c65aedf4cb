"""Statistics of tokens: how much encoding loses, and how predictable tokens are by counting."""

import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax.tokens import Codec


class TokenStatistics:
    """Accumulates the floors that a network's loss in nats per token is compared with."""

    def __init__(self, codec: Codec):
        V, self.codec = codec.vocabulary, codec
        self.counts = np.zeros(V, np.int64)
        self.images, self.squared_error, self.values, self.same_left = 0, 0.0, 0, 0

    def add(self, images: UInt8[np.ndarray, "B H W C"], tokens: Int[np.ndarray, "B T"]) -> None:
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
