"""Label maps as tokens and back."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder
from gptv_jax.tokens import label_maps
from gptv_jax.tokens.label_maps import Cells, Patches, fit_patches, from_bytes
from gptv_jax.train.autoencoding import LOGIT, fit_learned, make_label_loss

CLASSES, SHAPE, CELL = 5, (10, 13), 4  # the last cells of a row and of a column are cut


def drawn(count=40, seed=0, dtype=np.uint8):
    """Rectangles of classes, and pixels without a class."""
    rng, no_class = np.random.default_rng(seed), 255 if dtype == np.uint8 else -1
    maps = np.zeros((count, *SHAPE), dtype)
    for each in maps:
        for _ in range(4):
            y, x = rng.integers(0, SHAPE)
            each[y : y + rng.integers(2, 7), x : x + rng.integers(2, 7)] = rng.integers(CLASSES)
        each[tuple(rng.integers(0, SHAPE))] = no_class
    return maps


@pytest.fixture(scope="module")
def patches():
    return fit_patches(drawn(), CLASSES, CELL, codes=30, seed=0)


@pytest.fixture(params=["cells", "patches"])
def codec(request, patches):
    return patches if request.param == "patches" else Cells(CLASSES, SHAPE, CELL)


def test_tokens_stand_for_cells(codec):
    maps = drawn(seed=1)
    tokens, weights = codec.encode(maps)
    assert codec.grid == (3, 4) and tokens.shape == weights.shape == (40, 12)
    assert tokens.dtype == np.int32 and weights.dtype == np.float32
    assert 0 <= tokens.min() <= tokens.max() < codec.vocabulary and weights.all()
    restored = codec.decode(tokens)
    assert restored.shape == maps.shape and restored.dtype == np.int32
    assert restored.min() >= 0 and restored.max() < CLASSES
    again, _ = codec.encode(restored)
    assert (codec.decode(again) == restored).all()
    assert (codec.encode(drawn(seed=1, dtype=np.int32))[0] == tokens).all()


def test_any_token_decodes_to_classes(codec):
    tokens = np.random.default_rng(0).integers(codec.vocabulary, size=(20, 12))
    restored = codec.decode(tokens)
    assert restored.min() >= 0 and restored.max() < CLASSES


def test_pixels_without_a_class_count_nowhere(codec):
    maps = drawn(4, seed=2)
    maps[:, :4, :4] = 255  # the first cell
    maps[:, 4:8, 4:8] = 3
    maps[:, 4:7, 4:8] = 255  # most of another cell; what is left is of class 3
    tokens, weights = codec.encode(maps)
    assert (weights[:, 0] == 0).all() and (weights[:, 1:] == 1).all()
    assert (codec.decode(tokens)[:, 7, 4:8] == 3).all()


def test_a_cell_is_its_majority():
    maps = np.array([[[1, 1, 2, 4], [1, 0, 4, 2]]])
    tokens, _ = Cells(CLASSES, (2, 4), 2).encode(maps)
    assert tokens.tolist() == [[1, 2]]  # among equals the first class


def test_patches_restore_more_than_cells_of_their_size(patches):
    maps = drawn(seed=1)
    right = [
        (codec.decode(codec.encode(maps)[0]) == maps).mean()
        for codec in (Cells(CLASSES, SHAPE, CELL), patches)
    ]
    assert right[1] > right[0] + 0.02
    found = patches.decode(patches.encode(maps)[0])
    nearest = np.stack([(patches.cells(maps) == p).sum(axis=1) for p in patches.patches]).max(
        axis=0
    )
    inside = found == maps
    assert inside.sum() == nearest.sum()  # no other codes agree with more pixels


def test_patches_depend_on_maps_and_seed_alone(patches):
    again = fit_patches(iter(drawn()), CLASSES, CELL, codes=30, seed=0)
    assert (again.patches == patches.patches).all()
    other = fit_patches(drawn(), CLASSES, CELL, codes=30, seed=1)
    assert not np.array_equal(other.patches, patches.patches)


def test_many_patches_are_sampled(monkeypatch):
    monkeypatch.setattr(label_maps, "SAMPLED", 100)
    few = fit_patches(drawn(), CLASSES, CELL, codes=20, seed=0)
    assert few.vocabulary == 20 and np.unique(few.patches, axis=0).shape[0] > 10


def test_too_few_patches_are_refused():
    maps = np.zeros((3, *SHAPE), np.uint8)
    with pytest.raises(InputError, match="1 different patches"):
        fit_patches(maps, CLASSES, CELL, codes=2, seed=0)
    with pytest.raises(InputError, match="0 different patches"):
        fit_patches([], CLASSES, CELL, codes=2, seed=0)


def test_bytes_keep_a_codec(codec):
    loaded, maps = from_bytes(codec.to_bytes()), drawn(3)
    assert type(loaded) is type(codec) and loaded.shape == codec.shape
    assert (loaded.encode(maps)[0] == codec.encode(maps)[0]).all()
    for wrong in (b"x", codec.to_bytes()[:40], codec.to_bytes().replace(b"gptv_jax", b"gptv_xxx")):
        with pytest.raises(InputError, match="label tokens is damaged"):
            from_bytes(wrong)


def test_maps_of_another_shape_are_refused(codec):
    with pytest.raises(ValueError, match="label maps are"):
        codec.encode(np.zeros((1, 4, 4), np.uint8))


def test_a_class_255_needs_more_than_uint8():
    assert not label_maps.has_class(np.array([255], np.uint8), 300)[0]
    assert label_maps.has_class(np.array([255], np.int32), 300)[0]
    assert (
        Patches(2, (2, 2), 2, np.zeros((1, 4), int)).encode(np.full((1, 2, 2), 255, np.uint8))[1]
        == 0
    )


def fit(maps, steps):
    own = {"downsample": 4, "widths": (16,), "levels": (8, 8, 4)}
    return fit_learned(list(maps), CLASSES + 1, steps, batch_size=16, seed=0, **own)


@pytest.fixture(scope="module")
def learned():
    return fit(drawn(64), steps=120)


def test_learned_codes_restore_label_maps(learned):
    maps = drawn(16, seed=1)
    tokens, weights = learned.encode(maps)
    assert learned.grid == (3, 4) and tokens.shape == weights.shape == (16, 12)
    assert 0 <= tokens.min() <= tokens.max() < learned.vocabulary == 256
    restored = learned.decode(tokens)
    assert restored.shape == maps.shape and restored.min() >= 0 and restored.max() < CLASSES
    known = maps < CLASSES
    most = np.bincount(maps[known]).max() / known.sum()
    assert (restored == maps)[known].mean() > most + 0.05
    assert (learned.encode(maps[3:5])[0] == tokens[3:5]).all()


def test_no_code_stands_for_a_class_that_training_had_not():
    """Without a step of training, which would make the class unlikely."""
    maps = drawn(8)
    codec = fit(np.where(maps < CLASSES, maps + 1, maps), steps=0)
    tokens = np.random.default_rng(0).integers(codec.vocabulary, size=(200, 12))
    assert np.unique(codec.decode(tokens)).tolist() == [1, 2, 3, 4, 5]


def test_learned_codes_take_pixels_without_a_class(learned):
    maps = np.full((1, *SHAPE), -1)
    tokens, weights = learned.encode(maps)
    assert not weights.any()
    maps[:, :4, :4] = 2
    assert learned.encode(maps)[1].sum() == 1
    assert (learned.decode(tokens) < CLASSES).all()
    assert (learned.encode(np.full((1, *SHAPE), 255, np.uint8))[0] == tokens).all()


def test_bytes_keep_learned_codes(learned):
    loaded, maps = from_bytes(learned.to_bytes()), drawn(3)
    assert (loaded.encode(maps)[0] == learned.encode(maps)[0]).all()
    copied = pickle.loads(pickle.dumps(learned))  # as Grain's workers get it
    assert (copied.decode(copied.encode(maps)[0]) == learned.decode(learned.encode(maps)[0])).all()


def test_pixels_without_a_class_have_no_loss(learned):
    config, half = learned.config, drawn(2)[:, :8, :12].astype(np.int32)
    half[:, :, 6:] = learned.classes
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = autoencoder.init(config, jax.random.key(0))
        loss = make_label_loss(config)
        whole, _ = loss(params, None, {"maps": jnp.asarray(half)}, None, None)
        model = autoencoder.bind(config, params)
        logits = model.decode(
            model.encode(label_maps.as_channels(jnp.asarray(half), learned.classes)).codes
        )
    nats = -np.asarray(jax.nn.log_softmax(LOGIT * logits))
    known = half < learned.classes
    picked = np.take_along_axis(nats, np.where(known, half, 0)[..., None], -1)[..., 0]
    by_map = [(row * k).sum() / k.sum() for row, k in zip(picked, known, strict=True)]
    assert float(whole) == pytest.approx(np.mean(by_map), rel=1e-5)
