"""Paths as users give them, full disks, missing devices, and systems without POSIX locks."""

import errno
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Ended, small_arguments
from etils import epath

import gptv_jax
from gptv_jax import checkpoint, errors, files
from gptv_jax import config as config_lib
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.config import run_file
from gptv_jax.data import cache, sources
from gptv_jax.errors import InputError
from gptv_jax.runs.record import RunFolder, config_of

STATE = {"step": jnp.int32(7), "params": {"a": jnp.arange(12.0), "b": jnp.ones((2, 3))}}


def save(folder: pathlib.Path, *steps: int) -> None:
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, STATE, {"position": step})
        checkpoints.wait()


NAMES = [
    "lr[0.1]",
    "[!a]",
    "a*b",
    "**",
    "q?",
    "{a,b}",
    "50%s #1",
    "dot.",
    "né 字",
    "two\nlines",
    ":",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_comes_back_from_a_folder_of_any_name(tmp_path, one_device, name):
    place = files.user_path(tmp_path / name / "checkpoints" / "pretrain")
    save(place, 0, 1)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
    )
    with Checkpoints(place, read_only=True) as saved:
        state, info = saved.restore_latest(abstract)
    assert info == {"position": 1} and saved.steps() == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    run = epath.Path(place.parent)
    assert checkpoint.found(run) and not checkpoint.found(run / "pretrain")


def test_an_address_stays_an_address():
    given = "gs://bucket/some/run"
    assert str(checkpoint.for_orbax(given)) == str(files.user_place(given)) == given
    with pytest.raises(InputError, match=r"checkpoint_dir is 'gs://bucket/a\*'; it takes .*\*\?\["):
        config_lib.resolve(
            config_lib.recorded(config_lib.Config, {"checkpoint_dir": "gs://bucket/a*"})
        )


def test_a_path_that_tensorstore_cannot_take_is_refused_before_any_work(tmp_path):
    for name in ("back\\slash", "/".join(["long" * 50] * 19)):
        with pytest.raises(InputError, match=r"--workdir=.*name another folder") as error:
            RunFolder(config_lib.Config(), str(tmp_path / name))
        assert len(str(error.value)) < errors.LONGEST
    assert list(tmp_path.iterdir()) == []


def test_the_first_checkpoint_is_read_back_before_the_second_is_written(tmp_path, one_device):
    with Checkpoints(tmp_path / "pretrain", keep=9) as checkpoints:
        checkpoints.save(0, STATE, {"position": 0})
        done, deadline = tmp_path / "pretrain/0/_CHECKPOINT_METADATA", time.monotonic() + 60
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        (done.parent / "state" / "manifest.ocdbt").unlink()
        with pytest.raises(InputError, match="although it was just written"):
            checkpoints.save(1, STATE, {"position": 1})


def test_user_path_reads_a_text_as_the_system_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    assert files.user_path("~/a[1]") == files.user_path("a[1]") == tmp_path / "a[1]"
    assert files.user_path("link/../b") == tmp_path / "far" / "b"
    assert files.user_path("link/b") == tmp_path / "link" / "b"
    for text in ("~nobody-here/a", "n" * 300):
        with pytest.raises(InputError, match="is no path"):
            files.user_path(text)
    with pytest.raises(InputError, match=r"gs://a/b is an address; name a path on this machine\."):
        files.user_path("gs://a/b")


def test_the_home_folder_is_found_wherever_a_path_is_given(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(finished_run.folder)
    model = gptv_jax.load("~/run")
    model.save("~/run.safetensors")
    gptv_jax.to_huggingface(model, "~/hf")
    for source in ("~/run.safetensors", "~/hf"):
        gptv_jax.load(source, palette=None)
    assert RunFolder(config_lib.Config(), "~/new").path == tmp_path / "new"
    flat = {"checkpoint_dir": "~/place", "data.name": "arrays", "data.path": "~/set.npz"}
    config = config_lib.resolve(config_lib.recorded(config_lib.Config, flat))
    place = RunFolder(config, "~/new").checkpoints("pretrain")
    assert pathlib.Path(place) == tmp_path / "place" / "pretrain"
    np.savez(tmp_path / "set.npz", train_images=np.zeros((3, 8, 8, 1), np.uint8))
    assert sources.open_data_set(config.data).lengths == {"train": 3}
    assert not pathlib.Path("~").exists()


# The configuration of a run.


def test_a_run_folder_stands_for_its_configuration(finished_run, tmp_path, command):
    settings = run_file.load(str(finished_run.folder))
    assert config_lib.resolve(settings) == config_of(finished_run.folder)
    settings.model.width, settings.sample.top_k = 32, 3  # as an override does
    changed = config_lib.resolve(settings)
    assert (changed.model.width, changed.sample.top_k, changed.model.layers) == (32, 3, 1)
    copy = shutil.copytree(finished_run.folder, tmp_path / "a:[copy]")
    more = ["--config.train.log_every=3", "--quiet", "--config.init_from=None"]
    shutil.copy(copy / "config.json", tmp_path / "mine.json")
    assert run_file.load(str(tmp_path / "mine.json")) == run_file.load(str(finished_run.folder))
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="takes no argument after a colon"):
        run_file.load(f"{tmp_path}/plain:s")
    for given in (["--config", str(copy)], [f"--config={copy}/config.json"]):
        ended = command("main", *given, f"--workdir={copy}", *more)
        assert ended.code == 0 and json.loads(ended.output) == finished_run.summary
        assert ended.errors == ""


@pytest.mark.parametrize(
    ("given", "reason"), [("", "it has no config.json"), ("/config.json", "there is no file")]
)
def test_a_folder_of_no_run_is_no_configuration(tmp_path, command, given, reason):
    ended = command("main", f"--config={tmp_path}{given}", f"--workdir={tmp_path}/run")
    assert ended.code == 1 and reason in ended.errors.splitlines()[-1]


def test_the_log_shows_the_settings_that_are_not_the_defaults(finished_run):
    shown = [line.split(" = ")[0] for line in finished_run.errors.splitlines() if line[:2] == "  "]
    assert {"  model.width", "  train.steps"} <= set(shown) and len(shown) < 60
    assert not {"  model.mlp_ratio", "  seed"} & set(shown)


# Disks.

FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full", "/a/b"), "/a/b cannot be written: the disk is full"),
        (OSError(errno.EROFS, "read-only"), "a file cannot be written: the disk is read-only"),
        (ValueError(f'local file "/c": {FULL}'), "/c cannot be written: the disk is full"),
        (OSError(errno.ENOENT, "none", "/a"), None),
        (ValueError("the dimension is full"), None),
    ],
)
def test_a_disk_is_found_behind_an_error(error, words):
    assert errors.disk_problem(error) == words
    try:
        try:
            raise error
        except Exception as first:
            raise RuntimeError("Event loop is closed") from first
    except RuntimeError as second:
        assert errors.disk_problem(second) == words


def run(*command: str, **environment: str) -> Ended:
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.process
def test_a_full_disk_ends_with_a_sentence_and_the_same_command_goes_on(tmp_path, command):
    arguments = small_arguments(tmp_path / "run", "--stages=pretrain", "--config.train.steps=20")
    # The shell's limit of 8 KiB a file stands for a full disk.
    limited = 'ulimit -f 8; exec "$0" -m gptv_jax.main "$@"'
    ended = run("bash", "-c", limited, sys.executable, *arguments)
    *log, sentence = ended.errors.splitlines()
    assert ended.code == 1 and "Traceback" not in ended.errors, ended.errors
    assert sentence.startswith(f"error: {tmp_path}/run/") and "the disk takes no file" in sentence
    assert len(sentence) <= errors.LONGEST and not any("error:" in line for line in log)
    ended = command("main", *arguments)
    assert ended.code == 0 and json.loads(ended.output)["pretrain/steps"] == 20


class Holder:
    """Of a lock."""


def test_a_cache_that_was_not_finished_is_made_anew(tmp_path):
    holder = Holder()
    cache.claim(tmp_path / "cache", holder)
    (tmp_path / "cache" / "train.array_record").write_bytes(b"half")
    with pytest.raises(InputError, match="is in use"):
        cache.claim(tmp_path / "cache", Holder())
    del holder  # as the end of the process
    cache.claim(tmp_path / "cache")
    assert not (tmp_path / "cache" / "train.array_record").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.LOCK).touch()  # of a run folder, which is left alone
    with pytest.raises(InputError, match="is not empty"):
        cache.claim(tmp_path / "run")


def test_files_that_no_cache_has_are_never_deleted(tmp_path):
    folder = tmp_path / "cache"
    cache.claim(folder)
    for name in ("header.json", ".palette.npz.tmp", "skipped-3.jsonl"):
        (folder / name).touch()
    (folder / "holiday.txt").touch()
    with pytest.raises(InputError, match=r"not empty; .*, or move holiday.txt to another place"):
        cache.claim(folder, Holder())
    assert len(list(folder.iterdir())) == 5  # and no lock
    (folder / "holiday.txt").unlink()
    (folder / "train.array_record").mkdir()
    with pytest.raises(InputError, match=r"move train.array_record"):
        cache.claim(folder)
    (folder / "train.array_record").rmdir()
    cache.claim(folder)
    assert [path.name for path in folder.iterdir()] == [cache.UNFINISHED]


# Devices and systems.


@pytest.mark.process
def test_devices_that_are_missing_are_named(finished_run, tmp_path):
    lines = [
        "import runpy, sys, gptv_jax",
        f"source = {str(finished_run.folder)!r}",
        "try: gptv_jax.load(source)",
        "except ValueError as error: print(error)",
        f"sys.argv = ['convert', '--from=' + source, '--to={tmp_path}/w.safetensors']",
        "runpy.run_module('gptv_jax.convert', run_name='__main__', alter_sys=True)",
    ]
    ended = run(sys.executable, "-c", "\n".join(lines), JAX_PLATFORMS="nonsense")
    sentence = "JAX finds no device that JAX_PLATFORMS=nonsense asks for"
    assert ended.code == 1 and ended.output.startswith(sentence)
    [line] = ended.errors.splitlines()
    assert line.startswith(f"error: {sentence}") and line.endswith("gptv_jax[tpu] for a TPU.")


@pytest.mark.process
def test_a_system_without_posix_locks_has_others(tmp_path):
    lines = [
        "import pathlib, subprocess, sys, types",
        "sys.modules['fcntl'] = None",  # as on Windows
        "held = []",
        "def locking(file, mode, size):",
        "    if held: raise PermissionError(13, 'Permission denied')",
        "    held.append(file)",
        "sys.modules['msvcrt'] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)",
        "import gptv_jax.main",
        "from gptv_jax import files",
        f"folder = pathlib.Path({str(tmp_path)!r})",
        "files.lock(folder, '--workdir', holder=files)",
        "try: files.lock(folder, '--workdir', holder=files)",
        "except ValueError as error: print(error)",
    ]
    ended = run(sys.executable, "-c", "\n".join(lines))
    assert ended.code == 0, ended.errors
    assert "is in use by another process" in ended.output


# Messages.


def test_an_error_is_one_line_whatever_the_names_in_it_are():
    error = errors.InputError("a\x0bb.png and c\r\nd are\u2028no images.")
    assert str(error) == "a b.png and c d are no images."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as from a worker process


def test_a_list_is_shortened_to_its_first_items():
    items = [f"item{n}" for n in range(100)]
    assert errors.shorten(items[:3]) == "item0, item1, item2"
    found = errors.shorten(items, "; ", room=60)
    assert found.startswith("item0; item1") and found.endswith("more") and len(found) <= 75
    assert found.count("item") + int(found.split()[-2]) == 100
    assert errors.shorten([]) == ""
    read = []
    many = [type("Item", (), {"__str__": lambda _: read.append(1) or "item"})()] * 9999
    assert errors.shorten(many).endswith(" and 9979 more") and len(read) < 30
    assert errors.cut("a" * 500 + "\nthe advice", 100, end=20).endswith("the advice")
    assert len(errors.cut("a" * 500, 100, end=20)) == 100
