"""The benchmark of typicality on a tiny network: its sets, its numbers and its table."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import generator, make_mesh, random_image, random_params, tiny_network
from PIL import Image

import gptv_jax
from benchmarks import typicality as benchmark
from gptv_jax import config as config_lib
from gptv_jax.decode.typicality import Calibration, statistics
from gptv_jax.tokens import Palette
from gptv_jax.weights.native import WeightsFile

SHAPE = (4, 4, 3)


def resized(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(x).resize(SHAPE[1::-1])) for x in images])


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    return benchmark.made_sets(SHAPE, 16, generator(), resized)


def test_sets_are_what_they_are_called_and_depend_on_the_seed_alone(sets):
    again = benchmark.made_sets(SHAPE, 16, generator(), resized)
    for name, images in sets.items():
        assert images.dtype == np.uint8 and images.shape[1:] == SHAPE
        np.testing.assert_array_equal(images, again[name])
    flat = {name: images.reshape(len(images), 16, 3) for name, images in sets.items()}
    assert (flat["constants"] == flat["constants"][:, :1]).all()
    for name in flat.keys() - {"constants"}:
        assert (flat[name] != flat[name][:, :1]).any(axis=(1, 2)).mean() > 0.8, name
    parts = [len(images) for name, images in sets.items() if name.startswith("texture: ")]
    assert sum(parts) == 16


def test_every_texture_has_several_colours_and_is_another_one_each_time():
    rng = generator()
    for make in benchmark.TEXTURES.values():
        first, second = make(rng), make(rng)
        assert first.shape == (benchmark.SIDE, benchmark.SIDE, 3) and first.dtype == np.uint8
        assert len(np.unique(first.reshape(-1, 3), axis=0)) > 1 and (first != second).any()


def test_a_set_is_compared_with_the_test_images_by_every_number(sets):
    colors = generator(1).uniform(-1, 1, size=(11, 3)).astype(np.float32)
    tokens = config_lib.Tokens(kind="palette", colors=11)
    network = dataclasses.replace(tiny_network(), starts=1)
    described = WeightsFile(network.config, tokens, 4, {}, definition=Palette(colors, {}))
    mesh = make_mesh((1, 1, 1))
    usual = random_image(40, *SHAPE)
    with jax.set_mesh(mesh):
        params = random_params(described.network)
    unmeasured = gptv_jax.Model(described, params, mesh)
    nats = unmeasured.surprise(usual).reshape(40, 16)
    found = statistics(nats, unmeasured.detokenize(unmeasured.tokenize(usual)))
    described = dataclasses.replace(described, typicality=Calibration.fit(found, found))
    model = gptv_jax.Model(described, params, mesh)

    shown = {name: sets[name] for name in ("constants", "texture: checks", "texture: dots")}
    rows = benchmark.compare(model, usual, shown)
    own, other, *textures = rows
    assert [row["set"] for row in rows] == ["test images", *shown, "all textures"]
    assert [row["images"] for row in textures] == [2, 2, 4]
    for kind in ("typicality", "coder"):
        assert textures[2][kind] == pytest.approx((textures[0][kind] + textures[1][kind]) / 2)
    kinds = ("likelihood", "likelihood, two-sided", "coder", "difference", "typicality")
    for kind in kinds:
        assert own[kind] == pytest.approx(0.5) and 0 <= other[kind] <= 1
    # A constant takes fewer bits than any noise; the coder alone calls it more usual.
    assert other["coder"] == 0 and other["typicality"] > 0.9 and other["bits"] < own["bits"]
    assert own["rejected"] <= 1 / 40 < other["rejected"]
    lines = benchmark.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
