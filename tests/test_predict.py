"""The real command that classifies image files."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import encoded, make_folder

import gptv_jax
from gptv_jax.config import Data
from gptv_jax.data import sources

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 70 test images, more than a batch, some in a folder below, and a damaged one."""
    source = sources.open_source(Data(), "test")
    files = {f"{'below/' * (i % 2)}{i:02}.png": encoded(source[i]["image"]) for i in range(70)} | {
        "damaged.png": b"no image",
        "notes.txt": b"no image either",
    }
    return make_folder(tmp_path_factory.mktemp("pictures"), files)


def test_lines_have_the_probabilities_that_the_python_call_gives(
    command, finished_run, pictures, tmp_path
):
    run, out = f"--run={finished_run.folder}", tmp_path / "predictions.jsonl"
    ended = command("predict", run, str(pictures), f"--out={out}", "--top=0")
    assert ended.code == 0 and ended.output == ""
    lines = {line["file"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {str(path) for path in pictures.rglob("*.png")}
    damaged = lines.pop(str(pictures / "damaged.png"))
    assert damaged["error"] == "not an image that Pillow can read"
    assert f"{damaged['file']} cannot be read" in ended.errors
    source = sources.open_source(Data(), "test")
    model = gptv_jax.load(finished_run.folder)
    wanted = model.classify(np.stack([source[i]["image"] for i in range(70)]))
    for i, row in enumerate(wanted):
        classes = lines[str(pictures / ("below" if i % 2 else "") / f"{i:02}.png")]["classes"]
        found = {each["name"]: each["probability"] for each in classes}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        np.testing.assert_allclose([found[name] for name in model.classes], row, atol=1e-5)


def test_files_are_named_beside_flags_and_the_lines_go_to_the_terminal(
    command, finished_run, pictures
):
    ended = command("predict", str(pictures / "00.png"), f"--run={finished_run.folder}", "--top=2")
    [line] = map(json.loads, ended.output.splitlines())
    assert ended.code == 0 and len(line["classes"]) == 2


def test_a_reader_of_the_lines_may_leave(finished_run, pictures):
    unread, output = os.pipe()
    os.close(unread)  # as `| head -1` does after a line
    command = [sys.executable, "-m", "gptv_jax.predict", f"--run={finished_run.folder}"]
    ended = subprocess.run([*command, str(pictures)], stdout=output, stderr=subprocess.PIPE)
    os.close(output)
    assert ended.returncode == 141 and not re.search(b"error:|Error|Traceback", ended.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run={run}"], "no image is named"),
        (["{images}/00.png"], "--run must be given"),
        (["--run={run}", "{images}/nothing.png"], "there is no file or folder"),
        (["--run={run}", "{images}/damaged.png"], "none of 1 images can be read"),
        (["--run={images}", "{images}"], "is not a run folder"),
        (["--run={run}", "{images}", "--out={images}/00.png/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(command, finished_run, pictures, arguments, words):
    places = {"run": finished_run.folder, "images": pictures}
    ended = command("predict", *(argument.format(**places) for argument in arguments))
    [line] = [line for line in ended.errors.splitlines() if line.startswith("error:")]
    assert ended.code == 1 and words in line and "Traceback" not in ended.errors
