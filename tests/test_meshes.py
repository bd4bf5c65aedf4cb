"""Properties of whole trainings, and of the mesh, that do not depend on how the work is split."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import make_mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.errors import InputError
from gptv_jax.planning import topology
from gptv_jax.tasks.network import network_of
from gptv_jax.train import optimizer, step

STEPS, BATCH = 50, 16
CONFIG = config_lib.Config(
    model=config_lib.Model(layers=2, width=32, heads=4),
    train=config_lib.Train(
        steps=STEPS,
        optimizer=config_lib.Optimizer(learning_rate=3e-3, warmup_steps=5, clip_norm=1.0),
    ),
)
CODEC = tokens.make_codec(CONFIG.tokens, CONFIG.data.image_size)
MESHES = {  # data, fsdp, sequence, tensor
    "data 2, fsdp 2, tensor 2": (2, 2, 1, 2),
    "fsdp 2, sequence 2, tensor 2": (1, 2, 2, 2),
}


def losses(mesh: tuple[int, ...]) -> list[float]:
    """The loss of every step of a training on real digits."""
    network = network_of(CONFIG)
    update, rate = optimizer.make_optimizer(CONFIG.train.optimizer, STEPS)
    with jax.set_mesh(make_mesh(mesh)):
        state = jax.jit(step.make_init(network, update))(jax.random.key(0))
        train_step = step.make_train_step(step.make_loss(network), update, rate)
        found = []
        for batch in itertools.islice(Pipeline(CONFIG.data, CODEC, 0).train(BATCH), STEPS):
            state, metrics = train_step(state, sharding.global_batch(batch))
            found.append(metrics["nats_per_token"].item())  # waits for the step
    return found


@pytest.fixture(scope="module")
def on_one_device():
    return losses((1, 1, 1, 1))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_the_curve_of_losses_is_that_of_one_device(mesh, on_one_device):
    assert on_one_device[-1] < on_one_device[0] - 0.8  # it learns
    np.testing.assert_allclose(losses(mesh), on_one_device, rtol=0, atol=1e-4)


def test_no_device_ever_holds_the_whole_model_while_it_is_made():
    # Wide, so that split weights outweigh norms, and deep, as one whole layer is allowed.
    model = config_lib.Model(layers=8, width=128, heads=4)
    network = network_of(dataclasses.replace(CONFIG, model=model))
    update, _ = optimizer.make_optimizer(CONFIG.train.optimizer, STEPS)
    with jax.set_mesh(make_mesh((1, 4, 1, 2))):
        init = step.make_init(network, update)
        used = jax.jit(init).lower(jax.random.key(0)).compile().memory_analysis()
        state = sharding.abstract(init)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state["params"]))
    assert used.output_size_in_bytes < 1.05 * 3 * whole / 8  # weights and two moments
    assert used.temp_size_in_bytes < 0.3 * whole


class Device:
    """A device as `sharding.batch_share` reads it."""

    def __init__(self, process_index: int):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("shape", "of_process", "wanted"),
    [
        ((4, 1, 1, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((4, 1, 1, 1), [1, 0, 1, 0], [(1, 2), (0, 2)]),  # as a TPU's wires may have it
        ((1, 2, 1, 2), [0, 1, 0, 1], [(0, 1), (0, 1)]),  # tensor crosses processes
        ((1, 2, 2, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((2, 1, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_read_what_their_devices_hold(shape, of_process, wanted, monkeypatch):
    mesh = fake_mesh(shape, of_process)
    for process, share in enumerate(wanted):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.batch_share(mesh) == share


def test_a_mesh_that_gives_processes_unlike_shares_is_refused():
    with pytest.raises(InputError, match=r"3 groups of devices, which 2 processes cannot share"):
        sharding.batch_share(fake_mesh((3, 1, 1, 2), [0, 0, 0, 1, 1, 1]))


def fake_mesh(shape, of_process):
    devices = np.array([Device(process) for process in of_process])
    return jax.sharding.Mesh(devices.reshape(shape), sharding.AXES)


@pytest.fixture(scope="module")
def two_slices():
    """The chips of two TPU v5e slices of four each, which this machine does not have."""
    return topology.parse("v5e:2x2", 2).devices()


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [((2, 4, 1, 1), "data"), ((-1, 2, 1, 2), "data"), ((1, 8, 1, 1), "fsdp")],
    ids=str,
)
def test_slices_lie_along_the_outermost_axis_that_takes_them(two_slices, sizes, crossing):
    mesh = sharding.make_mesh(config_lib.Mesh(*sizes), two_slices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    axis = sharding.AXES.index(crossing)
    halves = np.split(slices, 2, axis=axis)
    assert [np.unique(half).tolist() for half in halves] == [[0], [1]]


def test_an_axis_may_take_a_part_of_the_torus():
    mesh = sharding.make_mesh(config_lib.Mesh(-1, 16, 1, 2), topology.parse("v5p:4x4x4").devices())
    assert tuple(mesh.shape.values()) == (2, 16, 1, 2)


def test_slices_that_only_tensor_could_cross_are_refused(two_slices):
    with pytest.raises(InputError, match=r"cannot be laid over 2 slices"):
        sharding.make_mesh(config_lib.Mesh(1, 1, 1, 8), two_slices)
