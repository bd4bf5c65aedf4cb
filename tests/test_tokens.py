import gc
import json
import warnings

import numpy as np
import pytest
from conftest import encoded, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError
from gptv_jax.tokens import Palette, PaletteCodec, palette
from gptv_jax.tokens.codec import TokenStatistics


@pytest.fixture
def codec():
    return tokens.make_codec(config_lib.Tokens("grey", levels=17), 8)


def images(levels=17):
    return np.random.default_rng(0).integers(levels, size=(5, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grey_levels_are_lossless(levels):
    codec = tokens.make_codec(config_lib.Tokens("grey", levels), 8)
    encoded = codec.encode(images(levels))
    assert encoded.shape == (5, 64) and encoded.dtype == np.int32
    assert encoded.min() >= 0 and encoded.max() < codec.vocabulary == levels
    decoded = codec.decode(encoded)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, images(levels))
    np.testing.assert_array_equal(codec.encode(decoded), encoded)
    wider = codec.decode(encoded[:, :15], grid=(3, 5))
    assert wider.shape[1:] == (3, 5, 1)
    np.testing.assert_array_equal(wider.reshape(len(wider), -1), encoded[:, :15])


def test_tokens_are_in_raster_order(codec):
    encoded = codec.encode(images())
    assert codec.grid == (8, 8) and codec.image_shape == (8, 8, 1)
    assert encoded[3, 2 * 8 + 5] == images()[3, 2, 5, 0]


def test_a_value_without_a_token_is_an_error_that_names_it(codec):
    wrong = images()
    wrong[2, 3, 4] = 17
    with pytest.raises(ValueError, match="value 17; 17 grey levels take 0 to 16"):
        codec.encode(wrong)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_pictures_stretch_the_levels_over_0_to_255(levels):
    codec = tokens.make_codec(config_lib.Tokens("grey", levels), 8)
    shown = codec.picture(images(levels))
    assert shown.shape == (5, 8, 8, 3) and shown.dtype == np.uint8
    wanted = np.round(images(levels).astype(float) * 255 / (levels - 1))
    for channel in range(3):
        np.testing.assert_array_equal(shown[..., channel], wanted[..., 0])
    assert shown.min() == 0 and shown.max() == 255


# Palettes.


def random_palette(colors: int, seed: int = 0) -> Palette:
    centers = np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32)
    return Palette(centers, {"made": "by a test"})


def apart(colors: int) -> Palette:
    """Colours on a grid, 4 values apart, so that rounding one cannot make it another."""
    places = np.random.default_rng(0).permutation(64**3)[:colors]
    grid = np.stack(np.unravel_index(places, (64,) * 3), axis=-1) * 4 + 1.3
    return Palette((grid / 127.5 - 1).astype(np.float32), {})


def squared_distances(pixels, centers):
    wanted = (centers.astype(np.float64) + 1) * 127.5
    return np.square(pixels[:, None].astype(np.float64) - wanted).sum(axis=-1)


@pytest.mark.parametrize("colors", [2, 512])
def test_a_token_is_the_nearest_colour(colors):
    codec = PaletteCodec(random_palette(colors), 64)
    corners = np.stack(np.meshgrid(*[[0, 15, 16, 127, 128, 255]] * 3), axis=-1).reshape(-1, 3)
    near = codec.definition.colors  # where rounding matters most
    pixels = np.concatenate([corners, near, random_image(64 * 64 - 216 - colors, 3)])
    images = pixels.astype(np.uint8).reshape(1, 64, 64, 3)
    found = codec.encode(images)
    assert found.dtype == np.int32 and found.shape == (1, 4096)
    distances = squared_distances(images.reshape(-1, 3), codec.definition.centers)
    taken = np.take_along_axis(distances, found.T, axis=1)[:, 0]
    np.testing.assert_allclose(taken, distances.min(axis=1), rtol=1e-12, atol=1e-9)
    assert (found[0] == distances.argmin(axis=1)).mean() > 0.999  # but for ties


@pytest.mark.parametrize("colors", [16, 5000])
def test_the_colours_of_tokens_have_those_tokens(colors):
    codec = PaletteCodec(apart(colors), 8)
    given = np.random.default_rng(0).integers(colors, size=(90, 64), dtype=np.int32)
    decoded = codec.decode(given)
    assert decoded.dtype == np.uint8 and decoded.shape == (90, 8, 8, 3)
    wider = codec.decode(given.reshape(45, -1), grid=(8, 16))
    np.testing.assert_array_equal(wider.reshape(decoded.shape), decoded)
    np.testing.assert_array_equal(codec.encode(decoded), given)
    np.testing.assert_array_equal(codec.picture(decoded), decoded)


def luminance(palette: Palette) -> np.ndarray:
    """Luminance of each colour, as Pillow converts RGB to grey (rounded to whole numbers)."""
    return np.asarray(Image.fromarray(palette.colors[None]).convert("L"))[0].astype(int)


def test_the_similarity_order_is_that_of_luminance():
    codec = PaletteCodec(random_palette(300), 8)
    assert sorted(codec.similarity_order) == list(range(300)) and codec.vocabulary == 300
    assert np.diff(luminance(codec.definition)[codec.similarity_order]).min() >= -1
    red, green, blue = primaries = np.eye(3, dtype=np.float32) * 2 - 1
    codec = PaletteCodec(Palette(primaries, {}), 8)
    assert [primaries[i].tolist() for i in codec.similarity_order] == [
        color.tolist() for color in (blue, red, green)
    ]


def test_a_palette_takes_no_grey_images():
    with pytest.raises(InputError, match=r"an image is 8 x 8 x 1, but 8 x 8 x 3 is needed"):
        pipeline.to_tokens(PaletteCodec(random_palette(4), 8), {"image": random_image(8, 8, 1)})


def test_a_palette_is_saved_and_loaded_bit_for_bit(tmp_path):
    saved = random_palette(77)
    codec = PaletteCodec(saved, 8)
    assert tokens.load_definition("palette", tmp_path) is None
    tokens.save_definition(codec.definition, tmp_path)
    loaded = tokens.load_definition("palette", tmp_path)
    assert loaded.centers.dtype == np.float32 and loaded.provenance == saved.provenance
    np.testing.assert_array_equal(loaded.centers, saved.centers)
    assert loaded.equivalent(saved) and not loaded.equivalent(random_palette(77, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["palette.npz"]


def test_a_palette_of_another_number_of_colours_is_an_error():
    with pytest.raises(InputError, match=r"tokens.colors is 512, but the palette has 16 colours"):
        tokens.make_codec(config_lib.Tokens("palette"), 8, random_palette(16))


GOOD = random_palette(16).centers


@pytest.mark.parametrize(
    "content",
    [
        GOOD.T,
        GOOD[:1],
        GOOD[None],
        np.float32(0.5),
        np.zeros((0, 3), np.float32),
        (GOOD * 127).astype(np.int8),
        np.where(GOOD[3, 1] == GOOD, np.nan, GOOD),
        np.where(GOOD[3, 1] == GOOD, np.inf, GOOD),
        (GOOD + 1) * 127.5,
        GOOD.astype(complex),
        np.array([["a", "b", "c"]] * 4),
        np.array([[None] * 3] * 4),
    ],
    ids=lambda content: f"{content.dtype}{content.shape}",
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_what_is_no_palette_is_an_error(tmp_path, content, ending):
    path = tmp_path / f"colors.{ending}"
    if ending == "npy":
        np.save(path, content)
    else:
        np.savez(path, centers=content, provenance=json.dumps({}))
    with pytest.raises(InputError, match=r"colors.np. (is not a palette|holds)") as error:
        palette.load(path)
    assert len(str(error.value).splitlines()) == 1


COLOURS = np.unique(np.random.default_rng(0).integers(0, 256, (16, 3)), axis=0)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_integers_from_0_to_255_are_the_colours_themselves(tmp_path, kind):
    np.save(tmp_path / "colors.npy", COLOURS.astype(kind))
    found = palette.load(tmp_path / "colors.npy")
    np.testing.assert_array_equal(found.colors, COLOURS)
    assert found.centers.dtype == np.float32 and found.provenance == {"file": "colors.npy"}
    np.save(tmp_path / "as_published.npy", (COLOURS / 127.5 - 1).astype(np.float32))
    assert palette.load(tmp_path / "as_published.npy").equivalent(found)


@pytest.mark.parametrize(
    ("content", "found", "cure"),
    [
        (COLOURS / 255, "to 0.97", "2 * colours - 1"),
        (np.float32([[0, 0, 0], [1, 1, 1]]), "from 0 to 1", "2 * colours - 1"),
        (COLOURS.astype(np.float32), "to 255", "colours / 127.5 - 1"),
        (np.array([[0, 0, 0], [1, 1, 1]]), "from 0 to 1", "2 * colours - 1"),
        (COLOURS / 255, "to 0.97", '{"range": "-1 to 1"}).save("palette.npz")'),
        (COLOURS - 128, "from -", "integers from 0 to 255"),
        (COLOURS * 257, "to 6", "integers from 0 to 255"),
        ((COLOURS / 127.5 - 1).T, "[3, 16]", "Transpose"),
        (COLOURS.T, "[3, 16]", "Transpose"),
        (np.full((4, 3), np.nan), "from nan to nan", "from -1 to 1"),
    ],
)
def test_a_palette_of_another_range_or_shape_is_an_error_that_says_what_it_is_and_should_be(
    tmp_path, content, found, cure
):
    np.save(tmp_path / "colors.npy", content)
    with pytest.raises(
        InputError, match=r"a palette is floating-point numbers .* -1 to 1"
    ) as error:
        palette.load(tmp_path / "colors.npy")
    assert found in str(error.value) and cure in str(error.value)


def test_a_palette_of_bright_colours_alone_is_read_again_where_this_project_wrote_it(tmp_path):
    bright = Palette(np.float32([[0.1, 0.5, 0.9], [0, 0.2, 1]]), {"data": "snow"})
    bright.save(tmp_path / "palette.npz")
    assert palette.load(tmp_path / "palette.npz").equivalent(bright)


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_following_either_advice_about_colours_from_0_to_1_gives_these_colours(tmp_path, kind):
    colours = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0]], kind)
    path = tmp_path / "palette.npy"
    np.save(path, colours)
    with pytest.raises(InputError, match=r"2 \* colours - 1.*tokens\.Palette\(colours") as error:
        palette.load(path)
    assert len(str(error.value)) <= 300 + len(str(path))
    np.save(path, 2 * colours - 1)
    np.testing.assert_array_equal(palette.load(path).colors, colours * 255)
    Palette(colours / 1, {"range": "-1 to 1"}).save(tmp_path / "palette.npz")
    wanted = np.rint((colours + 1) * 127.5)
    np.testing.assert_array_equal(palette.load(tmp_path / "palette.npz").colors, wanted)


def test_colours_that_come_twice_are_warned_of_and_their_tokens_never_occur(tmp_path, caplog):
    np.save(tmp_path / "twice.npy", np.concatenate([COLOURS, COLOURS]))
    found = palette.load(tmp_path / "twice.npy")
    assert f"twice.npy has {len(COLOURS)} colours that it had before" in caplog.text
    encoded_tokens = PaletteCodec(found, 16).encode(random_image(16, 16, 3)[None])
    assert encoded_tokens.max() < len(COLOURS)


def no_palettes(folder) -> dict[str, bytes]:
    random_palette(16).save(folder / "whole.npz")
    whole = (folder / "whole.npz").read_bytes()
    np.savez(folder / "other.npz", colors=GOOD)
    flipped = whole[:250] + bytes([whole[250] ^ 1]) + whole[251:]
    return {
        "text": b"0.1 0.2 0.3\n",
        "empty": b"",
        "image": encoded(random_image(4, 4, 3)),
        "cut": whole[: len(whole) // 2],
        "flipped": flipped,
        "zip": b"PK\x03\x04" + bytes(200),
        "other": (folder / "other.npz").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["text", "empty", "image", "cut", "flipped", "zip", "other"])
def test_a_file_that_is_no_palette_is_an_error(tmp_path, kind):
    (tmp_path / "colors").write_bytes(no_palettes(tmp_path)[kind])
    with pytest.raises(InputError, match=r"colors is not a palette") as error:
        palette.load(tmp_path / "colors")
    assert len(str(error.value).splitlines()) == 1


def test_loading_leaves_no_file_open(tmp_path):
    random_palette(16).save(tmp_path / "colors.npz")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        palette.load(tmp_path / "colors.npz")
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]


def test_a_palette_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"there is no palette .*colors.npy"):
        palette.load(tmp_path / "colors.npy")
    with pytest.raises(InputError, match=r"is not a palette"):
        palette.load(tmp_path)


def test_k_means_is_a_function_of_pixels_and_seed():
    pixels = random_image(3000, 3)
    first, again, other = (palette.build(pixels, 16, seed, {"data": "x"}) for seed in (0, 0, 1))
    assert first.equivalent(again) and not first.equivalent(other)
    assert first.centers.shape == (16, 3) and first.centers.dtype == np.float32
    assert np.abs(first.centers).max() <= 1
    assert np.diff(luminance(first)).min() >= -1
    assert first.provenance["data"] == "x" and first.provenance["seed"] == 0
    json.dumps(first.provenance)


def test_k_means_is_better_than_random_colours():
    pixels = random_image(4000, 3) // 4
    found = palette.build(pixels, 16, 0, {})
    drawn = Palette(pixels[:16].astype(np.float32) / 127.5 - 1, {})
    errors = [squared_distances(pixels, p.centers).min(axis=1).mean() for p in (found, drawn)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("colors", [2, 16, 64])
def test_where_there_are_no_more_colours_each_is_one(colors):
    """However rare it is."""
    distinct = apart(colors).colors
    often = np.repeat(distinct, np.geomspace(1, 20_000, colors).astype(int), axis=0)
    found = palette.build(often, colors, 0, {})
    assert set(map(tuple, found.colors.tolist())) == set(map(tuple, distinct.tolist()))


def test_fewer_colours_than_wanted_are_an_error():
    with pytest.raises(InputError, match=r"only 7 different colours; set config.tokens.colors"):
        palette.build(random_image(7, 3).repeat(50, axis=0), 8, 0, {})


# Statistics.


def test_statistics_of_known_images():
    codec = tokens.make_codec(config_lib.Tokens("grey", 4), 2)
    statistics = TokenStatistics(codec)
    for image in ([[0, 0], [1, 2]], [[3, 3], [0, 0]]):
        pixels = np.uint8(image)[..., None]
        statistics.add(pixels[None], codec.encode(pixels[None]))
    shares = np.array([4, 1, 1, 2]) / 8
    assert statistics.numbers() == {
        "images": 2,
        "mean_squared_error": 0,
        "psnr": None,
        "tokens_used": 4,
        "unigram_nats": pytest.approx(-(shares * np.log(shares)).sum()),
        "same_as_left": 3 / 6,  # in raster order; of those that have one before them
    }


def test_statistics_measure_what_the_palette_loses():
    codec, given = PaletteCodec(random_palette(8), 6), random_image(6, 6, 3)
    statistics = TokenStatistics(codec)
    encoded = codec.encode(given[None])
    statistics.add(given[None], encoded)
    wanted = np.square(codec.decode(encoded)[0].astype(float) - given).mean()
    found = statistics.numbers()
    assert found["mean_squared_error"] == pytest.approx(wanted)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / np.sqrt(wanted)))


@pytest.fixture
def igpt(shared_data) -> PaletteCodec:
    found = palette.load(shared_data / "igpt_palette" / "kmeans_centers.npy")
    return tokens.make_codec(config_lib.Tokens("palette"), 32, found)


def test_the_palette_of_igpt_is_read_as_it_is(igpt, shared_data):
    centers = np.load(shared_data / "igpt_palette" / "kmeans_centers.npy")
    np.testing.assert_array_equal(igpt.definition.centers, centers)
    np.testing.assert_allclose(centers[0], [0.88664436, 0.66188294, 0.38917464])
    given = np.arange(1024, dtype=np.int32)[None] % 512
    np.testing.assert_array_equal(igpt.encode(igpt.decode(given)), given)


def test_what_the_palette_of_igpt_makes_of_cifar10(igpt, shared_data):
    """The whole test split, by the program's own source and decoder: known numbers."""
    config = config_lib.Data(
        name="cifar10", dir=str(shared_data / "tfds"), eval_transforms=("decode()",)
    )
    assert len(sources.open_source(config, "test")) == 10_000
    statistics = TokenStatistics(igpt)
    for chunk in pipeline.tokenized(igpt, pipeline.images(config, "test", DamageLog(config, None))):
        statistics.add(
            *(np.stack([record[key] for record in chunk]) for key in ("image", "tokens"))
        )
    found = statistics.numbers()
    assert found["images"] == 10_000 and found["tokens_used"] == 512
    assert found["mean_squared_error"] == pytest.approx(24.414, abs=0.01)
    assert found["psnr"] == pytest.approx(34.25, abs=0.005)
    assert found["unigram_nats"] == pytest.approx(6.009, abs=0.0005)
    assert found["same_as_left"] == pytest.approx(0.307, abs=0.0005)
