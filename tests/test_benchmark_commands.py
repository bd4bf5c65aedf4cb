"""Commands of benchmarks: all of them into one document, attention's errors, and growth."""

import argparse
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import all as everything
from benchmarks import attention_error, decode, growth, harness
from benchmarks.turns import ROOT, Measured
from gptv_jax.model import attention

CPU_ALONE = ("growth", "split_cpu")  # memory of a CPU's process, and how a CPU is split


def test_a_table_is_put_between_its_lines_and_nothing_else_changes(tmp_path, capsys):
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- speed:a-cpu -->\nold\n<!-- /speed:a-cpu -->\nafter\n")
    assert everything.write(document, "a-cpu", "new")
    text = "before\n<!-- speed:a-cpu -->\nnew\n<!-- /speed:a-cpu -->\nafter\n"
    assert document.read_text() == text
    assert not everything.write(document, "a-gpu", "new")
    assert document.read_text() == text and "add these two" in capsys.readouterr().err


@pytest.mark.parametrize("name", everything.NAMES)
def test_the_document_has_a_place_for_every_table(name, tmp_path):
    copy = tmp_path / "results.md"
    copy.write_text((ROOT / "docs" / "results.md").read_text())
    for platform in ("cpu",) if name in CPU_ALONE else ("cpu", "gpu"):
        assert everything.write(copy, f"{name}-{platform}", "table")


def test_the_same_command_goes_on_with_the_cases_that_are_missing(tmp_path, monkeypatch):
    document, log = tmp_path / "results.md", tmp_path / "log"
    lines = "<!-- speed:decode-cpu -->\n<!-- /speed:decode-cpu -->\n"
    document.write_text(lines)
    assert harness.having("a, b", ["a, b", "a, b c"]) == ["a, b"]  # no other with its words
    cases = {"a B1": 0.0, "b B2": 30.0}  # and how long they take
    script = f"import json, sys, time; case = sys.argv[-1]; open({str(log)!r}, 'a').write(case)\n"

    def run(*flags: str) -> tuple:
        """The exit code, what was measured, and which cases the document has."""
        rows = "[{'case': case[8:], 'contender': 'x'}]"
        result = f"{{'rows': {rows}}} | {harness.facts()}"
        told = f"time.sleep({cases}[case[8:]]); print(json.dumps({result}))"
        monkeypatch.setattr(everything, "MODULE", [sys.executable, "-c", script + told])
        monkeypatch.setattr(decode, "cases", lambda platform: list(cases))
        options = ["--benchmarks=decode", f"--write={document}", f"--pieces={tmp_path}", *flags]
        monkeypatch.setattr(sys, "argv", ["all", *options])
        with pytest.raises(SystemExit) as ended:
            everything.main()
        measured = log.read_text().split("--cases=")[1:]
        log.write_text("")
        return ended.value.code, measured, [case in document.read_text() for case in cases]

    assert run("--limit=3") == (143, ["a B1", "b B2"], [True, False])
    assert run("--limit=1") == (
        "decode, b B2: takes longer than --limit=1.",
        ["b B2"],
        [True, False],
    )
    cases["b B2"] = 0.0
    assert run("--limit=60") == (0, ["b B2"], [True, True])
    assert run() == (0, ["a B1", "b B2"], [True, True])
    assert run("--cases=b") == (0, ["b B2"], [True, True])


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`call(row, *flags)`: the exit code and commands of a benchmark that finds this row."""
    log = tmp_path / "log"
    monkeypatch.setattr(decode, "cases", lambda platform: ["a", "b"])

    def call(row: dict, *flags: str) -> tuple[object, list[list[str]]]:
        log.write_text("")
        found = {"rows": [{"case": "a", "contender": "x"} | row]} | harness.facts()
        script = (
            f"import json, sys; open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
        )
        told = f"{script}; print(json.dumps({found})); sys.exit({'failed' in row})"
        monkeypatch.setattr(everything, "MODULE", [sys.executable, "-c", told])
        monkeypatch.setattr(sys, "argv", ["all", "--benchmarks=decode", *flags])
        with pytest.raises(SystemExit) as ended:
            everything.main()
        return ended.value.code, [json.loads(line) for line in log.read_text().splitlines()]

    return call


def test_a_case_with_a_contender_that_failed_is_measured_again(measured, tmp_path):
    (tmp_path / "results.md").write_text("<!-- speed:decode-cpu -->\n<!-- /speed:decode-cpu -->\n")
    flags = [
        "--limit=60",
        f"--pieces={tmp_path}",
        f"--write={tmp_path / 'results.md'}",
        "--rounds=3",
    ]
    code, commands = measured({"note": "no more memory", "failed": True}, *flags)
    assert code and commands == [["benchmarks.decode", "--rounds=3", f"--cases={c}"] for c in "ab"]
    code, commands = measured({"note": "no such machine"}, *flags)
    assert not code and len(commands) == 2
    code, commands = measured({}, *flags)
    assert not code and not commands
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_tiny_sizes_are_kept_only_where_a_folder_is_named(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    code, commands = measured({}, "--quick")
    assert not code and commands == [["benchmarks.decode", "--quick"]]
    assert {path.name for path in tmp_path.iterdir()} == {"log"}
    for measurements in ([["benchmarks.decode", "--quick"]], []):
        code, commands = measured({}, "--quick", f"--pieces={tmp_path / 'kept'}", "--limit=60")
        assert not code and commands == measurements
    (piece,) = json.loads((tmp_path / "kept" / "decode-cpu.json").read_text()).values()
    assert piece["rows"][0]["contender"] == "x"


def off_by(share: float):
    """Attention whose values are wrong by a share."""

    def wrong(q, k, v, *, visible):
        mask = jnp.arange(len(visible))[None] < jnp.array(visible)[:, None]
        return attention.attention(q, k, v * (1 + share), mask)

    return wrong


@pytest.mark.parametrize("mask", ["causal", "full", "prefix", "frames"])
def test_errors_of_attention_and_gradients_are_found(mask, one_device, monkeypatch):
    case = attention_error.quick(attention_error.Case(mask, 64, dtype="float32"))
    found = attention_error.measure(case)
    assert found["holds"] and found["error"] < 1e-6 and found["gradients_error"] < 1e-6
    monkeypatch.setattr(attention, "self_attention", off_by(1e-3))
    found = attention_error.measure(case)
    assert not found["holds"] and found["error"] == pytest.approx(1e-3, rel=0.01)


def test_an_error_in_bfloat16_is_measured_against_the_plain_form_in_bfloat16(one_device):
    case = attention_error.quick(attention_error.Case("causal", 64))
    found = attention_error.measure(case)
    assert found["holds"] and 1e-4 < found["plain_error"] < 2e-2


def test_exponents_of_growth_are_those_of_the_powers(monkeypatch):
    case = growth.Case("layers", (1, 2, 4))

    def faked(contenders, arguments):
        """Time grows linearly, and twice as much at the end; memory with the root."""
        made = {}
        for each in contenders:
            n = each.arguments["point"]["layers"]
            facts = {"planned": 4.0 * n, "flops": 3.0 * n, "measured": 2**20 * n**0.5}
            seconds = 5.0 * n * (2 if n == 4 else 1)
            made[each.name] = Measured((seconds,), facts, processor=(seconds,))
        return made

    monkeypatch.setattr(growth, "compare", faked)
    *points, whole, last = growth.measure(
        case, argparse.Namespace(only="", rounds=1, seconds=0, warm_up=0)
    )
    assert [row["median"] for row in points] == [5, 10, 40]
    assert [row["MiB"] for row in points] == pytest.approx([1, 2**0.5, 2])
    assert [whole["GFLOP"], whole["planned_MiB"]] == pytest.approx([1, 1])
    assert last["processor_seconds"] == pytest.approx(2) and last["MiB"] == pytest.approx(0.5)
    assert whole["processor_seconds"] == pytest.approx(1.5)
    assert last["note"] == "exponent 2.00; time above what is expected"


def test_every_size_of_growth_is_varied_alone_and_devices_share_the_state():
    for case in growth.cases("cpu"):
        for value, point in case.points.items():
            changed = {f for f in vars(point) if vars(point)[f] != vars(case.base)[f]}
            assert changed <= {case.axis} and getattr(point, case.axis) == value
            assert point.training.network.length == point.tokens
    assert not growth.cases("gpu")


# A step of two simulated devices, whose memory is the state, the batch and what the step adds.
MEASURED = """
import dataclasses, json
from benchmarks import growth
point = growth.Point(layers=2, width=64, tokens=64, batch=16, devices=2)
task = growth.train(dataclasses.asdict(point), memory=True)
task.wait(task.step())
print(json.dumps(task.facts))
"""


@pytest.mark.process
def test_a_step_of_several_devices_has_about_the_planned_memory():
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=everything.ROOT,
        env=os.environ | growth.BY_BUFFER | {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert facts["measured"] == pytest.approx(facts["planned"], rel=0.5) and facts["flops"] > 0
