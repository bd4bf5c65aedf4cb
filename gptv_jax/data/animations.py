"""When an animation shows which of its frames, so that a clip has frames of a constant rate.

The durations of the frames stand in the headers of GIF, APNG and WebP files, so no pixel is decoded
to find them. The headers are: GIF89a section 23 (graphic control extension), the chunk fcTL of PNG
(third edition, 11.3.6), and the chunk ANMF of WebP (RFC 9649, section 2.7.1.1).
"""

import struct
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from gptv_jax.config.data import Limits
from gptv_jax.data.images import count_frames
from gptv_jax.data.limits import DamagedImageError

# Browsers show a frame of 10 ms or less, as many programs write by mistake, for 100 ms.
LEAST, USUAL = 10, 100  # milliseconds
# The share of the frames that may be shorter than the step of time: a single short frame, such as
# the last one of a screen recording, would make long ones of all others.
SHORTER = 0.1
REPEATS = 32  # times that a frame is shown at most, as a menu may stand for an hour


def timeline(encoded: bytes, limits: Limits) -> Int[np.ndarray, " N"]:
    """Numbers of the frames that are shown at N evenly spaced times; [0] of a single picture.

    A frame is repeated as often as its duration has the step of time, rounded, and at most
    `REPEATS` times. The step is the duration of the shortest frames, see `SHORTER`. The frames of
    AVIF and TIFF files last equally long. The default image of an APNG file, which programs show
    that know no animations, is left out where it is no frame of the animation.
    Raises DamagedImageError where the file cannot be read, is truncated, or has another number of
    frames than it states.
    """
    count, first = count_frames(encoded, limits), 0
    if encoded.startswith(b"GIF8"):
        durations = list(_of_gif(encoded))
    elif count == 1:
        return np.zeros(1, int)
    elif encoded.startswith(b"\x89PNG"):
        first, durations = _of_png(encoded)
    elif encoded.startswith(b"RIFF"):
        durations = list(_of_webp(encoded))
    else:
        return np.arange(count)
    if first + len(durations) != count:
        found = f"{len(durations)} frames of {count - first}"
        raise DamagedImageError(f"the file is damaged: it has {found}")
    lengths = np.array([d if d > LEAST else USUAL for d in durations])
    step = np.sort(lengths)[int((len(lengths) - 1) * SHORTER)]
    times = np.clip(np.floor(lengths / step + 0.5).astype(int), 1, REPEATS)
    return np.repeat(np.arange(first, count), times)


def _of_gif(encoded: bytes) -> Iterator[float]:
    """Milliseconds of every frame; DamagedImageError where the trailer, the last byte, is absent.

    Pillow takes the frames that there are for all.
    """
    try:
        at, duration = 13 + _palette(encoded[10]), 0
        while (kind := encoded[at : at + 1]) != b";":
            if kind == b"!":
                if encoded[at + 1] == 0xF9 and encoded[at + 2] >= 3:
                    (duration,) = struct.unpack_from("<H", encoded, at + 4)
                at = _blocks_end(encoded, at + 2)
            elif kind == b",":
                yield 10.0 * duration
                # The header, a palette and the size of a code stand before the pixels.
                at, duration = _blocks_end(encoded, at + 11 + _palette(encoded[at + 9])), 0
            elif kind:
                at += 1
            else:
                raise IndexError
    except (IndexError, struct.error) as error:
        raise DamagedImageError("the file is truncated") from error


def _palette(flags: int) -> int:
    """Bytes of the palette of a GIF file or frame."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _blocks_end(encoded: bytes, at: int) -> int:
    """The place behind the blocks of a part of a GIF file."""
    while length := encoded[at]:
        at += 1 + length
    return at + 1


def _of_png(encoded: bytes) -> tuple[int, list[float]]:
    """How many pictures stand before the animation, 0 or 1, and milliseconds of every frame."""
    at, kind, first, durations = 8, b"", 0, []
    while kind != b"IEND" and at + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if kind == b"IDAT" and not durations:
            first = 1
        if kind == b"fcTL" and length >= 26:
            number, unit = struct.unpack_from(">HH", encoded, at + 28)
            durations.append(1000 * number / (unit or 100))
        at += 12 + length
    if kind != b"IEND":  # the frame before may have no pixels
        raise DamagedImageError("the file is truncated")
    return first, durations


def _of_webp(encoded: bytes) -> Iterator[float]:
    at = 12
    while at + 8 <= len(encoded):
        kind, length = struct.unpack_from("<4sI", encoded, at)
        if kind == b"ANMF" and at + 24 <= len(encoded):
            yield float(int.from_bytes(encoded[at + 20 : at + 23], "little"))
        at += 8 + length + length % 2
