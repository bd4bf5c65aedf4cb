"""References on disk, and the numbers of a set of images compared with a reference."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_image

from gptv_jax.errors import InputError
from gptv_jax.quality import reference
from gptv_jax.quality.evaluate import evaluate, inception_score, overlap
from gptv_jax.quality.features import FeatureExtractor, pixels
from gptv_jax.quality.reference import measure

SHAPE = (4, 4, 1)
ABOUT = {"data": "noise", "split": "train", "transforms": ["resize 4, method=lanczos"]}


def corner_features(images):
    """Two pixels as features, and probabilities of three classes from the first pixel."""
    values = images.reshape(len(images), -1).astype(np.float64)
    return values[:, :2], np.eye(3)[images[:, 0, 0, 0] % 3] * 0.7 + 0.1


CORNER = FeatureExtractor(corner_features, "corner", "v1", 2)


def batches(images: np.ndarray, size: int):
    return iter(np.split(images, range(size, len(images), size)))


@pytest.fixture(scope="module")
def real():
    return random_image(90, *SHAPE)


@pytest.fixture(scope="module")
def generated():
    return random_image(70, *SHAPE, seed=1) // 2


@pytest.fixture(scope="module")
def made(real):
    return reference.compute(CORNER, batches(real, 32), ABOUT)


def test_a_reference_has_moments_and_provenance(real, made):
    x = real.reshape(90, -1)[:, :2].astype(float)
    assert made.count == 90
    np.testing.assert_allclose(made.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(made.covariance, np.cov(x.T), rtol=1e-12)
    assert ABOUT.items() <= made.provenance.items()
    assert made.provenance["count"] == 90
    assert made.provenance["features"] == {"name": "corner", "hash": "v1"}
    assert made.provenance["versions"]["jax"] == jax.__version__


def test_the_batch_size_does_not_matter(real, made):
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return corner_features(images)

    features = FeatureExtractor(counted, "corner", "v1", 2)
    for size in (7, 90):
        other = reference.compute(features, batches(real, size), ABOUT)
        np.testing.assert_allclose(other.covariance, made.covariance, rtol=1e-12)
        np.testing.assert_array_equal(other.kept, made.kept)
        assert set(sizes) == {
            size
        }  # the last batch was padded, so that the extractor compiles once
        sizes.clear()


def test_kept_features_are_a_random_sample(real):
    order = FeatureExtractor(lambda i: i.reshape(len(i), -1)[:, :1], "first", "v1", 1)
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None, None, None], (1, *SHAPE))
    kept = measure(order, batches(ramp, 9), 50)[1][:, 0]
    assert len(kept) == len(set(kept)) == 50 and set(kept) <= set(range(200))
    assert 70 < kept.mean() < 130 and kept.min() < 20 and kept.max() > 180
    assert 60 < kept[:25].mean() < 140  # the first rows are a random sample too
    assert list(kept) != sorted(kept)
    assert len(measure(order, batches(ramp, 9), 500)[1]) == 200


def test_a_saved_reference_is_read_back(made, tmp_path):
    path = tmp_path / "folder" / "reference.npz"
    for written in (made, dataclasses.replace(made, kept=None)):
        written.save(path)
        read = reference.load(str(path))
        np.testing.assert_equal(dataclasses.asdict(read), dataclasses.asdict(written))
    assert [p.name for p in path.parent.iterdir()] == ["reference.npz"]
    with pytest.raises(InputError, match=r"does not end in \.npz"):
        made.save(tmp_path / "reference.npy")


def test_damaged_files_and_files_of_other_programs_are_refused(made, tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(InputError, match="there is no reference"):
        reference.load(path)
    made.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:-100], b"", b"PK no zip", flipped):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"reference\.npz is no reference of .*damaged"):
            reference.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))  # the form of pytorch-fid
    with pytest.raises(InputError, match="is no reference of generation quality"):
        reference.load(path)
    path.write_bytes(whole)
    with np.load(path) as content:
        arrays = dict(content)
    changes = [
        {"mean": made.mean[:1]},
        {"mean": np.array(0.0)},
        {"covariance": made.covariance * np.nan},
        {"kept": made.kept[:, :1]},
        {"kept": made.kept.astype(int)},
        {"reference": str(arrays["reference"]).replace('"count": 90', '"count": 1')},
    ]
    for change in changes:
        np.savez(path, **(arrays | change))
        with pytest.raises(InputError, match="its arrays are not those of a reference"):
            reference.load(path)


def test_a_newer_format_is_refused(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reference, "FORMAT", 2)
        made.save(tmp_path / "later.npz")
    with pytest.raises(InputError, match="has format 2; this version reads format 1"):
        reference.load(tmp_path / "later.npz")


def test_evaluate_returns_the_numbers_of_the_metrics(made, real, generated):
    found = evaluate(batches(generated, 32), made, CORNER)
    y, p = corner_features(generated)
    assert found["frechet_distance"] > 1000
    itself = evaluate(batches(real, 32), made, CORNER)
    assert itself["frechet_distance"] < 1e-9
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    assert found["count"] == 70 and found["reference_count"] == 90 and found["overlap_count"] == 70
    score, deviation = inception_score(p.astype(np.float32))
    assert found["inception_score"] == score > 1
    assert found["inception_score_deviation"] == deviation
    # The reference is cut to the count of the generated images, whose order does not matter.
    shared = overlap(made.kept[:70], y.astype(np.float32))
    assert found["recall"] == shared.recall and found["precision"] == shared.precision
    assert found["density"] == pytest.approx(shared.density) and found["coverage"] > 0
    assert found["warning"] is None


def test_numbers_that_cannot_be_computed_are_none(real, generated):
    features = pixels(SHAPE)
    made = reference.compute(features, batches(real, 32), ABOUT, keep=0)
    assert made.kept is None
    found = evaluate(batches(generated[:12], 5), made, features)
    missing = ("precision", "recall", "density", "coverage", "overlap_count")
    for name in (*missing, "inception_score", "inception_score_deviation"):
        assert found[name] is None
    assert "12 generated images do not span the 16 features" in found["warning"]
    assert "reference images" not in found["warning"]


def test_another_extractor_is_refused_before_an_image_is_drawn(made):
    def never():
        raise AssertionError("an image was drawn")
        yield

    for name, hash in (("other", "v1"), ("corner", "v2")):
        other = FeatureExtractor(corner_features, name, hash, 2)
        with pytest.raises(InputError) as refused:
            evaluate(never(), made, other)
        assert "corner (hash v1)" in str(refused.value)
        assert f"{name} (hash {hash})" in str(refused.value)


def test_batches_that_are_no_images_are_refused(made):
    with pytest.raises(InputError, match="there are no images"):
        evaluate(iter([]), made, CORNER)
    for wrong in (np.zeros((2, 4, 4, 1)), random_image(4, 4, 1), random_image(0, *SHAPE)):
        with pytest.raises(ValueError, match=r"must be uint8 \[B, H, W, C\]"):
            evaluate(iter([wrong]), made, CORNER)
    with pytest.raises(InputError, match="one image has no covariance"):
        reference.compute(CORNER, iter([random_image(1, *SHAPE)]), ABOUT)
