"""The copy of the log in Weights & Biases, without a network: what its local files hold."""

import json
import pathlib
import struct
import sys
import time

import pytest

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.stages import setup
from gptv_jax.train import wandb_copy
from gptv_jax.train.metrics import MetricWriter

pytestmark = pytest.mark.filterwarnings("ignore:::wandb")


def records(path: pathlib.Path):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if len(content) < place + 7 + length:
            return  # is being written
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def copied(folder: pathlib.Path) -> tuple[set[str], list[dict]]:
    """Names of the runs in a run folder, and the numbers of all of their events."""
    runs, events = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                runs.add(f"{record.run.project}/{record.run.run_id}")
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): i for i in record.history.item}
                values = {k: json.loads(i.value_json) for k, i in items.items() if k[0] != "_"}
                events.append(values)
    return runs, events


def test_a_run_and_its_continuation_are_one_run_with_all_events(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for last in (3, 5):
        copy = wandb_copy.Wandb("photos", tmp_path, "abc", {"seed": 0})
        log = MetricWriter(tmp_path, copy)
        log.rewind("pretrain", 2)
        for step in range(1 if last == 3 else 3, last + 1):
            log.write("pretrain", step, {"loss": step / 2, "mfu": None})
        copy.finish()
    steps = [1, 2, 3, 3, 4, 5]  # 3 is repeated
    # Another process of the library writes the files, and finish() does not wait for their end.
    deadline = time.monotonic() + 60
    while len(copied(tmp_path)[1]) < len(steps) and time.monotonic() < deadline:
        time.sleep(0.1)
    runs, events = copied(tmp_path)
    assert runs == {"photos/abc"}
    assert events == [{"pretrain/step": s, "pretrain/loss": s / 2} for s in steps]


def test_a_library_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    config = config_lib.Config(wandb="photos")
    with pytest.raises(InputError, match=r"config.wandb .* pip install"):
        setup.open_run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
