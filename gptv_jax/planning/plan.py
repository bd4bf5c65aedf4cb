"""A plan: memory, FLOPs, traffic and time of a training step on given devices."""

import dataclasses

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.planning import compiled, memory, traffic
from gptv_jax.planning.pretrain import Pretraining
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import Training

DAY = 86_400  # seconds


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

    config: config_lib.Config
    topology: Topology
    training: Training
    sizes: dict[str, int]  # of the mesh, by axis
    params: int
    executed: int  # FLOPs that a step executes, on all devices together
    memory: memory.Memory  # by arithmetic
    compiled: compiled.Compiled | None  # None: by arithmetic alone
    traffic: list[traffic.Traffic]
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
    def flags(self) -> list[str]:
        """Flags that give a run this plan's mesh, rematerialisation and microbatches."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.sizes.items()]
        if len(self.training.policies) > 1:
            mesh.append(f"--config.model.remat={self.training.remat}")
        if self.training.splits_batches:
            mesh.append(f"--config.train.microbatches={self.training.train.microbatches}")
        return mesh

    def numbers(self) -> dict:
        """The plan as JSON: bytes of one device, seconds, FLOPs of all devices together."""
        needed, unit = self.training.flops, self.training.unit
        days = self.roofline and self.roofline.bound * self.training.train.steps / DAY
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
            "bytes_per_device": self.bytes_per_device,
            "bytes_per_device_source": "compiler" if self.compiled else "arithmetic",
            "bytes_per_device_by_arithmetic": self.memory.total,
            "bytes": self._bytes(),
            "device_memory_bytes": self.topology.memory_bytes,
            "fits": self.fits,
            "collectives": [dataclasses.asdict(each) for each in self.traffic],
            "collectives_source": "compiler" if self._saw_collectives else "arithmetic",
            "loops_of_unknown_length": self.compiled.unknown_loops if self.compiled else [],
            "step_seconds": self.roofline and dataclasses.asdict(self.roofline),
            "step_seconds_estimate": self.step_seconds,
            "step_seconds_without_overlap": self.roofline and self.roofline.serial,
            "mfu_estimate": self.mfu,
            "days": days,
            "device_hours": days and 24 * days * self.topology.count,
        }

    @property
    def _saw_collectives(self) -> bool:
        return self.compiled is not None and not self.compiled.refused

    def _bytes(self) -> dict[str, int]:
        """Bytes of one device by purpose; the compiler gives only one sum of temporaries."""
        parts = dataclasses.asdict(self.memory)
        if self.compiled:
            del parts["gradients"], parts["activations"]
            parts["temporaries"] = self.compiled.total - sum(parts.values())
        return parts


def make(
    config: config_lib.Config,
    topology: Topology,
    kind: type[Training] = Pretraining,
    *,
    compiling: bool = True,
) -> Plan:
    """Plans a training of a configuration.

    Args:
      config: of the run; of its mesh, a -1 is filled.
      topology: the devices.
      kind: class of the training to plan.
      compiling: False does without the compiler where there is one for the topology.

    Raises:
      InputError: the mesh does not fit the devices, the batch or the network.
    """
    training = kind.of(config)
    sizes = dict(zip(sharding.AXES, sharding.axis_sizes(config.mesh, topology.count), strict=True))
    mesh = topology.abstract_mesh(tuple(sizes.values()))
    sharding.check(config, mesh, training.sections)
    sharding.over_slices(tuple(sizes.values()), topology.slices)
    program = None
    # By arithmetic, slices follow one another along the first axes.
    slice_of = [i // topology.per_slice for i in range(topology.count)]
    if topology.compiles and compiling:
        mesh = topology.mesh(config.mesh)
        program = compiled.compile_step(training, mesh)
        slice_of = [getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat]
    bytes_ = memory.estimate(training, topology, sizes)
    if program and not program.refused:
        moved = traffic.of_program(program.collectives, sizes, slice_of)
    else:
        moved = traffic.by_arithmetic(training.collectives(sizes), sizes, slice_of)
    executed, line = training.executed(topology.platform, sizes), None
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
    params = memory.parameter_count(training, topology)
    return Plan(config, topology, training, sizes, params, executed, bytes_, program, moved, line)
