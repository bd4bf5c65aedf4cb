"""A trace holds exactly the configured steps, with the parts of the step by name."""

import collections
import gzip
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import small_arguments

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES
from gptv_jax.train import metrics


def run(folder: pathlib.Path, *more: str) -> str:
    """Pretrains 20 steps by the real command, each long enough to be traced; returns the log."""
    size = ("--config.model.width=64", "--config.train.batch_size=64")
    steps = ("--stages=pretrain", "--config.train.steps=20", "--config.train.eval_every=0")
    more = (*size, *steps, *more)
    ended = subprocess.run(
        [sys.executable, "-m", "gptv_jax.main", *small_arguments(folder, *more)],
        capture_output=True,
        text=True,
        # An executable from another test's cache may carry the names of an older source.
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


def events(file: pathlib.Path) -> list[dict]:
    """Events with a duration, from a trace in Perfetto's format."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.process
def test_the_configured_steps_are_traced_and_no_others(tmp_path):
    folder = tmp_path / "run"
    log = run(folder, "--config.profile.steps=7:9")
    traces = folder / "profile" / "plugins" / "profile" / "steps_7_9"
    assert f"The trace of steps 7 to 9 is in {traces}" in log
    names = sorted(path.name for path in traces.iterdir())
    assert names == ["process_0.perfetto.json.gz", "process_0.xplane.pb"]
    assert [path.name for path in (folder / "profile").iterdir()] == ["plugins"]

    found = events(traces / "process_0.perfetto.json.gz")
    steps = [event for event in found if event["name"] == "step"]
    assert sorted(int(event["args"]["step_num"]) for event in steps) == [7, 8, 9]
    assert len([event for event in found if event["name"] == "next batch"]) == 3
    # On the device the operations of a whole step occur three times.
    executed = collections.Counter(
        event["args"]["run_id"]
        for event in found
        if event.get("args", {}).get("hlo_module") == "jit_train_step"
    )
    assert len(executed) == 3 and len(set(executed.values())) == 1
    whole = (traces / "process_0.xplane.pb").read_bytes().decode(errors="ignore")
    for part in ("attention", "mlp", "loss", "optimizer"):
        assert re.search(rf"jit\(train_step\)/[^\0]*\b{part}\b", whole), part

    # A run that continues from step 15 traces only what is left of steps 14 to 17.
    shutil.rmtree(folder / "checkpoints" / "pretrain" / "20")
    (folder / "summary.json").unlink()
    run(folder, "--config.profile.steps=14:17")
    assert sorted(path.name for path in traces.parent.iterdir()) == ["steps_16_17", "steps_7_9"]


def test_steps_that_are_past_are_not_traced_and_said_once(tmp_path, caplog):
    profiler = metrics.Profiler((7, 9), tmp_path)
    with caplog.at_level(logging.INFO, "gptv_jax"):
        for number in (16, 17):
            with profiler.step(number, lambda: pytest.fail("waited for a step")):
                pass
    [record] = caplog.records
    assert "No trace: steps 7 to 9 (config.profile.steps) are past." in record.getMessage()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["", "10", "10:", ":15", "15:10", "0:3", "-1:3", "1:2:3", "a:b"])
def test_malformed_steps_are_refused_and_the_message_gives_the_format(steps):
    settings = config_lib.default()
    settings.profile.steps = steps
    with pytest.raises(InputError, match=r"config\.profile\.steps is .*FIRST:LAST, such as 10:15"):
        config_lib.resolve(settings)


def test_steps_beyond_the_training_are_refused():
    settings = config_lib.default()
    settings.train.steps, settings.profile.steps = 14, "10:15"
    with pytest.raises(InputError, match=r"'10:15'.*config\.train\.steps = 14"):
        STAGES["pretrain"].check(config_lib.resolve(settings))
    settings.profile.steps = "10:14"
    STAGES["pretrain"].check(config_lib.resolve(settings))
    assert config_lib.resolve(settings).profile.window == (10, 14)
