"""Where a run's numbers go (JSON lines, TensorBoard, the terminal), and the units of speed."""

import collections
import json
import logging
import pathlib
import shutil
import sys
import time

import jax
import tqdm
from etils import epy

from gptv_jax import files, hardware

with epy.lazy_imports():  # it imports torch where that is installed, which takes seconds
    import tensorboardX

LOG = logging.getLogger(__name__)


def mfu(flops: int, tokens_per_second: float | None) -> float | None:
    """Model FLOPs utilisation: the share of all devices' bfloat16 peak; None where not known.

    `flops` are those of one token, as `model.flops` counts; the speed is that of all devices.
    """
    known = hardware.of(jax.devices()[0].device_kind)
    if known is None or tokens_per_second is None:
        return None
    return tokens_per_second * flops / (known.peak_flops * jax.device_count())


class MetricWriter:
    """Writes events as JSON lines and to TensorBoard; on process 0 alone."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.board_folder = folder / "tensorboard"
        self._counts: collections.Counter[str] = collections.Counter()
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}

    def write(self, stage: str, step: int, values: dict[str, float | int | None]) -> None:
        self._counts[stage] += 1
        if jax.process_index() != 0:
            return
        event = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        self._show(event)

    def count(self, stage: str) -> int:
        return self._counts[stage]

    def rewind(self, stage: str, step: int, count: int | None = None) -> None:
        """Drops the stage's events that a resumed training is about to repeat.

        These are the events of steps later than `step`, and those after the first `count`.
        TensorBoard's files of the stage, whose end a kill may have cut off, are written anew.
        """
        if jax.process_index() != 0 or not self.path.exists():
            return
        shutil.rmtree(self.board_folder / stage, ignore_errors=True)
        kept = []
        self._counts[stage] = 0
        for event in self.read():
            if event["stage"] == stage:
                if event["step"] > step or self._counts[stage] == count:
                    continue
                self._counts[stage] += 1
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

    def _show(self, event: dict) -> None:
        stage, step = event["stage"], event["step"]
        if stage not in self._boards:
            # The SummaryWriter's thread writes the file every two seconds and at exit.
            folder = str(self.board_folder / stage)
            self._boards[stage] = tensorboardX.SummaryWriter(folder, flush_secs=2)
        for name, value in event.items():
            if name not in ("stage", "step", "time") and value is not None:
                self._boards[stage].add_scalar(f"{stage}/{name}", value, step, event["time"])


class Progress:
    """A bar on a terminal; elsewhere one line each time `report` is called."""

    def __init__(self, stage: str, steps: int, done: int = 0, unit: str = "step"):
        self.stage, self.steps = stage, steps
        hidden = not sys.stderr.isatty() or jax.process_index() != 0
        self.bar = tqdm.tqdm(total=steps, initial=done, desc=stage, unit=unit, disable=hidden)
        self.advance, self.close = self.bar.update, self.bar.close

    def report(self, step: int, values: dict[str, float | None]) -> None:
        shown = {k: f"{v:.4g}" for k, v in values.items() if v is not None}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and jax.process_index() == 0:
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            LOG.info("%s %d/%d  %s", self.stage, step, self.steps, line)
