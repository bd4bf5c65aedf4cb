"""Search over mesh, rematerialisation and microbatches: by arithmetic, then by the compiler."""

import dataclasses
import itertools
from collections.abc import Iterator

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.model.layers import REMAT
from gptv_jax.planning import plan
from gptv_jax.planning.plan import Plan
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import Training

TENSOR = 16  # the largest axis "tensor"; beyond, every layer waits for its sums
LONG = 2048  # tokens from which splitting a sequence is tried
CONFIRMED = 3  # of the best choices are confirmed by the compiler
TRIED = 6  # choices are compiled at most, where some do not fit
SHOWN = 10  # choices in the table


def search(training: Training, topology: Topology, wanted: int = CONFIRMED) -> list[Plan]:
    """Plans for the choices of mesh, rematerialisation and microbatches, the best first.

    The best plans are compiled where there is a compiler; plans that it finds not to fit are left
    out, until `wanted` plans are confirmed. Plans are ranked by the time of a step in which nothing
    overlaps, because the bounds of many plans are equal; where device speeds are unknown, by
    memory. Raises InputError where the batch or the network fits no mesh of these devices.
    """
    plans = sorted(choices(training, topology), key=rank)
    if not plans:
        raise InputError(
            f"no mesh of {topology.count} devices divides config.{training.section}.batch_size="
            f"{training.train.batch_size} and the network; take another batch size."
        )
    if not topology.compiles:
        return plans
    compiled: list[Plan] = []
    while len(compiled) < min(TRIED, len(plans)) and sum(c.fits for c in compiled) < wanted:
        compiled.append(plan.make(plans[len(compiled)].training, topology))
    return sorted((c for c in compiled if c.fits), key=rank) or [min(compiled, key=rank)]


def choices(training: Training, topology: Topology) -> Iterator[Plan]:
    """Plans, by arithmetic, with every mesh, rematerialisation and number of microbatches to try.

    The config's mesh, rematerialisation and microbatches are ignored.
    """
    within = topology.per_slice
    tensors = _powers(min(TENSOR, training.heads, within))
    sequences = _powers(within if training.units >= LONG else 1)
    for tensor, sequence, fsdp in itertools.product(tensors, sequences, _powers(within)):
        data, left = divmod(within, tensor * sequence * fsdp)
        if not left:
            mesh = config_lib.Mesh(data * topology.slices, fsdp, sequence, tensor)
            yield from _on_mesh(training, topology, mesh)


def _on_mesh(training: Training, topology: Topology, mesh: config_lib.Mesh) -> Iterator[Plan]:
    """Plans with every accepted rematerialisation and number of microbatches, cheapest first."""
    config, rows, policies = training.config, 1, [training.config.model.remat]
    if training.tunable:
        rows = training.train.batch_size // (mesh.data * mesh.fsdp)
        policies = ["none", *REMAT]
    for microbatches, policy in itertools.product(_powers(rows), policies):
        model = dataclasses.replace(config.model, remat=policy)
        choice = training.with_train(microbatches, mesh=mesh, model=model)
        try:
            yield plan.make(choice, topology, compiling=False)
        except InputError:  # the mesh does not divide the batch or the network
            continue


def smallest(training: Training, topology: Topology) -> Plan | None:
    """The plan, by arithmetic, on the fewest devices of the topology's kind that fits; or None.

    Weights are split over all devices; among the choices that fit, the plan has the fewest
    microbatches and then the least rematerialisation.
    """
    for count in _powers(topology.count):
        one = dataclasses.replace(topology, per_slice=count, slices=1)
        for tensor in _powers(min(TENSOR, training.heads, count)):
            mesh = config_lib.Mesh(1, count // tensor, 1, tensor)
            for found in _on_mesh(training, one, mesh):
                if found.fits:
                    return found
    return None


def rank(found: Plan) -> tuple[bool, float | int]:
    """Key by which plans are sorted, the best first: whether it fits, then time or memory."""
    cost = found.roofline.serial if found.roofline else found.bytes_per_device
    return not found.fits, cost if found.fits else found.bytes_per_device


def _powers(most: int) -> Iterator[int]:
    return (2**i for i in range(most.bit_length()))
