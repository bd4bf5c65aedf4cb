"""The real train step, compiled for devices that are not there."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.planning import hlo
from gptv_jax.train import optimizer, step

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as XLA writes sizes
# All of the program's memory, though one form of the message calls it temporaries.
_NEEDED = re.compile(r"(?:Used |memory required for HLO temporaries \()([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step; bytes are of one device."""

    arguments: int  # the train state and the batch
    temporaries: int  # everything else that is alive at the worst moment
    collectives: list[hlo.Collective]
    unknown_loops: list[str]  # with collectives in them that count once
    refused: bool = False  # by the compiler, as more than the memory

    @property
    def total(self) -> int:
        """Bytes of a device at the worst moment."""
        return self.arguments + self.temporaries


def program(
    config: config_lib.Config, network: Network, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """One step of pretraining as the stage makes it, compiled.

    Args:
      config: of the run.
      network: its network.
      mesh: over the devices to compile for.
    """
    train = config.train
    update, rate = optimizer.make_optimizer(
        train.optimizer, train.steps, relative_width=config.model.relative_width
    )
    train_step = step.make_train_step(
        step.generative_loss(network, train.steps),
        update,
        rate,
        microbatches=train.microbatches,
        seed=config.seed,
        ema=train.ema,
    )
    rows = NamedSharding(mesh, sharding.BATCH_FIRST)
    batch = step.abstract_batch(network, train.batch_size, rows)
    with jax.set_mesh(mesh), _uncached(mesh):
        state = sharding.abstract(step.make_init(network, update, train.ema))
        return train_step.lower(state, batch).compile()


@contextlib.contextmanager
def _uncached(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Keeps a program for devices that are not here out of the cache: it could not be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    if mesh.devices.flat[0].platform != jax.default_backend():
        jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_step(config: config_lib.Config, network: Network, mesh: jax.sharding.Mesh) -> Compiled:
    """What the compiler says of `program`."""
    try:
        step_ = program(config, network, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(0, _needed(str(error)), [], [], refused=True)
    memory = step_.memory_analysis()
    found, unknown = hlo.collectives(step_.as_text(), mesh.size)
    # The new state takes the place of the old one, which is donated.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes,
        found,
        unknown,
    )


def _needed(message: str) -> int:
    """Bytes that a refused program needs, as the message tells them."""
    found = _NEEDED.search(message)
    return round(float(found[1]) * UNITS[found[2]]) if found else 0
