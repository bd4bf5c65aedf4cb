"""A training's numbers: their log (JSON lines, TensorBoard, terminal), speed, sessions, traces."""

import collections
import contextlib
import itertools
import json
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm
from etils import epy

from gptv_jax import errors, files, hardware
from gptv_jax.train.wandb_copy import Wandb

with epy.lazy_imports():  # it imports torch where that is installed, which takes seconds
    import tensorboardX

LOG = logging.getLogger(__name__)
# A terminal's line; the bar has what the numbers leave of its width.
BAR = "{desc} {n_fmt}/{total_fmt}{postfix[0]} |{bar}|"
# The number of a training step that stands for its loss: the first of these that it has.
LOSSES = ("class_nats", "best_class_nats", "nats_per_token", "loss")
# The number of an evaluation that is shown first, and 1 where larger is better, else -1.
WATCHED = {"accuracy": 1, "best_accuracy": 1, "nats_per_token": -1, "psnr_db": 1}


def mfu(flops: int, tokens_per_second: float | None) -> float | None:
    """Model FLOPs utilisation: the share of all devices' bfloat16 peak; None where not known.

    `flops` are those of one token, as `model.flops` counts; the speed is that of all devices.
    """
    known = hardware.of(jax.devices()[0].device_kind)
    if known is None or tokens_per_second is None:
        return None
    return tokens_per_second * flops / (known.peak_flops * jax.device_count())


class MetricWriter:
    """Writes events as JSON lines, to TensorBoard and once to `copy`; on process 0 alone."""

    def __init__(self, folder: pathlib.Path, copy: Wandb | None = None):
        self._copy = copy
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.board_folder = folder / "tensorboard"
        self.counts: collections.Counter[str] = collections.Counter()  # events of each stage
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}

    def write(self, stage: str, step: int, values: dict[str, float | int | None]) -> None:
        self.counts[stage] += 1
        if jax.process_index() != 0:
            return
        event = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        with errors.naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self._show(event)
        if self._copy:
            self._copy.write(event)

    def rewind(self, stage: str, step: int, count: int | None = None) -> None:
        """Drops the stage's events that a resumed training is about to repeat.

        These are the events of steps later than `step`, and all events after the first `count`.
        TensorBoard's files of the stage, whose end a kill may have cut off, are written anew.
        """
        if jax.process_index() != 0 or not self.path.exists():
            return
        shutil.rmtree(self.board_folder / stage, ignore_errors=True)
        kept, self.counts[stage] = [], 0
        for event in self.read():
            if event["stage"] == stage:
                if event["step"] > step or self.counts[stage] == count:
                    continue
                self.counts[stage] += 1
                self._show(event)
            kept.append(event)
        files.replace(self.path, "".join(json.dumps(e) + "\n" for e in kept).encode())

    def read(self) -> list[dict]:
        """All complete events; a line that a kill cut short is left out."""
        events = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                LOG.warning("%s: dropped a line that was cut short.", self.path)
        return events

    def close(self) -> None:
        if self._copy:
            self._copy.finish()
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def _show(self, event: dict) -> None:
        stage, step = event["stage"], event["step"]
        if stage not in self._boards:
            # The SummaryWriter's thread writes the file every two seconds and at exit.
            folder = str(self.board_folder / stage)
            self._boards[stage] = tensorboardX.SummaryWriter(folder, flush_secs=2)
        for name, value in event.items():
            if name not in ("stage", "step", "time") and value is not None:
                self._boards[stage].add_scalar(f"{stage}/{name}", value, step, event["time"])


def ranking(numbers: dict) -> dict[str, int]:
    """The number by which people compare evaluations, and 1: larger is better, -1: smaller."""
    return next(({k: sign} for k, sign in WATCHED.items() if k in numbers), {})


def best_step(
    evaluations: list[dict], primary: dict[str, int] | None, steps: set[int] | None = None
) -> int | None:
    """The step of the best evaluation (of those at `steps`), among equals the first; None: none.

    `primary` ranks the evaluations, see `step.Metric`; a number that is None is the worst.
    """
    ranked = [e for e in evaluations if primary and (steps is None or e["step"] in steps)]

    def preference(evaluation: dict) -> list[float]:
        given = ((evaluation[name], sign) for name, sign in primary.items())
        return [-math.inf if value is None else float(sign * value) for value, sign in given]

    return max(ranked, key=preference)["step"] if ranked else None


def format_number(name: str, value: float | int) -> str:
    """A number as text: a share for an accuracy, else four digits."""
    whole = isinstance(value, int) or abs(value) >= 1000
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:{'' if whole else '#'}.4g}"


class Progress:
    """A bar on a terminal; elsewhere one line each time `report` is called.

    80 columns show what people watch: loss, last and best validation, speed and time left.
    """

    def __init__(self, stage: str, steps: int, done: int = 0, unit: str = "step"):
        self.stage, self.steps = stage, steps
        quiet = logging.getLogger("gptv_jax").level >= logging.WARNING  # --quiet
        visible = sys.stderr.isatty() or "ipykernel" in sys.modules  # notebooks show bars as text
        hidden = quiet or not visible or jax.process_index() != 0
        options = {"unit": unit, "disable": hidden, "dynamic_ncols": True, "bar_format": BAR}
        self.bar = tqdm.tqdm(total=steps, initial=done, desc=stage, postfix=[""], **options)
        self.advance, self.close = self.bar.update, self.bar.close
        self._loss = self._validation = self._speed = ""
        self._first: tuple[float, int] | None = None  # time and step of the first report

    def report(self, step: int, values: dict[str, float | None]) -> None:
        """Shows the numbers of step `step`; of a training's losses the first of `LOSSES`."""
        now, known = time.monotonic(), {k: v for k, v in values.items() if v is not None}
        speed, used = known.pop("tokens_per_second", None), known.pop("mfu", None)
        if loss := next((name for name in LOSSES if name in known), None):
            known = {"loss": known[loss]}
        self._loss = "".join(f"  {name} {format_number(name, known[name])}" for name in known)
        self._speed = f"  {tqdm.tqdm.format_sizeof(speed)} tokens/s" if speed else ""
        began, first = self._first = self._first or (now, step)
        if step > first:
            left = (now - began) / (step - first) * (self.steps - step)
            self._speed += f"  {tqdm.tqdm.format_interval(left)} left"
        if used is not None:
            self._speed += f"  MFU {used:.1%}"
        self._refresh()
        if self.bar.disable:
            self._log(f"{self.stage} {step}/{self.steps}{self._numbers}")

    def evaluated(
        self, evaluations: list[dict], primary: dict[str, int] | None = None, *, quiet: bool = False
    ) -> None:
        """Shows the last evaluation (a dict with "step" and its numbers) and the best so far.

        The first of the numbers `primary` is watched; None: a number that people know.
        `quiet` leaves out the line with all numbers, for an evaluation of an earlier process.
        """
        numbers = dict(evaluations[-1])
        step, primary = numbers.pop("step"), primary or ranking(numbers)
        known = {name: value for name, value in numbers.items() if value is not None}
        words = {name: format_number(name, value) for name, value in known.items()}
        watched, at = next(iter(primary), None), best_step(evaluations, primary)
        if watched in words:
            best = next(each for each in evaluations if each["step"] == at)
            value, newest = format_number(watched, best[watched]), at == step
            self._validation = f"  val {words[watched]}  best {value}"
            words[watched] += " (best so far)" if newest else f" (best {value} at {best['step']})"
        if not quiet:
            order = sorted(words, key=lambda name: name != watched)  # which comes first
            line = ", ".join(f"{name} {words[name]}" for name in order)
            self._log(f"{self.stage} {step}/{self.steps} validation: {line}")
        self._refresh()

    def _log(self, line: str) -> None:
        """On process 0: a line of the log or, on a terminal, above the bar."""
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)
        elif jax.process_index() == 0:
            LOG.info("%s", line)

    def _refresh(self) -> None:
        self._numbers = self._loss + self._validation + self._speed
        if not self.bar.disable:
            self.bar.postfix[0] = self._numbers.replace("  ", " ")
            self.bar.refresh()


class Clock:
    """Seconds of training steps and their number; compilation, saves and evaluations excluded."""

    def __init__(self, seconds: float, steps: int):
        # [seconds, steps, seconds waiting for data]; the third is a part of the first.
        self.total = self._lap_start = np.array([seconds, steps, 0.0])

    def add(self, seconds: float, steps: int = 0, waited: float = 0.0) -> None:
        self.total = np.add(self.total, (seconds, steps, waited))

    def lap(self, tokens_per_step: int) -> dict[str, float | None]:
        """Speed and share of data waiting since the last lap."""
        seconds, steps, wait = (self.total - self._lap_start).tolist()
        self._lap_start = self.total
        speed = steps * tokens_per_step / seconds if steps else None
        return {"tokens_per_second": speed, "data_wait_share": wait / seconds if steps else None}


class Sessions:
    """The sessions of one training, kept in sessions.json: `{training: [session, ...]}`.

    A session is the work of one process on one training, from its beginning (restoring and
    compiling included) to the last sign of life: its newest entry in the log, evaluation, save or
    end. A kill leaves no time to write, so whatever a session did after that sign counts as down
    time.
    """

    def __init__(self, folder: pathlib.Path, training: str, began: float, step: int, saved: float):
        """Starts a session that began at `began`, in seconds since 1970 like all times here.

        It continues from the checkpoint of `step`, saved at `saved`; both are 0 without one.
        """
        self.path = folder / "sessions.json"
        self._all = files.read_json(self.path, {})
        self._sessions = self._all.setdefault(training, [])
        before = self._lost()
        for each in self._sessions:  # several lose steps where a damaged checkpoint was passed over
            redone = each["last_step"] - max(step, each["first_step"])
            seconds = each["seen"] - max(saved, each["began"])
            each["lost_steps"] = max(each["lost_steps"], redone)
            each["lost_seconds"] = max(each["lost_seconds"], seconds)
        # Steps and seconds of earlier sessions that this session finds lost: of a session that was
        # killed only those up to its last sign of life, so at least so many.
        self.lost = tuple(a - b for a, b in zip(self._lost(), before, strict=True))
        self.lost_at_least = any(not each.get("ended") for each in self._sessions[-1:])
        session = {"began": began, "seen": time.time(), "first_step": step, "last_step": step}
        self._sessions.append(session | {"lost_steps": 0, "lost_seconds": 0.0})
        files.write_json(self.path, self._all)

    def seen(self, step: int, *, ended: bool = False) -> None:
        """Notes that the session is alive and has taken `step` steps; `ended`: it takes no more."""
        self._sessions[-1] |= {"seen": time.time(), "last_step": step, "ended": ended}
        files.write_json(self.path, self._all)

    def numbers(self, productive: float | None) -> dict[str, float | int | None]:
        """The training's numbers for the summary.

        `productive` are the seconds of the steps that led to the final weights, where known, and
        goodput is their share of the wall time. steps_redone and seconds_lost lie between a
        checkpoint that was continued from and the last sign of life of the session before,
        seconds_up is the length of all sessions, seconds_down the time between sessions.
        """
        up = sum(each["seen"] - each["began"] for each in self._sessions)
        # Time between the end of a training and its extension by more steps is not counted.
        pairs = itertools.pairwise(self._sessions)
        pauses = [after["began"] - each["seen"] for each, after in pairs if each.get("extended")]
        wall = self._sessions[-1]["seen"] - self._sessions[0]["began"] - sum(pauses)
        steps, seconds = self._lost()
        return {
            "goodput": productive / wall if productive is not None and wall else None,
            "restarts": len(self._sessions) - 1 - len(pauses),
            "steps_redone": steps,
            "seconds_lost": seconds,
            "seconds_up": up,
            "seconds_down": wall - up,
        }

    def _lost(self) -> tuple[int, float]:
        steps = sum(each["lost_steps"] for each in self._sessions)
        return steps, sum((each["lost_seconds"] for each in self._sessions), 0.0)


class Profiler:
    """Traces the first to the last of `steps`, both included, for TensorBoard (xprof) and Perfetto.

    Every process writes two files into `FOLDER/plugins/profile/steps_FIRST_LAST/`, the folder that
    TensorBoard reads: `process_I.xplane.pb` and, for Perfetto, `process_I.perfetto.json.gz`.
    """

    def __init__(self, steps: tuple[int, int] | None = None, folder: pathlib.Path | None = None):
        self._steps, self._folder = steps, folder
        self._began: int | None = None  # first step of the trace that is being recorded

    @contextlib.contextmanager
    def step(self, number: int, drain: Callable[[], None]) -> Iterator[None]:
        """Surrounds step `number`, the first one being 1.

        `drain` waits until all earlier steps are done. It is called before the first traced step,
        so that none of them is in the trace, and after the last, so that it is there whole.
        """
        first, last = self._steps or (0, 0)
        if first and number > last:
            LOG.info("No trace: steps %d to %d (config.profile.steps) are past.", first, last)
            self._steps = None
        if not first <= number <= last:
            yield
            return
        scratch = self._folder / f"process_{jax.process_index()}.tmp"
        if self._began is None:
            drain()
            self._began = number
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event for every Python call would slow the steps
            jax.profiler.start_trace(scratch, create_perfetto_trace=True, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == last:
            drain()
            jax.profiler.stop_trace()
            self._collect(scratch)

    def _collect(self, scratch: pathlib.Path) -> None:
        folder = self._folder / "plugins/profile" / f"steps_{self._began}_{self._steps[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        # JAX names its files by host, which processes may share, and its folders by the second.
        for kind in ("xplane.pb", "perfetto.json.gz"):
            name = "perfetto_trace.json.gz" if kind.startswith("perfetto") else f"*.{kind}"
            (written,) = scratch.glob(f"plugins/profile/*/{name}")
            written.replace(folder / f"process_{jax.process_index()}.{kind}")
        shutil.rmtree(scratch)
        LOG.info("The trace of steps %d to %d is in %s.", self._began, self._steps[1], folder)
        self._steps = self._began = None
