"""Objects as tokens: quantisation, the sequence of an image, and the vote of several views."""

import dataclasses

import numpy as np
import pytest

from gptv_jax.config.tasks import Detect
from gptv_jax.tasks.boxes import BoxTokens, Detections, iou, noise_boxes, vote

SIZE = (40, 56)
TOKENS = BoxTokens(bins=32, classes=3)
SETTINGS = Detect(objects=12, bins=32)


def random_boxes(rng, count: int, size=SIZE) -> np.ndarray:
    low, high = np.sort(rng.random((2, count, 2)), axis=0) * size
    return np.concatenate([low, high], axis=1).astype(np.float32)


def example(settings=SETTINGS, count=5, seed=0, evaluation=False) -> tuple[dict, np.ndarray]:
    rng = np.random.default_rng(seed)
    boxes, labels = random_boxes(rng, count), rng.integers(3, size=count)
    found = TOKENS.sequence(boxes, labels, SIZE, settings, None if evaluation else rng)
    return {name: array.reshape(-1, 5) for name, array in found.items()}, boxes


@pytest.mark.parametrize("bins", [2, 32, 1000])
def test_a_box_comes_back_within_half_a_bin(bins):
    tokens = BoxTokens(bins, 3)
    boxes = random_boxes(np.random.default_rng(0), 500)
    ids = tokens.quantize(boxes, SIZE)
    error = np.abs(tokens.dequantize(ids, SIZE) - boxes)
    assert (error <= 0.5 / (bins - 1) * np.array([*SIZE, *SIZE]) + 1e-5).all()
    np.testing.assert_array_equal(tokens.quantize(tokens.dequantize(ids, SIZE), SIZE), ids)
    assert ids[:, ::2].max() < bins <= ids[:, 1::2].min() and ids.max() < 2 * bins
    edges = np.array([[0, 0, *SIZE]], np.float32)
    np.testing.assert_array_equal(tokens.dequantize(tokens.quantize(edges, SIZE), SIZE), edges)


def test_objects_come_first_and_noise_fills_up_without_loss_on_its_coordinates():
    found, boxes = example(dataclasses.replace(SETTINGS, class_weight=0.5))
    targets, weights = found["targets"], found["weights"]
    assert targets.shape == (12, 5) and targets.dtype == np.int32
    assert (targets[:5, 4] < TOKENS.noise).all() and (targets[5:, 4] == TOKENS.noise).all()
    assert (weights[:5, :4] == 1).all() and (weights[5:, :4] == 0).all()
    assert (weights[:, 4] == 0.5).all()
    expected = {tuple(row) for row in TOKENS.quantize(boxes, SIZE).tolist()}
    assert {tuple(row) for row in targets[:5, :4].tolist()} == expected
    assert (targets[:, :2] <= targets[:, 2:4]).all()  # noise objects are boxes, too


def test_the_order_is_random_or_by_position():
    orders = {tuple(example(seed=0)[0]["targets"][:5, 0])}
    rng, (_, boxes) = np.random.default_rng(1), example(seed=0)
    labels = np.zeros(5, int)
    for _ in range(8):
        found = TOKENS.sequence(boxes, labels, SIZE, SETTINGS, rng)
        orders.add(tuple(found["targets"].reshape(-1, 5)[:5, 0]))
    assert len(orders) > 3
    by_place = TOKENS.sequence(
        np.array([[20, 9, 30, 20], [2, 30, 9, 40], [2, 3, 20, 8]], np.float32),
        np.array([0, 1, 2]),
        SIZE,
        dataclasses.replace(SETTINGS, order="position"),
        rng,
    )
    np.testing.assert_array_equal(by_place["targets"].reshape(-1, 5)[:3, 4] - 64, [2, 1, 0])


@pytest.mark.parametrize("order", ["random", "position"])
def test_noise_objects_stand_among_the_real_ones_where_the_settings_say_so(order):
    settings = dataclasses.replace(SETTINGS, order=order, noise_among=1.0)
    among, boxes = example(settings)
    real = among["targets"][:, 4] < TOKENS.noise
    assert real.sum() == 5 and not real[:5].all()
    assert ((among["weights"][:, :4] == 1) == real[:, None]).all()  # weights go with their objects
    expected = {tuple(row) for row in TOKENS.quantize(boxes, SIZE).tolist()}
    assert {tuple(row) for row in among["targets"][real, :4].tolist()} == expected
    if order == "position":
        places = [tuple(row) for row in among["targets"][:, :2].tolist()]
        assert places == sorted(places)
    shares = [
        example(dataclasses.replace(settings, noise_among=0.5), seed=k)[0]["targets"][:5, 4].max()
        for k in range(60)
    ]
    assert 15 < np.sum(np.array(shares) < TOKENS.noise) < 50


def test_of_too_many_objects_every_one_is_taken_now_and_then():
    settings, (_, boxes) = dataclasses.replace(SETTINGS, objects=3), example()
    rng, labels = np.random.default_rng(0), np.arange(5) % 3
    places = [tuple(row) for row in TOKENS.quantize(boxes, SIZE).tolist()]
    taken = set()
    for _ in range(20):
        targets = TOKENS.sequence(boxes, labels, SIZE, settings, rng)["targets"].reshape(3, 5)
        assert (targets[:, 4] < TOKENS.noise).all()
        taken |= {tuple(row) for row in targets[:, :4].tolist()}
    assert taken == set(places)


def test_evaluation_is_not_random():
    first, again = example(evaluation=True)[0], example(evaluation=True)[0]
    other = example(evaluation=True, seed=1)[0]
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert (first["targets"] != other["targets"]).any()


def test_an_image_without_objects_is_all_noise():
    found, _ = example(count=0)
    assert (found["targets"][:, 4] == TOKENS.noise).all() and (found["weights"][:, :4] == 0).all()
    assert len(np.unique(found["targets"][:, 0])) > 3  # random boxes, since none can be moved


def test_classes_that_are_read_are_corrupted_and_others_are_not():
    rng, boxes, labels = np.random.default_rng(0), random_boxes(np.random.default_rng(1), 12), []
    for share in (0.0, 1.0):
        settings = dataclasses.replace(SETTINGS, class_corruption=share)
        found = [TOKENS.sequence(boxes, np.zeros(12, int), SIZE, settings, rng) for _ in range(50)]
        targets, inputs = (np.stack([f[k] for f in found]) for k in ("targets", "inputs"))
        targets, inputs = targets.reshape(-1, 5), inputs.reshape(-1, 5)
        np.testing.assert_array_equal(inputs[:, :4], targets[:, :4])
        assert (targets[:, 4] == 64).all()
        labels.append(np.bincount(inputs[:, 4] - 64, minlength=4) / len(inputs))
    np.testing.assert_array_equal(labels[0], [1, 0, 0, 0])
    plain = dataclasses.replace(SETTINGS, class_corruption=0.0)
    found = [TOKENS.sequence(boxes[:1], np.zeros(1, int), SIZE, plain, rng) for _ in range(50)]
    noise = np.stack([f["inputs"] for f in found]).reshape(50, 12, 5)[:, 1:, 4] - 64
    shares = np.bincount(noise.ravel(), minlength=4) / noise.size
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.08)
    np.testing.assert_allclose(labels[1], [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.08)


def test_without_noise_the_sequence_ends():
    found, _ = example(dataclasses.replace(SETTINGS, noise=False))
    assert (found["targets"][5:] == TOKENS.noise).all()
    np.testing.assert_array_equal(found["inputs"][5:], found["targets"][5:])
    np.testing.assert_allclose(found["weights"][5:], 0.1)


def test_noise_has_the_kinds_that_the_settings_say():
    rng, boxes = np.random.default_rng(0), np.array([[0.4, 0.4, 0.6, 0.5]])
    jittered = noise_boxes(boxes, 500, (1.0, 0.0, 0.0), rng)
    assert 0 < np.abs(jittered - boxes).max() <= 0.1 * 0.2 + 1e-6
    shifted = noise_boxes(boxes, 500, (0.0, 1.0, 0.0), rng)
    inside = ((shifted > 0) & (shifted < 1)).all(axis=1)
    sides = shifted[:, 2:] - shifted[:, :2]
    np.testing.assert_allclose(sides[inside], np.tile([0.2, 0.1], (inside.sum(), 1)))
    assert iou(shifted, boxes).mean() < 0.1
    wild = noise_boxes(boxes, 500, (0.0, 0.0, 1.0), rng)
    assert wild.min() >= 0 and wild.max() <= 1 and np.std(wild[:, 2] - wild[:, 0]) > 0.1


def test_jitter_beyond_two_deviations_is_drawn_anew():
    boxes = np.array([[0.4, 0.4, 0.6, 0.6]])
    jittered = noise_boxes(boxes, 5000, (1.0, 0.0, 0.0), np.random.default_rng(0))
    deviations = np.abs(jittered - boxes) / (0.05 * 0.2)
    assert deviations.max() < 2 and 0.008 < (deviations > 1.9).mean() < 0.017  # .0125


def test_only_real_classes_are_detections_and_the_best_comes_first():
    found, boxes = example(evaluation=True)
    chances = np.linspace(0.1, 0.9, 12).repeat(5)
    detected = TOKENS.detections(found["targets"].reshape(-1), chances, SIZE)
    assert len(detected.boxes) == len(detected.labels) == 5
    assert (np.diff(detected.scores) < 0).all()
    places = TOKENS.quantize(detected.boxes, SIZE).tolist()
    assert sorted(places) == sorted(TOKENS.quantize(boxes, SIZE).tolist())


def test_equal_views_change_nothing():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 9), np.sort(rng.random(9))[::-1].astype(np.float32)
    labels = rng.integers(2, size=9).astype(np.int32)
    # Twice the same object, as likely.
    boxes[1], scores[1], labels[1] = boxes[0] + 0.1, scores[0], labels[0]
    one = Detections(boxes, labels, scores)
    found = vote([one] * 4)
    np.testing.assert_allclose(found.boxes, one.boxes, atol=1e-5)
    np.testing.assert_array_equal(found.labels, one.labels)
    np.testing.assert_allclose(found.scores, one.scores, atol=1e-6)


def test_views_that_agree_are_averaged_and_others_lose():
    def view(box, score, label=0):
        arrays = np.array([box], np.float32), np.array([label], np.int32)
        return Detections(*arrays, np.array([score], np.float32))

    found = vote([view([0, 0, 10, 10], 0.9), view([0, 0, 10, 12], 0.3)])
    np.testing.assert_allclose(found.boxes, [[0, 0, 10, 10.5]], atol=1e-5)
    np.testing.assert_allclose(found.scores, [0.6])
    found = vote([view([0, 0, 10, 10], 0.9), view([0, 0, 10, 10], 0.3, label=1)])
    np.testing.assert_allclose(found.scores, [0.45, 0.15])
    np.testing.assert_array_equal(found.labels, [0, 1])
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    assert len(vote([none, none]).boxes) == 0
