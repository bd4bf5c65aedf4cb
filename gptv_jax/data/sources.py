"""Where images come from: random access to `{"image": uint8 [H, W, C], "label": int}`."""

import functools
from typing import Protocol, runtime_checkable

import numpy as np
from sklearn import datasets, model_selection

from gptv_jax import config as config_lib

SPLITS = ("train", "validation", "test")


@runtime_checkable
class Source(Protocol):
    """A split of a data set."""

    classes: int  # number of classes

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> dict:
        """Example `index`; the same one every time."""


class Digits:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images with the grey levels 0 to 16.

    Alpaydin and Kaynak (1998), UCI; shipped with scikit-learn, so nothing is downloaded. Split
    once and for all, stratified by class with seed 0, into 1,197 / 200 / 400.
    """

    classes = 10
    image_size = 8

    def __init__(self, split: str):
        digits = datasets.load_digits()
        self.images = digits.images.astype(np.uint8)[..., None]
        self.labels = digits.target.astype(np.int32)
        self.indices = _digits_split()[split]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        index = self.indices[index]
        return {"image": self.images[index], "label": self.labels[index]}


@functools.cache
def _digits_split() -> dict[str, np.ndarray]:
    labels = datasets.load_digits().target
    rest, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=400, stratify=labels, random_state=0
    )
    train, validation = model_selection.train_test_split(
        rest, test_size=200, stratify=labels[rest], random_state=0
    )
    return {"train": train, "validation": validation, "test": test}


SOURCES = {"digits": Digits}


def open_source(config: config_lib.Data, split: str) -> Source:
    """The split of the data set that the config names.

    Raises:
      InputError: an unknown data set, or images of another size than the config says.
    """
    if config.name not in SOURCES:
        raise config_lib.InputError(
            f"config.data.name is {config.name!r}; it takes one of {', '.join(SOURCES)}."
        )
    source = SOURCES[config.name](split)
    if source.image_size != config.image_size:
        raise config_lib.InputError(
            f"config.data.image_size is {config.image_size}, but the images of {config.name} are "
            f"{source.image_size} pixels wide and high; set config.data.image_size="
            f"{source.image_size}."
        )
    return source
