"""The benchmarks' harness, with real processes, and that both sides of a comparison do one work."""

import argparse
import collections
import itertools
import json
import pathlib
import runpy
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, random_params, tiny_network

from benchmarks import ablations, decode, features, harness, train_step, turns
from benchmarks.sizes import QUICK, Size
from benchmarks.turns import Contender, Measured
from gptv_jax import config as config_lib
from gptv_jax import sharding

ROOT = pathlib.Path(__file__).parent.parent
CONTENDERS = pathlib.Path(__file__).parent / "contenders.py"


def turns_of(rounds: int, seconds: float, warm_up: float = 0) -> argparse.Namespace:
    return argparse.Namespace(rounds=rounds, seconds=seconds, warm_up=warm_up, only="")


def contender(name: str, function: str, **arguments) -> Contender:
    path = {"PYTHONPATH": f"{ROOT}:{CONTENDERS.parent}"}
    return Contender(name, f"{CONTENDERS.stem}:{function}", arguments, path)


def test_contenders_take_turns_and_the_faster_one_has_the_higher_ratio(tmp_path):
    log = tmp_path / "log"
    both = [contender("slow", "sleeper", seconds=0.04, log=str(log)),
            contender("fast", "sleeper", seconds=0.01, log=str(log))]  # fmt: skip
    found = turns.compare(both, turns_of(3, 0.2, warm_up=60))
    logged = itertools.groupby(log.read_text().split())
    names, counts = zip(*((name, len(list(each))) for name, each in logged), strict=True)
    slow, fast = counts[-2:]
    assert names == ("0.04", "0.01") * 5
    # To warm up: one iteration each, and one more with those in which processes take memory.
    warm = (1 + turns.FIRST_ITERATIONS,) * 2
    assert counts == (1, 1, *warm) + (slow, fast) * 3 and fast > 1
    slow, fast = rows = harness.rows("sleep", found, work=10, unit="naps", base="slow")
    assert slow["ratio"] == 1 < fast["ratio"]
    assert slow["quartiles"][0] <= slow["median"] <= slow["quartiles"][1] <= 10 / 0.04
    assert found["fast"].facts == {"sleeps": 0.01}
    assert harness.table(rows).splitlines()[-1].split("|")[-2].strip() == f"{fast['ratio']:.2f}"


def test_one_that_is_not_idle_while_it_waits_is_noticed():
    both = [contender("idle", "sleeper", seconds=0.1), contender("busy", "spinner")]
    found = turns.compare(both, turns_of(2, 0.1))
    # Cores: a busy machine leaves a thread that never rests well under one.
    assert found["idle"].waiting < 0.02 < 0.1 < found["busy"].waiting


def test_other_processes_that_work_meanwhile_are_noticed(capsys):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        found = turns.compare([contender("idle", "sleeper", seconds=0.5)], turns_of(2, 0.5))
        other.kill()
    assert found["idle"].others > 0.3
    assert "Other processes used" in capsys.readouterr().err


def test_those_that_cannot_run_are_noted_and_mistakes_fail(capsys):
    all_of_them = [contender("lacking", "lacking"), contender("mistaken", "mistaken"),
                   contender("well", "sleeper", seconds=0.01)]  # fmt: skip
    found = turns.compare(all_of_them, turns_of(1, 0.01))
    assert found["lacking"].note == "there is no such machine" and not found["lacking"].failed
    assert found["mistaken"].note == "ZeroDivisionError: division by zero"
    assert len(found["well"].seconds) == 1
    rows = harness.rows("case", found, 1, "naps", base="lacking")
    assert "there is no such machine" in harness.table(rows)
    with pytest.raises(SystemExit):
        harness.report("notes", rows)
    printed = capsys.readouterr()
    assert "1 / 0" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["benchmark"] == "notes"


def test_the_pytorch_gpt_is_our_network(one_device):
    torch = pytest.importorskip("torch", reason="the bench extra (torch) is not installed")
    from benchmarks import peers

    network = tiny_network(axial_positions=False, start_per_variant=False)
    network = type(network)(network.config, network.layout)
    params, batch = random_params(network), random_batch(network)
    model = network.config
    size = Size(model.width, model.layers, model.heads, network.length, network.vocabulary)
    peer, tokens = peers.GPT(size), torch.tensor(batch["tokens"], dtype=torch.long)
    peer.copy_weights({k: np.asarray(v) for k, v in sharding.by_name(params).items()})
    ours = network.bind(params)(jnp.asarray(batch["tokens"]))
    np.testing.assert_allclose(ours.logits, peer(tokens).detach(), rtol=0, atol=1e-5)

    # Every layer's features, by the hooks that features.py uses.
    task = peers.pooling(peer, tokens)
    np.testing.assert_allclose(ours.pooled, task(), rtol=0, atol=1e-5)

    # Decoding with its cache, one position after the other.
    with torch.inference_mode():
        before, cache = [None, *tokens.T[:-1]], peer.empty_cache(*tokens.shape)
        logits = [peer.extend(each, position, cache) for position, each in enumerate(before)]
    np.testing.assert_allclose(ours.logits, torch.stack(logits, dim=1), rtol=0, atol=1e-5)
    drawn = peer.draw(3, network.length - 1)
    assert drawn.shape == (3, network.length - 1) and drawn.max() < network.vocabulary


def test_the_pytorch_tasks_do_their_work_once(monkeypatch):
    pytest.importorskip("torch", reason="the bench extra (torch) is not installed")
    from benchmarks import peers

    passes = collections.Counter()

    def count(name: str) -> None:
        original = getattr(peers.GPT, name)

        def counted(*arguments):
            passes[name] += 1
            return original(*arguments)

        monkeypatch.setattr(peers.GPT, name, counted)

    for name in ("forward", "extend"):
        count(name)
    shared = QUICK.asdict()
    for task, name, count in (
        (peers.train(**shared, model="gpt"), "forward", 1),
        (peers.generate(**shared, count=5, model="gpt"), "extend", 5),
    ):
        before = passes[name]
        task.wait(task.step())
        assert passes[name] - before == count


def faked(seconds: dict[str, float]):
    """In place of `turns.compare`: what each contender would have taken."""
    return lambda contenders, _: {c.name: Measured((seconds.get(c.name, 1.0),)) for c in contenders}


def test_limits_are_what_they_are_called(monkeypatch):
    arguments = argparse.Namespace(tokens=16, rounds=1, seconds=0, warm_up=0, only="")
    size, B = QUICK.size, QUICK.batch
    D, L, T, V = size.width, size.layers, size.tokens, size.vocabulary
    product = 2 * train_step.SIDES["cpu"] ** 3  # FLOPs
    monkeypatch.setattr(train_step, "compare", faked({"gptv_jax": 0.5, "JAX matmul": 0.25}))
    rows = {row["contender"]: row for row in train_step.measure(QUICK, arguments)}
    needed = 6 * (12 * L * D**2 + V * D) + 12 * L * T * D  # of a token (PaLM)
    assert rows["JAX matmul"]["median"] == pytest.approx(product / 0.25 / 1e9)
    assert rows["gptv_jax"]["mfu"] == pytest.approx(B * T / 0.5 * needed / (product / 0.25))

    monkeypatch.setattr(decode, "compare", faked({"gptv_jax": 0.5, "copy": 0.25}))
    monkeypatch.setattr(decode, "GROWN", ())
    rows = {row["contender"]: row for row in decode.measure(QUICK, arguments)}
    read = 4 * (12 * L * D**2 + V * D) + 4 * 2 * L * D * B * (T + 1) / 2  # bytes, of a step
    bandwidth = 2 * decode.COPIED / 0.25
    assert rows["gptv_jax"]["of_limit"] == pytest.approx(T / 0.5 * read / bandwidth)

    monkeypatch.setattr(features, "compare", faked({"gptv_jax": 3.0, "gptv_jax last layer": 2.0}))
    rows = {row["contender"]: row for row in features.measure(QUICK, arguments)}
    assert rows["gptv_jax"]["cost_over_last_layer"] == pytest.approx(1.5)


def test_a_table_says_that_other_processes_disturbed_it():
    found = {"a": Measured((1.0,), others=0.05), "b": Measured((1.0,), others=1.25)}
    rows = harness.rows("case", found, 1, "naps")
    about = harness.facts() | {"rows": rows}
    assert "other processes used 1.25 cores" in harness.told(["x"], about)
    assert "other processes" not in harness.told(["x"], about | {"rows": rows[:1]})


def test_growth_tells_the_cost_of_a_token():
    arguments = argparse.Namespace(tokens=16, rounds=1, seconds=0, warm_up=0, only="")
    short, room, whole = rows = decode.growth(QUICK, arguments)
    assert [row["contender"] for row in rows] == [
        "first 16 of 16",
        "first 16 of 256",
        "first 64 of 64",
    ]
    for row in (room, whole):
        assert row["cost"] == pytest.approx(short["median"] / row["median"])


@pytest.mark.parametrize(
    "flag", ["--rounds=0", "--batch=0", "--batch=-2", "--tokens=0", "--tokens=x"]
)
def test_numbers_that_must_be_positive_are(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode", flag])
    with pytest.raises(SystemExit):
        runpy.run_path(decode.__file__, run_name="__main__")
    assert "must be a positive integer" in capsys.readouterr().err


# The command, whose runs save and end when they are asked to, or do what their name says.
KEEPER = """
import sys
from benchmarks import reference_runs
def command(name, folder, *_):
    return [sys.executable, "-c", CHILD, name, str(folder)]
reference_runs.command = command
reference_runs.main()
"""
CHILD = """
import json, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(parents=True)
saved = folder / "checkpoints" / "pretrain"
def save(*_):
    (saved / str(len(list(saved.glob("*"))))).mkdir(parents=True)
    sys.exit(143 if name == "m" else 0)
if name == "l":
    sys.exit(3)
if name == "m":
    signal.signal(signal.SIGTERM, save)
if name == "s":
    time.sleep(1)
    config = {"tokens.kind": "grey", "tokens.levels": 17, "seed": 5}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    save()
(folder / "ready").touch()
time.sleep(60)
"""


def keeper(out: pathlib.Path, runs: str, limit: float) -> subprocess.Popen:
    flags = ["--cache=cache", f"--out={out}", f"--runs={runs}", f"--limit={limit}", "--reserve=2"]
    script = f"CHILD = {CHILD!r}{KEEPER}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


# The runs asked for, the limit in seconds, the exit code, and a part of the message.
ENDINGS = {
    "stopped with nothing saved": ("tiny", 8, 1, "came no further"),
    "saved when stopped": ("m", 8, 143, "continues"),
    "first run done, time over": ("s,tiny", 8, 143, "continues"),
    "failed": ("l", 60, 3, ""),
    "unknown run": ("s,10x", 60, 2, "--runs has 10x; it takes some of tiny,"),
    "limit below reserve": ("s", 2, 2, "--limit=2 must be more than --reserve=2"),
}


def test_reference_runs_end_in_time_and_tell_how(tmp_path):
    """All at once, because most of their time is waiting."""
    processes = {
        name: keeper(tmp_path / name, runs, limit) for name, (runs, limit, *_) in ENDINGS.items()
    }
    errors = {name: process.communicate()[1] for name, process in processes.items()}
    for name, (_, _, code, message) in ENDINGS.items():
        assert processes[name].returncode == code, (name, errors[name])
        assert message in errors[name], name


def test_reference_runs_tell_where_their_numbers_are_from(tmp_path):
    process = keeper(tmp_path, "s", limit=60)
    _, error = process.communicate()
    assert not process.returncode, error
    found = json.loads((tmp_path / "reference.json").read_text())
    assert f"--out={tmp_path}" in found["command"] and found["runs"]["s"]["seed"] == 5
    above, _, head, *_ = (tmp_path / "reference.md").read_text().splitlines()
    assert head == "| | s | published |"
    for fact in (found["command"], found["hardware"]["cpu"], found["date"], jax.__version__):
        assert fact in above


def test_reference_runs_that_are_stopped_stop_the_run_under_way(tmp_path):
    process = keeper(tmp_path, "m,tiny", limit=60)
    while not (tmp_path / "m" / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert (tmp_path / "m" / "checkpoints" / "pretrain" / "0").exists()
    assert not (tmp_path / "tiny").exists()


@pytest.mark.process
def test_a_benchmark_prints_a_table_and_one_json_line():
    pytest.importorskip("torch", reason="the bench extra (torch) is not installed")
    module = [sys.executable, "-m", "benchmarks.train_step", "--quick", "--only=gptv_jax,PyTorch"]
    ended = subprocess.run(
        [*module, "--rounds=2", "--seconds=0.05"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    *table, last = ended.stdout.splitlines()
    found = json.loads(last)
    assert len(table) == 2 + len(found["rows"])
    (ratios,) = found["ratios"].values()
    assert ratios["PyTorch"] == 1 and ratios["gptv_jax"] > 0
    assert all(row["mfu"] > 0 for row in found["rows"] if row["unit"] == "tokens/s")
    assert found["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("name", [name for name in ablations.NAMES if name != "base"])
def test_a_variant_of_the_recipe_is_accepted_and_is_not_the_base(name):
    def resolved(changes):
        settings = runpy.run_path(ROOT / "configs" / "cifar10.py")["get_config"]("tiny")
        settings.update_from_flattened_dict(ablations.BASE | changes)
        return config_lib.resolve(settings)

    assert resolved(ablations.changes(name)) != resolved({})
