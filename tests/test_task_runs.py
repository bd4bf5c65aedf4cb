"""Detection and segmentation by the real command: several processes, and a kill."""

import json
import pathlib
import re
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Command, free_port

pytestmark = pytest.mark.process

# 21 test images are no whole number of batches.
CONFIG = """
from gptv_jax import config as config_lib

def get_config(task):
    c = config_lib.default()
    c.data.name, c.data.image_size = "digit_scenes", (32, 48)
    c.data.train_split, c.data.validation_split = "train[:64]", "validation[:12]"
    c.data.test_split = "test[:21]"
    c.tokens.kind = "none"
    c.model.layers, c.model.width, c.model.heads = 1, 16, 2
    c.task.name, c.task.image_input, c.task.stem = task, "pixels", (8, 8, 8)
    c.task.detect.objects, c.task.detect.bins = 3, 29
    c.task.detect.votes, c.task.detect.samples = ("flip(1.0)",), 2
    c.task.segment.cell, c.task.segment.codes, c.task.segment.measured = 8, 20, 30
    c.task.segment.samples, c.task.segment.balance = 2, 1.0
    c.finetune.scratch = False
    train = c.finetune.train
    train.steps, train.batch_size, train.eval_every, train.log_every = 6, 8, 2, 2
    train.checkpoint_every = 1
    return c
"""


class Run(NamedTuple):
    """The folder of a finished run, and how the run was started."""

    folder: pathlib.Path
    arguments: list[str]  # of the command, without the folder of the run


def wait(*processes: Command) -> None:
    for process in processes:
        assert process.wait() == 0, process.errors[-3000:]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """`alone(task)` is the run of one process; every task is run once."""
    folder, runs = tmp_path_factory.mktemp("task_runs"), {}
    (folder / "config.py").write_text(CONFIG)

    def run(task: str) -> Run:
        if task not in runs:
            runs[task] = Run(folder / task, [f"--config={folder / 'config.py'}:{task}"])
            wait(start("main", *runs[task].arguments, f"--workdir={runs[task].folder}"))
        return runs[task]

    return run


@pytest.fixture
def both(start, alone, tmp_path):
    """`both(task)` gives the folders of the run of one process and of the run of two."""

    def run(task: str) -> tuple[pathlib.Path, pathlib.Path]:
        one = alone(task)
        meeting = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
        given = [*one.arguments, f"--workdir={tmp_path}", *meeting]
        wait(*[start("main", *given, f"--process_id={index}") for index in range(2)])
        return one.folder, tmp_path

    return run


def scores(folder: pathlib.Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if "test_" in k and v is not None}


def test_two_processes_detect_as_one_and_write_every_image_once(both):
    folders = both("detect")
    one, two = map(scores, folders)
    assert one["finetune/test_images"] == 21 and one["finetune/ceiling_test_ap"] > 0.3
    assert {"finetune/voted_test_ap", "finetune/wrong_image_test_ap"} <= one.keys()
    assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    paths = (folder / "finetune/detections-test.json" for folder in folders)
    files = [json.loads(path.read_text()) for path in paths]
    assert {row["image_id"] for row in files[0]} == set(range(21))
    boxes = [[[row["image_id"], row["category_id"], *row["bbox"]] for row in f] for f in files]
    np.testing.assert_allclose(*map(sorted, boxes), rtol=1e-4)
    assert all((folder / "samples/detections.png").exists() for folder in folders)


def test_two_processes_segment_as_one_and_count_every_pixel_once(both):
    folders = both("segment")
    one, two = map(scores, folders)
    names = ("", "written_", "voted_", "prior_", "ceiling_", "wrong_image_")
    assert {f"finetune/{name}test_miou" for name in names} <= one.keys()
    assert one["finetune/test_images"] == 21
    assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    found = [json.loads((f / "finetune/segmentation.json").read_text()) for f in folders]
    assert found[0]["confusion"] == found[1]["confusion"]
    assert np.sum(found[0]["confusion"]["read"]) == 21 * 32 * 48
    measured = [(folder / "task.measured").read_bytes() for folder in folders]
    assert measured[0] == measured[1]
    assert all((folder / "samples/segmentation.png").exists() for folder in folders)


def test_detection_that_is_killed_continues_bit_for_bit(start, alone, kills_benchmark, tmp_path):
    folder, arguments = alone("detect")
    given = ("main", *arguments, f"--workdir={tmp_path}")
    killed, saved = start(*given), tmp_path / "checkpoints" / "finetune"
    until = time.monotonic() + 600
    while not any(saved.glob("[3-6]")):
        assert killed.poll() is None and time.monotonic() < until, killed.errors[-3000:]
        time.sleep(0.005)
    killed.send_to_all(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    continued = start(*given)
    wait(continued)
    assert re.search("finetune continues from step [1-5] of 6", continued.errors)
    assert kills_benchmark.differences(tmp_path, folder) == []
    name = "finetune/detections-test.json"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
