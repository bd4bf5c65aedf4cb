"""Clips: records, transforms, tokens, positions of three axes, hidden context, moving digits."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, generator, make_mesh, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import Data, fields, rules
from gptv_jax.data import cache, cached_tokens, moving_digits, pipeline, sources, transforms
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.data_set import SPLITS
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, kept_tokens
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder
from gptv_jax.stages import pretrained, setup
from gptv_jax.tokens import (
    FrameCodec,
    GreyCodec,
    Palette,
    PaletteCodec,
    Tokenizer,
    make_codec,
)
from gptv_jax.train import objective
from gptv_jax.weights.native import WeightsFile

pytestmark = pytest.mark.usefixtures("one_device")
GRID = (3, 2, 4)  # frames, rows, columns
RECIPES = {"axial": {}, "rotary": MODERN, "target": {"target_positions": True}}


def clip_network(**changes):
    return tiny_network(grid=GRID, **changes)


def parameters(network) -> dict:
    """Weights, all of them far from zero, so that everything has an influence."""
    params = jax.jit(network.init)(jax.random.key(0))
    rng = generator(3)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def logits_of(network, params: dict, tokens: np.ndarray, **options) -> np.ndarray:
    return np.asarray(network.bind(params)(jnp.asarray(tokens), **options).logits)


def clip(frames: int = 4, height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    return generator(1).integers(256, size=(frames, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    "entry",
    [
        "resize((6, 5))",
        "random_crop(8, padding=2)",
        "flip(1.0)",
        "random_scale((0.5, 1.5))",
        "shift(2)",
        "rotate(40)",
        "random_augment()",
        "quantize(4)",
    ],
)
def test_a_transform_moves_every_frame_as_it_moves_an_image(entry):
    frames, transform = clip(), transforms.parse(entry)
    together = transform({"image": frames}, generator(5))["image"]
    each = [transform({"image": frame}, generator(5))["image"] for frame in frames]
    np.testing.assert_array_equal(together, np.stack(each))


@pytest.mark.parametrize("entry", ["brightness(0.5)", "contrast(0.5)", "color_balance(0.9)"])
def test_colour_changes_equal_frames_equally(entry):
    frames = np.repeat(clip(1), 3, axis=0)
    changed = transforms.parse(entry)({"image": frames}, generator(5))["image"]
    assert (changed != frames).any()
    np.testing.assert_array_equal(changed, changed[:1].repeat(3, axis=0))


def test_label_maps_and_tokens_of_clips_move_with_the_pixels():
    labels = generator(2).integers(5, size=(4, 12, 10), dtype=np.uint8)
    record = {"image": np.repeat(labels[..., None], 3, axis=-1), "segmentation": labels}
    for entry in ("random_crop(8)", "flip(1.0)", "flip_vertical(1.0)"):
        moved = transforms.parse(entry)(record, generator(7))
        np.testing.assert_array_equal(moved["image"][..., 0], moved["segmentation"])
        assert moved["segmentation"].ndim == 3
    cached = {"tokens": labels.astype(np.uint16)}
    moved = transforms.parse("flip(1.0)")(cached, generator())["tokens"]
    np.testing.assert_array_equal(moved, labels[..., ::-1])


@pytest.mark.parametrize(
    ("patch", "frames", "grid"),
    [((), 0, (8, 12)), ((2, 4), 0, (4, 3)), ((2, 2), 4, (4, 4, 6)), ((2, 2, 2), 4, (2, 4, 6))],
)
def test_patches_of_grey_levels_are_lossless_and_take_every_token(patch, frames, grid):
    codec = GreyCodec(2, (8, 12), patch, frames)
    images = generator().integers(2, size=(5, *codec.image_shape), dtype=np.uint8)
    tokens = codec.encode(images)
    assert codec.grid == grid and tokens.shape == (5, np.prod(grid))
    np.testing.assert_array_equal(codec.decode(tokens), images)
    every = np.arange(codec.vocabulary)[:, None].repeat(np.prod(grid), axis=1)
    np.testing.assert_array_equal(codec.encode(codec.decode(every)), every)
    # A token stands for one patch: the first for the upper left corner of the first frames.
    other = codec.decode(np.where(np.arange(np.prod(grid)) == 0, codec.vocabulary - 1, 0)[None])
    corner = tuple(slice(side) for side in (1,) * (len(grid) - len(patch)) + patch)
    assert other[0, ..., 0][corner].all()
    assert other.sum() == np.prod(patch, dtype=int)


def test_the_tokens_of_a_clip_are_those_of_its_frames():
    colours = generator().uniform(-1, 1, size=(7, 3)).astype(np.float32)
    images = PaletteCodec(Palette(colours, {}), (12, 10))
    codec, frames = FrameCodec(images, 4), clip()
    tokens = codec.encode(frames[None])
    np.testing.assert_array_equal(tokens.reshape(4, -1), images.encode(frames))
    assert codec.grid == (4, 12, 10) and codec.image_shape == (4, 12, 10, 3)
    np.testing.assert_array_equal(codec.decode(tokens)[0], images.decode(tokens.reshape(4, -1)))
    plain, flat = GreyCodec(256, (12, 10), (), 4), frames[None, ..., :1]
    np.testing.assert_array_equal(
        plain.encode(flat), FrameCodec(GreyCodec(256, (12, 10)), 4).encode(flat)
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_token_changes_no_logits_up_to_its_own(recipe):
    network = clip_network(**RECIPES[recipe])
    params, tokens = parameters(network), generator().integers(11, size=(1, 24), dtype=np.int32)
    rows = np.repeat(tokens, 25, axis=0)
    rows[np.arange(24), np.arange(24)] = (rows[np.arange(24), np.arange(24)] + 1) % 11
    logits = logits_of(network, params, rows)
    change = np.abs(logits[:24] - logits[24:]).max(axis=-1)  # [changed token, position]
    seen = np.tril(np.ones((24, 24), bool), -1).T
    assert (change[~seen] == 0).all()
    assert (change[seen] > 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_images_make_a_clip_network_of_one_frame_and_the_first_of_many(recipe):
    image = tiny_network(grid=GRID[1:], **RECIPES[recipe])
    params, tokens = parameters(image), generator().integers(11, size=(3, 24), dtype=np.int32)
    expected = logits_of(image, params, tokens[:, :8])
    for frames in (1, 3):
        network = tiny_network(grid=(frames, *GRID[1:]), **RECIPES[recipe])
        fresh = jax.jit(network.init)(jax.random.key(1))
        given = {name: params.get(name, value) for name, value in fresh.items()}
        found = logits_of(network, given, tokens[:, : 8 * frames])
        np.testing.assert_allclose(found[:, :8], expected, atol=1e-5)


def test_every_frame_has_a_place_of_its_own():
    for recipe in ({}, MODERN):
        network = clip_network(**recipe)
        params = parameters(network)
        where = network.layout.coordinates()
        assert where.tolist() == [[t, y, x] for t in range(3) for y in range(2) for x in range(4)]
        tokens = np.full((1, 24), 5, np.int32)
        logits = logits_of(network, params, tokens)[0].reshape(3, 8, -1)
        assert np.abs(logits[1] - logits[2]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cached_continuation_is_what_whole_passes_choose(recipe):
    network = clip_network(**RECIPES[recipe])
    params = parameters(network)
    given = np.full((2, 24), generation.UNKNOWN, np.int32)
    given[:, :8] = generator().integers(11, size=(2, 8))
    sampler = Sampler(network, params, config_lib.Drawing(temperature=0.0))
    drawn = sampler.draw(given, Section.COMPLETIONS.key(0))
    whole = np.where(given == generation.UNKNOWN, 0, given)
    for position in range(8, 24):
        logits = logits_of(network, params, whole)
        whole[:, position] = logits[:, position].argmax(axis=-1)
    np.testing.assert_array_equal(drawn, whole)
    assert kept_tokens(network, 1 / 3) == 8


def test_nats_spread_over_the_pixels_of_tubes_keep_their_sum():
    codec = GreyCodec(2, (4, 4), (2, 2, 2), 4)
    nats = generator().uniform(size=(3, 8)).astype(np.float32)
    spread = by_pixel(nats, codec)
    assert spread.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(spread.sum(axis=(1, 2, 3)), nats.sum(axis=1), rtol=1e-5)
    first = spread[:, :2, :2, :2].reshape(3, -1)
    np.testing.assert_array_equal(first, first[:, :1].repeat(8, axis=1))


def test_context_masking_hides_a_drawn_share_of_the_earlier_frames():
    network = clip_network(context_masking=0.8)
    hidden = np.asarray(objective.draw_hidden(network, 512, jax.random.key(0)))
    assert not hidden[:, 16:].any()
    shares = hidden[:, :16].mean(axis=1)
    assert shares.min() == 0 and 0.7 < shares.max() <= 1
    np.testing.assert_allclose(shares.mean(), 0.4, atol=0.03)
    assert objective.draw_hidden(network, 4, None) is None
    assert objective.draw_hidden(clip_network(), 4, jax.random.key(0)) is None


def test_a_hidden_token_is_not_read_and_stays_a_target():
    network, hidden = clip_network(), np.zeros((1, 24), bool)
    hidden[0, [2, 9]] = True
    params, tokens = parameters(network), generator().integers(11, size=(1, 24), dtype=np.int32)
    other = np.where(hidden, (tokens + 1) % 11, tokens)
    run = functools.partial(logits_of, network, params, hidden=jnp.asarray(hidden))
    np.testing.assert_array_equal(run(tokens), run(other))
    plain = logits_of(network, params, tokens)
    assert np.abs(run(tokens) - plain)[0, 3:].max() > 1e-3
    np.testing.assert_allclose(run(tokens)[0, :3], plain[0, :3], atol=1e-5)


@pytest.mark.parametrize("label", [None, "direction", "speed"])
def test_moving_digits_move_as_their_labels_say(label):
    config = Data(name="moving_digits", frames=6, image_size=16, label=label)
    source = sources.open_source(config, "validation")
    seen = set()
    for index in range(60):
        record = source[index]
        image = record["image"][..., 0].astype(int)
        assert image.shape == (6, 16, 16) and record["label"] == source.labels[index]
        # Where the ink of the second frame lies, from where that of the first one lies.
        total = image.sum(axis=(1, 2))
        np.testing.assert_array_equal(total, total[0])  # the digit is never cut
        centers = np.stack(
            [(image * axis).sum(axis=(1, 2)) / total for axis in np.indices((16, 16))]
        )
        down, right = np.rint(centers[:, 1] - centers[:, 0]).astype(int)
        name = source.class_names[record["label"]]
        seen.add(name)
        if label == "direction":
            assert name.split("_") == [
                way
                for way in (
                    ["up", "", "down"][np.sign(down) + 1],
                    ["left", "", "right"][np.sign(right) + 1],
                )
                if way
            ]
        elif label == "speed":
            assert name == ("slow" if max(abs(down), abs(right)) == 1 else "fast")
    assert len(seen) == len(source.class_names)


def test_digits_bounce_and_a_stride_skips_frames():
    way = moving_digits.places(np.array([1, 7]), np.array([-2, 1]), np.arange(12))
    assert way[:, 0].tolist() == [1, 1, 3, 5, 7, 7, 5, 3, 1, 1, 3, 5]
    assert way[:4, 1].tolist() == [7, 8, 7, 6]
    of = {
        n: Data(name="two_moving_digits", frames=5, frame_stride=n, image_size=16) for n in (1, 2)
    }
    every, second = (sources.open_source(each, "test")[3]["image"] for each in of.values())
    np.testing.assert_array_equal(every[::2][:3], second[:3])
    assert sources.open_source(of[1], "test").classes == 0


def test_clips_and_images_are_not_confused():
    for config, words in (
        (Data(name="digits", frames=4), "has images"),
        (Data(name="moving_digits", image_size=16), "to the number of frames"),
        (Data(name="moving_digits", frames=4, label="colour"), "digit, direction, speed"),
    ):
        with pytest.raises(InputError, match=words):
            sources.open_data_set(config)
    patch = config_lib.Config(tokens=config_lib.Tokens(patch=(2, 2, 2)))
    for config, words in (
        (patch, "config.data.frames is 0"),
        (dataclasses.replace(patch, data=Data(frames=3)), "3 x 8 x 8"),
        (config_lib.Config(tokens=config_lib.Tokens(levels=256, patch=(1, 4))), "65536"),
    ):
        with pytest.raises(InputError, match=words):
            rules.check(config)


def test_a_clip_network_begins_with_the_weights_of_images(tmp_path):
    model = dataclasses.replace(tiny_network(axial_positions=True).config, rotary=False)
    tokens = config_lib.Tokens(levels=4, patch=(2, 2))
    described = WeightsFile(model, tokens, image_size=16, params={})
    params, path = parameters(described.network), tmp_path / "images.safetensors"
    mesh = make_mesh((1, 1, 1))
    gptv_jax.Model(described, params, mesh).save(path)
    quantize = ("quantize(4)",)
    data = Data(
        name="moving_digits",
        frames=3,
        image_size=16,
        train_transforms=quantize,
        eval_transforms=quantize,
    )
    config = config_lib.Config(init_from=str(path), model=model, tokens=tokens, data=data)
    run = setup.open_run(config, str(tmp_path / "run"), ["sample"])
    with jax.set_mesh(run.mesh):
        found = pretrained.load(run).params
        assert not np.asarray(found["frame"]).any() and found["frame"].shape == (3, 32)
        rows = np.stack([sources.open_source(data, "test")[i]["image"] // 64 for i in range(8)])
        clips = logits_of(run.network(), found, run.codec.encode(rows))
    images = gptv_jax.load(path)
    expected = images.logits(images.tokenize(rows[:, 0]))
    np.testing.assert_allclose(clips[:, :64], expected, atol=1e-4)


def clip_data(**changes) -> Data:
    entries = {"train_transforms": ("quantize(4)",), "eval_transforms": ("quantize(4)",)}
    return Data(**{"name": "moving_digits", "frames": 3, "image_size": 16, **entries, **changes})


def write_cache(folder, tokens: config_lib.Tokens, data: Data):
    """A token cache of the first test clips, as `gptv_jax.prepare` makes it."""
    codec = make_codec(tokens, data.image_size, frames=data.frames)
    found = itertools.islice(pipeline.images(data, "test", DamageLog(data, None)), 24)
    rows = [
        record | {"tokens": codec.encode(record["image"][None])[0], "image_id": i}
        for i, record in enumerate(found)
    ]
    header = {
        "source": {"name": data.name},
        "provenance": None,
        "tokens": fields.flatten(tokens) | {"palette": None, "tokenizer": None},
        "image_size": data.image_size,
        "frames": data.frames,
        "frame_stride": data.frame_stride,
        "transforms": data.eval_transforms,
        "classes": 10,
    }
    folder.mkdir()
    cache.write(folder, codec, {split: rows for split in SPLITS}, header)
    return codec, rows


def test_a_token_cache_of_clips_is_trained_from(tmp_path):
    tokens, model = config_lib.Tokens(levels=4, patch=(2, 2)), tiny_network().config
    codec, rows = write_cache(tmp_path / "cache", tokens, clip_data(frame_stride=2))
    given = {"name": "tokens", "path": str(tmp_path / "cache"), "frame_stride": 2}
    config = config_lib.Config(data=clip_data(**given), tokens=tokens, model=model)
    run = setup.open_run(config, str(tmp_path / "run"), ["pretrain"])
    batch = next(run.data.evaluation("test", 8))
    np.testing.assert_array_equal(batch["tokens"], [row["tokens"] for row in rows[:8]])
    assert codec.grid == (3, 8, 8)
    for changes, words in (
        ({"frame_stride": 1}, "data.frame_stride is 1, expected 2"),
        ({"frames": 2}, "data.frames is 2, expected 3"),
        ({"frames": 0}, "has videos"),
    ):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
        with pytest.raises(InputError, match=words):
            setup.open_run(other, str(tmp_path / "other"), ["pretrain"])
    # A patch that moves whole would keep its pixels as they are.
    assert not cached_tokens.takes(config.data, "flip(1.0)")


def test_clips_of_learned_tokens_take_a_tokenizer_of_images(tmp_path):
    coder = config_lib.Autoencoder(channels=1, widths=(8,), levels=(3, 3), downsample=4)
    coder = dataclasses.replace(coder, encoder_blocks=0, decoder_blocks=0)
    shapes = jax.eval_shape(lambda key: autoencoder.init(coder, key), jax.random.key(0))
    weights = {n: np.ones(leaf.shape, np.float32) for n, leaf in sharding.by_name(shapes).items()}
    Tokenizer(coder, weights, {}).save(tmp_path / "tokenizer.safetensors")
    tokens = config_lib.Tokens(kind="learned", autoencoder=coder)
    tokens = dataclasses.replace(tokens, tokenizer=str(tmp_path / "tokenizer.safetensors"))
    data = clip_data(train_transforms=(), eval_transforms=())
    config = config_lib.Config(data=data, tokens=tokens, model=tiny_network().config)
    run = setup.open_run(config, str(tmp_path / "run"), ["pretrain"])
    assert next(run.data.train(8))["tokens"].shape == (8, 3 * 4 * 4)


def test_formats_of_images_refuse_clips_and_patches(tmp_path):
    model = dataclasses.replace(tiny_network().config, axial_positions=False)
    for frames, patch, words in ((3, (), "data.frames=3"), (0, (2, 2), r"tokens.patch=\(2, 2\)")):
        tokens = config_lib.Tokens(levels=2, patch=patch)
        described = WeightsFile(model, tokens, image_size=4, params={}, frames=frames)
        params = parameters(described.network)
        made = gptv_jax.Model(described, params, make_mesh((1, 1, 1)))
        with pytest.raises(InputError, match=words):
            gptv_jax.to_huggingface(made, tmp_path / "hf")
