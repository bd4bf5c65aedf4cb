"""A plan: memory, FLOPs, traffic and time of a training step on given devices."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptv_jax import sharding
from gptv_jax.planning import compiled
from gptv_jax.planning.collectives import WIDTHS, Call
from gptv_jax.planning.hlo import Collective
from gptv_jax.planning.memory import Memory
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import Training

DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same axes in one step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, whose devices take part
    count: int
    bytes: int  # of the arrays that are gathered, reduced or moved, of all collectives together
    inside: float  # bytes that a device sends to devices of its slice or node
    between: float  # bytes that a device sends to other slices or nodes


def traffic_of(
    found: Iterable[Collective], sizes: dict[str, int], slice_of: Sequence[int]
) -> list[Traffic]:
    """Traffic of collectives, added up by kind and axes, most bytes first.

    `sizes` are the mesh's by axis, and `slice_of` the slice of each device in the order of the
    mesh. Collectives are rings: first inside every slice, then between slices.
    """
    places = np.array(np.unravel_index(np.arange(len(slice_of)), tuple(sizes.values()))).T
    first_of_each_slice = tuple(slice_of.index(i) for i in sorted(set(slice_of)))
    rows = collections.defaultdict(list)
    for kind, count, size, group in found:
        group = group or first_of_each_slice
        along = np.ptp(places[list(group)], axis=0)
        slices = len({slice_of[i] for i in group})
        members = len(group) // slices
        passes = 2 if kind == "all-reduce" else 1
        if kind == "collective-permute":
            inside, between = (float(size), 0.0) if slices == 1 else (0.0, float(size))
        else:
            inside = passes * size * (members - 1) / members
            between = passes * size / members * (slices - 1) / slices
        axes = tuple(axis for axis, distance in zip(sizes, along, strict=True) if distance)
        rows[kind, axes].append((count, count * size, count * inside, count * between))
    added = []
    for (kind, axes), each in rows.items():
        count, size, inside, between = map(sum, zip(*each, strict=True))
        added.append(Traffic(kind, axes, count, size, inside, between))
    return sorted(added, key=lambda row: -row.bytes)


def _required(calls: Iterable[Call], sizes: dict[str, int]) -> Iterator[Collective]:
    """The collectives that a sharding requires, as a compiled program would have them."""
    ids = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
    for kind, axes, count, size in calls:
        group = ids[tuple(slice(None) if axis in axes else 0 for axis in sizes)]
        if group.size > 1 and count:
            yield Collective(kind, count, round(size), tuple(group.ravel().tolist()))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one step takes in each part of a device at its peak rate, if it never waits."""

    compute: float
    memory: float
    interconnect: float
    network: float  # between slices or nodes

    @property
    def bound(self) -> float:
        """Seconds of a step if the slowest part hides all other parts."""
        return max(dataclasses.astuple(self))

    @property
    def serial(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration's costs on a topology; times are None where device speeds are unknown."""

    topology: Topology
    training: Training
    sizes: dict[str, int]  # of the mesh, by axis
    params: int
    executed: int  # FLOPs that a step executes, on all devices together
    memory: Memory  # by arithmetic
    compiled: compiled.Compiled | None  # None: by arithmetic alone
    traffic: list[Traffic]
    roofline: Roofline | None

    @property
    def bytes_per_device(self) -> int:
        """Bytes at the worst moment of a step: by the compiler or, without one, by arithmetic."""
        return self.compiled.total if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        """Whether `bytes_per_device` is within what a program may take of a device's memory."""
        refused = self.compiled is not None and self.compiled.refused
        return not refused and self.bytes_per_device <= self.topology.memory_bytes

    @property
    def flops_per_step(self) -> int:
        """FLOPs that a step of the training needs, on all devices together."""
        training = self.training
        return training.flops.total * training.units * training.train.batch_size

    @property
    def step_seconds(self) -> float | None:
        """The roofline's bound: all parts of a device overlapped."""
        return self.roofline and self.roofline.bound

    @property
    def mfu(self) -> float | None:
        """FLOPs that a step needs, over the peak FLOPs of all devices in `step_seconds`."""
        if not self.roofline:
            return None
        peak = self.topology.count * self.topology.hardware.peak_flops
        return self.flops_per_step / (self.roofline.bound * peak)

    @property
    def drawing(self) -> dict[str, float | int | None] | None:
        """How many sequences are drawn at a time at most, by arithmetic; None where none are drawn.

        For each token a device reads all weights in the compute dtype, which only the axis "tensor"
        splits, and the keys and values of its sequences, on average half of them. "seconds" is the
        time that this takes at least for all sequences together. Guidance takes two for each one.
        """
        if not self.training.draws:
            return None
        network, hardware = self.training.network, self.topology.hardware
        config, tensor = network.config, self.sizes["tensor"]
        weights = WIDTHS[config.dtype] * self.params // tensor
        cache = 2 * WIDTHS[config.dtype] * config.layers * network.length * config.width // tensor
        free = self.topology.memory_bytes - self.memory.parameters - weights
        rows = max(free // cache, 0)
        read = network.length * (weights + rows * cache / 2)
        return {
            "weights_bytes": weights,
            "bytes_per_sequence": cache,
            "sequences": rows * self.sizes["data"] * self.sizes["fsdp"],
            "seconds": hardware and read / hardware.memory_bandwidth,
        }

    @property
    def flags(self) -> list[str]:
        """Flags that give a run this plan's mesh, rematerialisation and microbatches."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.sizes.items()]
        if not self.training.tunable:
            return mesh
        remat, parts = self.training.config.model.remat, self.training.train.microbatches
        return [
            *mesh,
            f"--config.model.remat={remat}",
            f"--config.{self.training.section}.microbatches={parts}",
        ]

    def numbers(self) -> dict:
        """The plan as JSON: bytes of one device, seconds, FLOPs of all devices together."""
        needed, unit = self.training.flops, self.training.unit
        days = self.roofline and self.roofline.bound * self.training.train.steps / DAY
        parts = dataclasses.asdict(self.memory)
        if not parts["teachers"]:
            del parts["teachers"]
        if self.compiled:  # the compiler gives only one sum of temporaries
            del parts["gradients"], parts["activations"]
            parts["temporaries"] = self.compiled.total - sum(parts.values())
        counted = self.compiled and not self.compiled.refused
        return {
            "topology": self.topology.name,
            "num_slices": self.topology.slices,
            "devices": self.topology.count,
            "mesh": self.sizes,
            "flags": self.flags,
            "params": self.params,
            f"flops_per_{unit}": needed.total,
            **{f"flops_per_{unit}_{part}": count for part, count in needed.items()},
            "flops_per_step": self.flops_per_step,
            "flops_per_step_executed": self.executed,
            "flops_per_step_encoding": self.training.encoding,
            "bytes_per_device": self.bytes_per_device,
            "bytes_per_device_source": "compiler" if self.compiled else "arithmetic",
            "bytes_per_device_by_arithmetic": self.memory.total,
            "bytes": parts,
            "device_memory_bytes": self.topology.memory_bytes,
            "fits": self.fits,
            "collectives": [dataclasses.asdict(each) for each in self.traffic],
            "collectives_source": "compiler" if counted else "arithmetic",
            "loops_of_unknown_length": self.compiled.unknown_loops if self.compiled else [],
            "step_seconds": self.roofline and dataclasses.asdict(self.roofline),
            "step_seconds_estimate": self.step_seconds,
            "step_seconds_without_overlap": self.roofline and self.roofline.serial,
            "mfu_estimate": self.mfu,
            "drawing": self.drawing,
            "days": days,
            "device_hours": days and 24 * days * self.topology.count,
        }


def make(training: Training, topology: Topology, *, compiling: bool = True) -> Plan:
    """Plans a training, whose configuration's mesh may have a -1 to fill.

    `compiling=False` does without the compiler where there is one for the topology.

    InputError: the mesh does not fit the devices, the batch or the network.
    """
    config = training.config
    lengths = sharding.axis_sizes(config.mesh, topology.count)
    mesh = sharding.abstract_mesh(lengths, topology.kind, topology.platform)
    training.check(mesh)
    sharding.over_slices(lengths, topology.slices)
    sizes, program, line = dict(mesh.shape), None, None
    # By arithmetic, slices follow one another along the first axes.
    slice_of = [i // topology.per_slice for i in range(topology.count)]
    found = _required(training.collectives(sizes), sizes)
    if topology.compiles and compiling:
        real = sharding.make_mesh(config.mesh, topology.devices())
        program = compiled.compile_step(training, real)
        slice_of = [getattr(device, "slice_index", None) or 0 for device in real.devices.flat]
        found = found if program.refused else program.collectives
    moved = traffic_of(found, sizes, slice_of)
    bytes_, executed = training.memory(mesh), training.executed(mesh)
    if rates := topology.hardware:
        # Each pass over the layers reads their weights. The optimizer reads and writes its state
        # and the parameters, and reads the gradients. Activations are left out: the compiler
        # decides how many activations go through memory.
        read = training.weights_read(sizes)
        read += 2 * (bytes_.parameters + bytes_.optimizer) + bytes_.gradients
        line = Roofline(
            executed / topology.count / rates.peak_flops,
            read / rates.memory_bandwidth,
            sum(each.inside for each in moved) / rates.interconnect,
            sum(each.between for each in moved) / rates.network,
        )
    params = sum(array.size for array in training.state()[0])
    return Plan(topology, training, sizes, params, executed, bytes_, program, moved, line)
