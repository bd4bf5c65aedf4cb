"""Learned tokens as a codec: encode, decode, files."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import generator, make_mesh, random_image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.data import pipeline
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder, vqgan
from gptv_jax.tokens import LearnedCodec, Tokenizer, learned

CONFIG = config_lib.Autoencoder(
    widths=(16,), encoder_blocks=1, decoder_blocks=1, attention=True, levels=(8, 5, 5, 5)
)
SETTINGS = config_lib.Tokens("learned", autoencoder=CONFIG)


def random_tokenizer(config=CONFIG, seed: int = 0) -> Tokenizer:
    """Weights that spread codes and pixels over many of those there are."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        abstract = sharding.abstract(lambda key: autoencoder.init(config, key))
    rng = generator(seed)
    params = {
        name: rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        for name, leaf in sharding.by_name(abstract).items()
    }
    params["encoder.to_code.bias"] *= 0.3
    params["decoder.to_pixels.to_pixels"] *= 3
    return Tokenizer(config, params, {"data": "noise"})


@pytest.fixture(scope="module")
def codec() -> LearnedCodec:
    return tokens.make_codec(SETTINGS, 16, random_tokenizer())


def test_a_token_stands_for_a_square_of_pixels(codec):
    images = random_image(5, 16, 16, 3)
    found = codec.encode(images)
    assert codec.grid == (4, 4) and codec.image_shape == (16, 16, 3) and codec.vocabulary == 1000
    assert found.shape == (5, 16) and found.dtype == np.int32
    assert found.min() >= 0 and found.max() < 1000 and len(np.unique(found)) > 9
    restored = codec.decode(found)
    assert restored.shape == images.shape and restored.dtype == np.uint8
    assert restored.min() == 0 and restored.max() == 255  # such weights go beyond both ends
    assert codec.decode(found[:, :6], grid=(2, 3)).shape == (5, 8, 12, 3)
    assert codec.encode(images[:0]).shape == (0, 16)
    assert codec.decode(found[:0]).shape == (0, 16, 16, 3)


def test_every_pixel_comes_back_and_what_lies_beyond_is_cut():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = learned.from_pixels(jnp.asarray(pixels))
    assert scaled.min() == -1 and scaled.max() == 1
    np.testing.assert_array_equal(learned.to_pixels(scaled), pixels)
    beyond = jnp.array([-40.0, -1.01, 1.01, 40.0]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(np.ravel(learned.to_pixels(beyond)), [0, 0, 255, 255])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_the_same_in_batches_of_any_size_and_on_any_devices(dtype, monkeypatch):
    config = dataclasses.replace(CONFIG, norm=True, dtype=dtype)
    codec = LearnedCodec(random_tokenizer(config), 16)
    images = random_image(40, 16, 16, 3)
    wanted = codec.encode(images)
    assert len(jax.local_devices()) == 8
    for size in (1, 7, 16, 33):
        found = [codec.encode(images[i : i + size]) for i in range(0, 40, size)]
        np.testing.assert_array_equal(np.concatenate(found), wanted)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(learned.jax, "local_devices", lambda: one)
    alone = LearnedCodec(codec.definition, 16)
    np.testing.assert_array_equal(alone.encode(images), wanted)
    np.testing.assert_array_equal(alone.decode(wanted), codec.decode(wanted))


def test_encoding_goes_on_within_a_training_step_s_guard(codec):
    images = random_image(3, 16, 16, 3)
    wanted = codec.encode(images)
    with jax.set_mesh(make_mesh((2, 2, 2))), jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(codec.encode(images), wanted)


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are not checked, as it is for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_images_of_another_shape_are_named(codec, unchecked):
    takes = r"takes uint8 \[B, 16, 16, 3\]"
    with pytest.raises(ValueError, match=rf"images are uint8 \[2, 16, 16, 1\]; .*{takes}"):
        codec.encode(random_image(2, 16, 16, 1))
    with pytest.raises(ValueError, match=rf"images are float32 .*{takes}"):
        codec.encode(random_image(2, 16, 16, 3).astype(np.float32) / 255)
    with pytest.raises(InputError, match=r"an image is 8 x 8 x 3, but 16 x 16 x 3 is needed"):
        pipeline.to_tokens(codec, {"image": random_image(8, 8, 3)})


def test_sizes_that_are_none_are_named(codec, tmp_path, unchecked):
    codec.definition.save(tmp_path / "x.safetensors")
    for size in (0, -4, 18, 16.0, "16"):
        with pytest.raises(ValueError, match=rf"image_size is {size!r}; .* a multiple of 4"):
            gptv_jax.load_tokenizer(tmp_path / "x.safetensors", size)
    assert gptv_jax.load_tokenizer(tmp_path / "x.safetensors", 32).grid == (8, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.full((1, 16), 1000), "tokens range from 1000 to 1000; they must lie in 0 to 999"),
        (np.full((1, 16), -1), "tokens range from -1 to -1"),
        (np.zeros((1, 5), int), r"tokens are int64 \[1, 5\]; .* \[B, 16\]"),
        (np.zeros((1, 16)), "tokens are float64"),
    ],
)
def test_tokens_that_are_none_are_named(codec, given, words, unchecked):
    with pytest.raises(ValueError, match=words):
        codec.decode(given)


def test_grey_images_are_shown_in_three_channels():
    config = dataclasses.replace(CONFIG, channels=1)
    codec = LearnedCodec(random_tokenizer(config), 8)
    images = random_image(2, 8, 8, 1)
    assert codec.decode(codec.encode(images)).shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(codec.picture(images), images.repeat(3, axis=-1))


def test_a_saved_tokenizer_is_read_as_it_was(codec, tmp_path):
    tokens.save_definition(codec.definition, tmp_path)
    for path in (tmp_path, tmp_path / learned.FILE):
        again = learned.load(path)
        assert again.equivalent(codec.definition) and again.provenance == {"data": "noise"}
        assert again.config == CONFIG and again.hash == codec.definition.hash
    assert tokens.load_definition("learned", tmp_path / "nowhere") is None
    assert not random_tokenizer(seed=1).equivalent(codec.definition)
    images = random_image(4, 16, 16, 3)
    same = tokens.make_codec(SETTINGS, 16, again)
    np.testing.assert_array_equal(same.encode(images), codec.encode(images))


def test_a_tokenizer_of_other_settings_is_refused_by_the_field(codec):
    other = dataclasses.replace(SETTINGS, autoencoder=dataclasses.replace(CONFIG, levels=(8, 5)))
    with pytest.raises(InputError, match=r"levels is \(8, 5\), expected \(8, 5, 5, 5\)"):
        tokens.make_codec(other, 16, codec.definition)


def test_what_is_no_tokenizer_is_named(codec, tmp_path):
    with pytest.raises(InputError, match=r"there is no tokenizer .*stage tokenizer has finished"):
        learned.load(tmp_path)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"hello" * 20)
    with pytest.raises(InputError, match=r"x.safetensors .*damaged"):
        learned.load(path)
    params = codec.definition.params
    name = "encoder.stem.bias"
    harmed = {
        r"encoder.stem.bias \(16,\) is missing": {n: a for n, a in params.items() if n != name},
        r"more \(2,\) is left over": params | {"more": np.zeros(2, np.float32)},
        r"encoder.stem.bias is \(3,\), expected \(16,\)": params | {name: np.zeros(3, np.float32)},
        r"encoder.stem.bias is not finite": params | {name: params[name] * np.nan},
    }
    for words, content in harmed.items():
        Tokenizer(CONFIG, content, {}).save(path)
        with pytest.raises(InputError, match=words):
            learned.load(path)


def test_attention_of_a_foreign_tokenizer_adds_its_output_to_the_features():
    config = config_lib.Autoencoder(
        widths=(8,), encoder_blocks=1, decoder_blocks=1, norm=True, attention=True, groups=4,
        downsample=1, quantizer="vq", codes=16, code_size=4,
    )  # fmt: skip
    attention = "decoder.middle.attention.0"
    known = {"quant_conv.weight": np.zeros((4, 6, 1, 1)), f"{attention}.norm.weight": None}
    codes = jnp.asarray(generator().integers(0, 16, (2, 4, 4)))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        shapes, rng = vqgan.shapes(config, known), generator(1)
        params = {
            name: jnp.asarray(rng.normal(size=s.shape), s.dtype) for name, s in shapes.items()
        }
        out = {name: params[name] for name in (f"{attention}.out.weight", f"{attention}.out.bias")}
        without = {name: a for name, a in params.items() if not name.startswith(attention)}
        silent = params | jax.tree.map(jnp.zeros_like, out)
        full, plain, same = (
            vqgan.Vqgan(config, each).decode(codes) for each in (params, without, silent)
        )
    np.testing.assert_array_equal(same, plain)
    assert np.abs(full - plain).max() > 0.1
