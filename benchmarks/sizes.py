"""Shapes of the networks that the benchmarks measure, for both frameworks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A network's shape."""

    width: int
    layers: int
    heads: int
    tokens: int  # T, a square number
    vocabulary: int
    name: str = ""
    levels: tuple[int, ...] = ()  # of a code, which a head by levels predicts; (): a flat head

    def __str__(self) -> str:
        return self.name or f"D{self.width} L{self.layers} T{self.tokens}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network's size with the batch size and dtype that are measured."""

    size: Size
    batch: int
    dtype: str = "float32"  # of compute

    def __str__(self) -> str:
        return f"{self.size} B{self.batch} {self.dtype}"

    def asdict(self) -> dict:
        """The case as arguments of a factory, which can be written as JSON."""
        return dataclasses.asdict(self)


LONG = Size(width=256, layers=8, heads=4, tokens=1024, vocabulary=512)
SMALL = Size(width=128, layers=6, heads=4, tokens=64, vocabulary=17)  # about that of digits.py
QUICK = Case(Size(width=32, layers=2, heads=2, tokens=16, vocabulary=17), 2, "float32")
IGPT_S = Size(width=512, layers=24, heads=8, tokens=1024, vocabulary=512, name="iGPT-S")
IGPT_M = Size(width=1024, layers=36, heads=8, tokens=1024, vocabulary=512, name="iGPT-M")
IGPT_L = Size(width=1536, layers=48, heads=16, tokens=1024, vocabulary=512, name="iGPT-L")
