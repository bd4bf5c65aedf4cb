"""Images of 6 x 10 and 24 x 40 pixels through every stage and every call.

No size divides into another one, so height and width that change places anywhere end a test.
"""

import dataclasses
import json
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import generator, random_image
from ml_collections import config_flags
from PIL import Image
from safetensors import safe_open
from test_learned import SETTINGS, random_tokenizer
from test_tokens import random_palette

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import prepare, tokens
from gptv_jax.data.cache import TokenCache
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.runs import pictures
from gptv_jax.stages import STAGES, setup
from gptv_jax.stages.select import choose_stages

H, W, LEVELS = 6, 10, 4
LOCAL = dataclasses.replace(SETTINGS.autoencoder, attention=False)  # a code sees nearby pixels
GREY = {
    "data.name": "arrays",
    "data.image_size": (H, W),
    "tokens.levels": LEVELS,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.axial_positions": True,
    "train.steps": 8,
    "train.batch_size": 16,
    "train.optimizer.warmup_steps": 2,
    "finetune.train.steps": 2,
    "finetune.train.batch_size": 16,
    "finetune.train.optimizer.warmup_steps": 1,
    "finetune.scratch": False,
    "probe.c": (1.0,),
    "sample.count": 6,
    "sample.completions": 3,
    "generate.count": 16,
    "generate.batch_size": 16,
}


def config_of(values: dict) -> config_lib.Config:
    settings = config_lib.default()
    settings.update_from_flattened_dict(values)
    return config_lib.resolve(settings)


def write(path, height: int, width: int, channels: int, levels: int) -> dict[str, np.ndarray]:
    """A labelled set: a bright column, whose third of the width is the class, over noise."""
    rng, arrays = generator(5), {}
    for split, count in (("train", 48), ("validation", 16), ("test", 19)):
        labels = rng.integers(3, size=count)
        images = rng.integers(levels // 2, size=(count, height, width, channels))
        images[np.arange(count), :, (2 * labels + 1) * width // 6] = levels - 1
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return arrays


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """The arrays, the configuration and the folder of a run with every stage."""
    place = tmp_path_factory.mktemp("grey")
    arrays = write(place / "bars.npz", H, W, 1, LEVELS)
    config = config_of(GREY | {"data.path": str(place / "bars.npz")})
    gptv_jax.train(config, place / "run")
    gptv_jax.train(config, place / "run", ["generate"])
    return arrays, config, place / "run"


@pytest.fixture(scope="module")
def model(grey):
    return gptv_jax.load(grey[2], "pretrain")


@pytest.fixture(scope="module")
def images(grey):
    return grey[0]["test_images"][:5]


@pytest.mark.parametrize(
    ("text", "size"),
    [("48", 48), ("48,64", (48, 64)), ("(48, 64)", (48, 64)), ("[64,48]", (64, 48)), ("8,8", 8)],
)
def test_the_command_line_takes_one_number_or_height_and_width(text, size, monkeypatch):
    line = ["program", f"--config.data.image_size={text}"]
    monkeypatch.setattr(sys, "argv", line)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values)
    values(line)
    data = config_lib.resolve(values.config).data
    assert data.image_size == size and type(data.image_size) is type(size)
    assert data.size == (size if isinstance(size, tuple) else (size, size))


@pytest.mark.parametrize("wrong", ["48x64", (48,), (1, 2, 3), (0, 4), True, 8.0, (4, "a"), None])
def test_other_sizes_are_refused_in_one_sentence(wrong):
    settings = config_lib.default()
    settings.data.image_size = wrong
    with pytest.raises(InputError) as caught:
        config_lib.resolve(settings)
    message = str(caught.value)
    assert message.startswith(f"config.data.image_size is {wrong!r}") and message.count(". ") == 0
    assert "one number of pixels, 1 or more, or height and width, such as 48,64." in message


def test_a_square_is_one_number_as_before():
    pair, one = (config_lib.Data(image_size=size) for size in ((8, 8), 8))
    assert pair == one and type(pair.image_size) is int
    settings = config_lib.default()
    settings.data.image_size = (16, 24)  # a config file may change its mind
    settings.data.image_size = 16
    assert config_lib.resolve(settings).data.size == (16, 16)


def test_a_run_records_the_rectangle_and_measures_all_stages(grey):
    _, config, folder = grey
    recorded = json.loads((folder / "config.json").read_text())
    assert recorded["config"]["data.image_size"] == [H, W]
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["pretrain/test_nats_per_token"] < np.log(LEVELS) + 0.5
    assert {"probe/test_accuracy", "finetune/test_accuracy"} < summary.keys()
    assert gptv_jax.train(config, folder) is not None  # finished: continues to nothing
    generated = np.load(folder / "generated" / "samples.npz")["arr_0"]
    assert generated.shape == (16, H, W, 3)
    with Image.open(folder / "samples" / "completions.png") as picture:
        width, height = picture.size
    assert width > 2 * height  # three pairs of wide images in one row


def test_tokens_of_a_rectangle_are_in_raster_order(model, images):
    assert model.codec.grid == model.network.grid == (H, W)
    assert model.params["row"].shape[0] == H and model.params["column"].shape[0] == W
    found = model.tokenize(images)
    np.testing.assert_array_equal(found, images.reshape(len(images), -1))
    np.testing.assert_array_equal(model.detokenize(found), images)
    with pytest.raises(ValueError, match=r"uint8 \[B, 6, 10, 1\]"):
        model.tokenize(images.swapaxes(1, 2))
    surprise = model.surprise(images)
    assert surprise.shape == (len(images), H, W)
    sums = -model.log_likelihood(images)
    np.testing.assert_allclose(surprise.sum(axis=(1, 2)), sums, rtol=1e-5)


def test_known_rows_and_pixels_of_a_rectangle_stay(model, images):
    upper = model.complete(images, keep=0.5, seed=1)
    np.testing.assert_array_equal(upper[:, : H // 2], images[:, : H // 2])
    assert (upper[:, H // 2 :] != images[:, H // 2 :]).any()
    left = np.tile(np.arange(W) < 4, (H, 1))
    drawn = model.complete(images, mask=left, seed=1)
    np.testing.assert_array_equal(drawn[:, :, :4], images[:, :, :4])
    assert (drawn[:, :, 4:] != images[:, :, 4:]).any()
    with pytest.raises(ValueError, match=r"bool \[6, 10\]"):
        model.complete(images, mask=left.T)


def test_outpainting_adds_rows_and_columns_where_asked(model, images):
    wider = model.outpaint(images, top=1, bottom=4, left=2, right=7, seed=1)
    assert wider.shape == (len(images), 1 + H + 4, 2 + W + 7, 1)
    np.testing.assert_array_equal(wider[:, 1 : 1 + H, 2 : 2 + W], images)


def test_a_saved_rectangle_is_read_again_and_other_sizes_are_not(grey, model, images, tmp_path):
    path = tmp_path / "x.safetensors"
    model.save(path)
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["gptv_jax"])["image_size"] == [H, W]
    again, given = gptv_jax.load(path), model.tokenize(images)
    np.testing.assert_array_equal(again.logits(given), model.logits(given))
    with pytest.raises(ValueError, match=r"data.image_size=\(6, 10\), a rectangle"):
        gptv_jax.to_huggingface(model, tmp_path / "exported")
    tall = dataclasses.replace(grey[1].data, image_size=(W, H))
    config = dataclasses.replace(grey[1], data=tall, init_from=str(path))
    with pytest.raises(InputError, match=r"10 x 6|10, 6"):
        setup.open_run(config, str(tmp_path / "run"), ["probe"])


def test_training_from_a_token_cache_of_rectangles_is_training_from_images(grey, tmp_path):
    arrays, config, folder = grey
    with flagsaver.flagsaver(out=str(tmp_path / "cache")):
        prepare.main(config)
    cache = TokenCache(tmp_path / "cache")
    assert cache.image_size == (H, W) and cache.codec().grid == (H, W)
    stored = cache.open("test")[3]["tokens"]
    np.testing.assert_array_equal(stored, arrays["test_images"][3, ..., 0])
    data = dataclasses.replace(config.data, name="tokens", path=str(cache.folder))
    gptv_jax.train(dataclasses.replace(config, data=data), tmp_path / "run", ["pretrain"])
    of_cache, of_images = (
        json.loads((place / "summary.json").read_text())["pretrain/test_nats_per_token"]
        for place in (tmp_path / "run", folder)
    )
    assert of_cache == of_images
    square = dataclasses.replace(data, image_size=H)
    with pytest.raises(InputError, match=r"data.image_size is 6, expected \(6, 10\)"):
        setup.open_run(dataclasses.replace(config, data=square), str(tmp_path / "other"))


def test_a_palette_takes_rectangles():
    codec, given = tokens.PaletteCodec(random_palette(8), (24, 40)), random_image(3, 24, 40, 3)
    found = codec.encode(given)
    assert codec.grid == (24, 40) and codec.image_shape == (24, 40, 3) and found.shape == (3, 960)
    alone = tokens.PaletteCodec(codec.definition, 1).encode(given[1:2, 7:8, 33:34])
    assert found[1, 7 * 40 + 33] == alone.item()
    np.testing.assert_array_equal(codec.encode(codec.decode(found)), found)


def test_a_learned_token_of_a_rectangle_stands_for_its_square_of_pixels(tmp_path):
    settings = dataclasses.replace(SETTINGS, autoencoder=LOCAL)
    tokenizer = random_tokenizer(LOCAL)
    codec = tokens.make_codec(settings, (24, 40), tokenizer)
    given = random_image(9, 24, 40, 3)
    changed = given.copy()
    changed[:, 8:12, 32:36] = 255 - changed[:, 8:12, 32:36]  # the square in row 2, column 8
    differs = (codec.encode(given) != codec.encode(changed)).any(axis=0).reshape(6, 10)
    assert codec.grid == (6, 10) and differs[2, 8]
    assert not differs[:, :5].any() and not differs[5].any()
    assert codec.decode(codec.encode(given)).shape == given.shape
    tokenizer.save(tmp_path / "x.safetensors")
    loaded = gptv_jax.load_tokenizer(tmp_path / "x.safetensors", image_size=(24, 40))
    np.testing.assert_array_equal(loaded.encode(given), codec.encode(given))
    with pytest.raises(ValueError, match=r"image_size is 42; .* a multiple of 4"):
        gptv_jax.load_tokenizer(tmp_path / "x.safetensors", image_size=(24, 42))


def test_flops_of_an_autoencoder_grow_with_the_area():
    wide, square = (flops.of_autoencoder(LOCAL, size).total for size in ((24, 40), 8))
    assert wide * 8 * 8 == square * 24 * 40


def test_a_tokenizer_and_a_palette_are_trained_on_rectangles(tmp_path):
    small = {
        "model.axial_positions": False,
        "train.steps": 2,
        "train.optimizer.warmup_steps": 1,
        "tokens.autoencoder.widths": (8,),
        "tokens.autoencoder.levels": (3, 3),
        "tokens.autoencoder.encoder_blocks": 1,
        "tokens.autoencoder.decoder_blocks": 1,
        "tokens.colors": 6,
        "tokenizer.adversarial": 0.1,
        "tokenizer.discriminator_layers": 2,
        "tokenizer.discriminator_width": 8,
        "tokenizer.train.steps": 2,
        "tokenizer.train.batch_size": 16,
        "tokenizer.train.optimizer.warmup_steps": 1,
    }
    for kind, size in (("palette", (6, 10)), ("learned", (24, 40))):
        path = tmp_path / f"{kind}.npz"
        given = write(path, *size, 3, 256)["test_images"][:2]
        small |= {"tokens.kind": kind, "data.path": str(path), "data.image_size": size}
        stages = ["tokenizer"] * (kind == "learned") + ["pretrain"]
        config = config_of(GREY | small)
        found = gptv_jax.train(config, tmp_path / kind, stages)
        assert found.network.grid == config.grid == (6, 10)
        assert found.detokenize(found.tokenize(given)).shape == given.shape
    with Image.open(tmp_path / "learned" / "samples" / "reconstructions.png") as picture:
        assert picture.size == (8 * (2 * 40 + 2), 4 * (2 * 24 + 2))  # 16 pairs, enlarged twice
    planned = STAGES["tokenizer"].plan(config)
    assert planned.batch(2)["image"].shape == (2, 24, 40, 3)
    loaded = gptv_jax.load_tokenizer(tmp_path / "learned")  # at the size of the training images
    assert loaded.image_shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data.image_size": (24, 42)}, ["image_size is (24, 42)", "downsample = 4", "(24, 44)"]),
        (
            {"tokenizer.adversarial": 1.0, "tokenizer.discriminator_layers": 4},
            ["discriminator_layers is 4", "16 does not divide config.data.image_size = (24, 40)"],
        ),
        (
            {"tokenizer.lpips": 1.0, "tokenizer.lpips_weights": "x", "data.image_size": (12, 40)},
            ["image_size is (12, 40)", "16 pixels or more"],
        ),
        (
            {"task.image_input": "pixels", "task.stem": (8,)},
            [
                "stem is (8,)",
                "12 x 20 positions",
                "downsample=4 makes 6 x 10 tokens",
                "take (8, 8)",
            ],
        ),
        (
            {"task.image_input": "pixels", "task.stem": (8, 8), "tokens.kind": "grey"},
            ["image_input is 'pixels'", "kind=grey makes 24 x 40 tokens", "6 x 10", "take tokens"],
        ),
        (
            {"task.image_input": "pixels", "task.stem": (8,) * 4, "tokens.kind": "none"},
            ["image_size is (24, 40)", "16 pixels a side", "(32, 48)"],
        ),
        (
            {"task.image_input": "pixels", "tokens.kind": "none"},
            ["task.stem is ()", "take (64,)"],
        ),
        ({"tokens.kind": "none"}, ["tokens.kind is 'none'", "config.task.image_input=pixels"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_a_size_that_does(values, words):
    with pytest.raises(InputError) as caught:
        config = config_of({"tokens.kind": "learned", "data.image_size": (24, 40), **values})
        for name in ("tokenizer", "finetune"):
            STAGES[name].check(config)
    message = str(caught.value)
    assert all(each in message for each in words) and len(message) <= 300


def test_images_without_tokens_are_for_fine_tuning_and_its_robustness_alone():
    values = {"tokens.kind": "none", "task.image_input": "pixels", "task.stem": (8, 8)}
    values |= {"task.name": "detect", "data.image_size": (24, 40)}
    config, keys = config_of(values), {"image", "boxes", "box_labels"}
    assert config.tokens.vocabulary == 0 and config.grid == (6, 10)
    assert tokens.make_codec(config.tokens, config.data.image_size) is None
    assert choose_stages(config, keys) == ["finetune"]
    assert choose_stages(config, keys, ["robustness"]) == ["robustness"]
    for name in STAGES.keys() - {"finetune", "robustness"}:
        with pytest.raises(InputError, match=f"--stages has {name}, but config.tokens.kind=none"):
            choose_stages(config, keys, [name])


def test_a_grid_of_wide_pictures_is_about_square(tmp_path):
    pictures.save_grid(random_image(12, 16, 48, 3), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        width, height = picture.size
    assert (width, height) == (2 * (4 * 48 + 2), 6 * (4 * 16 + 2))
