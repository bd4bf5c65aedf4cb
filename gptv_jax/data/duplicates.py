"""Images that are nearly equal, within a split and between splits, by perceptual hashes.

The hash is pHash (Zauner 2010): the signs of the 63 lowest frequencies of a grey image of 32 x 32
pixels, against their median. It is a line of SciPy, which the package has anyway; the library
`imagehash` would add two packages for that line, and has no search. Candidates differ in few bits;
small grey copies, which must correlate, tell apart images of few details, whose hashes agree.
"""

import concurrent.futures
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.fft
from jaxtyping import Float, Int, UInt64
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.data_set import SPLITS, Source
from gptv_jax.data.images import Decode
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import to_picture
from gptv_jax.errors import InputError, shorten

LOG = logging.getLogger(__name__)
SIDE, COPY, LOWEST = 32, 16, 8  # pixels of the hashed image and of the copy; frequencies an axis
ALIKE = 0.98  # correlation of two copies from which on images are nearly equal
AT_ONCE = 1024  # images whose hashes are made together


class Hashes(NamedTuple):
    """The hashes of N images of a split."""

    rows: Int[np.ndarray, " N"]  # numbers of the images; damaged ones are absent
    codes: UInt64[np.ndarray, " N"]
    copies: Float[np.ndarray, "N P"]  # small grey copies, of mean 0 and length 1, or all 0


@functools.lru_cache(maxsize=4)
def _all(config: config_lib.Data, split: str, distance: int) -> dict[str, dict[int, str]]:
    opened, names = {}, dict.fromkeys((*reversed(SPLITS), split))
    for name in names:
        try:
            opened[name] = sources.open_source(config, name)
        except InputError:  # the data have no such split
            if name == split:
                raise
    hashed = {name: of_source(source, config.limits) for name, source in opened.items()}
    codes, copies = (np.concatenate(each) for each in list(zip(*hashed.values(), strict=True))[1:])
    owners = [(name, row) for name, found in hashed.items() for row in found.rows.tolist()]
    found: dict[str, dict[int, str]] = {name: {} for name in opened}
    held: dict[str, dict[int, str]] = {name: {} for name in opened}  # also in training
    for first, second in near(codes, copies, distance):
        (split_1, row_1), (split_2, row_2) = owners[first], owners[second]
        name_1, name_2 = opened[split_1].name(row_1), opened[split_2].name(row_2)
        if name_1 == name_2:  # two splits of the run share an image
            continue
        found[split_2].setdefault(row_2, f"it is nearly equal to {name_1} of the split {split_1}")
        if split_2 == "train" != split_1:
            held[split_1].setdefault(row_1, name_1)
    for name, rows in held.items():
        if rows:
            LOG.warning(
                "%d of %d %s images stand in training, or nearly equal ones: %s.",
                *(len(rows), len(opened[name]), name, shorten(rows.values())),
            )
    LOG.info("nearly equal images that a filter may leave out: %s.", _counts(found))
    return found


def _counts(found: dict[str, dict[int, str]]) -> str:
    return ", ".join(f"{name} {len(rows)}" for name, rows in found.items())


def find(config: config_lib.Data, split: str, distance: int) -> dict[int, str]:
    """The images of a split that are nearly equal to one before, each with the words that say so.

    The images of test come first, then those of validation and of training.
    """
    return _all(config, split, distance)[split]


def of_source(source: Source, limits: config_lib.Limits) -> Hashes:
    """The hashes of all images that can be read; of a clip, of its frames one below the other."""
    decode = Decode(channels=1).within(limits)

    def one(index: int) -> tuple[int, np.uint64, np.ndarray] | None:
        try:
            image = decode(source[index])["image"]
        except (DamagedImageError, OSError):
            return None
        picture = to_picture(image if image.ndim == 3 else np.concatenate(image))
        return index, *perceptual_hash(picture)

    rows, codes, copies = [], [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(source), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(source)))
            for row, code, copy in filter(None, pool.map(one, indices)):
                rows.append(row)
                codes.append(code)
                copies.append(copy)
    return Hashes(
        np.array(rows, np.int64),
        np.array(codes, np.uint64),
        np.array(copies, np.float32).reshape(-1, COPY * COPY),
    )


def perceptual_hash(picture: Image.Image) -> tuple[np.uint64, Float[np.ndarray, " P"]]:
    """The hash of a grey picture, and its small copy, of mean 0 and length 1."""
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    low = scipy.fft.dctn(pixels)[:LOWEST, :LOWEST].ravel()[1:]
    bits = np.packbits(np.append(low > np.median(low), False))
    copy = pixels.reshape(COPY, SIDE // COPY, COPY, SIDE // COPY).mean(axis=(1, 3)).ravel()
    copy -= copy.mean()
    length = np.linalg.norm(copy)
    return bits.view(np.uint64)[0], copy / length if length > 1e-3 * COPY else 0 * copy


def near(
    codes: UInt64[np.ndarray, " N"], copies: Float[np.ndarray, "N P"], distance: int
) -> Iterator[tuple[int, int]]:
    """Pairs i < j of images that are nearly equal, in the order of j; each pair once.

    Of `distance` + 1 parts of two codes one agrees where at most `distance` bits differ, so only
    images that agree in a part are compared. Two images of one colour each are nearly equal.
    """
    found, ends = set(), np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(ends.tolist()):
        part = codes >> np.uint64(low)
        part &= np.uint64(2 ** (high - low) - 1)
        order = np.argsort(part, kind="stable")
        part, step = part[order], 1
        while (same := np.flatnonzero(part[step:] == part[:-step])).size:
            one, other = order[same], order[same + step]
            few = np.bitwise_count(codes[one] ^ codes[other]) <= distance
            one, other = one[few], other[few]
            flat = ~copies[one].any(axis=1) & ~copies[other].any(axis=1)
            alike = flat | (np.einsum("np,np->n", copies[one], copies[other]) >= ALIKE)
            pairs = zip(one[alike].tolist(), other[alike].tolist(), strict=True)
            found.update((min(pair), max(pair)) for pair in pairs)
            step += 1
    yield from sorted(found, key=lambda pair: pair[::-1])
