import gc
import itertools
import json
import logging
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_params, tiny_network
from jax.sharding import NamedSharding, PartitionSpec

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.checkpoint import Checkpoints, DamagedError
from gptv_jax.errors import InputError
from gptv_jax.train import optimizer, step

pytestmark = pytest.mark.usefixtures("one_device")

INFO = {"position": 0, "seconds": 1.25, "timed": 3, "evaluations": [{"step": 0, "accuracy": 0.5}]}


def small_state(seed=0):
    """A state with a big array, an empty one, a scalar and all kinds of floats."""
    rng = np.random.default_rng(seed)
    special = [0.0, -0.0, np.inf, -np.inf, 1e-42, np.finfo(np.float32).max]
    state = {
        "step": np.int32(seed),
        "params": {
            "blocks": {"qkv": rng.normal(size=(64, 256)).astype(np.float32)},
            "special": np.array(special, np.float32),
        },
        "opt": [{"count": np.array([seed, 7], np.int32)}],
    }
    mesh = jax.sharding.get_mesh()
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bit_for_bit(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, f), w in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype), path
        assert np.asarray(f).tobytes() == np.asarray(w).tobytes(), path


def save(folder, *steps, keep=10):
    """Checkpoints of `small_state(step)`."""
    with Checkpoints(folder, keep) as checkpoints:
        for number in steps:
            checkpoints.save(number, small_state(number), {**INFO, "position": number})


def restore_latest(folder):
    with Checkpoints(folder, 10) as checkpoints:
        return checkpoints.restore_latest(abstract_of(small_state()))


def steps_in(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.steps()


def contents(folder):
    """Every file below with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Saving and restoring


def test_what_is_restored_is_bit_for_bit_what_was_saved(tmp_path):
    save(tmp_path / "pretrain", 3)
    state, info = restore_latest(tmp_path / "pretrain")
    assert_bit_for_bit(state, small_state(3))
    assert {k: info[k] for k in INFO} == {**INFO, "position": 3}


def test_the_newest_checkpoint_is_restored_and_any_one_can_be(tmp_path):
    save(tmp_path, 9, 10, 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 9, 10]
        abstract = abstract_of(small_state())
        assert checkpoints.restore_latest(abstract)[1]["position"] == 10
        state, info = checkpoints.restore(9, abstract)
    assert info["position"] == 9
    assert_bit_for_bit(state, small_state(9))


def test_nothing_is_restored_where_there_is_nothing(tmp_path):
    assert restore_latest(tmp_path / "pretrain") is None
    assert steps_in(tmp_path / "pretrain") == []


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = small_state(1)
        checkpoints.save(1, state, INFO)
        jax.tree.map(lambda x: x.delete(), state)
    assert_bit_for_bit(restore_latest(tmp_path)[0], small_state(1))


def test_a_step_that_is_saved_already_stays_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1), INFO)
        checkpoints.wait()
        before = contents(tmp_path)
        checkpoints.save(1, small_state(2), INFO)
    assert contents(tmp_path) == before


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert steps_in(tmp_path) == [1] and half.exists()  # opened to be read, it changes nothing
    assert restore_latest(tmp_path)[1]["position"] == 1
    until = time.monotonic() + 30
    while half.exists():  # Orbax removes it in a thread
        assert time.monotonic() < until
        time.sleep(0.01)


def test_opened_to_be_read_it_changes_nothing(tmp_path):
    save(tmp_path, 1, 2, 3)
    before = contents(tmp_path)
    with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
        checkpoints.restore_latest(abstract_of(small_state()))
    assert contents(tmp_path) == before
    with Checkpoints(tmp_path / "absent", 1, read_only=True) as checkpoints:
        assert checkpoints.steps() == []
    assert not (tmp_path / "absent").exists()


# Retention


def save_with(folder, steps, best=None, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        checkpoints.best = best
        for number in steps:
            checkpoints.save(number, small_state(), INFO)


def test_the_newest_stay(tmp_path):
    save_with(tmp_path, range(1, 6))
    assert steps_in(tmp_path) == [4, 5]


def test_the_best_stays_beside_the_newest_until_another_is_better(tmp_path):
    save_with(tmp_path, range(1, 6), best=2)
    assert steps_in(tmp_path) == [2, 4, 5]
    save_with(tmp_path, [6, 7], best=5)  # in another process
    assert steps_in(tmp_path) == [5, 6, 7]


# What does not fit


def test_all_names_and_shapes_that_differ_are_listed(tmp_path):
    save(tmp_path, 1)
    expected = abstract_of(small_state())
    expected["params"]["blocks"]["qkv"] = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    expected["params"]["extra"] = expected["params"].pop("special")
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (lambda e: checkpoints.restore(1, e), checkpoints.restore_latest):
            with pytest.raises(InputError) as error:
                restore(expected)
            message = str(error.value)
            assert "params.blocks.qkv is (64, 256), expected (64, 128)" in message
            assert "params.extra (6,) is missing" in message
            assert "params.special (6,) is left over" in message
            assert "step" not in message.split("network:")[1] and "opt" not in message
            assert not isinstance(error.value, DamagedError)
    assert steps_in(tmp_path) == [1]


def test_a_part_of_the_state_can_be_restored_by_itself(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        part = {"params": abstract_of(small_state())["params"]}
        state, info = checkpoints.restore(1, part)
        assert_bit_for_bit(state, {"params": small_state(1)["params"]})
        assert info["position"] == 1
        del part["params"]["special"]
        with pytest.raises(InputError, match=r"params\.special"):
            checkpoints.restore(1, part)


# Other meshes


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 1)], ids=str)
def test_another_mesh_restores_the_same_values_in_its_own_shardings(shape, tmp_path):
    network = tiny_network()
    update, _ = optimizer.make_optimizer(config_lib.Optimizer(name="adamw"), 10)

    @jax.jit
    def trained(params):
        state = step.state_of(params, update)
        return state | {"opt": jax.tree.map(lambda x: x + 1, state["opt"])}

    with jax.set_mesh(make_mesh((8, 1, 1))), Checkpoints(tmp_path) as checkpoints:
        state = trained(random_params(network))
        checkpoints.save(1, state, INFO)
    with jax.set_mesh(make_mesh(shape)), Checkpoints(tmp_path) as checkpoints:
        abstract = sharding.abstract(step.make_init(network, update))
        found, _ = checkpoints.restore_latest(abstract)
    assert_bit_for_bit(found, state)
    for f, a in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert f.sharding.is_equivalent_to(a.sharding, f.ndim)


# Damage


@pytest.fixture
def failed_reads(monkeypatch):
    """Orbax's coroutines raise once more when they are collected after a failed read; not here."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    gc.collect()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS = {f.__name__: f for f in (truncate, delete, zero, flip)}


def biggest(folder):
    """Of the files that hold the arrays."""
    return max(folder.glob("state/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A folder with the checkpoints 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(make_mesh((1, 1, 1))):
        save(folder / "pretrain", 1, 2)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_damaged_data_falls_back_to_the_checkpoint_before_and_is_set_aside(
    way, two_saved, tmp_path, caplog, failed_reads
):
    folder = tmp_path / "run" / "pretrain"
    shutil.copytree(two_saved / "pretrain", folder)
    WAYS[way](biggest(folder / "2"))
    left = contents(folder / "2")
    with caplog.at_level(logging.WARNING, "gptv_jax"):
        state, info = restore_latest(folder)
    assert info["position"] == 1
    assert_bit_for_bit(state, small_state(1))
    assert steps_in(folder) == [1]
    assert contents(tmp_path / "run" / "damaged" / "pretrain-2") == left
    assert f"{folder / '2'} is damaged" in caplog.text and "Falling back to step 1" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_damage_to_any_file_is_noticed_or_harmless(way, two_saved, tmp_path, failed_reads):
    pristine = two_saved / "pretrain"
    names = [p.relative_to(pristine) for p in (pristine / "2").rglob("*") if p.is_file()]
    assert len(names) > 5
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "pretrain"
        shutil.copytree(pristine, folder)
        WAYS[way](folder / name)
        state, info = restore_latest(folder)
        position = info["position"]
        assert position in (1, 2), name
        assert_bit_for_bit(state, small_state(position))
        assert {k: info[k] for k in INFO} == {**INFO, "position": position}, name
        # An unfinished checkpoint is swept away, a damaged one set aside; a good one stays.
        assert steps_in(folder) == list(range(1, position + 1)), name


def test_a_checkpoint_set_aside_can_be_saved_again(two_saved, tmp_path, failed_reads):
    folder = tmp_path / "pretrain"
    shutil.copytree(two_saved / "pretrain", folder)
    for _ in range(2):  # the second time there is one in damaged/ already
        truncate(biggest(folder / "2"))
        with Checkpoints(folder, 10) as checkpoints:
            assert checkpoints.restore_latest(abstract_of(small_state()))[1]["position"] == 1
            checkpoints.save(2, small_state(2), {**INFO, "position": 2})
        assert restore_latest(folder)[1]["position"] == 2


def test_when_all_are_damaged_it_is_an_error_and_nothing_moves(two_saved, tmp_path, failed_reads):
    folder = tmp_path / "run" / "pretrain"
    shutil.copytree(two_saved / "pretrain", folder)
    truncate(biggest(folder / "1"))
    flip(biggest(folder / "2"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read") as error:
        restore_latest(folder)
    assert str(folder) in str(error.value) and not isinstance(error.value, DamagedError)
    assert contents(tmp_path) == before


def test_one_damaged_checkpoint_asked_for_by_number_is_an_error_and_stays(
    two_saved, tmp_path, failed_reads
):
    shutil.copytree(two_saved / "pretrain", tmp_path / "pretrain")
    flip(biggest(tmp_path / "pretrain" / "2"))
    before = contents(tmp_path)
    with (
        Checkpoints(tmp_path / "pretrain", read_only=True) as checkpoints,
        pytest.raises(DamagedError, match=r"pretrain/2 is damaged"),
    ):
        checkpoints.restore(2, abstract_of(small_state()))
    assert contents(tmp_path) == before


def test_changed_information_is_noticed(two_saved, tmp_path, failed_reads):
    folder = tmp_path / "pretrain"
    shutil.copytree(two_saved / "pretrain", folder)
    path = folder / "2" / "info" / "metadata"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "info": {**info["info"], "position": 3}}))
    assert restore_latest(folder)[1]["position"] == 1


@pytest.mark.parametrize("phase", range(3))  # its shapes, its arrays, its record
def test_what_another_process_cannot_read_nobody_goes_on_from(tmp_path, monkeypatch, phase):
    save(tmp_path / "run", 1, 2)
    there = itertools.chain([i == phase for i in range(phase + 1)], itertools.repeat(False))
    monkeypatch.setattr(hosts, "from_all", lambda value: [value, next(there)])
    assert restore_latest(tmp_path / "run")[1]["position"] == 1
    assert (tmp_path / "damaged" / "run-2").exists()
