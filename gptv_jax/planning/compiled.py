"""The real train step, compiled for devices that are not there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.planning import hlo
from gptv_jax.train import optimizer, step

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as XLA writes sizes
_NEEDED = re.compile(r"(?:Used |temporaries \(|memory required[^(]*\()([\d.]+)([KMGT]?)")


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


def abstract_state(config: config_lib.Config, network: Network) -> dict:
    """Shapes and shardings of the train state {step, params, opt} under the mesh that is set."""
    update, _ = optimizer.make_optimizer(config.train.optimizer, config.train.steps)
    return sharding.abstract(step.make_init(network, update))


def compile_step(config: config_lib.Config, network: Network, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles one step of pretraining as the stage makes it.

    Args:
      config: of the run.
      network: its network.
      mesh: over the devices to compile for.
    """
    train = config.train
    update, rate = optimizer.make_optimizer(train.optimizer, train.steps)
    train_step = step.make_train_step(
        step.generative_loss(network),
        update,
        rate,
        microbatches=train.microbatches,
        seed=config.seed,
    )
    rows = NamedSharding(mesh, sharding.HIDDEN)
    shapes = {"tokens": (train.batch_size, network.length), "variant": (train.batch_size,)}
    if config.data.labels:
        shapes["label"] = (train.batch_size,)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        for name, shape in shapes.items()
    }
    with jax.set_mesh(mesh):
        lowered = train_step.lower(abstract_state(config, network), batch)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(0, _needed(str(error)), [], [], refused=True)
    memory = program.memory_analysis()
    found, unknown = hlo.collectives(program.as_text(), mesh.size)
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
