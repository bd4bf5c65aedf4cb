import numpy as np
import pytest

from gptv_jax import config as config_lib
from gptv_jax import tokens


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


def test_an_unknown_codec_is_an_error_that_names_the_known_ones():
    with pytest.raises(config_lib.InputError, match=r"config.tokens.name is 'gray'.*grey"):
        tokens.make_codec(config_lib.Tokens("gray"), 8)
