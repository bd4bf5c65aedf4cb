"""scikit-learn's handwritten digits, read without importing scikit-learn, which takes a second."""

import importlib.util
import pathlib

import numpy as np
from etils import epy
from jaxtyping import Int

from gptv_jax.data.arrays import Arrays

with epy.lazy_imports():
    from sklearn import datasets

VALIDATION, TEST = 200, 400  # images; the other 1,197 are the training images


def digits() -> Arrays:
    """1,797 real 8x8 images with the grey levels 0 to 16, in three splits that never change.

    Alpaydin and Kaynak (1998), UCI; part of scikit-learn, so nothing is downloaded. The splits are
    stratified by class.
    """
    table = _table()
    images, labels = table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int32)
    images = images.reshape(-1, 8, 8, 1)
    rest, test = _draw(labels, TEST)
    train, validation = (rest[rows] for rows in _draw(labels[rest], VALIDATION))
    splits = {"train": train, "validation": validation, "test": test}
    return Arrays({name: (images[rows], labels[rows]) for name, rows in splits.items()})


def _table() -> np.ndarray:
    """A row for each image: its 64 pixels and its class."""
    installed = importlib.util.find_spec("sklearn")
    file = pathlib.Path(installed.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    found = datasets.load_digits()  # of a release that keeps the file elsewhere
    return np.column_stack([found.data, found.target])


def _draw(
    labels: Int[np.ndarray, " N"], count: int
) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " C"]]:
    """The rows of `labels` that are left when `count` rows are drawn, and the rows that are drawn.

    The draw is that of scikit-learn's train_test_split with stratify=labels and random_state=0.
    """
    rng, counts = np.random.RandomState(0), np.bincount(labels)
    left = _shares(counts, len(labels) - count, rng)
    drawn = _shares(counts - left, count, rng)
    parts: tuple[list, list] = ([], [])
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    for rows, *sizes in zip(by_class, left, left + drawn, strict=True):
        first, second, _ = np.split(rows[rng.permutation(len(rows))], sizes)
        parts[0].append(first)
        parts[1].append(second)
    return rng.permutation(np.concatenate(parts[0])), rng.permutation(np.concatenate(parts[1]))


def _shares(
    counts: Int[np.ndarray, " K"], total: int, rng: np.random.RandomState
) -> Int[np.ndarray, " K"]:
    """`total` divided among the classes as their `counts` are, rounded; ties are drawn."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders = exact - shares
    for largest in np.unique(remainders)[::-1]:
        if lacking := int(total - shares.sum()):
            (tied,) = np.where(remainders == largest)
            shares[rng.choice(tied, size=min(len(tied), lacking), replace=False)] += 1
    return shares.astype(int)
