"""Weights of I3D that a user provides; test_parity_i3d tests what I3D computes.

The network is compiled once, for two clips.
"""

import contextlib
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy
from conftest import generator, random_image
from flax import serialization, traverse_util

from gptv_jax.config import fields
from gptv_jax.config.stages import Generate
from gptv_jax.errors import InputError
from gptv_jax.quality import i3d
from gptv_jax.quality.features import make_features

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "generation_quality.md"
CLIPS = (9, 20, 24, 3)  # frames, height, width, channels


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under PyTorch's names, scaled so that signals neither vanish nor explode."""
    rng = generator(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("bn.weight", "running_var")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 2 else 0.1
        return (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)

    wanted = i3d.tensors(i3d.PYTORCH, gains=True).values()
    return {name: draw(name, shape) for own in wanted for name, shape in own.items()}


BRANCHES = {"b0": "Branch_0.Conv3d_0a_1x1", "b3b": "Branch_3.Conv3d_0b_1x1"}
BRANCHES |= {f"b{i}a": f"Branch_{i}.Conv3d_0a_1x1" for i in (1, 2)}
BRANCHES |= {f"b{i}b": f"Branch_{i}.Conv3d_0b_3x3" for i in (1, 2)}
KINDS = {
    ("conv3d", "weight"): ("conv_3d", "kernel"),
    ("conv3d", "bias"): ("conv_3d", "bias"),
    ("bn", "weight"): ("batch_norm", "gamma"),
    ("bn", "bias"): ("batch_norm", "beta"),
    ("bn", "running_mean"): ("batch_norm", "moving_mean"),
    ("bn", "running_var"): ("batch_norm", "moving_variance"),
}


def as_magvit(weights: dict[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """The tensors by their places in MAGVIT's nested dict, with gains where there are some."""
    found = {}
    for name, value in weights.items():
        *place, kind, last = name.split(".")
        place = [BRANCHES.get(each, each) for each in place]
        place = ["Logits.Conv3d_0c_1x1"] if place == ["logits"] else place
        value = value.transpose(2, 3, 4, 1, 0) if value.ndim == 5 else value
        found[(*place, *KINDS[kind, last])] = np.ascontiguousarray(value)
    return found


def save_magvit(weights, folder) -> str:
    """Writes MAGVIT's file and converts it by the code in the docs, word for word."""
    weights = {"params": traverse_util.unflatten_dict(as_magvit(weights))}
    (folder / "i3d_k400.flax").write_bytes(serialization.msgpack_serialize(weights))
    [code] = re.findall(
        r"```python\n(import flax\.serialization.*?)```", DOCS.read_text(), re.DOTALL
    )
    with contextlib.chdir(folder):
        exec(code, {})
    return str(folder / "i3d.safetensors")


@pytest.fixture(scope="module")
def weights():
    return random_weights()


def save(weights, folder) -> str:
    safetensors.numpy.save_file(weights, folder / "i3d.safetensors")
    return str(folder / "i3d.safetensors")


def test_names_and_sizes_are_those_of_the_published_weights(weights):
    assert weights["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert weights["Mixed_4e.b2b.conv3d.weight"].shape == (64, 32, 3, 3, 3)
    assert weights["Mixed_5c.b3b.bn.running_var"].shape == (128,)
    assert weights["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)
    assert sum(name.endswith("conv3d.weight") for name in weights) == 58
    # 12.29 million of the convolutions and 0.41 of the logits, as torch's port of I3D has.
    trained = [v.size for n, v in weights.items() if "running" not in n]
    assert sum(trained) == 12_697_264


def test_a_file_of_either_program_gives_the_features(weights, tmp_path):
    clips = random_image(2, *CLIPS)
    clips[1] = clips[1, ..., :1]  # grey
    counter = {"Mixed_4b.b0.bn.num_batches_tracked": np.array(7)}
    features = make_features(save(weights | counter, tmp_path), CLIPS)
    values, probabilities = features(clips)
    assert values.shape == (2, features.size) == (2, 400) and values.dtype == np.float32
    assert probabilities is None and features.of_pictures
    assert features.name == "I3D, 400 mean logits of 9 frames, resized: tensorflow"
    assert np.abs(values[0] - values[1]).max() > 0.05 * np.abs(values).max()
    flax = make_features(save_magvit(weights, tmp_path), CLIPS)
    np.testing.assert_allclose(flax(clips)[0], values, rtol=1e-5)
    # Without gains, as in MAGVIT's file, gains are 1.
    ones = {n: np.ones_like(v) if n.endswith("bn.weight") else v for n, v in weights.items()}
    expected = make_features(save(ones, tmp_path), CLIPS)(clips)[0]
    assert np.abs(expected - values).max() > 0.05 * np.abs(values).max()
    bare = {n: v for n, v in weights.items() if not n.endswith("bn.weight")}
    without = make_features(save_magvit(bare, tmp_path), CLIPS)
    np.testing.assert_array_equal(without(clips)[0], expected)
    assert len({features.hash, flax.hash, without.hash}) == 3
    # The way frames are resized, and the order of frames, change the features.
    other = make_features(save(weights, tmp_path), CLIPS, "tensorflow_64")
    assert other.name.endswith("tensorflow_64") and other.name != features.name
    for changed in (other(clips)[0], features(clips[:, ::-1])[0]):
        assert np.abs(changed - values).max() > 1e-3 * np.abs(values).max()


def test_frames_are_resized_as_tensorflow_and_pytorch_do():
    ramp = np.zeros((1, 1, 112, 112, 1), np.uint8)
    ramp[0, 0, :, :, 0] = 2 * np.arange(112)  # from left to right
    wanted = {"tensorflow": np.arange(224), "pytorch": np.arange(224) - 0.5}
    for resize, row in wanted.items():
        found = np.asarray(i3d.resized(ramp, resize))
        assert found.shape == (1, 1, 224, 224, 3)
        row = np.clip(row, 0, 222) / 127.5 - 1
        np.testing.assert_allclose(found[0, 0], np.tile(row[:, None], (224, 1, 3)), atol=1e-6)
    twice = np.asarray(i3d.resized(ramp, "tensorflow_64"))[0, 0, 0, :, 0]
    assert np.abs(twice[7:200] - (np.arange(224) / 127.5 - 1)[7:200]).max() < 0.02
    names = fields.by_name(Generate)["i3d_resize"].metadata["accepted"][0]
    assert all(name in names for name in i3d.RESIZES)


def test_every_fault_of_the_weights_is_listed(weights, tmp_path):
    wrong = dict(weights)
    del wrong["Mixed_3c.b1b.bn.running_mean"]
    wrong["logits.conv3d.weight"] = wrong["logits.conv3d.weight"][:101]  # trained on UCF-101
    wrong["Mixed_6a.b0.bn.bias"] = np.zeros(5, np.float32)
    with pytest.raises(InputError) as refused:
        make_features(save(wrong, tmp_path), CLIPS)
    message = str(refused.value)
    for part in (
        "i3d.safetensors",
        "I3D with the 400 classes",
        "Mixed_3c.b1b.bn.running_mean (192,) is missing",
        "logits.conv3d.weight is (101, 1024, 1, 1, 1), expected (400, 1024, 1, 1, 1)",
        "Mixed_6a.b0.bn.bias (5,) is left over",
    ):
        assert part in message
    wrong = weights | {"logits.conv3d.bias": np.full(400, np.nan, np.float32)}
    with pytest.raises(InputError, match=r"not finite, in logits\.conv3d\.bias"):
        make_features(save(wrong, tmp_path), CLIPS)


def test_what_i3d_does_not_take_is_refused(weights, tmp_path):
    path = save(weights, tmp_path)
    for shape, words in (
        ((20, 24, 3), "9 frames or more, and these have 1"),
        ((8, 20, 24, 3), "9 frames or more, and these have 8"),
        ((9, 20, 24, 4), "RGB or grey images, but these have 4 channels"),
    ):
        with pytest.raises(InputError, match=words):
            make_features(path, shape)
    with pytest.raises(InputError, match="take one of tensorflow, tensorflow_64, pytorch"):
        make_features(path, CLIPS, "nearest")
