"""Planned bytes of a device: against a real run, and arithmetic against the compilers."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from conftest import MODERN, random_batch
from jax.sharding import PartitionSpec as P

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.planning import memory, plan, topology
from gptv_jax.planning.training import Pretraining
from gptv_jax.train import objective, optimizer, step

CPU, TPU = topology.parse("cpu:8"), topology.parse("v5e:2x4")


def small(mesh: tuple[int, ...], remat: str, microbatches: int = 1, **changes) -> config_lib.Config:
    """4 layers, 144 tokens; every axis of the mesh divides it."""
    # Scanned, as on a TPU: of an unrolled walk the compiler fuses what it likes across layers.
    model = {"layers": 4, "width": 128, "heads": 4, "remat": remat, "scan_layers": True, **changes}
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    return config_lib.Config(
        model=config_lib.Model(**model),
        mesh=config_lib.Mesh(**sizes),
        train=config_lib.Train(batch_size=64, microbatches=microbatches),
        data=config_lib.Data(image_size=12),
    )


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_state_and_batch_are_what_real_arrays_hold(mesh):
    config = small(mesh, "dots")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema=0.9))
    found = plan.make(Pretraining(config), CPU, compiling=False)
    update, _ = optimizer.make_optimizer(config.train.optimizer, config.train.steps)
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        state = jax.jit(step.make_init(found.training.network, update, 0.9))(jax.random.key(0))
        batch = random_batch(found.training.network, size=64)
        arrays = sharding.global_batch({name: batch[name] for name in ("tokens", "variant")})
    planned = found.memory
    assert held(state["params"]) == {planned.parameters}
    assert held([state["opt"], state["ema"]]) == {planned.optimizer}
    assert held(arrays) == {planned.batch}
    assert found.params == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


def held(tree) -> set[int]:
    """Bytes on each device."""
    totals = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return set(totals.values())


# Steps of the real program in their own process, which grows by what eight devices need. XLA's
# optimisations are on, as for users: without them a step takes twice as long. On a busy machine the
# devices' worst moments may not coincide, so the largest growth counts.
MEASURED = """
import json, os, pathlib
import jax, numpy as np
import test_memory as t
os.environ["XLA_FLAGS"] = ""
from gptv_jax import sharding
from gptv_jax.planning import compiled, plan
from gptv_jax.planning.training import Pretraining
from gptv_jax.train import optimizer, step

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

rows = []
for remat in ("none", "full"):
    config = t.small((2, 2, 2), remat)
    found = plan.make(Pretraining(config), t.CPU)
    mesh = sharding.make_mesh(config.mesh)
    update, _ = optimizer.make_optimizer(config.train.optimizer, config.train.steps)
    grown = []
    with jax.set_mesh(mesh):
        state = jax.jit(step.make_init(found.training.network, update))(jax.random.key(0))
        program = compiled.program(found.training, mesh)
        shape = (64, found.training.network.length)
        batch = {"tokens": np.zeros(shape, np.int32), "variant": np.zeros(64, np.int32)}
        batch = sharding.global_batch(batch)
        for _ in range(3):
            jax.block_until_ready(state)
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
            before = status("VmRSS")
            state, metrics = program(state, batch, None)
            jax.block_until_ready((state, metrics))
            grown.append(status("VmHWM") - before)
    rows.append({"grown": max(grown), "planned": 8 * found.numbers()["bytes"]["temporaries"]})
print(json.dumps(rows))
"""


@pytest.mark.process
def test_a_real_step_grows_the_process_by_what_was_planned():
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
        # Buffers are taken from the system and given back to it, one by one.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for measured in json.loads(ended.stdout):
        assert measured["planned"] > 100e6  # large beside what else a process does
        assert measured["grown"] == pytest.approx(measured["planned"], rel=0.1)


# Arithmetic, which the search and plans for GPUs rest on, against the compilers. What these fuse,
# or copy, within a layer it does not know. A v5e has 128 MiB of vector memory beside its HBM, so
# what is compared there is large beside that, and of the size of a real layer.


@pytest.mark.parametrize(
    ("mesh", "remat", "microbatches", "recipe"),
    [
        ((1, 8, 1), "none", 1, {}),
        ((1, 4, 2), "dots", 1, {}),
        ((2, 2, 2), "full", 4, {}),
        ((1, 8, 1), "dots", 1, MODERN),
    ],
    ids=str,
)
def test_arithmetic_is_near_the_cpu_compiler(mesh, remat, microbatches, recipe):
    config = small(mesh, remat, microbatches, dtype="bfloat16", **recipe)
    found = plan.make(Pretraining(config), CPU)
    arguments = found.memory.parameters + found.memory.optimizer + found.memory.batch
    assert found.compiled.arguments == pytest.approx(arguments, rel=0.001)
    assert 0.85 < found.memory.total / found.compiled.total < 1.2


def test_of_logits_in_parts_one_part_is_counted(monkeypatch):
    config = small((1, 8, 1), "full")
    config = dataclasses.replace(config, tokens=config_lib.Tokens(kind="palette", colors=2048))
    logits = 4 * 8 * 144 * 2048  # bytes on one device
    monkeypatch.setattr(objective, "LOGITS_BYTES", logits // 4)
    found = plan.make(Pretraining(config), CPU)
    assert logits > 0.3 * found.compiled.total
    assert 0.85 < found.memory.total / found.compiled.total < 1.2


@pytest.mark.parametrize(
    ("mesh", "microbatches", "count"), [((1, 8, 1), 1, 1), ((2, 2, 2), 4, 1), ((1, 8, 1), 1, 2)]
)
def test_arithmetic_with_teachers_is_near_the_cpu_compiler(mesh, microbatches, count):
    """The teachers are 3 times as wide as the student, so their arrays count."""
    teacher = Pretraining(small(mesh, "none", width=384)).network
    settings = config_lib.Distill(teacher=("large",) * count)
    config = dataclasses.replace(small(mesh, "none", microbatches), distill=settings)
    found = plan.make(Pretraining(config, (teacher,) * count), CPU)
    planned, compiled = found.memory, found.compiled
    arguments = planned.parameters + planned.optimizer + planned.batch + planned.teachers
    assert compiled.arguments == pytest.approx(arguments, rel=0.001)
    assert planned.teachers > 5 * planned.parameters
    assert 0.85 < planned.total / compiled.total < 1.3
    alone = plan.make(Pretraining(dataclasses.replace(config, distill=config_lib.Distill())), CPU)
    assert planned.activations > 1.1 * alone.memory.activations


@pytest.mark.parametrize(
    ("mesh", "remat", "batch_size"),
    [((1, 8, 1), "none", 64), ((1, 4, 2), "dots", 128)],
    ids=str,
)
def test_arithmetic_is_near_the_tpu_compiler(mesh, remat, batch_size):
    config = small(mesh, remat, dtype="bfloat16", width=512, heads=8)
    train = dataclasses.replace(config.train, batch_size=batch_size)
    config = dataclasses.replace(config, data=config_lib.Data(image_size=32), train=train)
    found = plan.make(Pretraining(config), TPU)
    assert found.compiled.total > 8 * 128 * 2**20
    assert 0.75 < found.memory.total / found.compiled.total < 1.2


def test_what_is_kept_falls_with_rematerialisation_and_with_microbatches():
    def activations(remat, microbatches=1):
        config = small((1, 8, 1), remat, microbatches)
        return plan.make(Pretraining(config), TPU, compiling=False).memory.activations

    assert activations("none") > 2 * activations("dots") > 2 * activations("full")
    assert activations("dots", 4) == pytest.approx(activations("dots") / 4, rel=0.05)


def test_a_tpu_fills_an_array_up_to_whole_tiles():
    cpu, tpu = (sharding.abstract_mesh((1, 8, 1, 1), d.kind, d.platform) for d in (CPU, TPU))
    split = jax.NamedSharding(cpu, P(None, "fsdp"))
    array = jax.ShapeDtypeStruct((4, 512, 3, 8, 64), "float32", sharding=split)
    assert memory.total_bytes([array], cpu) == 4 * 64 * 3 * 8 * 64 * 4
    assert memory.total_bytes([array], tpu) == 4 * 128 * 3 * 8 * 64 * 4  # 64 lanes as 128
    array = jax.ShapeDtypeStruct((5, 128), "bfloat16")
    assert memory.total_bytes([array], tpu) == 8 * 128 * 2
