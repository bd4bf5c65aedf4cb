"""Panoptic quality against hand-made cases, and against hotcoco where this is installed."""

import json

import numpy as np
import pytest
from PIL import Image

from gptv_jax.tasks import average_precision, panoptic
from gptv_jax.tasks.boxes import Detections
from gptv_jax.tasks.panoptic import Segments

THINGS = (True, True, False, False)  # of four classes
SIDE = 24


def scored(pairs, things=THINGS):
    parts = [panoptic.count(*pair, len(things)) for pair in pairs]
    return panoptic.scores({k: sum(part[k] for part in parts) for k in parts[0]}, things)


def strips(widths, labels, crowd=None):
    """A picture of 1 x 20 pixels: segments side by side, and void to the end."""
    numbers = np.repeat(np.arange(len(widths)), widths)
    where = np.pad(numbers, (0, 20 - len(numbers)), constant_values=-1)[None]
    crowd = None if crowd is None else np.array(crowd)
    return Segments(where, np.array(labels), crowd)


def test_the_truth_scores_one():
    truth = strips([5, 5, 10], [0, 0, 2])
    found = scored([(truth, truth)])
    assert found["pq"] == found["sq"] == found["rq"] == found["pq_things"] == found["pq_stuff"] == 1


def test_quality_is_iou_times_f1():
    """Two of class 0, one found with an IoU of 8 / 10; a false one of class 1."""
    found = scored([(strips([10, 10], [0, 0]), strips([8, 2, 10], [0, 0, 1]))])
    assert found["pq"] == found["pq_things"] == pytest.approx(0.8 / (1 + 1 / 2 + 1 / 2) / 2)
    assert found["pq_stuff"] is None
    assert found["sq_things"] == pytest.approx(0.4) and found["rq_things"] == pytest.approx(0.25)


def test_an_overlap_of_exactly_one_half_is_no_match():
    assert scored([(strips([10], [0]), strips([5], [0]))])["pq"] == 0
    assert scored([(strips([11], [0]), strips([6], [0]))])["pq"] == pytest.approx(6 / 11)


def test_void_is_neither_an_error_nor_a_part_of_a_union():
    truth = strips([6], [0])
    assert scored([(truth, strips([12], [0]))])["pq"] == 1  # half of the segment is void
    wrong = panoptic.count(truth, strips([6, 7], [0, 1]), 4)
    assert wrong["fp"].sum() == 0
    half = panoptic.count(truth, strips([12], [1]), 4)  # exactly half: wrong
    assert half["fp"].tolist() == [0, 1, 0, 0] and half["fn"].tolist() == [1, 0, 0, 0]


def test_crowds_neither_match_nor_are_missed():
    truth = strips([6, 14], [0, 0], crowd=[False, True])
    found = panoptic.count(truth, strips([6, 7, 7], [0, 0, 1]), 4)
    assert found["tp"].tolist() == [1, 0, 0, 0] and found["fn"].sum() == 0
    assert found["fp"].tolist() == [0, 1, 0, 0]  # of another class than the crowd
    assert scored([(truth, truth)])["pq"] == 1


def test_no_segment_at_all():
    empty = strips([], np.zeros(0, int))
    found = scored([(empty, empty)])
    assert found["pq"] is found["pq_things"] is found["pq_stuff"] is None


def test_detections_become_segments_that_do_not_overlap():
    """Of 20 pixels, the first 8 are a cup, then 8 a dog; the last one has no class."""
    where = np.repeat([0, 1, 2], [8, 8, 4])
    plane = np.where(where == 2, 1, np.where(where == 1, 2, 0)).astype(np.uint8)[None]
    plane[0, -1] = 255
    record = {"masks": where == np.arange(2)[:, None, None], "box_labels": np.array([0, 1])}
    record |= {"boxes": np.zeros((2, 4), np.float32), "segmentation": plane}
    record = average_precision.without_pixels(record, masks=True)

    def found(*objects, names=("cup", "ground", "dog")):
        """Each object is (first pixel, end, class, score), the most likely one first."""
        *ends, labels, scores = (np.array(x) for x in zip(*objects, strict=True))
        pixels = np.arange(20)[None, None]
        masks = (pixels >= ends[0][:, None, None]) & (pixels < ends[1][:, None, None])
        guess = Detections(np.zeros((len(labels), 4)), labels, scores, masks)
        return panoptic.of_detections([record], [guess], ("cup", "dog"), names)

    perfect = (0, 8, 0, 0.9), (8, 16, 1, 0.8)
    assert found(*perfect) == dict.fromkeys(("pq", "sq", "rq", "pq_things", "pq_stuff"), 1)
    # Neither an unlikely object nor one that likelier objects mostly cover counts; others lose
    # pixels. What is said of a pixel without a class is never wrong.
    assert found(*perfect, (3, 18, 1, 0.7), (16, 19, 0, 0.4)) == found(*perfect)
    assert found(*perfect, (19, 20, 0, 0.7)) == found(*perfect)
    assert found((0, 10, 0, 0.9), (8, 16, 1, 0.8))["sq"] == pytest.approx((0.8 + 0.75 + 1) / 3)
    missed = found((0, 8, 0, 0.9))  # pixels of no object are ground, here three of 11
    assert [missed[name] for name in ("pq", "sq", "rq")] == pytest.approx([1 / 3] * 3)
    assert (missed["pq_things"], missed["pq_stuff"]) == (0.5, 0)
    assert found(*perfect, names=("cup", "ground", "dog", "sky")) == {}
    assert found(*perfect, names=("cup", "dog")) == {}


def random_image(rng, truth=None):
    """Rectangles over each other; a prediction is the truth, moved and with some other classes."""
    where, labels = np.full((SIDE, SIDE), -1), []
    for number in range(7):
        y, x = rng.integers(0, SIDE - 4, 2)
        where[y : y + rng.integers(4, 12), x : x + rng.integers(4, 12)] = number
        labels.append(rng.integers(4))
    if truth is not None:
        where = np.roll(truth.where, rng.integers(0, 2, 2), (0, 1))
        where[rng.random(where.shape) < 0.1] = -1
        labels = np.where(rng.random(len(truth.labels)) < 0.2, labels[0], truth.labels)
    kept = np.unique(where[where >= 0])
    where = np.where(where < 0, -1, np.searchsorted(kept, where))
    labels = np.array(labels)[kept]
    crowd = np.zeros(len(labels), bool)
    if truth is None and rng.random() < 0.5:  # one crowd at most, as in COCO
        crowd[rng.integers(len(labels))] = True
    crowd &= np.array(THINGS)[labels]
    return Segments(where, labels, crowd)


def write(folder, name, images):
    """The segments as COCO's panoptic format has them: a JSON file and PNG files of numbers."""
    (folder / name).mkdir()
    annotations = []
    for number, each in enumerate(images):
        ids = each.where + 1
        png = np.stack([ids % 256, ids // 256, 0 * ids], axis=-1).astype(np.uint8)
        Image.fromarray(png).save(folder / name / f"{number}.png")
        info = [
            {
                "id": i + 1,
                "category_id": int(label),
                "iscrowd": int(each.crowd[i]),
                "area": int((each.where == i).sum()),
                "bbox": [0, 0, 1, 1],
            }
            for i, label in enumerate(each.labels)
        ]
        row = {"image_id": number, "file_name": f"{number}.png", "segments_info": info}
        annotations.append(row)
    shown = [
        {"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE}
        for i in range(len(images))
    ]
    categories = [{"id": i, "name": str(i), "isthing": int(t)} for i, t in enumerate(THINGS)]
    content = {"images": shown, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder / f"{name}.json"), str(folder / name)


def test_numbers_are_those_of_hotcoco(tmp_path):
    peer = pytest.importorskip("hotcoco.panoptic")
    rng = np.random.default_rng(0)
    truth = [random_image(rng) for _ in range(40)]
    predicted = [random_image(rng, each) for each in truth]
    (a, a_folder), (b, b_folder) = (
        write(tmp_path, "true", truth),
        write(tmp_path, "made", predicted),
    )
    theirs = peer.pq_compute(a, b, a_folder, b_folder)
    ours = scored(list(zip(truth, predicted, strict=True)))
    assert 0.2 < ours["pq"] < 0.9
    for suffix, kind in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("pq", "sq", "rq"):
            assert ours[name + suffix] == pytest.approx(theirs[kind][name], abs=1e-12)
