"""The stage's train step, compiled for devices that this machine does not have."""

import dataclasses
import re

import jax

from gptv_jax.planning import hlo
from gptv_jax.planning.training import Training

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as XLA writes sizes
# XLA's two messages about too little memory; both give the memory of the whole program.
_NEEDED = re.compile(r"(?:Used |memory required for HLO temporaries \()([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's facts about a step; bytes are of one device."""

    arguments: int  # the train state and the batch
    temporaries: int  # all other arrays alive at the worst moment
    collectives: list[hlo.Collective]
    unknown_loops: list[str]  # loops of unknown length, whose collectives count once
    refused: bool = False  # whether the compiler refused it, as needing more than the memory

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def program(training: Training, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The train step of the training's stage, compiled for the devices of the mesh."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    # Programs for absent devices stay out of the cache, from which they could not be read.
    if mesh.devices.flat[0].platform != jax.default_backend():
        jax.config.update(name, float("inf"))
    try:
        with jax.set_mesh(mesh):
            return training.lower(mesh).compile()
    finally:
        jax.config.update(name, before)


def compile_step(training: Training, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles `program(training, mesh)`, and reads memory and collectives from the result."""
    try:
        step = program(training, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _NEEDED.search(str(error))
        size = round(float(needed[1]) * UNITS[needed[2]]) if needed else 0
        return Compiled(0, size, [], [], refused=True)
    memory = step.memory_analysis()
    found, unknown = hlo.collectives(step.as_text(), mesh.size)
    # The old state is donated: the new state takes its memory.
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    temporaries += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(memory.argument_size_in_bytes, temporaries, found, unknown)
