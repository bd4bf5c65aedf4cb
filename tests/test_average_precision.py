"""AP, floors and calibration, on images whose right answer is known."""

import builtins
import json

import numpy as np
import pytest

from gptv_jax.errors import InputError
from gptv_jax.tasks import average_precision
from gptv_jax.tasks.boxes import BoxTokens, Detections

ONE = pytest.approx(1)  # pycocotools adds an epsilon to every denominator
NONE = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def scenes(count: int, classes: int = 3, seed: int = 0, objects: int = 4) -> list[dict]:
    """Records of images of 300 x 400 pixels; every fifth has no object."""
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        n = 0 if number % 5 == 4 else rng.integers(1, objects + 1)
        corner = rng.uniform((0, 0), (180, 280), (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(12, 120, (n, 2))], axis=1)
        labels = rng.integers(classes, size=n).astype(np.int32)
        records.append({"boxes": boxes.astype(np.float32), "box_labels": labels})
    return records


def perfect(record: dict) -> Detections:
    scores = np.ones(len(record["boxes"]), np.float32)
    return Detections(record["boxes"], record["box_labels"], scores)


def test_the_truth_scores_one_and_no_detections_score_zero():
    records = scenes(10)
    numbers = average_precision.score(records, [perfect(r) for r in records], 3).numbers
    for name in ("ap", "ap50", "ap_medium", "ap_large", "ar100"):
        assert numbers[name] == ONE
    assert len(numbers) == 13 and numbers["calibration_error"] == 0
    scores = average_precision.score(records, [NONE] * 10, 3)
    assert scores.numbers["ap"] == scores.numbers["ar100"] == 0
    assert scores.numbers["calibration_error"] is None
    assert scores.by_class[0]["ap"] == 0 and sum(c["objects"] for c in scores.by_class) > 9


def test_an_image_without_detections_counts():
    records = scenes(4)
    found = [perfect(records[0]), perfect(records[1]), NONE, NONE]
    assert average_precision.score(records, found, 3).numbers["ap"] < 0.8


def test_a_number_without_objects_is_none():
    record = {"boxes": np.array([[0, 0, 200, 200]], np.float32), "box_labels": np.array([0])}
    scores = average_precision.score([record], [perfect(record)], 2)
    assert scores.numbers["ap"] == ONE and scores.numbers["ap_large"] == ONE
    assert scores.numbers["ap_small"] is scores.numbers["ar_medium"] is None
    assert scores.by_class[1] == {"ap": None, "ap50": None, "objects": 0}
    empty = {"boxes": np.zeros((0, 4), np.float32), "box_labels": np.zeros(0, np.int32)}
    for found in (NONE, perfect(record)):
        assert average_precision.score([empty], [found], 2).numbers["ap"] is None


def test_the_area_is_that_of_the_annotation():
    record = {"boxes": np.array([[0, 0, 200, 200]], np.float32), "box_labels": np.array([0])}
    record |= {"area": np.array([500.0], np.float32)}
    numbers = average_precision.score([record], [perfect(record)], 1).numbers
    assert numbers["ap_small"] == ONE and numbers["ap_large"] is None


def test_crowds_neither_count_as_found_nor_as_missed():
    boxes = np.array([[0, 0, 50, 50], [100, 100, 250, 250]], np.float32)
    record = {"boxes": boxes, "box_labels": np.array([0, 0]), "crowd": np.array([False, True])}
    inside = np.array([[0, 0, 50, 50], [120, 120, 160, 160], [170, 170, 200, 200]], np.float32)
    scores = np.array([0.5, 0.9, 0.8], np.float32)
    found = Detections(inside, np.zeros(3, np.int32), scores)
    scored = average_precision.score([record], [found], 1)
    assert scored.numbers["ap"] == ONE and scored.by_class[0]["objects"] == 1
    assert scored.numbers["calibration_error"] == pytest.approx(0.5)
    record["crowd"][1] = False
    assert average_precision.score([record], [found], 1).numbers["ap"] < 0.5


def test_detections_of_other_images_score_near_zero():
    records = scenes(60, seed=3)
    found = [perfect(r) for r in records]
    wrong = average_precision.score(records, found[-1:] + found[:-1], 3).numbers
    assert wrong["ap"] < 0.02


def test_the_truth_as_tokens_scores_one_with_many_bins_and_less_with_few():
    records, ap = scenes(30), {}
    for bins in (16, 64, 1000):
        tokens, found = BoxTokens(bins, 3), []
        for r in records:
            ids = tokens.quantize(r["boxes"], (300, 400))
            boxes = tokens.dequantize(ids, (300, 400))
            found.append(perfect({"boxes": boxes, "box_labels": r["box_labels"]}))
        ap[bins] = average_precision.score(records, found, 3).numbers["ap"]
    assert ap[1000] == ONE and 1 > ap[64] > ap[16] > 0.1


def test_calibrated_scores_have_no_calibration_error_and_sure_ones_do():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    correct = rng.random(20_000) < scores
    assert average_precision.calibration_error(scores, correct) < 0.02
    sure = average_precision.calibration_error(np.ones(20_000), correct)
    assert sure == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("width", "error"), [(49, 0.9), (51, 0.1)])
def test_calibration_takes_a_detection_for_right_from_an_iou_of_one_half_on(width, error):
    record = {"boxes": np.array([[0, 0, 100, 100]], np.float32), "box_labels": np.array([0])}
    box, score = np.array([[0, 0, 100, width]], np.float32), np.array([0.9], np.float32)
    found = Detections(box, np.array([0]), score)
    numbers = average_precision.score([record], [found], 1).numbers
    assert numbers["calibration_error"] == pytest.approx(error)


def test_the_file_of_results_gives_pycocotools_the_same_numbers(tmp_path):
    """With the file's own ids, in any order, whatever the numbers of images and classes are."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    records, rng = scenes(12), np.random.default_rng(0)
    found = []
    for r in records:
        moved = r["boxes"] + rng.normal(0, 4, r["boxes"].shape).astype(np.float32)
        scores = rng.random(len(moved)).astype(np.float32)
        found.append(Detections(moved, r["box_labels"], scores))
    numbers = average_precision.score(records, found, 3).numbers
    images, categories = [100 - 7 * i for i in range(12)], [90, 3, 17]
    rows = json.loads(json.dumps(average_precision.results(found, images, categories)))
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    truth = COCO()
    annotations = [
        {
            "image_id": images[i],
            "category_id": categories[label],
            "bbox": [float(v) for v in (b[1], b[0], b[3] - b[1], b[2] - b[0])],
            "area": float((b[2] - b[0]) * (b[3] - b[1])),
            "iscrowd": 0,
        }
        for i, r in enumerate(records)
        for b, label in zip(r["boxes"], r["box_labels"], strict=True)
    ]
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in images],
        "categories": [{"id": c} for c in categories],
        "annotations": [{"id": n, **row} for n, row in enumerate(annotations, start=1)],
    }
    truth.createIndex()
    run = COCOeval(truth, truth.loadRes(rows), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    own = [-1 if x is None else x for x in numbers.values()][:12]
    np.testing.assert_allclose(own, run.stats, rtol=1e-9)
    assert 0.1 < numbers["ap"] < 0.95


def test_without_pycocotools_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install -e '\.\[coco\]'"):
        average_precision.score([], [], 1)
