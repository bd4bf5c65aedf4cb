"""The choices that a configuration leaves open, by arithmetic first, then by the compiler."""

import dataclasses
from collections.abc import Iterator

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.planning import plan
from gptv_jax.planning.plan import Plan
from gptv_jax.planning.pretrain import Pretraining
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import Training

TENSOR = 16  # at most; beyond, every layer waits for its sums
LONG = 2048  # tokens from which splitting a sequence is worth trying
CONFIRMED = 3  # of the best choices, by the compiler
TRIED = 6  # at most, where it finds that some do not fit
SHOWN = 10  # choices in the table


def search(
    config: config_lib.Config,
    topology: Topology,
    kind: type[Training] = Pretraining,
    wanted: int = CONFIRMED,
) -> list[Plan]:
    """Plans for the choices of mesh, rematerialisation and microbatches, the best first.

    The best of them are compiled where there is a compiler; those that it finds not to fit are
    left out. The order is by the time of a step in which nothing overlaps, because that tells
    choices apart that the bound does not; where no speed is known, by memory.

    Args:
      config: of the run, whose own mesh, remat and microbatches do not matter.
      topology: the devices.
      kind: of training.
      wanted: plans that the compiler is to confirm.

    Raises:
      InputError: the batch or the network fits no mesh of these devices.
    """
    found = list(choices(config, topology, kind))
    if not found:
        training = kind.of(config)
        raise InputError(
            f"no mesh of {topology.count} devices divides config.{training.section}.batch_size="
            f"{training.train.batch_size} and the "
            "network; take another batch size."
        )
    plans = sorted((plan.make(c, topology, kind, compiling=False) for c in found), key=_rank)
    if not topology.compiles:
        return plans
    compiled: list[Plan] = []
    while len(compiled) < min(TRIED, len(plans)) and sum(c.fits for c in compiled) < wanted:
        compiled.append(plan.make(plans[len(compiled)].config, topology, kind))
    return sorted((c for c in compiled if c.fits), key=_rank) or [min(compiled, key=_rank)]


def choices(
    config: config_lib.Config, topology: Topology, kind: type[Training] = Pretraining
) -> Iterator[config_lib.Config]:
    """The configuration with every mesh, rematerialisation and number of parts worth a try."""
    within, training = topology.per_slice, kind.of(config)
    long = training.positions >= LONG
    for tensor in _powers(min(TENSOR, training.heads, within)):
        for sequence in _powers(within // tensor) if long else (1,):
            for fsdp in _powers(within // (tensor * sequence)):
                rest, left = divmod(within, tensor * sequence * fsdp)
                if left:
                    continue
                mesh = config_lib.Mesh(rest * topology.slices, fsdp, sequence, tensor)
                yield from _on(config, topology, training, mesh)


def _on(
    config: config_lib.Config, topology: Topology, training: Training, mesh: config_lib.Mesh
) -> Iterator[config_lib.Config]:
    """Every rematerialisation and number of parts that a mesh leaves, the cheapest first."""
    rows = training.train.batch_size // (mesh.data * mesh.fsdp)
    for microbatches in _powers(rows if training.splits_batches else 1):
        for policy in training.policies:
            choice = _with(config, mesh, policy, microbatches)
            if _accepted(choice, topology, training):
                yield choice


def smallest(
    config: config_lib.Config, topology: Topology, kind: type[Training] = Pretraining
) -> Plan | None:
    """The plan on the fewest devices of the kind that fits, by arithmetic; None: none does.

    Weights are split as far as they can be; no more is rematerialised, and the batch is worked
    through in no more parts, than it takes.
    """
    training = kind.of(config)
    for count in _powers(topology.count):
        one = dataclasses.replace(topology, per_slice=count, slices=1)
        for tensor in _powers(min(TENSOR, training.heads, count)):
            mesh = config_lib.Mesh(1, count // tensor, 1, tensor)
            for choice in _on(config, one, training, mesh):
                found = plan.make(choice, one, kind, compiling=False)
                if found.fits:
                    return found
    return None


def _with(
    config: config_lib.Config, mesh: config_lib.Mesh, policy: str, microbatches: int
) -> config_lib.Config:
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(config.model, remat=policy),
        train=dataclasses.replace(config.train, microbatches=microbatches),
    )


def _accepted(config: config_lib.Config, topology: Topology, training: Training) -> bool:
    try:
        mesh = topology.abstract_mesh(sharding.axis_sizes(config.mesh, topology.count))
        sharding.check(config, mesh, training.sections)
    except InputError:
        return False
    return config.train.batch_size % config.train.microbatches == 0


def _rank(found: Plan) -> tuple[bool, float | int]:
    cost = found.roofline.serial if found.roofline else found.bytes_per_device
    return not found.fits, cost if found.fits else found.bytes_per_device


def _powers(most: int) -> Iterator[int]:
    """Powers of two up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
