import dataclasses

import jax
import numpy as np
import pytest
from conftest import MESHES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.train import step
from gptv_jax.train.optimizer import make_optimizer


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradients((1, 1, 1))


def loss_and_gradients(shape):
    network = tiny_network(classes=5)
    with jax.set_mesh(make_mesh(shape)):
        batch = sharding.global_batch(random_batch(network))
        loss = step.joint_loss(network, 1.0, 1.0)
        gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0]))
        value, grads = gradient(random_params(network))
        return float(value), jax.device_get(grads)


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_loss_and_gradients_are_those_of_one_device(shape, reference):
    value, grads = loss_and_gradients(shape)
    np.testing.assert_allclose(value, reference[0], rtol=1e-5)
    for path, wanted in jax.tree.leaves_with_path(reference[1]):
        found = grads
        for key in path:
            found = found[key.key]
        scale = np.abs(wanted).max() + 1e-30
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, err_msg=str(path))


@pytest.fixture(scope="module", params=["adam", "muon"])
def state_on_eight(request):
    """The abstract train state of a network with every kind of parameter, fsdp 2, tensor 4."""
    network = tiny_network(classes=5)
    optimizer, _ = make_optimizer(config_lib.Optimizer(name=request.param), steps=1)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        return sharding.abstract(step.make_init(network, optimizer))


def test_every_parameter_has_a_row_in_the_table_and_lies_as_it_says(state_on_eight):
    leaves = jax.tree.leaves_with_path(state_on_eight["params"])
    assert {path[-1].key for path, _ in leaves} == set(sharding.PARAMETERS)
    for path, leaf in leaves:
        assert leaf.sharding.spec == sharding.PARAMETERS[path[-1].key], path


def test_large_parameters_are_split_over_fsdp_and_tensor(state_on_eight):
    blocks = state_on_eight["params"]["blocks"]
    for name in ("qkv", "attention_out", "mlp_in", "mlp_out"):
        leaf = blocks[name]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, name
    for name in ("token_embedding", "position", "head"):
        leaf = state_on_eight["params"][name]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 2 == leaf.size, name


def test_moments_are_sharded_as_their_parameters(state_on_eight):
    params = jax.tree.leaves_with_path(state_on_eight["params"])
    specs = {tuple(k.key for k in path): leaf.sharding.spec for path, leaf in params}
    found = set()
    for path, leaf in jax.tree.leaves_with_path(state_on_eight["opt"]):
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


def test_rows_that_every_process_holds_are_split_over_the_batch_axes():
    rows = np.arange(16).reshape(8, 2)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        array = sharding.from_everywhere(rows)
    assert array.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(array), rows)
