"""Sizes of networks that the benchmarks measure, for both frameworks, as JSON goes between them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A network's shape."""

    width: int
    layers: int
    heads: int
    tokens: int  # T, a square number
    vocabulary: int

    def __str__(self) -> str:
        return f"D{self.width} L{self.layers} T{self.tokens}"

    def asdict(self) -> dict[str, int]:
        """As the factories' arguments have it."""
        return dataclasses.asdict(self)


LONG = Size(width=256, layers=8, heads=4, tokens=1024, vocabulary=512)
SMALL = Size(width=128, layers=6, heads=4, tokens=64, vocabulary=17)  # about that of digits.py
QUICK = Size(width=32, layers=2, heads=2, tokens=16, vocabulary=17)
IGPT = {
    "iGPT-S": Size(width=512, layers=24, heads=8, tokens=1024, vocabulary=512),
    "iGPT-M": Size(width=1024, layers=36, heads=8, tokens=1024, vocabulary=512),
    "iGPT-L": Size(width=1536, layers=48, heads=16, tokens=1024, vocabulary=512),
}
