"""How much of a run's time was training: the time of its steps, and its sessions.

A session is the work of one process on one training, from its beginning (restoring and compiling
included) to the last sign of life: its newest entry in the log, evaluation, save or end. A kill
leaves no time to write, so whatever a session did after that sign counts as down time.
"""

import contextlib
import pathlib
import time

from gptv_jax import files


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
        """Over the whole training, in all its sessions."""
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
        """Starts a session.

        Args:
          folder: of the run.
          training: its name.
          began: start of the session, in seconds since 1970 like all times here.
          step: of the checkpoint that the session continues from.
          saved: when that checkpoint was saved; 0 for a training that starts anew.
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

        Args:
          productive: seconds of the steps that led to the final weights; None: not known.

        Returns:
          goodput, the productive share of the wall time; restarts; steps_redone and seconds_lost,
          between a checkpoint that was continued from and the last sign of life of the session
          before; seconds_up, of all sessions, and seconds_down, between them.
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
        """Steps and seconds that all sessions lost."""
        steps = sum(each["lost_steps"] for each in self._sessions)
        return steps, sum((each["lost_seconds"] for each in self._sessions), 0.0)
