"""Scores of label maps against independent counts."""

import numpy as np
import pytest
from sklearn import metrics

from gptv_jax import config as config_lib
from gptv_jax.tasks import confusion, map_facts

CLASSES = 4


def maps(dtype=np.int32, seed=0):
    """Truth with pixels of no class, and predictions; class 3 is predicted and never true."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (8, 6, 5))
    predicted = np.where(
        rng.random(truth.shape) < 0.6, truth, rng.integers(0, CLASSES, truth.shape)
    )
    truth = np.where(rng.random(truth.shape) < 0.2, 255 if dtype == np.uint8 else -1, truth)
    return truth.astype(dtype), predicted.astype(np.int32)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_scores_are_those_of_an_independent_count(dtype):
    truth, predicted = maps(dtype)
    found = confusion.scores(confusion.count(truth, predicted, CLASSES))
    inter, union, right, seen = (np.zeros(CLASSES) for _ in range(4))
    for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if t in (-1, 255):
            continue
        seen[t] += 1
        union[t] += 1
        if t == p:
            inter[t] += 1
            right[t] += 1
        else:
            union[p] += 1
    assert found["miou"] == pytest.approx((inter / union).mean(), rel=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(right.sum() / seen.sum(), rel=1e-12)
    assert found["mean_class_accuracy"] == pytest.approx((right[:3] / seen[:3]).mean(), rel=1e-12)
    known = (truth >= 0) & (truth < CLASSES)
    t, p = truth[known], predicted[known]
    every = metrics.jaccard_score(t, p, labels=range(CLASSES), average=None, zero_division=0)
    np.testing.assert_allclose(found["iou_by_class"], every, rtol=1e-12)
    assert found["classes_scored"] == CLASSES and found["accuracy_by_class"][3] is None
    recall = metrics.recall_score(t, p, average="macro", labels=[0, 1, 2])
    assert found["mean_class_accuracy"] == pytest.approx(recall)


def test_only_pixels_with_a_class_matter():
    truth, predicted = maps()
    before = confusion.count(truth, predicted, CLASSES)
    changed = np.where(truth < 0, 3 - predicted, predicted)
    assert (confusion.count(truth, changed, CLASSES) == before).all()
    assert before.dtype == np.int64 and before.sum() == (truth >= 0).sum()
    assert before[:, 3].any() and not before[3].any()


def test_scores_without_a_pixel_are_none():
    found = confusion.scores(np.zeros((2, 2), int))
    assert found["miou"] is found["pixel_accuracy"] is found["mean_class_accuracy"] is None
    assert found["iou_by_class"] == [None, None] and found["classes_scored"] == 0


def test_the_prior_is_the_most_frequent_class_of_each_position():
    def measured(*maps):
        found = map_facts.measure(maps, 3, config_lib.Segment(write=False), seed=0)
        return map_facts.load(found)

    first = np.array([[0, 1], [2, -1]])
    found = measured(first, first, np.full((2, 2), 1))
    assert found.prior.tolist() == [[0, 1], [2, 1]]
    np.testing.assert_allclose(found.frequencies, [0.2, 0.6, 0.2])
    assert measured(np.array([[-1, 2], [2, -1]])).prior.tolist() == [[2, 2], [2, 2]]
