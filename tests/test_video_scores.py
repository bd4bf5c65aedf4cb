"""Metrics of label maps of videos, against independent counts and maps made by hand."""

import numpy as np
import pytest
from scipy import ndimage

from gptv_jax.tasks import video_scores


def blob(seed: int, side: int = 60) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 5) > 0.02


def reference_f(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F as DAVIS's own code computes it: boundaries are dilated by a disk."""
    reach = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk, lines = x**2 + y**2 <= reach**2, []
    for mask in (truth, predicted):
        line = np.zeros_like(mask)
        for i in range(len(mask)):
            for j in range(len(mask)):
                down, right = min(i + 1, len(mask) - 1), min(j + 1, len(mask) - 1)
                others = mask[i, right], mask[down, j], mask[down, right]
                line[i, j] = any(other != mask[i, j] for other in others)
        lines.append(line)
    wide = [ndimage.binary_dilation(line, disk) for line in lines]
    precision = (lines[1] & wide[0]).sum() / lines[1].sum()
    recall = (lines[0] & wide[1]).sum() / lines[0].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_boundary_f_is_that_of_dilated_boundaries():
    for seed in range(4):
        truth, predicted = blob(seed), ndimage.shift(blob(seed), (seed, 1), order=0) ^ blob(9)
        expected = reference_f(truth, predicted)
        assert 0.1 < expected < 1
        assert video_scores.boundary_f(truth, predicted) == pytest.approx(expected)
    nothing, square = np.zeros((60, 60), bool), np.zeros((60, 60), bool)
    square[20:40, 20:40] = True
    assert video_scores.boundary_f(nothing, nothing) == 1
    assert video_scores.boundary_f(square, nothing) == video_scores.boundary_f(nothing, square) == 0
    assert video_scores.boundary_f(square, np.roll(square, 1, axis=0)) == 1  # within .008 of 85
    assert video_scores.boundary_f(square, np.roll(square, 8, axis=(0, 1))) < 0.5


def test_regions_and_boundaries_are_means_over_objects_and_inner_frames():
    truth = np.zeros((5, 8, 8), np.uint8)
    truth[:, :4, :4], truth[:, 4:, 4:], truth[:, 7, 0] = 1, 2, 255
    assert video_scores.davis(truth, truth, 3) == {"region_similarity": 1.0, "boundary_f": 1.0}
    found = truth.copy()
    found[[0, 4]] = 0  # the first and the last frame do not count
    assert video_scores.davis(truth, found, 3) == {"region_similarity": 1.0, "boundary_f": 1.0}
    found[2, :4, :4] = 0  # object 1 is lost in one of three frames, and the ground grows
    ground = 63 - 32
    expected = np.mean([2 / 3, 1.0, (2 + ground / (ground + 16)) / 3])
    assert video_scores.davis(truth, found, 3)["region_similarity"] == pytest.approx(expected)
    found = truth.copy()
    found[:, 7, 0] = 1  # a pixel without a class counts as background of every object
    assert video_scores.davis(truth, found, 3)["region_similarity"] == 1
    later = truth.copy()
    later[0][later[0] == 2] = 0  # no object, as the first map does not have the class
    found = later.copy()
    found[1:][found[1:] == 2] = 1
    assert video_scores.davis(later, found, 3)["region_similarity"] < 1
    assert video_scores.davis(truth[:2], truth[:2], 3) == {}


def test_consistency_counts_pixels_that_stay_right():
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(3, size=(1, 4, 5)), 6, axis=0).astype(np.uint8)
    wrong = (truth + 1) % 3  # predictions that stay, and are wrong
    truth[rng.random(truth.shape) < 0.1] = 255
    found = np.where(rng.random(truth.shape) < 0.1, 0, truth)
    for n in (1, 2, 3, 6):
        shares = []
        for start in range(6 - n + 1):
            stays = right = 0
            for y in range(4):
                for x in range(5):
                    true = set(truth[start : start + n, y, x].tolist())
                    if len(true) == 1 and true != {255}:
                        stays += 1
                        right += set(found[start : start + n, y, x].tolist()) == true
            if stays:
                shares.append(right / stays)
        assert video_scores.consistency(truth, found, 3, n) == pytest.approx(np.mean(shares))
    assert video_scores.consistency(truth, found, 3, 7) is None
    assert video_scores.consistency(truth, wrong, 3, 2) == 0


def test_scores_leave_out_the_first_frame_of_every_video():
    rng = np.random.default_rng(1)
    truths = [rng.integers(3, size=(n, 4, 5)).astype(np.uint8) for n in (4, 9)]
    pairs = [(t, np.where(rng.random(t.shape) < 0.2, 0, t)) for t in truths]
    found = video_scores.scores(pairs, 3)
    for truth, maps in pairs:
        maps[0] = truth[0] + 1
    assert video_scores.scores(pairs, 3) == found
    assert len(found["miou_by_frame"]) == 8 and "consistency_16" not in found
    truth, maps = (np.concatenate([pair[i][1:] for pair in pairs]) for i in (0, 1))
    ious = [
        ((truth == c) & (maps == c)).sum() / ((truth == c) | (maps == c)).sum() for c in range(3)
    ]
    assert found["miou"] == pytest.approx(np.mean(ious))
    alone = video_scores.scores([(truths[0][:1], truths[0][:1])], 3)
    assert alone["miou"] is None and alone["miou_by_frame"] == []
