"""Ridge regression of every layer from streamed moments, against scikit-learn's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from conftest import make_mesh

from gptv_jax import sharding
from gptv_jax.probe import features, ridge

CLASSES, LAYERS, WIDTH = 3, 2, 16
STRENGTHS = (1e-4, 1e-2)


def badly_scaled(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [L, N, D], correlated, with means of up to 1000 deviations, and labels [N]."""
    rng = np.random.default_rng(seed)
    same = np.random.default_rng(9)  # for every seed
    labels = rng.integers(CLASSES, size=images)
    common = rng.normal(size=(LAYERS, images, 1))
    x = 3 * common + rng.normal(size=(LAYERS, images, WIDTH))
    x += 0.7 * same.normal(size=(LAYERS, CLASSES, WIDTH))[:, labels]
    mean, scale = same.uniform(-1000, 1000, (LAYERS, 1, WIDTH)), 10 ** same.uniform(-4, 4, WIDTH)
    x = (mean + x) * scale
    x[..., 5] = 0.3  # constant: must not be divided by its deviation
    return x.astype(np.float32), labels.astype(np.int32)


def given(x: np.ndarray, labels: np.ndarray, size: int, fill: float = 0.0) -> features.Features:
    """Features in batches of `size`, the last one filled with rows of mask 0; all splits alike."""

    def split(_):
        for start in range(0, len(labels), size):
            real = min(size, len(labels) - start)
            rows = np.full((1, len(x), size, x.shape[-1]), fill, np.float32)
            rows[0, :, :real] = x[:, start : start + real]
            label = (np.arange(size) % CLASSES).astype(np.int32)  # some masked rows are right
            label[:real] = labels[start : start + real]
            mask = (np.arange(size) < real).astype(np.float32)
            batch = {"x": np.moveaxis(rows, 2, 0), "label": label, "mask": mask}
            batch = sharding.global_batch(batch)
            yield moved(batch.pop("x")), batch

    return split


@jax.jit
def moved(x):
    return jnp.moveaxis(x, 0, 2)


def moments_of(read: features.Features) -> ridge.Moments:
    moments = ridge.empty(LAYERS, WIDTH, CLASSES)
    for x, batch in read("train"):
        moments = ridge.add(moments, x, batch)
        # Hundreds of reductions under way over eight simulated devices can starve two cores.
        jax.block_until_ready(moments)
    return moments


def solved(read: features.Features) -> tuple:
    return ridge.solve(moments_of(read), np.tile(np.array(STRENGTHS)[:, None], LAYERS))


def scores_of(solution: tuple, x: np.ndarray) -> np.ndarray:
    """[S, L, N, C], in float64."""
    weight, bias, shift = solution
    x = x.astype(np.float64) - shift[:, None]
    return np.einsum("lnd,slcd->slnc", x, weight) + bias[:, :, None]


def sklearns(x: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    found = np.zeros((len(STRENGTHS), LAYERS, new.shape[1], CLASSES))
    for (s, strength), layer in itertools.product(enumerate(STRENGTHS), range(LAYERS)):
        model = sklearn.linear_model.Ridge(alpha=strength * len(labels))
        scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), model)
        scaled.fit(x[layer].astype(np.float64), np.eye(CLASSES)[labels])
        found[s, layer] = scaled.predict(new[layer].astype(np.float64))
    return found


def test_the_regression_matches_scikit_learn(one_device):
    (x, labels), (new, _) = badly_scaled(2000), badly_scaled(300, seed=1)
    found, wanted = scores_of(solved(given(x, labels, 64)), new), sklearns(x, labels, new)
    assert np.abs(wanted).max() > 0.8  # the scores separate the classes
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mesh", "size"), [((2, 2, 2), 8), ((1, 8, 1), 104), ((1, 2, 2, 2), 104)])
def test_the_regression_is_the_same_for_any_batch_size_and_mesh(mesh, size):
    (x, labels), (new, _) = badly_scaled(2000), badly_scaled(300, seed=1)
    with jax.set_mesh(make_mesh(mesh)):
        found = scores_of(solved(given(x, labels, size)), new)
    np.testing.assert_allclose(found, sklearns(x, labels, new), rtol=0, atol=1e-4)


def test_rounding_errors_do_not_add_up_over_many_batches(one_device):
    x, labels = badly_scaled(2000)
    [(x, batch)] = given(x, labels, 2000)("train")
    moments, products = ridge.empty(LAYERS, WIDTH, CLASSES), {}
    for count in range(1, 3001):
        moments = ridge.add(moments, x, batch)
        if count in (1, 3000):
            total, lost = (np.asarray(m["products"], np.float64) for m in moments[1:])
            products[count] = total - lost
    deviation = np.sqrt(np.einsum("ldd->ld", products[1]) + 1e-300)
    error = (products[3000] / 3000 - products[1]) / np.einsum("ld,le->lde", deviation, deviation)
    assert np.abs(error).max() < 1e-7


def test_masked_rows_do_not_count(one_device):
    x, labels = badly_scaled(100)
    wanted = solved(given(x, labels, 100))
    new = badly_scaled(300, seed=1)[0]
    for size in (64, 104):  # rows of mask 0 in the last batch, and in the first
        found = solved(given(x, labels, size, fill=1e6))
        np.testing.assert_allclose(scores_of(found, new), scores_of(wanted, new), rtol=0, atol=1e-5)
    read, whole = given(x, labels, 64, fill=1e6), given(x, labels, 100)
    assert ridge.tabulate(read, CLASSES, STRENGTHS) == ridge.tabulate(whole, CLASSES, STRENGTHS)


def test_the_accuracies_of_the_table_match_scikit_learn(one_device):
    (x, labels), (new, truth) = badly_scaled(200), badly_scaled(300, seed=1)

    def read(split):
        return given(*((x, labels) if split == "train" else (new, truth)), 64)(split)

    right = sklearns(x, labels, new).argmax(axis=-1) == truth
    for layer, row in enumerate(ridge.tabulate(read, CLASSES, STRENGTHS, test=False)):
        of_strength = right[:, layer].mean(axis=-1)
        assert row["ridge_validation_accuracy"] == pytest.approx(of_strength.max())
        assert row["ridge"] == STRENGTHS[len(STRENGTHS) - 1 - of_strength[::-1].argmax()]


def test_the_strength_is_chosen_on_validation_and_the_final_fit_includes_validation(one_device):
    parts = [badly_scaled(120, seed) for seed in range(3)]
    splits = dict(zip(("train", "validation", "test"), parts, strict=True))

    def table(**other):
        return ridge.tabulate(lambda s: given(*(splits | other)[s], 64)(s), CLASSES, STRENGTHS)

    x, labels = splits["test"]
    for row, other in zip(table(), table(test=(x, (labels + 1) % CLASSES)), strict=True):
        assert row.pop("ridge_test_accuracy") != other.pop("ridge_test_accuracy")
        assert row == other
    both = [
        np.concatenate(p, axis=a) for p, a in zip(zip(*parts[:2], strict=True), (1, 0), strict=True)
    ]
    right = sklearns(*both, x).argmax(axis=-1) == labels
    for layer, row in enumerate(table()):
        accuracy = right[STRENGTHS.index(row["ridge"]), layer].mean()
        assert row["ridge_test_accuracy"] == pytest.approx(accuracy)
