"""Plans: the real command, meshes of up to 256 devices, and the search."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from gptv_jax import config as config_lib
from gptv_jax import hardware
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning import plan, search, table, topology
from gptv_jax.planning.training import Pretraining

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PROMISED = {
    *("params", "flops_per_token", "flops_per_step", "bytes_per_device", "device_memory_bytes"),
    *("fits", "collectives", "step_seconds_estimate", "mfu_estimate"),
}


def started(config: str, *arguments: str) -> subprocess.Popen:
    """The real command; the cache of the tests holds no program of another kind of device."""
    module = [sys.executable, "-m", "gptv_jax.plan", f"--config={CONFIGS / config}"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*module, *arguments], env=environment, **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


TINY = ["model.layers=2", "model.width=32", "model.heads=2", "train.batch_size=8"]
TINY = [f"--config.{field}" for field in TINY]


@pytest.mark.process
def test_two_processes_plan_for_tpus_at_the_same_time_and_print_json_alone():
    """Compiled by libtpu on a machine without a TPU, neither waiting for the other's lock."""
    fsdp = ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    both = [
        started("digits.py", "--topology=v5e:2x2", "--json", *TINY, *fsdp),
        started("digits.py", "--topology=v5e:2x4", "--json", *TINY),
    ]
    plans = []
    for process in both:
        code, output, errors = ended(process)
        assert code == 0 and errors == "", errors[-3000:]
        plans.append(json.loads(output))
    for found in plans:
        assert set(found) >= PROMISED
        assert found["fits"] is True and found["bytes_per_device_source"] == "compiler"
        assert 0 < found["bytes_per_device"] < found["device_memory_bytes"] == int(15.75 * 2**30)
        assert found["flops_per_step"] == found["flops_per_token"] * 8 * 64
        assert found["step_seconds_estimate"] > 0 and 0 < found["mfu_estimate"] < 1
        assert {each["count"] > 0 and each["bytes"] > 0 for each in found["collectives"]} == {True}
        assert all(each["between"] == 0 for each in found["collectives"])
    one, two = plans
    assert one["params"] == two["params"]
    gathers = [each for each in one["collectives"] if each["kind"] == "all-gather"]
    assert [each["axes"] for each in gathers] == [["fsdp"]] and gathers[0]["count"] >= 2 * 4 * 2
    assert {(each["kind"], *each["axes"]) for each in two["collectives"]} == {
        ("all-reduce", "data")
    }


def test_gradients_are_summed_between_slices():
    config = config_lib.Config(model=config_lib.Model(layers=1, width=256, heads=2))
    found = plan.make(Pretraining(config), topology.parse("v5e:2x2", 2))
    assert found.compiled and found.fits
    sums = [each for each in found.traffic if each.between]
    assert {(each.kind, each.axes) for each in sums} == {("all-reduce", ("data",))}
    # Each of four devices sends its quarter of the gradients, half of it twice over; small arrays
    # are filled up to whole tiles.
    assert sum(each.between for each in sums) == pytest.approx(4 * found.params / 4, rel=0.1)


@pytest.mark.process
def test_exit_codes_and_refusals():
    """1 where the plan does not fit, and one sentence where there is none to be made."""
    too_large = started("imagenet.py:xl", "--topology=gpu:8xa100", "--json")
    unknown = started("digits.py", "--topology=v5e16")
    uneven = started("imagenet.py:l", "--topology=v5e-256")
    code, output, _ = ended(too_large)
    found = json.loads(output)
    assert code == 1 and found["fits"] is False
    assert found["bytes_per_device"] > found["device_memory_bytes"] == 60 * 10**9
    assert found["params"] == 6_810_875_904
    code, output, errors = ended(unknown)
    assert code == 1 and output == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: --topology=v5e16 is not known; it takes v4:4x4x4, v5e:16x16")
    code, output, errors = ended(uneven)
    assert code == 1 and output == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: config.train.batch_size is 128, which 256 (config.mesh.data")
    mesh = {"data": 128, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert (
        " ".join(f"--config.mesh.{axis}={n}" for axis, n in mesh.items()) + "; --search" in errors
    )
    assert plan.make(Pretraining(large(**mesh)), topology.parse("v5e-256"), compiling=False).fits


# Many devices.

SCALED = """
import collections, dataclasses, json
from gptv_jax import config as config_lib
from gptv_jax.planning import plan, topology
from gptv_jax.planning.training import Pretraining

config = config_lib.Config(
    model=config_lib.Model(width=256, heads=4, remat="dots"),
    train=config_lib.Train(batch_size=256),
    probe=config_lib.Probe(batch_size=256),
    finetune=config_lib.Finetune(train=config_lib.Train(batch_size=256)),
)
rows = []
for count, fsdp, tensor in [(8, 2, 2), (256, 64, 2)]:
    for layers in (2, 4):
        model = dataclasses.replace(config.model, layers=layers)
        mesh = config_lib.Mesh(data=-1, fsdp=fsdp, tensor=tensor)
        planned = dataclasses.replace(config, model=model, mesh=mesh)
        found = plan.make(Pretraining(planned), topology.parse(f"cpu:{count}"))
        whole = {"devices": count, "shards": fsdp * tensor, "layers": layers}
        collectives = collections.Counter()
        for each in found.traffic:  # over data or not, as the mesh has it
            over = "tensor" if "tensor" in each.axes else "batch"
            collectives[f"{each.kind} over {over}"] += each.count
        rows.append(whole | {
            "collectives": collectives,
            "arguments": found.compiled.arguments,
            "parameters": found.memory.parameters,
        })
print(json.dumps(rows))
"""


@pytest.mark.process
def test_per_device_bytes_fall_with_shards_and_collectives_per_layer_stay():
    """The real step on simulated meshes of 8 and 256 devices, 2 and 4 layers deep."""
    ended = subprocess.run(
        [sys.executable, "-c", SCALED],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "256"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads(ended.stdout)
    assert {row["devices"] for row in rows} == {8, 256}
    by_layers = {n: [row for row in rows if row["layers"] == n] for n in (2, 4)}
    for name in ("arguments", "parameters"):
        # Of two more layers alone, whose matrices are split over all shards; the norms, which are
        # not, are 2 x 2 x 256 floats of them, three times over with Adam's moments.
        whole = {"arguments": 3, "parameters": 1}[name] * 4
        for shallow, deep in zip(by_layers[2], by_layers[4], strict=True):
            added = deep[name] - shallow[name]
            assert added == whole * (2 * 12 * 256**2 // deep["shards"] + 2 * 2 * 256)
    a_layer = [
        {kind: (deep["collectives"][kind] - n) / 2 for kind, n in shallow["collectives"].items()}
        for shallow, deep in zip(by_layers[2], by_layers[4], strict=True)
    ]
    assert all(each == a_layer[0] for each in a_layer), a_layer
    assert a_layer[0]["all-gather over batch"] == 8  # four matrices, forward and backward
    assert sum(a_layer[0].values()) < 20


# In this process, by arithmetic.

V5E, H200 = topology.parse("v5e:4x4"), topology.parse("gpu:8xh200", 2)


def large(**mesh: int) -> config_lib.Config:
    """IGPT-L."""
    return config_lib.Config(
        model=config_lib.Model(48, 1536, 16, dtype="bfloat16", remat="dots"),
        tokens=config_lib.Tokens("palette"),
        data=config_lib.Data(image_size=32),
        mesh=config_lib.Mesh(**mesh),
    )


def test_the_mesh_must_divide_devices_and_slices():
    with pytest.raises(InputError, match=r"config\.mesh\.data=3.*there are 16"):
        plan.make(Pretraining(large(data=3)), H200)
    with pytest.raises(InputError, match=r"cannot be laid over 2 slices"):
        plan.make(Pretraining(large(data=1, fsdp=1, tensor=16)), H200)


def test_only_the_planned_stage_must_fit_the_mesh():
    config = dataclasses.replace(large(data=2, fsdp=8), probe=config_lib.Probe(batch_size=3))
    assert plan.make(Pretraining(config), H200, compiling=False).fits


def test_the_roofline_is_of_the_slowest_part():
    found = plan.make(Pretraining(large(data=2, fsdp=8)), H200)
    line, known = found.roofline, hardware.KINDS["NVIDIA H200"]
    executed = flops.executed(found.training.network, "gpu").total
    assert line.compute == pytest.approx(executed * 128 * 1024 / 16 / known.peak_flops)
    sent = sum(each.between for each in found.traffic)
    # Between two nodes each device sends the half of its eighth of the gradients, twice over.
    assert sent == pytest.approx(2 * 2 * found.params / 8 / 2, rel=0.01)
    assert line.network == pytest.approx(sent / known.network)
    assert line.bound == max(dataclasses.astuple(line)) and line.serial > line.bound
    assert found.mfu == pytest.approx(
        flops.training(found.training.network).total / executed * line.compute / line.bound
    )
    assert plan.Roofline(1.0, 2.0, 4.0, 3.0).bound == 4.0


def test_days_and_device_hours_are_those_of_all_steps():
    found = plan.make(Pretraining(large(data=2, fsdp=8)), H200)
    numbers = found.numbers()
    assert numbers["days"] == pytest.approx(found.step_seconds * 1000 / 86_400)
    assert numbers["device_hours"] == pytest.approx(numbers["days"] * 24 * 16)


def two_heads(layers: int = 200) -> config_lib.Config:
    """With less to try than 16 heads give, and so deep that only some choices fit."""
    model = dataclasses.replace(large().model, heads=2, layers=layers)
    return dataclasses.replace(large(), model=model)


def test_the_search_ranks_what_fits_and_its_flags_make_the_same_plan():
    plans = search.search(Pretraining(two_heads()), H200)
    assert len(plans) > 50
    fitting = [each for each in plans if each.fits]
    assert plans[: len(fitting)] == fitting and len(fitting) < len(plans)
    times = [each.roofline.serial for each in fitting]
    assert times == sorted(times)
    assert {each.training.config.model.remat for each in plans} == {"none", "dots", "full"}
    assert {each.sizes["tensor"] for each in plans} == {1, 2}
    values = dict(flag.removeprefix("--config.").split("=") for flag in plans[0].flags)
    assert values["model.remat"] == plans[0].training.config.model.remat
    mesh = config_lib.Mesh(**{axis: int(values[f"mesh.{axis}"]) for axis in plans[0].sizes})
    config = two_heads()
    again = dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(config.model, remat=values["model.remat"]),
        train=config_lib.Train(microbatches=int(values["train.microbatches"])),
    )
    assert plan.make(Pretraining(again), H200).bytes_per_device == plans[0].bytes_per_device


def test_what_the_compiler_refuses_is_left_out_of_the_search(monkeypatch):
    few = config_lib.Train(batch_size=16)  # images, in few microbatches
    made, config = plan.make, dataclasses.replace(two_heads(layers=8), train=few)
    best = min(search.choices(Pretraining(config), V5E), key=search.rank)

    def compiled(training, devices, *, compiling=True):
        found = made(training, devices, compiling=False)
        refused = compiling and found.flags == best.flags
        program = plan.compiled.Compiled(0, 10**12, [], [], refused=refused)
        return dataclasses.replace(found, compiled=program if refused else None)

    monkeypatch.setattr(search.plan, "make", compiled)
    plans = search.search(Pretraining(config), V5E)
    assert best.fits and len(plans) == search.CONFIRMED
    assert all(each.fits and each.flags != best.flags for each in plans)
    monkeypatch.setattr(search, "TRIED", 1)
    assert not search.search(Pretraining(config), V5E)[0].fits


def test_a_batch_that_no_mesh_divides_is_refused():
    config = large()
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=7))
    with pytest.raises(InputError, match=r"no mesh of 16 devices divides .*batch_size=7"):
        search.search(Pretraining(odd), H200)


def test_the_smallest_mesh_that_fits_is_the_first_that_does():
    one = search.smallest(Pretraining(large()), V5E)
    assert one.fits and one.topology.count == 2  # 16 bytes a weight: 21.8 GB, of 16.9 GB a device
    deep = dataclasses.replace(large().model, layers=480)
    huge = dataclasses.replace(large(), model=deep, train=config_lib.Train(batch_size=2))
    assert search.smallest(Pretraining(huge), topology.parse("v5e:2x1")) is None


def test_the_table_says_everything():
    found = plan.make(Pretraining(large(data=2, fsdp=8)), H200)
    shown = table.show(found, search.smallest(Pretraining(large()), H200))
    for words in ("1,362,250,752", "8.158 G in products", "906 M in attention", "by arithmetic"):
        assert words in shown
    for words in ("fits", "over fsdp", "between slices", "a bound", "MFU at most", "device-hours"):
        assert words in shown
    assert "DOES NOT FIT" in table.show(plan.make(Pretraining(two_heads()), H200), None)
    assert table.ranking([found]).count(" ".join(found.flags)) == 1
