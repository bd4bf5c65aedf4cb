"""LPIPS: the weights that are accepted, and the distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import generator

from gptv_jax.errors import InputError
from gptv_jax.model import lpips
from gptv_jax.weights.strict_reader import load_lpips


def random_weights(seed: int = 0) -> lpips.Weights:
    """Tensors of the authors' state dict, scaled so that features keep their size."""
    rng, weights, inputs = generator(seed), {}, 3
    for i, convolutions in enumerate(lpips.SLICES):
        for number, outputs in convolutions:
            kernel = rng.standard_normal((outputs, inputs, 3, 3), np.float32)
            name = f"net.slice{i + 1}.{number}"
            weights[f"{name}.weight"] = kernel * np.float32((2 / (9 * inputs)) ** 0.5)
            weights[f"{name}.bias"] = rng.normal(0, 0.1, outputs).astype(np.float32)
            inputs = outputs
        # The trained weights are not negative either, so that the sum is a distance.
        weights[f"lin{i}.model.1.weight"] = rng.random((1, inputs, 1, 1), np.float32)
    return weights


@pytest.fixture
def weights(monkeypatch) -> lpips.Weights:
    """Weights of a network with a sixteenth of VGG's channels, which computes faster."""
    narrow = tuple(
        tuple((number, outputs // 16) for number, outputs in convolutions)
        for convolutions in lpips.SLICES
    )
    monkeypatch.setattr(lpips, "SLICES", narrow)
    return random_weights()


@pytest.fixture(scope="module")
def vgg_weights() -> lpips.Weights:
    """Weights of VGG-16's shapes, written down here independently, by torchvision's layers."""
    layers = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
    layers |= {14: (256, 256), 17: (256, 512)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))
    weights, first = {}, (0, 5, 10, 17, 24)
    for number, (inputs, outputs) in layers.items():
        name = f"net.slice{sum(number >= begins for begins in first)}.{number}"
        weights[f"{name}.weight"] = np.full((outputs, inputs, 3, 3), 0.5, np.float32)
        weights[f"{name}.bias"] = np.arange(outputs, dtype=np.float32)
    for i, width in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{i}.model.1.weight"] = np.full((1, width, 1, 1), i, np.float32)
    return weights


def random_images(seed: int, size: int = 16) -> np.ndarray:
    return generator(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


distance = jax.jit(lpips.distance)
slope = jax.jit(jax.grad(lambda w, one, other: lpips.distance(w, one, other).sum(), argnums=1))


def test_the_distance_agrees_with_plain_numpy(weights):
    def features(image):  # [H, W, 3], one image, in float64
        x = (image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        x = np.moveaxis(x, -1, 0)
        for i, convolutions in enumerate(lpips.SLICES):
            if i:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))
            for number, _ in convolutions:
                name = f"net.slice{i + 1}.{number}"
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
                x = np.tensordot(weights[f"{name}.weight"], windows, ((1, 2, 3), (0, 3, 4)))
                x = np.maximum(x + weights[f"{name}.bias"][:, None, None], 0)
            yield x / (np.sqrt(np.square(x).sum(axis=0)) + 1e-10)

    one, other = random_images(0), random_images(1)
    other[1] = 0.7 * one[1] + 0.3 * other[1]
    wanted = [
        sum(
            (np.square(a - b) * weights[f"lin{i}.model.1.weight"][0]).sum(axis=0).mean()
            for i, (a, b) in enumerate(zip(features(x), features(y), strict=True))
        )
        for x, y in zip(one, other, strict=True)
    ]
    assert wanted[0] > 1.5 * wanted[1]
    np.testing.assert_allclose(distance(weights, one, other), wanted, rtol=1e-4)


def test_the_distance_is_symmetric_and_0_only_for_equal_images(weights):
    one, other = random_images(0), random_images(1)
    np.testing.assert_array_equal(distance(weights, one, one), 0)
    there, back = distance(weights, one, other), distance(weights, other, one)
    assert (np.asarray(there) > 0).all()
    np.testing.assert_allclose(back, there, rtol=1e-5)
    nearer = one + 0.1 * (other - one)
    assert (np.asarray(distance(weights, one, nearer)) < there).all()


def test_the_gradient_is_finite_and_points_towards_the_image(weights):
    image, other = (jnp.asarray(random_images(seed)) for seed in (0, 1))
    found = slope(weights, other, image)
    assert np.isfinite(found).all() and np.any(found)
    step = other - 0.02 * found / jnp.abs(found).max()
    assert (distance(weights, step, image) < distance(weights, other, image)).all()
    # A network without any active feature has a gradient of zero, not of nan.
    blind = {n: -jnp.abs(w) if n.endswith(".bias") else 0 * w for n, w in weights.items()}
    np.testing.assert_array_equal(slope(blind, other, image), 0)


def test_weights_are_read_and_duplicates_are_ignored(vgg_weights, tmp_path):
    path = tmp_path / "lpips_vgg.safetensors"
    more = {"lins.0.model.1.weight": vgg_weights["lin0.model.1.weight"]}
    more |= {"scaling_layer.shift": lpips.SHIFT.reshape(1, 3, 1, 1)}
    safetensors.numpy.save_file(vgg_weights | more, path)
    found = load_lpips(path)
    assert found.keys() == vgg_weights.keys()
    for name, array in vgg_weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_every_tensor_that_does_not_fit_is_named(vgg_weights, tmp_path):
    path = tmp_path / "other.safetensors"
    harmed = dict(vgg_weights)
    del harmed["net.slice1.0.weight"]
    harmed["net.slice3.12.bias"] = np.zeros(128, np.float32)
    harmed["lin4.model.1.weight"] = np.zeros((1, 512, 1, 1), np.int32)
    harmed["net.slice6.30.bias"] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(harmed, path)
    with pytest.raises(InputError) as raised:
        load_lpips(path)
    message = str(raised.value)
    assert "other.safetensors are not those of LPIPS with VGG-16" in message
    for words in (
        "net.slice1.0.weight (64, 3, 3, 3) is missing",
        "net.slice3.12.bias is (128,), expected (256,)",
        "lin4.model.1.weight is of type int32",
        "net.slice6.30.bias (7,) is left over",
    ):
        assert words in message
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"other.safetensors .*damaged"):
        load_lpips(path)
