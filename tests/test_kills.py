"""A run killed again and again at any moment ends as an uninterrupted run."""

import json
import shutil
import signal

import pytest
from conftest import small_arguments

pytestmark = pytest.mark.process


def test_ten_random_kills_change_nothing(kills_benchmark, finished_run, tmp_path):
    arguments = [a for a in small_arguments(tmp_path) if not a.startswith("--workdir=")]
    with kills_benchmark.Command(arguments, tmp_path / "log") as command:
        kills = kills_benchmark.kill_again_and_again(
            command, tmp_path / "run", finished_run.folder, count=10, seed=1
        )
    assert kills_benchmark.differences(tmp_path / "run", finished_run.folder) == []
    assert {kill.by for kill in kills} == {signal.SIGKILL, signal.SIGTERM}
    assert {kill.under_way for kill in kills} >= {"save", "evaluation"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    redone = sum(kill.steps_redone for kill in kills)
    assert redone == sum(v for k, v in summary.items() if k.endswith("steps_redone"))
    assert 0 < summary["pretrain/goodput"] < 1
    assert summary["pretrain/restarts"] > 0


def test_every_kind_of_difference_is_found(kills_benchmark, finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder, tmp_path / "run")
    assert kills_benchmark.differences(folder, finished_run.folder) == []
    older, newer = (folder / "checkpoints" / "pretrain" / str(step) for step in (115, 120))
    shutil.rmtree(newer / "state")
    shutil.copytree(older / "state", newer / "state")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines + lines[-1:]))
    summary = json.loads((folder / "summary.json").read_text())
    summary["pretrain/test_nats_per_token"] += 1e-7
    (folder / "summary.json").write_text(json.dumps(summary))
    unfinished = folder / "checkpoints" / "pretrain" / "7.orbax-checkpoint-tmp"
    unfinished.mkdir()
    found = set(kills_benchmark.differences(folder, finished_run.folder))
    parameters = {name for name in found if name.startswith("pretrain: ")}
    assert parameters and found - parameters == {
        "summary.json",
        "metrics.jsonl",
        str(unfinished),
    }
