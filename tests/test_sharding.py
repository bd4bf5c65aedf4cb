import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import MESHES, RECIPES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder, discriminator
from gptv_jax.train import step
from gptv_jax.train.optimizer import make_optimizer

MODERN_MESHES = [(1, 2, 4), (1, 2, 2, 2)]  # which have every axis that splits weights or positions
CASES = [("igpt", shape) for shape in MESHES[1:]] + [("modern", shape) for shape in MODERN_MESHES]


@functools.cache
def reference(recipe):
    return loss_and_gradients(recipe, (1, 1, 1))


def loss_and_gradients(recipe, shape):
    network = tiny_network(classes=5, **RECIPES[recipe])
    with jax.set_mesh(make_mesh(shape)):
        batch = sharding.global_batch(random_batch(network))
        loss = step.joint_loss(network, 1.0, 1.0)
        gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, None)[0]))
        value, grads = gradient(random_params(network))
        return float(value), jax.device_get(grads)


@pytest.mark.parametrize(("recipe", "shape"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(recipe, shape):
    wanted, wanted_grads = reference(recipe)
    value, grads = loss_and_gradients(recipe, shape)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for path, wanted in jax.tree.leaves_with_path(wanted_grads):
        found = grads
        for key in path:
            found = found[key.key]
        scale = np.abs(wanted).max() + 1e-30
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, err_msg=str(path))


def state_on_eight(recipe, optimizer="adam"):
    """The abstract train state, fsdp 2, tensor 4."""
    optimizer, _ = make_optimizer(config_lib.Optimizer(name=optimizer), steps=1)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        return sharding.abstract(step.make_init(tiny_network(classes=5, **recipe), optimizer))


def test_every_parameter_has_a_row_in_the_table_and_lies_as_it_says():
    leaves = []
    for recipe in [*RECIPES.values(), {"target_positions": True}]:
        leaves += jax.tree.leaves_with_path(state_on_eight(recipe)["params"])
    learned = config_lib.Autoencoder(quantizer="vq", norm=True, attention=True)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        of_tokens = sharding.abstract(lambda key: autoencoder.init(learned, key))
        settings = config_lib.Tokenizer(adversarial=0.5)
        critic = sharding.abstract(lambda key: discriminator.init(learned, settings, key))
    leaves += jax.tree.leaves_with_path(of_tokens) + jax.tree.leaves_with_path(critic)
    assert {path[-1].key for path, _ in leaves} == set(sharding.PARAMETERS)
    for path, leaf in leaves:
        assert leaf.sharding.spec == sharding.PARAMETERS[path[-1].key], path


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_large_parameters_are_split_over_fsdp_and_tensor(recipe):
    params = state_on_eight(recipe)["params"]
    blocks = {name: leaf for name, leaf in params["blocks"].items() if "norm" not in name}
    assert len(blocks) == 4
    for name, leaf in blocks.items():
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, name
    for name in {"token_embedding", "position", "head"} & set(params):
        leaf = params[name]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 2 == leaf.size, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_moments_are_sharded_as_their_parameters(recipe, optimizer):
    state = state_on_eight(recipe, optimizer)
    params = jax.tree.leaves_with_path(state["params"])
    specs = {tuple(k.key for k in path): leaf.sharding.spec for path, leaf in params}
    found = set()
    for path, leaf in jax.tree.leaves_with_path(state["opt"]):
        name = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        name = name[-2:] if name[-2:] in specs else name[-1:]
        if name in specs and leaf.ndim:
            assert leaf.sharding.spec == specs[name], path
            found.add(name)
    assert found == set(specs)  # every parameter has a moment, and all were looked at


def test_arrays_on_the_devices_have_the_shards_that_the_types_promise():
    network = tiny_network()
    optimizer, rate = make_optimizer(config_lib.Optimizer(name="adam"), steps=1)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        init = step.make_init(network, optimizer)
        state = jax.jit(init)(jax.random.key(0))
        train_step = step.make_train_step(step.generative_loss(network), optimizer, rate)
        state, _ = train_step(state, sharding.global_batch(random_batch(network)))
        for wanted, found in zip(
            jax.tree.leaves(sharding.abstract(init)), jax.tree.leaves(state), strict=True
        ):
            shard = found.addressable_shards[0].data
            assert shard.shape == wanted.sharding.shard_shape(wanted.shape)
        moment = state["opt"][0].mu["blocks"]["mlp_in"]
        assert moment.addressable_shards[0].data.size * 8 == moment.size


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1, 1), (8, 1, 1, 1)), ((2, -1, 1, 2), (2, 2, 1, 2)), ((1, 2, 4, 1), (1, 2, 4, 1))],
)
def test_one_axis_fills_what_is_left(sizes, shape):
    mesh = sharding.make_mesh(config_lib.Mesh(*sizes))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1, 1), (-1, 3, 1, 1), (2, 2, 1, 1), (4, 4, 1, 1), (1, 1, 3, 1)]
)
def test_mesh_that_does_not_divide_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match=r"config\.mesh\.data=.*there are 8"):
        sharding.make_mesh(config_lib.Mesh(*sizes))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.width", {"model": config_lib.Model(width=36, heads=6)}),
        ("model.heads", {"model": config_lib.Model(width=32, heads=1)}),
        ("train.batch_size", {"train": config_lib.Train(batch_size=12, microbatches=4)}),
        (
            r"model\.width \* model\.mlp_ratio \* 2/3, rounded,",
            {"model": config_lib.Model(width=16, mlp_ratio=1, heads=2, mlp="swiglu")},  # 11
        ),
        ("probe.batch_size", {"probe": config_lib.Probe(batch_size=3)}),
        (
            "probe.sgd.batch_size",
            {"probe": config_lib.Probe("sgd", sgd=config_lib.ProbeSgd(batch_size=6))},
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(field, changes):
    config = dataclasses.replace(config_lib.Config(), **changes)
    mesh = make_mesh((1, 4, 2)) if field != "model.width" else make_mesh((1, 8, 1))
    with pytest.raises(InputError, match=rf"config\.{field} is "):
        sharding.check(config, mesh)


def test_what_the_mesh_does_not_divide_of_a_tokenizer_is_named():
    mesh, tokens = make_mesh((2, 4, 1)), config_lib.Tokens("learned")
    config = dataclasses.replace(config_lib.Config(), tokens=tokens)
    sharding.check_tokenizer(config, mesh)
    odd = dataclasses.replace(tokens, autoencoder=config_lib.Autoencoder(widths=(8, 6)))
    settings = config_lib.Tokenizer(adversarial=0.1, discriminator_width=10)
    for changes, words in (
        ({"tokens": odd}, r"tokens\.autoencoder\.widths\[1\] is 6, which 4 \(config\.mesh\.fsdp\)"),
        ({"tokenizer": settings}, r"tokenizer\.discriminator_width is 10, which 4"),
        (
            {"tokenizer": config_lib.Tokenizer(train=config_lib.Train(batch_size=12))},
            r"tokenizer\.train\.batch_size is 12, which 8",
        ),
    ):
        with pytest.raises(InputError, match=rf"config\.{words}"):
            sharding.check_tokenizer(dataclasses.replace(config, **changes), mesh)


def test_rows_that_every_process_holds_are_split_over_the_batch_axes():
    rows = np.arange(16).reshape(8, 2)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        array = sharding.from_everywhere(rows)
    assert array.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(array), rows)
