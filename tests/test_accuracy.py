"""Accuracies with their standard errors, by class, and what is said about them."""

import json
import math

import numpy as np
import pytest

from gptv_jax.runs import accuracy


def test_the_standard_error_is_the_deviation_over_random_test_splits():
    rng = np.random.default_rng(0)
    for share, images in ((1 / 3, 15), (0.9, 400)):
        drawn = rng.binomial(images, share, 20_000) / images
        assert accuracy.standard_error(share, images) == pytest.approx(drawn.std(), rel=0.02)


def test_no_accuracy_is_certain():
    for images in (1, 15, 400):
        errors = [accuracy.standard_error(share, images) for share in (0.0, 1.0)]
        assert errors[0] == errors[1] and 1 / (images + 2) / 2 < errors[0] < 0.5


def test_every_accuracy_with_a_count_of_its_split_gets_its_standard_error():
    numbers = {"validation_accuracy": 0.5, "labels_4_test_accuracy": 0.25, "test_nats": 1.0}
    numbers |= {"test_images": 16, "concatenated_test_accuracy": None}
    found = accuracy.with_standard_errors(numbers)
    added = {"labels_4_test_accuracy_standard_error": math.sqrt(0.25 * 0.75 / 16)}
    assert found == numbers | added
    both = accuracy.with_standard_errors(numbers | {"validation_images": 4})
    assert both["validation_accuracy_standard_error"] == 0.25


def test_classes_are_written_with_names_counts_and_accuracies(tmp_path):
    confusion = np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    accuracy.write(
        tmp_path, confusion, ("cat", "dog", "owl", "emu"), np.array([9, 8, 7, 6]), layer=2
    )
    found = accuracy.read(tmp_path)
    assert found["layer"] == 2 and accuracy.read(tmp_path / "nothing") == {}
    names = ("class", "name", "training_images", "test_images", "test_accuracy")
    rows = [(0, "cat", 9, 4, 0.75), (1, "dog", 8, 2, 0.0), (2, "owl", 7, 0, None)]
    rows.append((3, "emu", 6, 0, None))
    assert found["classes"] == [dict(zip(names, row, strict=True)) for row in rows]
    np.testing.assert_array_equal(found["confusion"], np.pad(confusion, ((0, 1), (0, 1))))
    accuracy.write(tmp_path, confusion, (), None)
    first = accuracy.read(tmp_path)["classes"][0]
    assert first["name"] == "0" and first["training_images"] is None


GOOD = {"probe/raw_pixels_test_accuracy": 0.5, "probe/test_accuracy": 0.8}
GOOD |= {"finetune/test_accuracy": 0.9, "probe/test_images": 400, "finetune/test_images": 400}


def rows(*counts: tuple[int, int]) -> list[dict]:
    """Rows of classes a, b ... with so many training and test images."""
    pairs = zip("abcdefgh", counts, strict=False)
    return [{"name": n, "training_images": t, "test_images": e} for n, (t, e) in pairs]


def test_good_numbers_need_no_caution():
    assert accuracy.cautions(GOOD, rows((11, 40), (200, 40))) == []
    assert accuracy.cautions({"pretrain/test_nats_per_token": 1.0}) == []


@pytest.mark.parametrize(
    ("changes", "classes", "words"),
    [
        (
            {"finetune/test_accuracy": 0.7},
            (),
            "network's test accuracy (70.00%) is below the linear",
        ),
        ({"finetune/test_accuracy": 0.79}, (), "by less than two standard errors."),
        ({"probe/raw_pixels_test_accuracy": 0.85}, (), "probe's test accuracy (80.00%) is below"),
        (dict.fromkeys(("probe/test_images", "finetune/test_images"), 15), (), "only 15 images"),
        ({}, ((0, 5), (20, 20)), "Class a: test images but no training image"),
        ({}, ((20, 0), (20, 20)), "Class a: no test image"),
        ({}, ((10, 9), (3, 9), (11, 9)), "Classes a, b: 10 training images or fewer"),
        ({}, ((1, 1),) * 5, "Classes a, b, c, d, e: 10 training images or fewer"),
    ],
)
def test_what_a_reader_may_miss_is_said_in_one_sentence(changes, classes, words):
    (found,) = accuracy.cautions(GOOD | changes, rows(*classes))
    assert words in found and len(found) <= 300


def test_of_many_classes_a_caution_names_some():
    many = [{"name": "long " * 6, "training_images": 1, "test_images": 1}] * 50
    (found,) = accuracy.cautions(GOOD, many)
    assert "and 48 more: 10 training images" in found and len(found) <= 300


def test_a_finished_stage_tells_its_accuracy_and_only_what_is_new(tmp_path, caplog):
    accuracy.write(tmp_path / "probe", np.diag([30, 30]), ("cat", "dog"), np.array([5, 50]))
    probed = {"probe/test_accuracy": 0.8, "probe/test_images": 60}
    with caplog.at_level("INFO", "gptv_jax"):
        accuracy.tell("probe", {}, probed, tmp_path)
    told = caplog.text
    assert "80.00% of 60 test images" in told and "standard error 5.16%" in told
    assert "Class cat: 10 training images" in told and "only 60 images" in told
    caplog.clear()
    tuned = probed | {"finetune/test_accuracy": 0.7, "finetune/test_images": 60}
    accuracy.tell("finetune", probed, tuned, tmp_path)
    (record,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert record.startswith("The fine-tuned network's test accuracy (70.00%) is below")


@pytest.mark.process
@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_a_run_counts_every_test_image_once_by_class_and_class_given(finished_run, stage):
    found = json.loads((finished_run.folder / stage / "confusion.json").read_text())
    matrix, summary = np.array(found["confusion"]), finished_run.summary
    assert matrix.shape == (10, 10) and matrix.sum() == 400 == summary[f"{stage}/test_images"]
    assert np.trace(matrix) / 400 == pytest.approx(summary[f"{stage}/test_accuracy"])
    assert [row["test_images"] for row in found["classes"]] == matrix.sum(axis=1).tolist()
    assert sum(row["training_images"] for row in found["classes"]) == 1197
    for split, count in (("train", 1197), ("validation", 200), ("test", 400)):
        assert summary[f"{stage}/{split}_images"] == count
    accuracies = [name for name in summary if name.startswith(stage) and "accuracy" in name]
    alone = [name for name in accuracies if name.endswith("accuracy")]
    assert {f"{name}_standard_error" for name in alone} <= set(accuracies)
