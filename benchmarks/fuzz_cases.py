"""The mutations of files for `benchmarks/fuzz.py`, and the class of the files that it changes."""

import dataclasses
import pathlib
import re
import struct
from collections.abc import Callable

import numpy as np

EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = ("0", "-1", "1e999", "1e9", "99999999999999999999", "0.5", "NaN", "null", "true", '""')
NUMBERS += ("[]", "{}", '"\\ud800"', "16777216", "[[[[[[[[]]]]]]]]", "1000000", "-2147483649")


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes 1 to 8 bits."""
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def change_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces 1 to 4 of the first 64 bytes."""
    changed = bytearray(data)
    for place in rng.integers(min(64, len(data)), size=rng.integers(1, 5)).tolist():
        changed[place] = int(rng.choice((0, 1, 127, 128, 255, rng.integers(256))))
    return bytes(changed)


def change_number(rng: np.random.Generator, data: bytes) -> bytes:
    """Writes an extreme number of 2 or 4 bytes, in either order, mostly near the beginning."""
    order, form = rng.choice(("<", ">")), rng.choice(("H", "I"))
    value = int(rng.choice(EXTREMES)) % (2**16 if form == "H" else 2**32)
    word = struct.pack(order + form, value)
    last = max(len(data) - len(word), 1)
    place = int(rng.integers(last if rng.random() < 0.5 else min(last, 128)))
    return data[:place] + word + data[place + len(word) :]


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    """Keeps the beginning."""
    return data[: int(rng.integers(len(data)))]


def move(rng: np.random.Generator, data: bytes) -> bytes:
    """Removes, repeats or inserts a stretch of bytes."""
    start, end = sorted(rng.integers(len(data) + 1, size=2).tolist())
    stretch = data[start:end]
    middle = (b"", stretch * 2, rng.bytes(int(rng.integers(1, 64))) + stretch)[rng.integers(3)]
    return data[:start] + middle + data[end:]


def change_values(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces 1 to 3 numbers or texts of a JSON text: by other numbers, or anything."""
    for _ in range(rng.integers(1, 4)):
        found = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"\\]*"|\btrue\b|\bfalse\b|\bnull\b', data))
        if not found:
            return data
        place = found[rng.integers(len(found))]
        old = place[0].decode(errors="replace")
        whole = re.fullmatch(r"-?\d{1,9}", old)
        match rng.integers(3):
            case 0 if whole:
                factor = int(rng.choice((2, 10, 10**4, 10**8)))
                new = str(rng.choice((int(old) + 1, int(old) - 1, -int(old), int(old) * factor)))
            case 1:  # the value of another place
                new = found[rng.integers(len(found))][0].decode(errors="replace")
            case _:
                new = str(rng.choice((*NUMBERS, '"F64"', '"x"', old * 3)))
        data = data[: place.start()] + new.encode() + data[place.end() :]
    return data


BYTES = {"bits": flip_bits, "header": change_header, "numbers": change_number}
BYTES |= {"cut": cut, "moved bytes": move}


@dataclasses.dataclass
class Subject:
    """Files of one kind: the originals, the mutations of each, and how the files are read."""

    folder: pathlib.Path  # in which files may be written
    most_memory = 2**29  # bytes more than a worker has, at most

    def begin(self) -> None:
        """Reads an original, so that what is loaded once is there before the limit of memory."""
        name = next(iter(self.originals))
        self.read(name, "none", self.originals[name])

    def mutations(self, name: str) -> dict[str, Callable]:
        """The mutations of an original by their names."""
        return BYTES

    def mutated(self, rng: np.random.Generator) -> tuple[str, str, bytes]:
        """An original's name, a mutation's name, and the changed content."""
        names = list(self.originals)
        name = names[rng.integers(len(names))]
        known, original = self.mutations(name), self.originals[name]
        mutation = list(known)[rng.integers(len(known))]
        while (changed := known[mutation](rng, original)) == original:
            pass  # until a byte has changed
        return name, mutation, changed

    def read(self, name: str, mutation: str, content: bytes) -> None:
        """Reads a file: InputError, DamagedImageError, or AssertionError: its content is wrong."""
        raise NotImplementedError
