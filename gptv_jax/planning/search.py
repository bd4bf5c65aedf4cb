"""The choices that a configuration leaves open, by arithmetic first, then by the compiler."""

import dataclasses
from collections.abc import Iterator

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import remat
from gptv_jax.planning import plan
from gptv_jax.planning.plan import Plan
from gptv_jax.planning.topology import Topology

TENSOR = 16  # at most; beyond, every layer waits for its sums
LONG = 2048  # tokens from which splitting a sequence is worth trying
CONFIRMED = 3  # of the best choices, by the compiler
TRIED = 6  # at most, where it finds that some do not fit
SHOWN = 10  # choices in the table


def search(config: config_lib.Config, topology: Topology, wanted: int = CONFIRMED) -> list[Plan]:
    """Plans for the choices of mesh, rematerialisation and microbatches, the best first.

    The best of them are compiled where there is a compiler; those that it finds not to fit are
    left out. The order is by the time of a step in which nothing overlaps, because that tells
    choices apart that the bound does not; where no speed is known, by memory.

    Args:
      config: of the run, whose own mesh, remat and microbatches do not matter.
      topology: the devices.
      wanted: plans that the compiler is to confirm.

    Raises:
      InputError: the batch or the network fits no mesh of these devices.
    """
    found = list(choices(config, topology))
    if not found:
        raise InputError(
            f"no mesh of {topology.count} devices divides config.train.batch_size="
            f"{config.train.batch_size} (and those of the probe and of fine-tuning) and the "
            "network; take another batch size."
        )
    plans = sorted((plan.make(c, topology, compiling=False) for c in found), key=_rank)
    if not topology.compiles:
        return plans
    compiled: list[Plan] = []
    while len(compiled) < min(TRIED, len(plans)) and sum(c.fits for c in compiled) < wanted:
        compiled.append(plan.make(plans[len(compiled)].config, topology))
    return sorted((c for c in compiled if c.fits), key=_rank) or [min(compiled, key=_rank)]


def choices(config: config_lib.Config, topology: Topology) -> Iterator[config_lib.Config]:
    """The configuration with every mesh, rematerialisation and number of parts worth a try."""
    within = topology.per_slice
    long = config.data.image_size**2 >= LONG
    for tensor in _powers(min(TENSOR, config.model.heads, within)):
        for sequence in _powers(within // tensor) if long else (1,):
            for fsdp in _powers(within // (tensor * sequence)):
                rest, left = divmod(within, tensor * sequence * fsdp)
                if left:
                    continue
                mesh = config_lib.Mesh(rest * topology.slices, fsdp, sequence, tensor)
                rows = config.train.batch_size // (mesh.data * fsdp)
                for microbatches in _powers(rows):
                    for policy in ("none", *remat.POLICIES):
                        choice = _with(config, mesh, policy, microbatches)
                        if _accepted(choice, topology):
                            yield choice


def smallest(config: config_lib.Config, topology: Topology) -> Plan | None:
    """The plan on the fewest devices of the kind that fits, by arithmetic; None: none does.

    Weights are split as far as they can be; no more is rematerialised, and the batch is worked
    through in no more parts, than it takes.
    """
    for count in _powers(topology.count):
        one = dataclasses.replace(topology, per_slice=count, slices=1)
        for tensor in _powers(min(TENSOR, config.model.heads, count)):
            fsdp = count // tensor
            mesh = config_lib.Mesh(1, fsdp, 1, tensor)
            for microbatches in _powers(config.train.batch_size // fsdp):
                for policy in ("none", *remat.POLICIES):
                    choice = _with(config, mesh, policy, microbatches)
                    if _accepted(choice, one):
                        found = plan.make(choice, one, compiling=False)
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


def _accepted(config: config_lib.Config, topology: Topology) -> bool:
    try:
        sizes = sharding.axis_sizes(config.mesh, topology.count)
        sharding.check(config, topology.abstract_mesh(sizes))
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
