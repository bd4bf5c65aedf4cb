"""Metrics of generation quality, compared with SciPy and plain NumPy."""

import dataclasses
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from conftest import generator

from gptv_jax.errors import InputError
from gptv_jax.quality import evaluate
from gptv_jax.quality.evaluate import frechet_distance, inception_score, overlap
from gptv_jax.quality.reference import Moments


def features(count: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated float32 vectors with deviations over three orders of magnitude."""
    rng, same = generator(seed), generator(9)
    mixed = rng.normal(size=(count, width)) @ same.normal(size=(width, width))
    return (mixed * np.geomspace(1, 1e-3, width) + shift).astype(np.float32)


def moments(*batches: np.ndarray) -> Moments:
    width = batches[0].shape[1]
    found = Moments(0, np.zeros(width), np.zeros((width, width)))
    for batch in batches:
        found = found.plus(batch)
    return found


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(moments(x), moments(y))


def from_samples(x: np.ndarray, y: np.ndarray) -> float:
    """tr (C C')^(1/2) is the sum of the singular values of X Y', the centred samples."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    (m, x), (n, y) = ((z.mean(axis=0), (z - z.mean(axis=0)) / np.sqrt(len(z) - 1)) for z in (x, y))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((m - n) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    (m, c), (n, d) = ((z.mean(axis=0, dtype=float), np.cov(z.astype(float).T)) for z in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a singular product
        root = scipy.linalg.sqrtm(c @ d).real
    return ((m - n) ** 2).sum() + np.trace(c + d - 2 * root)


def test_the_distance_agrees_with_scipy():
    x, y = features(500, 48), features(400, 48, seed=1, shift=0.2)
    assert distance(x, y) > 1
    assert distance(x, y) == pytest.approx(by_scipy(x, y), rel=1e-9)


@pytest.mark.parametrize("counts", [(20, 400), (20, 30), (2, 3)])
def test_singular_covariances_cost_no_digits(counts):
    x, y = features(counts[0], 64), features(counts[1], 64, seed=1)
    assert distance(x, y) == pytest.approx(from_samples(x, y), rel=1e-12)
    assert distance(x, y) == pytest.approx(by_scipy(x, y), rel=1e-6)  # SciPy is off by 2e-8


def test_the_distance_is_0_for_equal_sets_and_that_of_the_means_for_shifted_sets():
    for seed in range(5):  # rounding takes some of the distances below 0
        x = features(30, 64, seed)
        assert 0 <= distance(x, x) < 1e-12 * moments(x).scatter.trace()
    means = generator(3).normal(size=(2, 64))
    of_x = moments(x)
    found = frechet_distance(*(dataclasses.replace(of_x, mean=mean) for mean in means))
    assert found == pytest.approx(((means[0] - means[1]) ** 2).sum(), rel=1e-12)
    assert distance(x, features(90, 64, seed=1)) == pytest.approx(
        distance(features(90, 64, seed=1), x), rel=1e-12
    )


def test_moments_of_several_batches_are_exact():
    x = features(999, 24, shift=1000.0)  # sums of squares far from 0 lose digits
    merged = moments(*np.split(x, [1, 8, 500]))
    assert merged.count == 999
    np.testing.assert_allclose(merged.mean, x.mean(axis=0, dtype=float), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(x.astype(float).T), rtol=0, atol=1e-11)
    assert merged.covariance.dtype == np.float64


def test_features_that_have_no_moments_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(InputError, match="one image has no covariance"):
        _ = moments(np.zeros((1, 4), np.float32)).covariance


def test_the_inception_score_agrees_with_scipy():
    p = generator().dirichlet(np.full(7, 0.3), size=103).astype(np.float32)
    p[:4] = np.eye(7)[:4]  # 0 log 0 is 0
    p[50] *= 1.0005  # rows of float32 add up to 1 nearly
    order = generator().permutation(103)
    parts = [p[order[i::10]].astype(float) for i in range(10)]
    wanted = [
        np.exp(np.mean(scipy.stats.entropy(q, np.mean(q, axis=0)[None], axis=1))) for q in parts
    ]
    mean, deviation = inception_score(p)
    assert mean == pytest.approx(np.mean(wanted), rel=1e-6)  # rows add up to 1 in float32
    assert deviation == pytest.approx(np.std(wanted), rel=1e-5)


def test_the_inception_score_goes_from_one_to_the_number_of_classes():
    certain = np.eye(5, dtype=np.float32)[np.arange(100) // 20]
    assert inception_score(certain, splits=1) == (pytest.approx(5, rel=1e-12), 0)
    alike = np.tile(generator().dirichlet(np.ones(5)), (100, 1))
    assert inception_score(alike)[0] == pytest.approx(1, rel=1e-12)


def test_the_inception_score_does_not_depend_on_images_sorted_by_class():
    classes = np.arange(1000) % 10
    for labels in (classes, np.sort(classes)):  # the stage generate draws classes in turn
        assert inception_score(np.eye(10)[labels])[0] > 9


def test_rows_that_are_no_probabilities_are_refused():
    p = np.full((20, 4), 0.25, np.float32)
    with pytest.raises(InputError, match="9 images cannot be split into 10"):
        inception_score(p[:9])
    for wrong in (p * 2, p * np.nan, p - np.array([0.5, 0, 0, -0.5], np.float32)):
        with pytest.raises(ValueError, match="0 or more and add up to 1"):
            inception_score(wrong)


def by_definition(real: np.ndarray, generated: np.ndarray, k: int, wide: int) -> tuple:
    """The papers' definitions, all pairs at once."""

    def far(x, y):
        return np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).sum(axis=-1))

    def radius(x, k):
        return np.sort(far(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]

    between = far(real, generated)
    inside = between <= radius(real, k)[:, None]
    recalled = between <= radius(generated, k)[None]
    close = between <= radius(real, wide)[:, None]
    return (
        inside.any(axis=0).mean(),
        recalled.any(axis=1).mean(),
        close.sum() / (wide * len(generated)),
        close.any(axis=1).mean(),
    )


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_precision_and_recall_follow_their_definitions_for_any_size_of_block(rows, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK_MIB", rows * 40 * 8 / 2**20)
    real, generated = features(40, 6), features(33, 6, seed=1, shift=0.1)
    real, generated = (1e7 + x.astype(np.float64) for x in (real, generated))
    for k, wide in ((3, 5), (2, 10)):
        found = overlap(real, generated, k, wide)
        assert found == pytest.approx(by_definition(real, generated, k, wide), rel=1e-12)
        assert min(found) > 0 and max(found[:2]) < 1
    swapped = overlap(generated, real)
    assert swapped.precision == overlap(real, generated).recall


def test_repeated_images_are_inside_each_others_balls():
    x = features(30, 2048, shift=1000.0)
    assert overlap(x, x)[:2] == (1, 1)
    for rows in (17, 18, 25):
        repeated = x[np.sort(np.resize(np.arange(3), rows))]
        # The balls have radius 0, so rounding errors would decide.
        assert overlap(repeated, np.concatenate([x, repeated[:5]])).precision == 8 / 35
    assert overlap(repeated, x) == (0.1, 1, pytest.approx(25 / 5 / 30), 1)


def test_missing_modes_lower_recall_and_noise_lowers_precision():
    near, far = features(100, 8), features(100, 8, seed=1, shift=100.0)
    real = np.concatenate([near, far])
    one_mode = overlap(real, features(100, 8, seed=2))
    assert one_mode.precision > 0.7 and one_mode.recall < 0.5 and one_mode.coverage < 0.6
    noise = np.concatenate([near, features(100, 8, seed=2, shift=-100.0)])
    assert overlap(near, noise).precision == 0.5 and overlap(near, noise).recall == 1


def test_too_few_images_have_no_neighbours():
    x = features(10, 4)
    with pytest.raises(InputError, match="only 5 generated images; give 6 or more"):
        overlap(x, x[:5])
    with pytest.raises(InputError, match="only 5 real images"):
        overlap(x[:5], x)
