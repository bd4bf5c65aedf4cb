"""Checkpoints outside the run folder, and a run folder as one process's alone."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.stages import pretrain, setup
from gptv_jax.stages import pretrained as pretrained_weights

CONFIG = config_lib.Config(
    model=config_lib.Model(layers=1, width=16, heads=2, scan_layers=False),
    train=config_lib.Train(steps=4, batch_size=16, checkpoint_every=2, log_every=1, eval_every=0),
)


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of another file system."""
    shared = pathlib.Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield pathlib.Path(folder) / "checkpoints"


def at(place) -> config_lib.Config:
    """The configuration with checkpoints at a place."""
    return dataclasses.replace(CONFIG, checkpoint_dir=str(place))


def pretrained(config: config_lib.Config, folder) -> dict:
    """Pretrains to the end; the weights."""
    run = setup.open_run(config, str(folder))
    with jax.set_mesh(run.mesh):
        run.finish("pretrain", pretrain.run_stage(run))
        return jax.device_get(pretrained_weights.load(run).params)


def same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A run folder with its checkpoints in it, and its weights."""
    folder = tmp_path_factory.mktemp("usual") / "run"
    return folder, pretrained(CONFIG, folder)


def test_all_that_reads_checkpoints_finds_them(usual, elsewhere, tmp_path):
    weights = pretrained(at(elsewhere), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert {"2", "4"} <= {path.name for path in (elsewhere / "pretrain").iterdir()}
    same(weights, usual[1])
    same(gptv_jax.load(tmp_path / "run").params, usual[1])
    later = dataclasses.replace(CONFIG, init_from=str(tmp_path / "run"))
    run = setup.open_run(later, str(tmp_path / "later"), ["finetune"])
    with jax.set_mesh(run.mesh):
        same(jax.device_get(pretrained_weights.load(run).params), usual[1])


def test_a_damaged_one_is_set_aside_there_and_the_one_before_taken(usual, elsewhere, tmp_path):
    pretrained(at(elsewhere), tmp_path / "run")
    for file in (elsewhere / "pretrain" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (tmp_path / "run" / "summary.json").unlink()
    same(pretrained(at(elsewhere), tmp_path / "run"), usual[1])
    assert (elsewhere / "damaged" / "pretrain-4").is_dir()


def test_two_runs_do_not_share_a_place(elsewhere, tmp_path):
    setup.open_run(at(elsewhere), str(tmp_path / "one"))
    setup.open_run(at(elsewhere), str(tmp_path / "one"))  # goes on
    with pytest.raises(InputError, match=rf"{elsewhere} holds the checkpoints of .*one; name ano"):
        setup.open_run(at(elsewhere), str(tmp_path / "two"))


def test_a_run_whose_place_was_refused_takes_another(elsewhere, tmp_path):
    setup.open_run(at(elsewhere), str(tmp_path / "one"))
    for _ in range(2):
        with pytest.raises(InputError, match="name another place"):
            setup.open_run(at(elsewhere), str(tmp_path / "two"))
    setup.open_run(at(elsewhere.parent / "two"), str(tmp_path / "two"))
    (tmp_path / "two" / "config.json").unlink()  # as if killed before it was written
    setup.open_run(at(elsewhere.parent / "two"), str(tmp_path / "two"))


def test_the_checkpoints_in_a_run_folder_are_no_place_for_another(usual, tmp_path):
    with pytest.raises(InputError, match="holds the checkpoints of another run"):
        setup.open_run(at(usual[0] / "checkpoints"), str(tmp_path / "run"))


def test_the_place_changes_only_when_what_it_holds_was_moved(usual, elsewhere, tmp_path):
    folder = shutil.copytree(usual[0], tmp_path / "run")
    with pytest.raises(InputError, match=rf"checkpoints are in {folder}.*; move .* to {elsewhere}"):
        setup.open_run(at(elsewhere), str(folder))
    shutil.move(folder / "checkpoints", elsewhere)
    run = setup.open_run(at(elsewhere), str(folder))
    with jax.set_mesh(run.mesh):
        same(jax.device_get(pretrained_weights.load(run).params), usual[1])
    same(gptv_jax.load(folder).params, usual[1])
    del run
    with pytest.raises(InputError, match=rf"checkpoints are in {elsewhere}"):
        setup.open_run(CONFIG, str(folder))


@pytest.mark.parametrize("place", ["/proc/checkpoints", "{file}/checkpoints", "gs://no-such/place"])
def test_a_place_that_cannot_be_written_is_refused(place, tmp_path):
    (tmp_path / "file").write_text("kept")
    place = place.format(file=tmp_path / "file")
    with pytest.raises(InputError, match=rf"config\.checkpoint_dir={place} cannot be written"):
        setup.open_run(at(place), str(tmp_path / "run"))


def test_a_relative_place_is_refused():
    settings = dataclasses.asdict(dataclasses.replace(CONFIG, checkpoint_dir="checkpoints"))
    with pytest.raises(InputError, match=r"config\.checkpoint_dir is 'checkpoints'; it takes"):
        config_lib.resolve(settings)


# One process a run folder.

HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_process_ends_however_it_does(tmp_path):
    setup.open_run(CONFIG, str(tmp_path / "run"))
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    command, pipe = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"--workdir=.*run is in use by another process"):
            setup.open_run(CONFIG, str(tmp_path / "run"))
        holder.kill()
    setup.open_run(CONFIG, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == before


def test_a_run_holds_its_folder(tmp_path):
    run = setup.open_run(CONFIG, str(tmp_path / "run"))
    with pytest.raises(InputError, match="in use by another process"):
        setup.open_run(CONFIG, str(tmp_path / "run"))
    del run
    setup.open_run(CONFIG, str(tmp_path / "run"))
