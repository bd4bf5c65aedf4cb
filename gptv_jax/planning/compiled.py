"""The real train step, compiled for devices that are not there."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax

from gptv_jax.planning import hlo
from gptv_jax.planning.training import Training

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


def program(training: Training, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """One step of a training as its stage makes it, compiled.

    Args:
      training: to be planned.
      mesh: over the devices to compile for.
    """
    with jax.set_mesh(mesh), _uncached(mesh):
        return training.lower(mesh).compile()


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


def compile_step(training: Training, mesh: jax.sharding.Mesh) -> Compiled:
    """What the compiler says of `program`."""
    try:
        step_ = program(training, mesh)
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
