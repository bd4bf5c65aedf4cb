"""What a linear map reads of label maps from every position, against scikit-learn's ridge."""

import json

import jax
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from conftest import make_mesh, random_batch, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.tasks import confusion, dense_probe
from gptv_jax.tokens import GreyCodec

CLASSES, CELLS, WIDTH, STRENGTH = 3, 4, 8, 1e-3


def drawn(images, seed):
    """Features [B, T, D] that say the classes of the cells, and counts of pixels [B, T, G, C]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 5, WIDTH)).astype(np.float32)
    mixed = np.random.default_rng(9).normal(size=(WIDTH, CELLS * CLASSES))
    scores = (x @ mixed).reshape(images, 5, CELLS, CLASSES) + np.array((1.5, 0, -1))
    counts = np.eye(CLASSES, dtype=np.int32)[scores.argmax(-1)] * 4
    counts[..., 0] += rng.integers(0, 3, counts.shape[:-1])
    counts[rng.random(counts.shape[:-1]) < 0.05] = 0  # cells without a class
    return x, counts.astype(np.int32)


def given(splits, size):
    """The features in batches of `size`, with images that do not count at the end."""

    def features(split):
        x, counts = splits[split]
        for start in range(0, len(x), size):
            real = min(size, len(x) - start)
            rows = [np.resize(a[start : start + real], (size, *a.shape[1:])) for a in (x, counts)]
            flat = rows[0].reshape(-1, WIDTH)
            mask = (np.arange(size) < real).astype(np.float32)
            batch = sharding.global_batch({"x": flat, "counts": rows[1], "mask": mask})
            yield batch["x"][None, None], batch["counts"], batch["mask"]

    return features


@pytest.fixture(scope="module")
def splits():
    return {"train": drawn(40, 0), "validation": drawn(11, 1), "test": drawn(13, 2)}


def test_numbers_are_those_of_ridge_regression(splits, monkeypatch):
    monkeypatch.setattr(dense_probe, "POWERS", (0.5,))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        [found] = dense_probe.tabulate(given(splits, 8), (STRENGTH,))

    def miou(fitted, split):
        x, counts = (np.concatenate([splits[name][i] for name in fitted]) for i in (0, 1))
        known = (counts.sum(-1) > 0).all(-1)
        shares = counts[known] / counts[known].sum(-1, keepdims=True)
        ridge = sklearn.linear_model.Ridge(alpha=STRENGTH * known.sum())
        model = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), ridge)
        model.fit(x[known].astype(np.float64), shares.reshape(known.sum(), -1))
        x, counts = splits[split]
        scores = model.predict(x.reshape(-1, WIDTH)).reshape(*counts.shape)
        chosen = (scores / shares.mean(0) ** 0.5).argmax(-1)
        matrix = np.zeros((CLASSES, CLASSES), int)
        for by_class, c in zip(counts.reshape(-1, CLASSES), chosen.ravel(), strict=True):
            matrix[:, c] += by_class
        return confusion.scores(matrix)

    assert found["validation_miou"] == pytest.approx(
        miou(["train"], "validation")["miou"], abs=1e-9
    )
    test = miou(["train", "validation"], "test")
    assert found["test_miou"] == pytest.approx(test["miou"], abs=1e-9)
    assert found["test_pixel_accuracy"] == pytest.approx(test["pixel_accuracy"], abs=1e-9)
    assert 0.5 < found["test_miou"] < 1


def test_batches_and_devices_change_nothing(splits):
    found = []
    for size, shape in ((8, (1, 1, 1)), (16, (1, 1, 1)), (8, (2, 4, 1))):
        with jax.set_mesh(make_mesh(shape)):
            found.append(dense_probe.tabulate(given(splits, size), (1e-3, 1e-1)))
    assert found[0] == found[1] == found[2]


def test_cells_are_those_of_the_position():
    """4 x 6 pixels as grey levels: a position is a pixel; as squares of 8 pixels: 2 x 2 cells."""
    label_map = np.arange(24).reshape(4, 6).astype(np.uint8)
    found = dense_probe.Cut(GreyCodec(2, (4, 6)), 24)({"segmentation": label_map})["cells"]
    assert found.shape == (24, 1, 24) and (found[:, 0] == np.eye(24)).all()
    codec = GreyCodec(2, (8, 16))
    codec.grid = (1, 2)
    blocks = np.kron(np.arange(8).reshape(2, 4), np.ones((4, 4), int)).astype(np.int32)
    cut = dense_probe.Cut(codec, 8)
    found = cut({"segmentation": blocks})["cells"]
    assert (found.argmax(-1) == [[0, 1, 4, 5], [2, 3, 6, 7]]).all() and found.sum() == 128


def test_a_position_has_the_features_that_have_read_its_token_first():
    network = tiny_network()
    batch = random_batch(network, 2) | {"cells": np.zeros((2, 16, 1, CLASSES), np.int32)}
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][:, 5] = 10 - changed["tokens"][:, 5]
    changed["tokens"][:, 5] += changed["tokens"][:, 5] == batch["tokens"][:, 5]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        read = dense_probe.of_network(
            network, params, lambda split: iter([batch, changed]), raw=False
        )
        [rows, other] = [np.asarray(x).reshape(3, 2, 16, 32) for x, _, _ in read("test")]
        on_mesh = sharding.global_batch(batch)
        found = network.bind(params)(on_mesh["tokens"], on_mesh["variant"], keep=(0, 1, 2)).kept
    # The last token is no input, so its position has the features of the position before it.
    expected = np.asarray(found)[:, :, [*range(1, 16), 15]]
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows[:, :, :5], other[:, :, :5])
    assert (rows[:, :, 5] != other[:, :, 5]).any(axis=-1).all()


class Squares(GreyCodec):
    """A position stands for 2 x 2 pixels; there is a token for each pixel."""

    def __init__(self, levels, size):
        super().__init__(levels, size)
        self.grid, self.pixels = tuple(n // 2 for n in size), size

    def decode(self, tokens, grid=None):
        return super().decode(tokens, grid or self.pixels)


def test_raw_pixels_are_those_of_the_position():
    codec, side = Squares(256, (4, 6)), 2
    tokens = np.random.default_rng(0).permutation(48).reshape(2, 24).astype(np.int32)
    images = tokens.reshape(2, 4, 6)
    batch = {"tokens": tokens, "cells": np.zeros((2, 6, 1, 1)), "mask": np.ones(2, np.float32)}
    with jax.set_mesh(make_mesh((1, 1, 1))):
        [(x, _, _)] = dense_probe.of_pixels(codec, lambda split: iter([batch]))("test")
    squares = [
        image[y : y + side, x : x + side].ravel()
        for image in images
        for y in (0, 2)
        for x in (0, 2, 4)
    ]
    np.testing.assert_array_equal(x[0, 0], squares)


def test_the_stage_reads_label_maps_by_layer(tmp_path):
    c = config_lib.default()
    c.data.name, c.data.image_size = "digit_scenes", (32, 48)
    c.task.name = "segment"
    c.data.train_split, c.data.validation_split = "train[:12]", "validation[:8]"
    c.data.test_split = "test[:8]"
    c.tokens.levels = 256
    c.model.layers, c.model.width, c.model.heads = 1, 8, 2
    c.train.steps, c.train.batch_size, c.probe.batch_size = 1, 8, 8
    gptv_jax.train(c, tmp_path, stages=["pretrain", "probe"])
    found = json.loads((tmp_path / "summary.json").read_text())
    layers = json.loads((tmp_path / "probe" / "dense_layers.json").read_text())
    assert [row["layer"] for row in layers] == [0, 1]
    best = found["probe/dense_best_layer"]
    assert (
        found["probe/test_miou"]
        == layers[best]["test_miou"]
        == found[f"probe/layer_{best}_test_miou"]
    )
    assert 0 < found["probe/raw_pixels_test_miou"] < 1 and found["probe/random_init_test_miou"] > 0
    assert (tmp_path / "probe" / "dense_layers.png").exists()
    assert "mean IoU" in (tmp_path / "report.html").read_text()
