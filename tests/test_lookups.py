"""Every lookup by data is in range: JAX clamps an index that is not, and drops its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_image, random_params
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.model import autoencoder
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import of_images
from gptv_jax.probe import sgd
from gptv_jax.train import autoencoding, step

pytestmark = pytest.mark.usefixtures("one_device")

SHIFTED = config_lib.Data(train_transforms=("shift(pixels=1)",))  # variants 0 to 8
CODEC = tokens.make_codec(config_lib.Tokens(), SHIFTED.image_size)
CLASSES = 10


class OutOfRangeError(Exception):
    """A lookup before the beginning or beyond the end of its table."""


def check_lookups(function, *arguments) -> int:
    """Evaluates `function` operation by operation; returns the number of lookups by index.

    Raises:
      OutOfRangeError: an index is negative or beyond the end of its table.
    """
    count = 0

    def check(equation, values):
        nonlocal count
        name, dims = equation.primitive.name, equation.params.get("dimension_numbers")
        shape = np.array(np.shape(values[0]) if values else ())
        if name == "gather":
            indices, axes = values[1], list(dims.start_index_map)
            room = (shape - np.array(equation.params["slice_sizes"]))[axes]
        elif name.startswith("scatter"):
            axes = list(dims.scatter_dims_to_operand_dims)
            assert set(axes) <= {*dims.inserted_window_dims, *dims.operand_batching_dims}
            indices, room = values[1], shape[axes] - 1
        elif name in ("dynamic_slice", "dynamic_update_slice"):
            slices = name == "dynamic_slice"
            sizes = equation.params["slice_sizes"] if slices else values[1].shape
            indices = np.array([int(i) for i in values[1 if slices else 2 :]])
            room = shape - np.array(sizes)
        else:
            return
        count += 1
        indices = np.asarray(indices)
        if (indices < 0).any() or (indices > room).any():
            raise OutOfRangeError(f"{equation}: {indices.min()} to {indices.max()}, room {room}")

    def run(jaxpr, constants, arguments):
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))
        for equation in jaxpr.eqns:
            given = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
            check(equation, given)
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if inner is not None and equation.primitive.name not in ("scan", "shard_map"):
                closed = isinstance(inner, ClosedJaxpr)
                found = run(*((inner.jaxpr, inner.consts) if closed else (inner, [])), given)
            else:
                known = list({v: None for v in equation.invars if not isinstance(v, Literal)})
                alone = jaxpr.replace(
                    constvars=[], invars=known, outvars=equation.outvars, eqns=[equation]
                )
                found = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(values[v] for v in known))
            values |= dict(zip(equation.outvars, found, strict=True))
        return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    closed = jax.make_jaxpr(function)(*arguments)
    run(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
    return count


def network(starts: int = 1, classes: int = 0, **changes) -> Network:
    config = config_lib.Model(layers=1, width=16, heads=2, scan_layers=False, **changes)
    layout = of_images(CODEC.vocabulary, CODEC.grid, config.objective)
    return Network(config, layout, starts, classes)


def train_batch(*transforms: str) -> dict:
    """A training batch of digits."""
    batch = next(Pipeline(SHIFTED, CODEC, seed=0).train(32, 0, transforms))
    assert batch["variant"].max() == (24 if transforms else 8)
    return sharding.global_batch(batch)


def loss_of(network: Network):
    """`(params, batch) -> loss` of a training step."""
    loss = step.make_loss(network, steps=4)
    return lambda params, batch: loss(params, None, batch, jax.random.key(0), jnp.int32(1))[0]


ORDERED = {"random_order": (0.0, 1.0), "target_positions": True, "rotary": True}
NETWORKS = {
    "one start vector": network(),
    "a start vector per variant": network(starts=9, start_per_variant=True, axial_positions=True),
    "class tokens": network(starts=CLASSES + 1, class_tokens=CLASSES, label_dropout=0.5),
    "random orders": network(**ORDERED),
    "bert": network(objective="bert"),
    "class head": network(classes=CLASSES),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_batch_of_the_pipeline_is_in_range_of_every_table(kind):
    given = NETWORKS[kind]
    params, loss = random_params(given), loss_of(given)
    assert check_lookups(loss, params, train_batch()) >= 2
    check_lookups(loss, params, train_batch("shift(pixels=2)"))  # fine-tuning may have other shifts
    split = next(Pipeline(SHIFTED, CODEC, seed=0).evaluation("test", 32))
    check_lookups(step.make_eval_step(given), params, sharding.global_batch(split))


def test_the_probe_by_sgd_is_in_range_of_every_table():
    given = NETWORKS["one start vector"]
    heads = sgd.Heads(given, config_lib.Probe("sgd"), CLASSES, ((0,), (1,)))
    loss, weights = sgd.make_loss(heads), jax.jit(heads.init)()
    checked = check_lookups(
        lambda w, p, b: loss(w, p, b, jax.random.key(0), jnp.int32(0)),
        weights,
        random_params(given),
        train_batch(),
    )
    assert checked >= 1


def test_codes_are_in_range_of_the_codebook():
    config = config_lib.Autoencoder(
        widths=(16,), encoder_blocks=1, decoder_blocks=1, quantizer="vq", codes=24, code_size=4
    )
    settings, key = config_lib.Tokenizer(), jax.random.key(0)
    params = jax.jit(lambda key: autoencoder.init(config, key))(key)
    batch = {"image": random_image(8, 8, 8, 3), "mask": np.ones(8, np.float32)}
    batch, loss = sharding.global_batch(batch), autoencoding.make_loss(config, settings)
    assert check_lookups(lambda p, b: loss(p, None, b, key, jnp.int32(0)), params, batch) == 1
    assert check_lookups(autoencoding.make_eval_step(config), params, batch) == 4
    passed = jax.jit(lambda p, b: loss(p, None, b, key, jnp.int32(0))[1]["aux"])(params, batch)
    book = {"counts": jnp.ones(24), "sums": jnp.ones((24, 4))}
    update = lambda z, codes: autoencoding.update_codebook(book, z, codes, settings, key)  # noqa: E731
    _, _, z, codes = passed
    assert check_lookups(update, z, codes) == 3
    with pytest.raises(OutOfRangeError):
        check_lookups(update, z, codes + 24)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("one start vector", "tokens"),
        ("class tokens", "label"),
        ("class head", "label"),
        ("bert", "tokens"),
    ],
)
def test_data_that_is_out_of_range_is_noticed(kind, part):
    """The check sees every table: one index too large in any of the data raises."""
    given = NETWORKS[kind]
    size = {"tokens": CODEC.vocabulary, "label": CLASSES + given.starts}[part]
    batch = train_batch()
    wrong = batch | {part: batch[part] + size}
    with pytest.raises(OutOfRangeError):
        check_lookups(loss_of(given), random_params(given), wrong)


def test_orders_and_start_vectors_that_are_out_of_range_are_noticed():
    given = network(**ORDERED)
    params, batch = random_params(given), train_batch()
    raster = jnp.tile(jnp.arange(given.length), (32, 1))
    forward = lambda v, o: given.bind(params)(batch["tokens"], v, order=o).logits  # noqa: E731
    assert check_lookups(forward, jnp.zeros(32, jnp.int32), raster) >= 5
    for variant, order in ((0, raster + 1), (CODEC.vocabulary, raster)):
        with pytest.raises(OutOfRangeError):
            check_lookups(forward, jnp.full(32, variant, jnp.int32), order)


def test_the_start_vector_learns_from_shifted_images():
    given, batch = NETWORKS["one start vector"], train_batch()
    loss, params = step.make_loss(given), random_params(given)
    gradient = jax.jit(jax.grad(lambda p, b: loss(p, None, b, None)[0]))
    found = gradient(params, batch)["start"]
    wanted = gradient(params, batch | {"variant": jnp.zeros_like(batch["variant"])})["start"]
    assert np.abs(found).max() > 1e-4
    np.testing.assert_array_equal(found, wanted)
