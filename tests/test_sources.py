import collections
import hashlib

import numpy as np
import pytest
from sklearn import datasets

from gptv_jax import config as config_lib
from gptv_jax.data import sources

SIZES = {"train": 1197, "validation": 200, "test": 400}


def test_digits_are_split_into_disjoint_parts_of_fixed_sizes():
    splits = {split: sources.digits().open(split) for split in sources.SPLITS}
    assert {split: len(source) for split, source in splits.items()} == SIZES
    found = collections.Counter(
        s[i]["image"].tobytes() for s in splits.values() for i in range(len(s))
    )
    images = datasets.load_digits().images.astype(np.uint8)
    assert found == collections.Counter(image.tobytes() for image in images)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "0c24422ffc2204d5"),
        ("validation", "a067199b5f0cd289"),
        ("test", "4ed006f4c4f22ed1"),
    ],
)
def test_digits_are_split_the_same_way_for_ever(split, digest):
    source = sources.digits().open(split)
    content = source.images.tobytes() + source.labels.astype(np.int64).tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", SIZES)
def test_every_split_of_the_digits_has_the_classes_in_proportion(split):
    wanted = np.bincount(datasets.load_digits().target) * SIZES[split] / 1797
    source = sources.open_source(config_lib.Data(), split)
    found = np.bincount([source[i]["label"] for i in range(len(source))])
    assert np.abs(found - wanted).max() < 1.5 and source.classes == len(found)


def test_digits_are_the_images_with_the_labels_of_scikit_learn():
    digits, source = datasets.load_digits(), sources.open_source(config_lib.Data(), "test")
    labels = {
        image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)
    }
    for i in (0, 17, 399):
        for _ in range(2):
            element = source[i]
            assert element["image"].dtype == np.uint8 and element["image"].shape == (8, 8, 1)
            assert element["label"] == labels[element["image"][..., 0].astype(float).tobytes()]


def test_an_unknown_source_is_an_error_with_the_command_that_prepares_it():
    with pytest.raises(config_lib.InputError, match=r"config.data.name=digit .*digits.*tfds build"):
        sources.open_source(config_lib.Data(name="digit"), "train")
