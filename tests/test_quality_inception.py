"""Weights of Inception that a user provides; test_parity_inception tests what Inception computes.

The network is compiled once, for two images.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import generator, make_mesh, random_image

from gptv_jax.errors import InputError
from gptv_jax.quality import inception
from gptv_jax.quality.features import make_features


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under PyTorch's names, scaled so that signals neither vanish nor explode."""
    rng = generator(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("bn.weight", "running_var")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 2 else 0.1
        scale = 0.003 if name == "fc.weight" else scale  # so that no class is certain
        return (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in inception.weight_shapes().items()}


@pytest.fixture(scope="module")
def weights():
    return random_weights()


def save(weights, folder) -> str:
    safetensors.numpy.save_file(weights, folder / "inception.safetensors")
    return str(folder / "inception.safetensors")


def test_names_and_sizes_are_those_of_the_published_weights():
    shapes = inception.weight_shapes()
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)  # [O, I, H, W]
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert sum(name.endswith(".conv.weight") for name in shapes) == 94
    convolutions = sum(np.prod(shape) for name, shape in shapes.items() if "conv" in name)
    assert convolutions == 21_751_136  # of torchvision's, without its auxiliary classifier


def test_a_file_of_weights_gives_features_and_probabilities(weights, tmp_path):
    images = random_image(2, 24, 20, 3)
    images[1] = images[1, ..., :1]  # grey
    path = save(weights | {"Mixed_7a.branch3x3_1.bn.num_batches_tracked": np.array(7)}, tmp_path)
    features = make_features(path, (24, 20, 3))
    values, probabilities = features(images)
    assert values.shape == (2, features.size) == (2, 2048) and values.dtype == np.float32
    assert probabilities.shape == (2, 1008)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(values[0] - values[1]).max() > 1e-3 * values.max()
    with jax.set_mesh(make_mesh((8, 1, 1))):  # two images cannot be split over eight devices
        of_grey = make_features(path, (24, 20, 1))(images[..., :1])
    for found, expected in zip(of_grey, (values, probabilities), strict=True):
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5 * expected.max())
    changed = weights | {"fc.bias": weights["fc.bias"] + 1}
    assert make_features(save(changed, tmp_path), (24, 20, 3)).hash != features.hash


def test_every_fault_of_the_weights_is_listed(weights, tmp_path):
    wrong = dict(weights)
    del wrong["Conv2d_1a_3x3.conv.weight"], wrong["Mixed_5b.branch_pool.bn.running_mean"]
    wrong["fc.weight"] = wrong["fc.weight"][:1000]  # ImageNet's classes: torchvision's own weights
    wrong["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    wrong["fc.bias"] = np.zeros(1008, np.int32)
    with pytest.raises(InputError) as refused:
        make_features(save(wrong, tmp_path), (32, 32, 3))
    message = str(refused.value)
    for part in (
        "inception.safetensors",
        "Conv2d_1a_3x3.conv.weight (32, 3, 3, 3) is missing",
        "Mixed_5b.branch_pool.bn.running_mean (32,) is missing",
        "fc.weight is (1000, 2048), expected (1008, 2048)",
        "fc.bias is of type int32",
        "AuxLogits.fc.bias (1000,) is left over",
        "pt_inception-2015-12-05",
    ):
        assert part in message
    assert message.count(";") == 4 and "Mixed_6" not in message


def test_values_that_are_not_finite_are_refused(weights, tmp_path):
    wrong = weights | {"fc.bias": np.full(1008, np.nan, np.float32)}
    with pytest.raises(InputError, match=r"not finite, in fc\.bias"):
        make_features(save(wrong, tmp_path), (32, 32, 3))


def test_images_of_other_channels_are_refused(weights, tmp_path):
    with pytest.raises(InputError, match="RGB or grey images, but these have 4 channels"):
        make_features(save(weights, tmp_path), (32, 32, 4))
