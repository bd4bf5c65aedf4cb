"""The network that makes codes of images, and its two quantizers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh
from flax import nnx

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import autoencoder, flops
from gptv_jax.model.quantizers import ScalarQuantizer, unit

SMALL = config_lib.Autoencoder(widths=(16,), encoder_blocks=1, decoder_blocks=1, levels=(8, 6))
DEEP = dataclasses.replace(SMALL, downsample=8, widths=(8, 16), norm=True, attention=True)
VECTORS = dataclasses.replace(SMALL, quantizer="vq", codes=24, code_size=4)
ALL = {"small": SMALL, "deep": DEEP, "vectors": VECTORS}
LEVELS = [(8, 6, 5), (8, 8, 8, 5, 5, 5), (2,), (3, 2)]


def weights(config) -> dict:
    """On the mesh that is set; made once, on one device."""
    leaves = sharding.abstract(lambda key: autoencoder.init(config, key))
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), _made(config), leaves)


@functools.cache
def _made(config) -> dict:
    with jax.set_mesh(make_mesh((1, 1, 1))):
        return jax.device_get(
            jax.jit(functools.partial(autoencoder.init, config))(jax.random.key(0))
        )


def some_images(count: int, size: int = 16, channels: int = 3) -> np.ndarray:
    shape = (count, size, size, channels)
    return generator().uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_there_are_as_many_codes_as_the_product_of_the_levels_each_for_values_of_its_own(levels):
    quantizer, count = ScalarQuantizer(levels), math.prod(levels)
    assert config_lib.Autoencoder(levels=levels).vocabulary == count
    values = quantizer.values(jnp.arange(count))
    assert values.shape == (count, len(levels))
    np.testing.assert_array_equal(quantizer.codes(values), np.arange(count))  # a way and back
    assert len(np.unique(np.asarray(values), axis=0)) == count
    # The first dimension counts fastest: what codes of saved tokenizers and caches mean.
    for i, steps in enumerate(np.cumprod((1, *levels[:-1]))):
        moved = np.flatnonzero(np.asarray(values)[steps] != np.asarray(values)[0])
        np.testing.assert_array_equal(moved, [i])
    # Whatever levels are taken together make one of the codes.
    each = [np.unique(np.asarray(values)[:, i]) for i in range(len(levels))]
    assert [len(found) for found in each] == list(levels)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_levels_lie_evenly_around_zero_whether_even_or_odd(count):
    quantizer = ScalarQuantizer((count,))
    values = np.asarray(quantizer.values(jnp.arange(count)))[:, 0]
    np.testing.assert_allclose(values, -values[::-1], atol=1e-7)
    np.testing.assert_allclose(np.diff(values), 2 / count, rtol=1e-6)
    assert (0.0 in values.round(7)) == bool(count % 2)
    # Parts of one size: numbers spread evenly over -1 .. 1 are spread evenly over the levels.
    spread = jnp.linspace(-1, 1, 1000 * count, endpoint=False)[:, None]
    used = np.bincount(np.asarray(quantizer.codes(spread)), minlength=count)
    assert abs(used - 1000).max() <= 1
    # A unit normal, which an encoder begins as, uses them nearly alike.
    drawn = jax.random.normal(jax.random.key(0), (1, 100, 400, 1))
    share = np.bincount(np.asarray(quantizer(drawn).codes).ravel(), minlength=count) / 40_000
    assert share.min() > 0.85 / count and share.max() < 1.15 / count


def test_what_is_rounded_is_the_nearest_level_and_its_gradient_that_of_the_identity():
    quantizer = ScalarQuantizer((4, 5))
    given = jnp.asarray(generator().uniform(-1, 1, (50, 2)), jnp.float32)
    rounded = np.asarray(quantizer.rounded(given))
    for axis, count in enumerate(quantizer.levels):
        levels = (2 * np.arange(count) + 1) / count - 1
        distance = abs(np.asarray(given)[:, axis, None] - levels)
        np.testing.assert_allclose(rounded[:, axis], levels[distance.argmin(axis=1)], atol=1e-6)
    pull = generator(1).normal(size=(50, 2)).astype(np.float32)
    _, back = jax.vjp(quantizer.rounded, given)
    np.testing.assert_array_equal(back(jnp.asarray(pull))[0], pull)
    # However far out the encoder goes, the codes stay among those there are.
    far = jnp.asarray([[[[-1e4, 1e4], [1e4, -1e4]]]])
    found = quantizer(far)
    assert np.isfinite(found.values).all() and set(np.ravel(found.codes)) == {3, 16}


def test_the_decoder_reads_what_its_codes_say(one_device):
    @jax.jit(static_argnums=0)
    def both_ways(config, params, images):
        model = autoencoder.bind(config, params)
        found = model.encode(images)
        return found, model.quantizer.values(found.codes), model.decode(found.codes)

    for config in ALL.values():
        params = weights(config)
        found, values, restored = both_ways(config, params, some_images(4))
        assert int(found.codes.min()) >= 0 and int(found.codes.max()) < config.vocabulary
        np.testing.assert_allclose(values, found.values, atol=1e-6)
        side = 16 // config.downsample
        assert found.codes.shape == (4, side, side)
        assert restored.shape == (4, 16, 16, 3)
        decode = autoencoder.bind(config, params).decode
        wide = jax.eval_shape(decode, jnp.zeros((1, 3, 5), int))
        assert wide.shape == (1, 3 * config.downsample, 5 * config.downsample, 3)


def test_a_vector_becomes_the_nearest_code_by_direction(one_device):
    config = VECTORS
    params = weights(config)
    quantizer = autoencoder.bind(config, params).quantizer
    z = generator().normal(size=(2, 3, 3, 4)).astype(np.float32) * 7
    found, book = quantizer(jnp.asarray(z)), np.asarray(unit(params["quantizer"]["codebook"]))
    cosine = np.einsum("bhwz,vz->bhwv", z / np.linalg.norm(z, axis=-1, keepdims=True), book)
    np.testing.assert_array_equal(found.codes, cosine.argmax(axis=-1))
    np.testing.assert_allclose(found.commitment, (2 - 2 * cosine.max(axis=-1)).mean(), rtol=1e-5)
    # Whatever precision products have by default, on a TPU that of bfloat16.
    assert "Precision.HIGHEST" in str(jax.make_jaxpr(quantizer)(jnp.asarray(z)))
    # The codebook has no gradient; the encoder has that of its own direction.
    _, back = jax.vjp(lambda z: quantizer(z).values, jnp.asarray(z))
    _, wanted = jax.vjp(unit, jnp.asarray(z))
    pull = jnp.asarray(generator(2).normal(size=z.shape), jnp.float32)
    np.testing.assert_allclose(back(pull)[0], wanted(pull)[0], rtol=1e-5, atol=1e-6)

    # Commitment pulls what is encoded towards its code, by directions again.
    _, back = jax.vjp(lambda z: quantizer(z).commitment, jnp.asarray(z))
    nearest = jnp.asarray(book)[found.codes]
    _, wanted = jax.vjp(lambda z: jnp.square(unit(z) - nearest).sum(-1).mean(), jnp.asarray(z))
    np.testing.assert_allclose(back(jnp.ones(()))[0], wanted(jnp.ones(()))[0], atol=1e-6)
    assert np.abs(back(jnp.ones(()))[0]).max() > 1e-3

    def loss(params):
        found = autoencoder.bind(config, params).quantizer(jnp.asarray(z))
        return found.values.sum() + found.commitment

    assert not np.any(jax.grad(loss)(params)["quantizer"]["codebook"])


@pytest.mark.parametrize("name", ALL)
def test_losses_gradients_and_codes_are_the_same_on_every_mesh(name):
    config, images = ALL[name], some_images(8)

    def loss(params, images):
        model = autoencoder.bind(config, params)
        found = model.encode(images)
        return jnp.square(model.decoder(found.values) - images).mean(), found.codes

    found = []
    # Along "tensor" convolutions are replicated, so fsdp alone splits weights the most.
    meshes = [(1, 8, 1), (2, 2, 2)] if name == "deep" else [(2, 2, 2)]
    for shape in [(1, 1, 1), *meshes]:
        with jax.set_mesh(make_mesh(shape)):
            rows = sharding.shard_rows(images)
            (value, codes), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                weights(config), rows
            )
            found.append(jax.device_get((value, codes, sharding.by_name(gradients))))
    (value, codes, gradients), *others = found
    assert len(np.unique(codes)) > 3
    for other in others:
        np.testing.assert_allclose(other[0], value, rtol=1e-5)
        np.testing.assert_array_equal(other[1], codes)
        for leaf in gradients:
            np.testing.assert_allclose(other[2][leaf], gradients[leaf], rtol=2e-3, atol=2e-6)


def test_every_weight_has_a_gradient_and_none_is_forgotten(one_device):
    params = weights(DEEP)

    def loss(params):
        model, images = autoencoder.bind(DEEP, params), jnp.asarray(some_images(2))
        return jnp.square(model.decoder(model.encode(images).values) - images).mean()

    for name, leaf in sharding.by_name(jax.jit(jax.grad(loss))(params)).items():
        assert np.any(leaf), name


def test_positions_become_channels_and_come_back(one_device):
    x = jnp.asarray(some_images(2, 8))
    packed = autoencoder.space_to_depth(x, 4)
    assert packed.shape == (2, 2, 2, 48)
    np.testing.assert_array_equal(packed[1, 0, 1], np.ravel(x[1, :4, 4:]))
    np.testing.assert_array_equal(autoencoder.depth_to_space(packed, 4), x)


def test_attention_lets_far_positions_know_of_each_other(one_device):
    images = some_images(1, 64)
    other = images.copy()
    other[0, :8, :8] *= -1
    for attention in (False, True):
        config = dataclasses.replace(DEEP, attention=attention)
        encoder = jax.jit(autoencoder.bind(config, weights(config)).encoder)
        changed = np.abs(encoder(images) - encoder(other))
        assert (changed[0, 6:, 6:] > 0).any() == attention


def test_flops_are_those_of_the_products_and_convolutions():
    def forward(x, w, v):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        return jax.lax.map(lambda row: row.reshape(-1, 5) @ v, y)

    shapes = (2, 6, 6, 3), (3, 3, 3, 5), (5, 7)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert flops.of_program(forward, *arguments) == 2 * (2 * 36 * 5 * 27) + 2 * (2 * 36 * 5 * 7)


def test_modules_hold_no_arrays_but_weights(one_device):
    made = nnx.eval_shape(lambda: autoencoder.Autoencoder(DEEP, rngs=nnx.Rngs(0)))
    assert not jax.tree.leaves(nnx.state(made, nnx.Not(nnx.Param)))
