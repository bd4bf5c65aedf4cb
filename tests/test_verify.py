"""`benchmarks.verify`: documents say what documented.py says, and new runs are compared with it."""

import json
import pathlib
import re
import sys

import pytest

from benchmarks import documented, verify
from benchmarks.documented import RUNS, Number, Run
from gptv_jax import config as config_lib
from gptv_jax.config import fields, run_file

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = (ROOT / "docs" / "results.md").read_text()
README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """The section of docs/results.md with this heading, to the next one of its level."""
    (text,) = re.findall(rf"^{re.escape(heading)}.*?(?=^## |\Z)", RESULTS, re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.parametrize("name", RUNS)
def test_documents_say_the_numbers_that_are_verified(name):
    text = section(RUNS[name].heading)
    for number in RUNS[name].numbers:
        for value in (number.value, *number.runs):
            assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", text), (number.key, value)
        assert number.readme in README, (number.key, number.readme)
        assert not number.readme or said(number), (number.key, number.readme)


def said(number: Number) -> bool:
    """Whether a number in the words of README is the documented one, rounded."""
    for digits, percent in re.findall(r"(\d+(?:\.\d+)?)(%?)", number.readme):
        unit = 10.0 ** -len(digits.partition(".")[2]) * (0.01 if percent else 1)
        value = float(digits) * (0.01 if percent else 1)
        if abs(value - float(number.value)) <= unit / 2 + 1e-9:
            return True
    return False


def test_the_table_of_spreads_in_the_document_is_that_of_the_numbers():
    assert documented.table() in RESULTS, "paste `python -m benchmarks.verify --documented`"


@pytest.mark.parametrize("name", RUNS)
def test_a_spread_holds_the_documented_runs_and_is_small_beside_the_number(name):
    for number in RUNS[name].numbers:
        value, runs = float(number.value), [float(run) for run in number.runs]
        assert all(abs(run - value) <= number.spread for run in runs), number.key
        if not any(word in number.key for word in ("wrong_image", "nats", "kl")):
            assert number.spread < value / 2, number.key


@pytest.mark.parametrize("name", RUNS)
def test_the_command_of_a_run_has_a_config_and_fields_that_exist(name, tmp_path):
    run, data = RUNS[name], {"photographs": "photographs", "data_dir": "tfds"}
    _, _, _, config, workdir, *flags = verify.command(name, run, tmp_path, data)
    known = fields.by_name(config_lib.Config)
    assert run_file.load(config.partition("=")[2])
    assert workdir == f"--workdir={tmp_path / name}"
    for flag in flags:
        field, _, value = flag.removeprefix("--config.").partition("=")
        assert value and "{" not in value and (field in known or field == "--stages")


@pytest.mark.process
def test_the_real_run_has_the_numbers_of_digits(finished_run):
    assert {number.key for number in RUNS["digits"].numbers} <= finished_run.summary.keys()


# A run that logs its name and writes what its name says, or fails.
RUN = """
import json, pathlib, sys
folder = pathlib.Path(dict(flag.split("=", 1) for flag in sys.argv[1:])["--workdir"])
with open(folder.parent / "started", "a") as log:
    print(folder.name, file=log)
found = json.loads((folder.parent / "found.json").read_text()).get(folder.name)
if found is None:
    sys.exit("no more memory")
folder.mkdir()
(folder / "summary.json").write_text(json.dumps(found))
"""
ALL = {
    "teacher": Run("digits.py", "", (Number("loss", "1.00", runs=("0.9", "1.0", "1.1")),)),
    "student": Run("digits.py", "", (Number("share", "0.50", images=100),), after="teacher"),
    "clips": Run("digits.py", "", (Number("floor", "0.25"),), needs="photographs"),
}


@pytest.fixture
def verified(tmp_path, monkeypatch, capsys):
    """`call(found, *flags)`: the exit code, the verdicts, the started runs, and the last line."""
    monkeypatch.setattr(verify, "RUNS", ALL)
    monkeypatch.setattr(verify, "MODULE", [sys.executable, "-c", RUN])

    def call(found: dict, *flags: str) -> tuple[object, dict, list[str], dict]:
        (tmp_path / "found.json").write_text(json.dumps(found))
        (tmp_path / "started").write_text("")
        monkeypatch.setattr(sys, "argv", ["verify", f"--out={tmp_path}", *flags])
        with pytest.raises(SystemExit) as ended:
            verify.main()
        printed = capsys.readouterr().out.splitlines()
        about = json.loads(printed[-1]) if printed else {}
        verdicts = {row["run"]: row["verdict"] for row in about.get("rows", ())}
        return ended.value.code, verdicts, (tmp_path / "started").read_text().split(), about

    return call


def test_numbers_within_their_spread_hold_and_finished_runs_are_not_repeated(verified, tmp_path):
    found = {"teacher": {"loss": 1.29}, "student": {"share": 0.36}}
    code, verdicts, started, about = verified(found)
    assert not code and set(verdicts.values()) == {"holds"} and about["left"] == ["clips"]
    assert started == ["teacher", "student"]
    assert json.loads((tmp_path / "verify.json").read_text())["rows"] == about["rows"]
    code, verdicts, started, _ = verified(found, f"--photographs={tmp_path}")
    assert code and verdicts["teacher"] == "holds" and started == ["clips"]  # which fails


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [({"loss": 1.31}, "above"), ({"loss": 0.69}, "below"), ({"loss": None}, verify.NO_NUMBER),
     ({"other": 1.0}, verify.NO_NUMBER)],
)  # fmt: skip
def test_a_number_beyond_its_spread_does_not_hold(verified, numbers, verdict):
    code, verdicts, _, _ = verified({"teacher": numbers}, "--only=teacher")
    assert code == 1 and verdicts == {"teacher": verdict}


def test_a_run_that_fails_does_not_stop_the_others(verified, tmp_path):
    code, verdicts, started, about = verified({"student": {"share": 0.5}}, "--only=student")
    assert started == ["teacher", "student"]  # the teacher first, although it is not named
    assert code == 1 and verdicts == {"student": "holds"} and list(about["failed"]) == ["teacher"]
    assert "no more memory" in (tmp_path / "teacher.log").read_text()
    code, verdicts, started, _ = verified({"teacher": {"loss": 1.0}}, "--only=student")
    assert not code and len(verdicts) == 2 and started == ["teacher"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--only=digits_2", "takes some of teacher, student, clips"),
     ("--only=clips", "clips needs --photographs=FOLDER")],
)  # fmt: skip
def test_what_cannot_be_verified_is_refused_before_any_run(verified, flag, message):
    code, _, started, _ = verified({}, flag)
    assert message in code and not started
