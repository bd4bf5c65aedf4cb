"""Images that are nearly equal, within a split and between splits, by perceptual hashes.

The hash is pHash (Zauner 2010): the signs of the 63 lowest frequencies of a grey image of 32 x 32
pixels, against their median. It is a line of SciPy, which the package has anyway; the library
`imagehash` would add two packages for that line, and has no search. Candidates differ in few bits;
small grey copies, which must correlate, tell apart images of few details, whose hashes agree. Every
hash is compared with all hashes before, a few ns each: of a million images, 2 ms an image.
"""

import concurrent.futures
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.fft
from jaxtyping import Bool, Float, Int, UInt64
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.data_set import SPLITS, Source
from gptv_jax.data.images import Decode, Transform
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import to_picture
from gptv_jax.errors import InputError, shorten

LOG = logging.getLogger(__name__)
SIDE, COPY, LOWEST = 32, 16, 8  # pixels of the hashed image and of the copy; frequencies an axis
ALIKE = 0.98  # correlation of two copies from which on images are nearly equal
AT_ONCE = 1024  # images whose hashes are made together


class Hashes(NamedTuple):
    """The hashes of N images of a split."""

    rows: Int[np.ndarray, " N"]  # numbers of the images; those that are not used are absent
    codes: UInt64[np.ndarray, " N"]
    copies: Float[np.ndarray, "N P"]  # small grey copies, of mean 0 and length 1, or all 0
    labels: Int[np.ndarray, " N"]  # -1: without a label


@functools.lru_cache(maxsize=8)
def find(
    config: config_lib.Data,
    split: str,
    distance: int,
    decode: Decode | None = None,
    filters: Sequence[Transform] = (),
) -> dict[int, str]:
    """The images of a split that are nearly equal to one before, each with the words that say so.

    The images of test come first, then those of validation and of training; in the split itself,
    only images that stay count. An image that a split before has as well, by its name, is not
    compared with that split. `decode` and the tuple `filters` are the other steps of the list: what
    they refuse or leave out of the split has no duplicate and is none.
    """
    order = (*reversed(SPLITS), split)
    opened = {}
    for name in order[: order.index(split) + 1]:
        try:
            opened[name] = sources.open_source(config, name)
        except InputError:  # the data have no such split
            if name == split:
                raise
    grey = Decode(channels=1).within(config.limits)
    hashed = {
        name: of_source(source, name, grey, decode, filters if name == split else ())
        for name, source in opened.items()
    }
    source, own = opened.pop(split), hashed.pop(split)
    names = [source.name(row) for row in own.rows.tolist()]
    equal: dict[int, tuple[str, str, int]] = {}  # split, name and label of the image before
    for before, other in opened.items():
        known = hashed[before]
        known_names = [other.name(row) for row in known.rows.tolist()]
        shared = set(names).intersection(known_names)
        new = np.array([i for i, name in enumerate(names) if name not in shared], int)
        first, group = distinct(known)
        held = np.zeros(len(first), bool)  # whether training has the image
        for i, found in between(_take(own, new), _take(known, first), distance):
            held[found] = True
            one = first[found].min()
            equal.setdefault(int(new[i]), (before, known_names[one], int(known.labels[one])))
        told = [
            n for n, its in zip(known_names, group, strict=True) if held[its] and n not in shared
        ]
        if split == "train" and told:
            LOG.warning(
                "%d of %d %s images stand in training, or nearly equal ones: %s.",
                *(len(told), len(other), before, shorten(told)),
            )
    rest = np.setdiff1d(np.arange(len(names)), [*equal])
    for j, i in to_one_before(_take(own, rest), distance).items():
        equal[int(rest[j])] = (split, names[rest[i]], int(own.labels[rest[i]]))
    reasons, mixed = {}, []
    for i, (where, name, label) in sorted(equal.items()):
        labels = {label, int(own.labels[i])}
        differs = len(labels) > 1 and -1 not in labels
        mixed += [names[i]] * differs
        label_words = ", which has another label" * differs
        reasons[int(own.rows[i])] = (
            f"it is nearly equal to {name} of the split {where}{label_words}"
        )
    if mixed:
        what = "images of the split %s have another label than the nearly equal image that stays"
        LOG.warning(f"%d {what}: %s.", len(mixed), split, shorten(mixed))
    LOG.info("%d of %d images of the split %s are nearly equal to others.", len(reasons),
             len(source), split)  # fmt: skip
    return reasons


def _take(hashes: Hashes, rows: Int[np.ndarray, " n"]) -> Hashes:
    return Hashes(*(each[rows] for each in hashes))


def of_source(
    source: Source,
    split: str,
    grey: Decode,
    decode: Decode | None = None,
    filters: Sequence[Transform] = (),
) -> Hashes:
    """The hashes of all images that are used; of a clip, of its frames one below the other.

    The filters judge what `decode` gives, or the record where it is None; `grey` is the last step.
    Warns of images that cannot be read.
    """

    def one(index: int) -> tuple[int, np.uint64, np.ndarray, int] | str | None:
        try:
            record = decode(source[index]) if decode else source[index]
            if any(each.reason(index, record, source) for each in filters):
                return None
            image = grey(record)["image"]
        except (DamagedImageError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)
        picture = to_picture(image if image.ndim == 3 else np.concatenate(image))
        return index, *perceptual_hash(picture), int(record.get("label", -1))

    found, unread = [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(source), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(source)))
            for index, each in zip(indices, pool.map(one, indices), strict=True):
                if isinstance(each, str):
                    unread.append(f"{source.name(index)} ({each})")
                elif each:
                    found.append(each)
    if unread:
        what = "images of the split %s cannot be read, and are not compared by drop_duplicates"
        LOG.warning(f"%d of %d {what}: %s.", len(unread), len(source), split, shorten(unread))
    rows, codes, copies, labels = zip(*found, strict=True) if found else ((),) * 4
    return Hashes(
        np.array(rows, np.int64),
        np.array(codes, np.uint64),
        np.array(copies, np.float32).reshape(-1, COPY * COPY),
        np.array(labels, np.int64),
    )


def perceptual_hash(picture: Image.Image) -> tuple[np.uint64, Float[np.ndarray, " P"]]:
    """The hash of a grey picture, and its small copy, of mean 0 and length 1.

    Both are 0 of a picture of one colour, whose bits would be rounding. No other picture has so few
    bits set: 31 of 63 are.
    """
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    copy = pixels.reshape(COPY, SIDE // COPY, COPY, SIDE // COPY).mean(axis=(1, 3)).ravel()
    copy -= copy.mean()
    length = np.linalg.norm(copy)
    if length <= 1e-3 * COPY:
        return np.uint64(0), np.zeros_like(copy)
    low = scipy.fft.dctn(pixels)[:LOWEST, :LOWEST].ravel()[1:]
    bits = np.packbits(np.append(low > np.median(low), False))
    return bits.view(np.uint64)[0], copy / length


def distinct(hashes: Hashes) -> tuple[Int[np.ndarray, " D"], Int[np.ndarray, " N"]]:
    """The first image of each of D groups of equal hashes, and the group of every image."""
    codes = hashes.codes.view(np.uint8).reshape(-1, 8)
    copies = np.ascontiguousarray(hashes.copies).view(np.uint8)
    both = np.concatenate([codes, copies], axis=1)
    _, first, group = np.unique(both, axis=0, return_index=True, return_inverse=True)
    return first, group.reshape(-1)


def between(
    images: Hashes, others: Hashes, distance: int
) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
    """Each image that has nearly equal `others`: its number, and the numbers of these others."""
    for i, code in enumerate(images.codes):
        rows = np.flatnonzero(np.bitwise_count(others.codes ^ code) <= distance)
        if rows.size and (rows := rows[_alike(others.copies[rows], images.copies[i])]).size:
            yield i, rows


def to_one_before(images: Hashes, distance: int) -> dict[int, int]:
    """For each image that is nearly equal to one before that stays: the number of the latter.

    An image stays unless it is nearly equal to one before that stays.
    """
    kept, codes, count = np.zeros(len(images.codes), int), np.zeros_like(images.codes), 0
    found = {}
    for j, code in enumerate(images.codes):
        rows = kept[:count][np.bitwise_count(codes[:count] ^ code) <= distance]
        rows = rows[_alike(images.copies[rows], images.copies[j])] if rows.size else rows
        if rows.size:
            found[j] = int(rows[0])
        else:
            kept[count], codes[count], count = j, code, count + 1
    return found


def _alike(
    copies: Float[np.ndarray, "n P"], copy: Float[np.ndarray, " P"]
) -> Bool[np.ndarray, " n"]:
    """Whether copies are of nearly equal images. Two images of one colour each are nearly equal."""
    return copies @ copy >= ALIKE if copy.any() else ~copies.any(axis=1)
