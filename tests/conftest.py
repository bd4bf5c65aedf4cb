"""Eight simulated devices, strict JAX, one compilation cache for all workers and processes."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU in the machine does not alter the tests
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Tests compile much and compute little: XLA's optimisations cost three times what they save.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import dataclasses

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor


def make_mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    """A mesh over the first devices."""
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, sharding.AXES, (AxisType.Explicit,) * 3, devices=devices)


def tiny_network(classes: int = 0, **changes) -> Network:
    """2 layers, 16 tokens, 11 token values, three start vectors; divisible by every mesh."""
    config = config_lib.Model(layers=2, width=32, heads=4, axial_positions=True)
    config = dataclasses.replace(config, **changes)
    return Network(config, vocabulary=11, grid=(4, 4), starts=3, classes=classes)


def random_params(network: Network, seed: int = 0) -> dict:
    """Weights without the zeros that the initialisation has, so that nothing is hidden by them.

    Drawn by NumPy: the same on every mesh, and nothing to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        value = rng.normal(0.5, 0.2, leaf.shape) if leaf.ndim < 2 else rng.normal(0, 0.2, leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    return jax.tree.map(draw, sharding.abstract(network.init))


def random_batch(network: Network, size: int = 8, seed: int = 0) -> dict:
    """NumPy tokens, variants, labels and masks."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(network.vocabulary, size=(size, network.length), dtype=np.int32),
        "variant": rng.integers(network.starts, size=size, dtype=np.int32),
        "label": rng.integers(max(network.classes, 1), size=size, dtype=np.int32),
        "mask": (np.arange(size) < size - 1).astype(np.float32),
    }


@pytest.fixture
def one_device():
    """The mesh (1, 1, 1), set."""
    with jax.set_mesh(make_mesh((1, 1, 1))) as mesh:
        yield mesh
