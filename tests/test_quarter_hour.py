"""gpu_quarter_hour.sh: its order, limits, kills and last lines, and a whole rehearsal."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_quarter_hour.sh"
PARTS = ["attention_error", "attention", "train_step", "decode", "10m_modern"]
# In place of Python: notes its arguments, and ends as the file of the part says: by an exit code,
# or, where that is "wait", by SIGTERM or SIGKILL alone.
PYTHON = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
case "$*" in
  *attention_error*) part=attention_error ;;
  *--benchmarks=*) part=$* && part=${part#*--benchmarks=} && part=${part%% *} ;;
  *prepare*) part=tokens && mkdir -p "$OUT/cache" && touch "$OUT/cache/header.json" ;;
  *) part=10m_modern ;;
esac
echo "$part $*" >>"$STUBS/calls"
code=$(cat "$STUBS/$part" 2>/dev/null || echo 0)
trap 'echo "$part ended" >>"$STUBS/calls"; exit 143' TERM
if [[ $code == wait ]]; then touch "$STUBS/waits"; while :; do sleep 0.05; done; fi
exit "$code"
"""


class Stand:
    """A folder with stand-ins for Python and for nvidia-smi, and results in `out`."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.out = folder / "stubs", folder / "out"
        self.folder.mkdir()
        for name, text in (("python", PYTHON), ("nvidia-smi", "#!/usr/bin/env bash\n")):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)

    def ends_by(self, part: str, code: int | str) -> None:
        (self.folder / part).write_text(str(code))

    def start(self, *flags: str) -> subprocess.Popen:
        path = f"{self.folder}:{os.environ['PATH']}"
        stubs = {"PATH": path, "PYTHON": str(self.folder / "python"), "STUBS": str(self.folder)}
        return subprocess.Popen(
            [SCRIPT, *flags],
            env=os.environ | stubs | {"OUT": str(self.out)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *flags: str) -> tuple[int, dict[str, str], list[str]]:
        """The exit code, the state of every part by the last lines, and the commands."""
        process = self.start(*flags)
        output, errors = process.communicate(timeout=300)
        assert not errors
        return process.returncode, states(output), self.calls()

    def calls(self) -> list[str]:
        """The commands since the last call of this."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def start_and_wait(self, *flags: str) -> subprocess.Popen:
        """Returns when a part waits."""
        process = self.start(*flags)
        while not (self.folder / "waits").exists():
            assert process.poll() is None
            time.sleep(0.02)
        return process


def states(output: str) -> dict[str, str]:
    lines = [line for line in output.splitlines() if ": at most " not in line]
    return dict(line.split(": ", 1) for line in lines)


def names(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return f"--cache={folder}"


def test_parts_run_in_order_within_their_times_and_once(stand, cache):
    code, found, calls = stand.run(cache)
    assert code == 0 and found == dict.fromkeys(PARTS, "done") and names(calls) == PARTS
    limits = [int(call.split("--limit=")[1].split()[0]) for call in calls[1:]]
    assert limits[:3] == [60, 300, 120] and 800 < limits[3] <= 870
    assert "--only=gptv_jax,PyTorch compiled " in calls[2] + " "
    assert "--cases=B256" in calls[3] and f"{cache} " in calls[4] + " "
    assert (stand.out / "summary.txt").read_text().splitlines() == [f"{n}: done" for n in PARTS]
    code, found, calls = stand.run(cache)
    assert code == 0 and set(found.values()) == {"done before"} and not calls


@pytest.mark.parametrize("flags", [["--rehearse"], []])
def test_a_rehearsal_and_a_run_do_not_share_a_folder(stand, cache, flags):
    (other,) = [flag for flag in (["--rehearse"], []) if flag != flags]
    assert stand.run(cache, *flags)[0] == 0
    process = stand.start(cache, *other)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "take another folder" in errors
    assert names(stand.calls()) == []
    assert set(stand.run(cache, *flags)[1].values()) == {"done before"}


def test_a_part_that_fails_stops_no_other_and_runs_again(stand, cache):
    stand.ends_by("attention", 3)
    stand.ends_by("decode", 143)
    code, found, calls = stand.run(cache)
    assert code == 1 and names(calls) == PARTS
    assert found["attention"].startswith("failed by exit code 3, see ")
    assert found["decode"].startswith("left") and found["10m_modern"] == "done"
    stand.ends_by("attention", 0)
    code, found, calls = stand.run(cache)
    assert code == 143 and names(calls) == ["attention", "decode"]
    assert found["attention"] == "done" and found["train_step"] == "done before"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_a_kill(stand, cache, number):
    stand.ends_by("train_step", "wait")
    process = stand.start_and_wait(cache)
    if number == signal.SIGTERM:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        left = {name: what.split(":")[0] for name, what in states(output).items()}
        assert process.returncode == 143
        assert left == dict(zip(PARTS, ["done", "done", "left", "left", "left"], strict=True))
        assert names(stand.calls()) == [*PARTS[:3], "train_step"]  # which was asked to end
    else:
        os.killpg(process.pid, number)
        process.communicate(timeout=60)
        assert names(stand.calls()) == PARTS[:3]
    stand.ends_by("train_step", 0)
    code, found, calls = stand.run(cache)
    assert code == 0 and names(calls) == PARTS[2:] and found["attention"] == "done before"


def test_a_limit_that_is_too_short_leaves_the_rest(stand, cache):
    code, found, calls = stand.run(cache, "--limit=14")
    assert code == 143 and not calls
    assert set(found.values()) == {"left: the same command continues"}
    assert stand.run(cache, "--limit=100")[0] == 0


def test_without_data_the_run_is_left_out_and_the_last_line_says_so(stand):
    code, found, calls = stand.run()
    assert code == 0 and names(calls) == PARTS[:-1]
    assert "give CIFAR-10 by --data_dir=FOLDER" in found["10m_modern"]


def test_images_become_tokens_once(stand, tmp_path):
    stand.ends_by("10m_modern", 143)
    for order in (["tokens", "10m_modern"], ["10m_modern"]):
        code, found, calls = stand.run(f"--data_dir={tmp_path}")
        assert code == 143 and names(calls)[-len(order) :] == order
        assert f"--cache={stand.out / 'cache'} " in calls[-1] + " "
    assert found["attention"] == "done before" and names(calls) == ["10m_modern"]


@pytest.mark.parametrize(
    "flags", [["--limit=x"], ["--fast"], ["a", "b"], ["--cache=a", "--data_dir=b"]]
)
def test_flags_that_it_does_not_know_are_refused(stand, flags):
    process = stand.start(*flags)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Usage: benchmarks/gpu_quarter_hour.sh" in errors
    assert not stand.calls()


def test_a_machine_without_a_gpu_is_told_of_the_rehearsal(stand):
    (stand.folder / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 9\n")
    process = stand.start()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "--rehearse" in errors and not stand.calls()


def test_shellcheck_finds_nothing():
    ended = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.process
def test_the_rehearsal_runs_every_part_in_miniature(tmp_path):
    """The real commands, on the CPU; a rehearsal that was killed continues."""

    def rehearse() -> tuple[int, dict[str, str]]:
        ended = subprocess.run(
            [SCRIPT, tmp_path, "--rehearse"],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        return ended.returncode, states(ended.stdout)

    assert rehearse() == (0, dict.fromkeys(PARTS, "done")), sorted(tmp_path.iterdir())
    for name in ("attention", "train_step", "decode"):
        (piece,) = json.loads((tmp_path / f"{name}-cpu.json").read_text()).values()
        assert any(row.get("median") for row in piece["rows"] if row["contender"] == "gptv_jax")
        assert f"benchmarks.{name} --quick" in (tmp_path / "results.md").read_text()
    rows = json.loads((tmp_path / "attention_error.json").read_text())["rows"]
    assert {row["form"] for row in rows} == {"blocked", "plain"} and all(r["holds"] for r in rows)
    run = json.loads((tmp_path / "reference" / "reference.json").read_text())["runs"]["10m_modern"]
    assert run["pretrain/steps"] == 60 and run["finetune/test_accuracy"] >= 0
    assert rehearse() == (0, dict.fromkeys(PARTS, "done before"))
