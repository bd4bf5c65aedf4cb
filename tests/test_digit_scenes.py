"""Scenes of digits: what a record holds, and which digits a split draws."""

import concurrent.futures

import numpy as np
import pytest

from gptv_jax.data import digit_scenes, digits


@pytest.fixture(scope="module")
def records():
    return [digit_scenes.scene("test", index) for index in range(60)]


def test_records_hold_what_the_docstring_says(records):
    H, W = digit_scenes.HEIGHT, digit_scenes.WIDTH
    for record in records:
        n = len(record["boxes"])
        assert 1 <= n <= digit_scenes.DIGITS
        found = {name: (array.dtype.name, array.shape) for name, array in record.items()}
        assert found == {
            "image": ("uint8", (H, W, 1)),
            "boxes": ("float32", (n, 4)),
            "box_labels": ("int32", (n,)),
            "crowd": ("bool", (n,)),
            "area": ("float32", (n,)),
            "masks": ("bool", (n, H, W)),
            "segmentation": ("uint8", (H, W)),
        }
        assert not record["crowd"].any()
    assert H != W  # a rectangle
    assert {len(record["boxes"]) for record in records} == set(range(1, digit_scenes.DIGITS + 1))


def test_boxes_are_tight_around_masks_and_agree_with_the_label_map(records):
    for record in records:
        assert record["masks"].sum(axis=0).max() == 1  # no pixel has two owners
        # COCO's area of an object is that of its mask, not of its box.
        np.testing.assert_array_equal(record["area"], [mask.sum() for mask in record["masks"]])
        drawn = np.zeros_like(record["segmentation"])
        for box, mask, label in zip(
            record["boxes"], record["masks"], record["box_labels"], strict=True
        ):
            rows, columns = np.nonzero(mask)
            ends = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            assert tuple(box) == ends
            assert min(box[2] - box[0], box[3] - box[1]) >= 2
            drawn[mask] = 1 + label
            # The ink shows: on average the box is brighter inside the mask than beside the mask.
            y0, x0, y1, x1 = map(int, box)
            inside, image = mask[y0:y1, x0:x1], record["image"][y0:y1, x0:x1, 0]
            assert inside.all() or image[inside].mean() > image[~inside].mean() + 20
        np.testing.assert_array_equal(drawn, record["segmentation"])


def test_a_split_draws_its_own_digits_alone(monkeypatch):
    for split in digit_scenes.SPLITS:
        _, classes = digit_scenes.drawings(split)
        np.testing.assert_array_equal(classes, digits.digits().open(split).labels)
    found = {s: digit_scenes.drawings(s)[0][:1] for s in digit_scenes.SPLITS}
    own = {"train": 1, "validation": 5, "test": 7}  # one digit a split, called by this class
    monkeypatch.setattr(digit_scenes, "drawings", lambda s: (found[s], np.array([own[s]])))
    for split, label in own.items():
        labels = [digit_scenes.scene(split, k)["box_labels"] for k in range(5)]
        assert set(np.concatenate(labels)) == {label}


def test_a_scene_depends_on_its_number_alone():
    scenes = digit_scenes.DigitScenes()
    assert scenes.lengths == {"train": 20_000, "validation": 400, "test": 400}
    source, order = scenes.open("train"), [7, 3, 19_999, 3]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(source.__getitem__, order))
    for index, record in zip(order, drawn, strict=True):
        for name, array in digit_scenes.scene("train", index).items():
            np.testing.assert_array_equal(record[name], array)
    different = [
        drawn[0],
        drawn[1],
        digit_scenes.scene("test", 7),
        digit_scenes.scene("train", 7, 1),
    ]
    images = {record["image"].tobytes() for record in different}
    assert len(images) == len(different)
