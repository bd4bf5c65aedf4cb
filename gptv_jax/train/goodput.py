"""Where a run's time goes: the time of its steps, its sessions, and a trace of a few steps.

A session is the work of one process on one training, from its beginning (restoring and compiling
included) to the last sign of life: its newest entry in the log, evaluation, save or end. A kill
leaves no time to write, so whatever a session did after that sign counts as down time.
"""

import contextlib
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax

from gptv_jax import files

LOG = logging.getLogger(__name__)


class Clock:
    """Seconds of training steps and their number; compilation, saves and evaluations excluded."""

    def __init__(self, seconds: float, steps: int):
        self.total, self.lap_start = [seconds, steps, 0.0], [seconds, steps, 0.0]
        self._wait = 0.0

    @contextlib.contextmanager
    def span(self, *, steps: int):
        """Counts the time within the `with`, in which `steps` steps are taken."""
        begin, self._wait = time.perf_counter(), 0.0
        yield
        spent = (time.perf_counter() - begin, steps, self._wait)
        self.total = [a + b for a, b in zip(self.total, spent, strict=True)]

    @contextlib.contextmanager
    def waiting(self):
        """Within a span: counts the time within the `with` as waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    def lap(self, tokens_per_step: int) -> dict[str, float | None]:
        """Speed and share of data waiting since the last lap."""
        seconds, steps, wait = (a - b for a, b in zip(self.total, self.lap_start, strict=True))
        self.lap_start = list(self.total)
        if not steps:
            return {"tokens_per_second": None, "data_wait_share": None}
        speed = steps * tokens_per_step / seconds
        return {"tokens_per_second": speed, "data_wait_share": wait / seconds}

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        seconds, steps, _ = self.total
        return steps * tokens_per_step / seconds if steps else None

    def seconds_of(self, steps: int) -> float | None:
        """Seconds of `steps` steps, counting those not timed at the mean of the timed ones."""
        seconds, timed, _ = self.total
        return seconds / timed * steps if timed else None

    def saved(self) -> dict:
        """The entries of a checkpoint that start the next session's clock."""
        return {"seconds": self.total[0], "timed": self.total[1]}


class Sessions:
    """The sessions of one training, kept in sessions.json: `{training: [session, ...]}`."""

    def __init__(self, folder: pathlib.Path, training: str, began: float, step: int, saved: float):
        """Starts a session that began at `began`, in seconds since 1970 like all times here.

        It continues from the checkpoint of `step`, which was saved at `saved`; 0 where there is
        none.
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
        # Steps and seconds of earlier sessions that this session finds lost.
        self.lost = tuple(a - b for a, b in zip(self._lost(), before, strict=True))
        session = {"began": began, "seen": time.time(), "first_step": step, "last_step": step}
        self._sessions.append(session | {"lost_steps": 0, "lost_seconds": 0.0})
        files.write_json(self.path, self._all)

    def seen(self, step: int) -> None:
        """Notes that the session is alive and has taken `step` steps."""
        self._sessions[-1] |= {"seen": time.time(), "last_step": step}
        files.write_json(self.path, self._all)

    def numbers(self, productive: float | None) -> dict[str, float | int | None]:
        """The training's numbers for the summary.

        `productive` are the seconds of the steps that led to the final weights, where known, and
        goodput is their share of the wall time. steps_redone and seconds_lost lie between a
        checkpoint that was continued from and the last sign of life of the session before,
        seconds_up are those of all sessions, seconds_down those between them.
        """
        up = sum(each["seen"] - each["began"] for each in self._sessions)
        wall = self._sessions[-1]["seen"] - self._sessions[0]["began"]
        steps, seconds = self._lost()
        return {
            "goodput": productive / wall if productive is not None and wall else None,
            "restarts": len(self._sessions) - 1,
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
