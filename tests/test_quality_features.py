"""Feature extractors."""

import dataclasses

import numpy as np
import pytest
from conftest import generator, random_image, random_params

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.quality.features import FeatureExtractor, make_features, pixels
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile


def test_pixels_are_averaged_over_equal_areas():
    images = random_image(3, 32, 16, 3)
    features = make_features("pixels", (32, 16, 3))
    values, probabilities = features(images)
    wanted = images.reshape(3, 8, 4, 8, 2, 3).mean(axis=(2, 4), dtype=float)
    np.testing.assert_allclose(values, wanted.reshape(3, -1), rtol=1e-6)
    assert probabilities is None and values.dtype == np.float32
    assert features.size == values.shape[1] and features.name.startswith("pixels 8x8x3 of ")


def test_averaged_areas_may_end_within_a_pixel():
    image = random_image(1, 12, 20, 1)
    repeated = image.repeat(2, axis=1).repeat(2, axis=2)  # 24 x 40 pixels, which 8 divides
    values, _ = make_features(None, (12, 20, 1))(image)
    np.testing.assert_allclose(values, pixels((24, 40, 1))(repeated)[0], rtol=1e-6)


def test_pixels_of_small_images_are_not_averaged():
    images = random_image(2, 5, 8, 1)
    features = make_features(None, (5, 8, 1))
    np.testing.assert_array_equal(features(images)[0], images.reshape(2, -1))
    assert features.size == 40


def test_a_function_returns_features_and_may_return_probabilities():
    images = random_image(2, 4, 4, 3)

    def function(images):
        return images.mean(axis=(1, 2)), np.full((len(images), 4), 0.25)

    features = FeatureExtractor(function, "means", "v1", 3)
    values, probabilities = features(images)
    assert values.shape == (2, 3) and probabilities.shape == (2, 4)
    assert FeatureExtractor(lambda i: function(i)[0], "means", "v1", 3)(images)[1] is None
    with pytest.raises(
        ValueError, match=r"means returned features \[2, 3\] for 2 images; .* return \[2, 5\]"
    ):
        FeatureExtractor(function, "means", "v1", 5)(images)


def test_a_network_without_a_probe_gives_the_middle_layer(tmp_path, one_device):
    model = config_lib.Model(layers=4, width=16, heads=2)
    weights_file = WeightsFile(model, config_lib.Tokens(), image_size=4, params={})
    params = sharding.by_name(random_params(weights_file.network))
    arrays = {name: np.asarray(value) for name, value in params.items()}
    path = tmp_path / "weights.safetensors"
    images = generator().integers(17, size=(8, 4, 4, 1), dtype=np.uint8)
    hashes = set()
    for layer in (None, 1):
        native.write(dataclasses.replace(weights_file, params=arrays, best_layer=layer), path)
        features = make_features(str(path), (4, 4, 1))
        assert features.name == f"gptv_jax, layer {layer or 2} of 4"
        values, probabilities = features(images)
        np.testing.assert_array_equal(values, gptv_jax.load(path).features(images, layer or 2))
        assert probabilities is None and features.size == values.shape[1]
        hashes.add(features.hash)
    assert len(hashes) == 1  # the same weights
    arrays["start"] = arrays["start"] + 1
    native.write(dataclasses.replace(weights_file, params=arrays), path)
    assert make_features(str(path), (4, 4, 1)).hash not in hashes


@pytest.mark.process
def test_a_run_gives_the_best_layer_and_class_probabilities(finished_run, tmp_path):
    images = generator().integers(17, size=(8, 8, 8, 1), dtype=np.uint8)  # levels
    features = make_features(str(finished_run.folder), (8, 8, 1))
    model, chosen = gptv_jax.load(finished_run.folder), finished_run.summary["probe/best_layer"]
    values, probabilities = features(images)
    np.testing.assert_array_equal(values, model.features(images))
    np.testing.assert_array_equal(probabilities, model.classify(images))
    assert features.size == values.shape[1] == 16
    assert features.name == f"gptv_jax, layer {chosen} of 1"

    model.save(tmp_path / "same.safetensors")  # equal weights in another place
    same = make_features(str(tmp_path / "same.safetensors"), (8, 8, 1))
    assert (same.name, same.hash) == (features.name, features.hash)
    with pytest.raises(InputError, match="takes images of 8x8x1, but these are of 32x32x3"):
        make_features(str(finished_run.folder), (32, 32, 3))


def test_names_of_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="features are 'inception', but there is no such file"):
        make_features("inception", (32, 32, 3))
    with pytest.raises(InputError, match="is not a run folder"):
        make_features(str(tmp_path), (32, 32, 3))
    (tmp_path / "cut.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(InputError, match=r"is no \.safetensors file, or damaged"):
        make_features(str(tmp_path / "cut.safetensors"), (32, 32, 3))
