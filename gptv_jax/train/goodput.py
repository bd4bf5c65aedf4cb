"""How much of the time was training: the sessions of a run, and what was lost between them.

A session is the work of one process on one training, from its beginning (restoring and compiling
included) to when it was last seen alive: its last entry in the log, evaluation, save or end. A kill
leaves no time to write: what a session did after that is not known, and counts as down time.
"""

import pathlib
import time

from gptv_jax import files


class Sessions:
    """The sessions of one training, kept in sessions.json: `{training: [session, ...]}`."""

    def __init__(self, folder: pathlib.Path, training: str, began: float, step: int, saved: float):
        """Begins a session.

        Args:
          folder: of the run.
          training: its name.
          began: when the session did, in seconds since 1970, as all times here.
          step: that it goes on from.
          saved: when that step was saved; 0: never, it is the first.
        """
        self.path, self.training = folder / "sessions.json", training
        every = files.read_json(self.path, {})
        before = self._lost(every.get(training, []))
        for each in every.get(training, []):  # more than one, where a damaged checkpoint was passed
            redone = each["last_step"] - max(step, each["first_step"])
            seconds = each["seen"] - max(saved, each["began"])
            each["lost_steps"] = max(each["lost_steps"], redone)
            each["lost_seconds"] = max(each["lost_seconds"], seconds)
        now = self._lost(every.get(training, []))
        self.lost = tuple(a - b for a, b in zip(now, before, strict=True))  # steps, seconds: newly
        self._session = {
            "began": began,
            "seen": time.time(),
            "first_step": step,
            "last_step": step,
            "lost_steps": 0,
            "lost_seconds": 0.0,
        }
        every.setdefault(training, []).append(self._session)
        self._every = every
        files.write_json(self.path, every)

    def seen(self, step: int) -> None:
        """Notes that the session is alive, and how far it has come."""
        self._session |= {"seen": time.time(), "last_step": step}
        files.write_json(self.path, self._every)

    def numbers(self, productive: float | None) -> dict[str, float | int | None]:
        """What the sessions come to.

        Args:
          productive: seconds that the steps took that were kept; None: not known.

        Returns:
          goodput, the share of the wall time that was productive; restarts; steps_redone and
          seconds_lost, from the checkpoint that was gone on from to when the session was last seen;
          seconds_up, of all sessions, and seconds_down, between them.
        """
        sessions = self._every[self.training]
        up = sum(each["seen"] - each["began"] for each in sessions)
        wall = sessions[-1]["seen"] - sessions[0]["began"]
        steps, seconds = self._lost(sessions)
        return {
            "goodput": productive / wall if productive is not None and wall else None,
            "restarts": len(sessions) - 1,
            "steps_redone": steps,
            "seconds_lost": seconds,
            "seconds_up": up,
            "seconds_down": wall - up,
        }

    @staticmethod
    def _lost(sessions: list[dict]) -> tuple[int, float]:
        """Steps and seconds, of all."""
        steps = sum(session["lost_steps"] for session in sessions)
        return steps, sum((session["lost_seconds"] for session in sessions), 0.0)
