"""Into how many devices the command splits a CPU, by itself or as a run began."""

import dataclasses
import itertools
import json
import pathlib
import re

import pytest
from test_runtime import run

from gptv_jax import config as config_lib
from gptv_jax.config import run_file
from gptv_jax.errors import InputError
from gptv_jax.hosts import cores
from gptv_jax.stages import setup

ROOT = pathlib.Path(__file__).parent.parent
WIDTHS, LENGTHS, BATCHES = (16, 32, 64, 96, 128, 256), (16, 64, 256, 1024), (1, 2, 8, 64)
# A fork has JAX imported and not started, as the command has.
PROGRAM = """
from gptv_jax import config
from gptv_jax.errors import InputError
from gptv_jax.hosts import cores
os.environ.pop("XLA_FLAGS", None)
os.environ.update({environment!r})
{before}
settings = config.resolve(config.recorded(config.Config, {fields!r}))
cores.available = lambda: 2
cores.split(settings, {folder!r} and pathlib.Path({folder!r}))
print(json.dumps([jax.device_count()]))
"""
WINS = {"data.image_size": 8, "model.width": 128, "model.heads": 4, "train.batch_size": 64}
WINS |= {"finetune.train.batch_size": 64}


def devices_of(folder: object, before: str = "", environment=None, **fields) -> str:
    """A program that prints how many devices JAX has, for a configuration where a split wins.

    `folder` is the folder of a run that continues; "" stands for a new run.
    """
    given = WINS | {name.replace("__", "."): value for name, value in fields.items()}
    named = {"fields": given, "folder": str(folder), "before": before}
    return PROGRAM.format(environment=environment or {}, **named)


def test_within_the_measured_widths_more_work_is_never_split_less():
    for count in (1, 2):
        for width, wider in itertools.pairwise(WIDTHS):
            for tokens, longer in itertools.pairwise(LENGTHS):
                for batch in BATCHES:
                    found = cores.choose(width, tokens, batch, count)
                    assert found in (1, count)
                    assert cores.choose(wider, tokens, batch, count) >= found
                    assert cores.choose(width, longer, batch, count) >= found
                    assert cores.choose(width, tokens, 2 * batch, count) >= found


def test_tiny_and_large_networks_odd_batches_and_cores_that_were_not_measured_are_not_split():
    assert cores.choose(64, 64, 64, 2) == cores.choose(256, 1024, 4, 2) == 2
    assert cores.choose(32, 64, 64, 2) == cores.choose(63, 64, 64, 2) == 1
    assert cores.choose(128, 64, 63, 2) == 1
    assert cores.choose(512, 64, 64, 2) == 1
    assert cores.choose(128, 64, 62, 2) == 1  # too little work in a step
    assert cores.choose(128, 64, 64, 1) == cores.choose(256, 1024, 64, 64) == 1


def test_every_batch_and_every_part_of_a_run_decides():
    settings = config_lib.resolve(config_lib.recorded(config_lib.Config, WINS))
    assert cores.of_run(settings, 2) == 2
    train = dataclasses.replace(settings.train, microbatches=64)
    odd = dataclasses.replace(settings.probe, batch_size=255)
    small = dataclasses.replace(settings.model, width=32)
    learned = dataclasses.replace(settings.tokens, kind="learned")
    named = dataclasses.replace(learned, tokenizer="runs/codes")
    sgd = dataclasses.replace(settings.probe.sgd, batch_size=33)
    sgd = dataclasses.replace(settings.probe, method="sgd", sgd=sgd)
    tuned = dataclasses.replace(settings.finetune.train, batch_size=65)
    tuned = dataclasses.replace(settings.finetune, train=tuned)
    changes = {"train": train, "model": small, "finetune": tuned}
    for name, changed in [*changes.items(), ("probe", odd), ("probe", sgd)]:
        assert cores.of_run(dataclasses.replace(settings, **{name: changed}), 2) == 1, name
    codes = dataclasses.replace(settings.data, image_size=32)  # 64 of them, as of 8 x 8 pixels
    for tokens, weights, count in ((named, "", 2), (learned, "runs/weights", 2), (learned, "", 1)):
        given = dataclasses.replace(settings, tokens=tokens, data=codes, init_from=weights)
        assert cores.of_run(given, 2) == count


@pytest.mark.process
def test_a_cpu_is_split_where_nobody_has_decided_and_the_run_did_not_begin_otherwise(tmp_path):
    def begun(devices: str) -> pathlib.Path:
        folder = tmp_path / devices.replace(" ", "_")
        folder.mkdir()
        record = {"devices": devices, "config": WINS}
        (folder / "config.json").write_text(json.dumps(record))
        return folder

    new, one, three, tpu = "", *map(begun, ("1 cpu", "3 cpu", "4 TPU v4"))
    accelerator = "import pathlib; from gptv_jax.hosts import runtime\n"
    accelerator += f"runtime.DEVICES = pathlib.Path({str(tmp_path)!r})\n"
    accelerator += "jax.config.update('jax_platforms', None)"
    (tmp_path / "nvidia0").touch()
    wanted = {
        devices_of(new): 2,
        devices_of(one): 1,  # as it began
        devices_of(three): 3,  # on a machine of more cores
        devices_of(tpu): 1,
        devices_of(new, model__width=32): 1,
        devices_of(new, mesh__fsdp=-1, mesh__data=1): 1,  # the user's mesh
        devices_of(new, mesh__data=1): 1,
        devices_of(new, mesh__fsdp=2, mesh__data=1, model__width=32): 2,
        devices_of(new, mesh__data=4): 1,  # which has fewer cores
        devices_of(three, mesh__fsdp=1, mesh__data=1): 1,
        devices_of(three, mesh__fsdp=-1, mesh__data=1): 3,
        devices_of(new, "jax.config.update('jax_num_cpu_devices', 1)"): 1,  # as JAX_NUM_CPU_DEVICES
        devices_of(new, environment={"XLA_FLAGS": f"--{cores.FORCED}=4"}): 4,
        devices_of(new, accelerator): 1,
    }
    assert [count for (count,) in run(*wanted)] == list(wanted.values())


def test_a_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    every = cores.available()
    for text, wanted in (("max 100000", every), ("150000 100000", 1), ("50000 100000", 1),
                         (f"{(every + 1) * 100_000} 100000", every)):  # fmt: skip
        cores.QUOTA.write_text(text)
        assert cores.available() == wanted, text


def test_a_run_that_goes_on_with_other_devices_says_so(tmp_path, caplog, one_device):
    def opened() -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="gptv_jax"):
            setup.open_run(config_lib.Config(), str(tmp_path)).folder.release()
        return [line for line in caplog.messages if "may round sums otherwise" in line]

    assert opened() == opened() == []
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"devices": "2 cpu"}))
    (line,) = opened()
    assert f"began on 2 cpu and continues on {record['devices']}" in line


def test_readme_names_the_configurations_that_are_split():
    sentence = (ROOT / "README.md").read_text().split("In `configs/` examples are ")[1]
    named = set(re.findall(r"`(\w+\.py(?::\w+)?)`", sentence.split(". ")[0]))
    names = {path.name for path in (ROOT / "configs").glob("*.py")} | named
    settings = {name: run_file.load(str(ROOT / "configs" / name)) for name in names}
    settings["features_cifar10.py"].tokens.tokenizer = "runs/codes"
    counts = {n: cores.of_run(config_lib.resolve(each), 2) for n, each in settings.items()}
    assert {name for name, count in counts.items() if count == 2} == named


@pytest.mark.parametrize("given", ["x", "0", "-2", "2.0", ""])
def test_a_variable_that_is_no_number_of_devices_is_refused(given, monkeypatch):
    monkeypatch.setenv(cores.VARIABLE, given)
    with pytest.raises(InputError, match=f"JAX_NUM_CPU_DEVICES is '{given}'; it takes a number"):
        cores.check_environment()
    monkeypatch.setenv(cores.VARIABLE, "2")
    cores.check_environment()
