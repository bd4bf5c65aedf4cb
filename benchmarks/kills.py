"""Random kills of one short run of the real command, which must end as an uninterrupted run.

    python benchmarks/kills.py [--kills=100] [--seed=0] [--folder=DIR]

All stages run twice, on digits: once uninterrupted, and once killed again and again, by SIGKILL or
SIGTERM, in training steps, in saves, in evaluations and at any other moment; the same command
starts again after each kill. At the end the arrays of the last checkpoints must be equal bit for
bit, and so must the log and the summary, times left out. Prints a table of the kills by activity,
with their costs; the last line is one JSON object. The exit code is 1 if anything differs.

The commands fork from a process that has imported everything, and find the programs that the
uninterrupted run compiled, so that a session takes a second or two and not half a minute.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp
from absl import logging

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "train.steps": 1000,
    "train.batch_size": 16,
    "train.eval_every": 20,
    "train.checkpoint_every": 10,
    "train.log_every": 2,
    "finetune.train.steps": 100,
    "finetune.train.batch_size": 16,
    "finetune.train.eval_every": 20,
    "finetune.train.checkpoint_every": 5,
    "finetune.train.log_every": 2,
    "finetune.patience": 0,
    "probe.c": (0.1,),
    "sample.count": 4,
    "sample.completions": 4,
}
TRAININGS = {  # and the sections of their settings
    "pretrain": "train",
    "finetune": "finetune.train",
    "finetune_scratch": "finetune.train",
}
UNDER_WAY = ("training", "save", "evaluation", "elsewhere")  # elsewhere: starts, other stages
AIMS = {"training": 0.3, "save": 0.3, "evaluation": 0.3, "elsewhere": 0.1}  # share of the kills
# What differs from run to run.
TIMES = ("time", "tokens_per_second", "data_wait_share", "mfu", "goodput", "restarts")
TIMES += ("steps_redone", "seconds_lost", "seconds_up", "seconds_down")
LIMIT = 300.0  # seconds that a session may take
SERVER = """
import json, os, runpy, sys
import jax
from gptv_jax.stages import finetune, probe, reports, sample
from ml_collections import config_flags
for line in sys.stdin:
    arguments, log, kept = json.loads(line)
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        # A kill could leave half a program in the cache: only an uninterrupted run writes there.
        least = 0.1 if kept else 1e9
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        sys.argv = ["main.py", *arguments]
        runpy.run_module("gptv_jax.main", run_name="__main__", alter_sys=True)
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Command:
    """The real command, run in one session after the other, each in a new process."""

    def __init__(self, arguments: list[str], log: pathlib.Path, cache: pathlib.Path | None = None):
        """Imports everything. `log` takes the output, `cache` the compiled programs, if given."""
        self.arguments, self.log = arguments, log
        environment = os.environ | ({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {})
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
        self._server = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, workdir: pathlib.Path, *, kept: bool = False) -> int:
        """Starts a session and returns its process id; `kept`: compiled programs are cached."""
        call = [[*self.arguments, f"--workdir={workdir}"], str(self.log), kept]
        self._server.stdin.write(json.dumps(call) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """The exit code of the session; -N after signal N."""
        return int(self._server.stdout.readline())

    def finish(self, workdir: pathlib.Path, *, kept: bool = False) -> None:
        """Runs a session to its end; raises RuntimeError if the exit code is not 0."""
        self.start(workdir, kept=kept)
        if code := self.wait():
            raise RuntimeError(f"exit code {code}: {self.log.read_text()[-3000:]}")


@dataclasses.dataclass
class Kill:
    """A session that was killed."""

    started: float  # seconds since 1970
    by: signal.Signals
    under_way: str  # one of UNDER_WAY
    code: int  # exit code
    seconds: float  # from the signal to the end
    steps_redone: int = 0
    seconds_lost: float = 0.0


class Observer:
    """The activity of a run, judged by the files in its folder."""

    def __init__(self, folder: pathlib.Path, config: dict):
        """Observes a run folder; `config` maps names of fields to values."""
        self.folder = folder
        self.every = {name: config[f"{of}.eval_every"] for name, of in TRAININGS.items()}

    def progress(self) -> int:
        """The number of saved steps, over all trainings."""
        saved = {}
        for path in self.folder.glob("checkpoints/*/*"):
            if path.name.isdigit() and path.parent.name in TRAININGS:
                saved[path.parent.name] = max(saved.get(path.parent.name, 0), int(path.name))
        return sum(saved.values())

    def under_way(self, started: float) -> str:
        """Activity of the session started at `started`; "elsewhere" until its first step."""
        newest = max(self._sessions(), key=lambda s: s["began"], default=None)
        if not newest or newest["began"] < started or newest["last_step"] == newest["first_step"]:
            return "elsewhere"
        training, last = newest["training"], self._last_event()
        trained = last["stage"] == training and "learning_rate" in last
        if trained and last["step"] % self.every[training] == 0:
            return "evaluation"  # its numbers are not logged yet
        if any(self.folder.glob(f"checkpoints/{training}/*.orbax-checkpoint-tmp*")):
            return "save"
        finished = json.loads(read(self.folder / "summary.json", "{}"))
        ended = any(name.startswith(f"{training}/") for name in finished)
        return "elsewhere" if ended else "training"

    def lost(self, kills: list[Kill]) -> None:
        """Adds to each kill the steps and seconds that the run has recorded as lost."""
        for session in self._sessions():
            kill = max((k for k in kills if k.started <= session["began"]), key=lambda k: k.started)
            kill.steps_redone += session["lost_steps"]
            kill.seconds_lost += session["lost_seconds"]

    def _sessions(self) -> list[dict]:
        every = json.loads(read(self.folder / "sessions.json", "{}"))
        return [s | {"training": name} for name, found in every.items() for s in found]

    def _last_event(self) -> dict:
        whole = [e for e in read(self.folder / "metrics.jsonl").splitlines(True) if e[-1] == "\n"]
        return json.loads(whole[-1]) if whole else {"stage": None}


def read(path: pathlib.Path, absent: str = "") -> str:
    """A file's text."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return absent


def kill_again_and_again(
    command: Command, folder: pathlib.Path, wanted: pathlib.Path, count: int, seed: int
) -> list[Kill]:
    """Runs the command in a folder to its end, through `count` kills.

    Args:
      command: the command.
      folder: run folder.
      wanted: folder of the uninterrupted run.
      count: number of kills.
      seed: for the moments and signals.
    """
    rng, kills = random.Random(seed), []
    config = json.loads((wanted / "config.json").read_text())["config"]
    run, whole = Observer(folder, config), Observer(wanted, config).progress()
    for number in range(count):
        aim = rng.choices(list(AIMS), list(AIMS.values()))[0]
        by = rng.choice([signal.SIGKILL, signal.SIGTERM])
        due, delay = whole * (number + rng.random()) / (count + 2), rng.random()
        started = time.time()
        process = command.start(folder)

        def reached(aim=aim, started=started, due=due, delay=delay) -> bool:
            if aim == "elsewhere":  # mostly while it starts
                return time.time() > started + 2 * delay
            if run.progress() < due:
                return False
            # Saves go on beside the steps, and may be at work nearly all the time.
            found = run.under_way(started)
            return found == aim or (aim == "training" and found == "save")

        while not reached() and running(process):
            if time.time() > started + LIMIT:
                os.kill(process, signal.SIGKILL)
                raise RuntimeError(f"hangs: {command.log.read_text()[-3000:]}")
            time.sleep(0.0005)
        time.sleep(0.01 * delay)  # a step or two, or into the middle of the save
        found, asked = run.under_way(started), time.perf_counter()
        if running(process):
            os.kill(process, by)
        code = command.wait()
        if code not in (-by, 128 + by):
            told = command.log.read_text()[-3000:]
            raise RuntimeError(f"exit code {code} after {by.name} in {found}: {told}")
        kills.append(Kill(started, by, found, code, time.perf_counter() - asked))
        told = f"\r{number + 1} kills, {run.progress()} of {whole} steps"
        print(told, end="", file=sys.stderr, flush=True)
    command.finish(folder)
    run.lost(kills)
    return kills


def running(process: int) -> bool:
    """Whether a process has not ended yet."""
    state = read(pathlib.Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def differences(folder: pathlib.Path, wanted: pathlib.Path) -> list[str]:
    """The differences between a run folder and the uninterrupted run's, times left out."""
    found = []
    for training in TRAININGS:
        if not (wanted / "checkpoints" / training).exists():
            continue
        step, last = (newest(each / "checkpoints" / training) for each in (folder, wanted))
        arrays, expected = (arrays_of(each / "state") for each in (step, last))
        if step.name != last.name or arrays.keys() != expected.keys():
            found.append(f"{training} ends with {step.name}, not {last.name}")
            continue
        found += [
            f"{training}: {name}"
            for name, array in arrays.items()
            if (array.dtype, array.shape) != (expected[name].dtype, expected[name].shape)
            or array.tobytes() != expected[name].tobytes()
        ]
    for name in ("summary.json", "metrics.jsonl"):
        texts = [(each / name).read_text() for each in (folder, wanted)]
        lines = [text.splitlines() if name.endswith("l") else [text] for text in texts]
        if without_times(lines[0]) != without_times(lines[1]):
            found.append(name)
    found += [str(path) for path in folder.rglob("*tmp*")]  # left by a kill and not removed
    return found


def newest(folder: pathlib.Path) -> pathlib.Path:
    """The last checkpoint of a training."""
    return max((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def arrays_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every saved array of a state, by name."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree}
        return checkpointer.restore(folder, restore_args=as_numpy)


def without_times(lines: list[str]) -> list[dict]:
    """JSON objects without the values that differ from run to run."""
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines]


def table(kills: list[Kill]) -> list[dict]:
    """A row for each signal and activity, and one for all kills."""
    rows = []
    for by in (signal.SIGKILL, signal.SIGTERM, None):
        for under_way in (*UNDER_WAY, None) if by else (None,):
            chosen = [k for k in kills if by in (k.by, None) and under_way in (k.under_way, None)]
            rows.append({
                "signal": by.name if by else "all",
                "under_way": under_way or "all",
                "kills": len(chosen),
                "steps_redone": sum(k.steps_redone for k in chosen),
                "seconds_lost": round(sum(k.seconds_lost for k in chosen), 2),
                "longest_end": round(max((k.seconds for k in chosen), default=0.0), 2),
            })  # fmt: skip
    return rows


def main() -> None:
    """Runs, kills and compares."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about files without metadata
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="default: a new one")
    given = parser.parse_args()
    base = given.folder or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    base.mkdir(parents=True, exist_ok=True)
    fields = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    arguments = [f"--config={ROOT / 'configs' / 'digits.py'}", *fields]
    begin = time.perf_counter()
    with Command(arguments, base / "log", base / "compiled") as command:
        command.finish(base / "uninterrupted", kept=True)
        print(f"uninterrupted: {time.perf_counter() - begin:.0f} s, in {base}", flush=True)
        kills = kill_again_and_again(
            command, base / "killed", base / "uninterrupted", given.kills, given.seed
        )
    different = differences(base / "killed", base / "uninterrupted")
    rows = table(kills)
    print("{:9}{:12}{:>7}{:>14}{:>14}{:>20}".format(*rows[0]))
    for row in rows:
        print("{:9}{:12}{:7}{:14}{:14}{:20}".format(*row.values()))
    print("the same" if not different else f"different: {', '.join(different)}")
    summary = json.loads((base / "killed" / "summary.json").read_text())
    result = {
        "benchmark": "kills",
        "seed": given.seed,
        "passed": not different,
        "seconds": round(time.perf_counter() - begin, 1),
        "goodput": summary["pretrain/goodput"],
        "rows": rows,
    }
    print(json.dumps(result))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
