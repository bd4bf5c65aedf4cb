"""What a person sees on a terminal of 80 columns."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable

import pytest

from gptv_jax.train.metrics import Progress

pytestmark = pytest.mark.process
COLUMNS = 80


def seen_on_terminal(show: Callable[[], None], monkeypatch) -> list[str]:
    """The lines that `show` writes to a terminal of 80 columns; a bar is a line each time."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))

    def read() -> bytes:
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 65536):
                written += part
        return written

    with concurrent.futures.ThreadPoolExecutor() as pool, os.fdopen(ours, "rb", closefd=True):
        reading = pool.submit(read)
        with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            show()
        return re.split(r"[\r\n]+", reading.result().decode())


def test_80_columns_show_loss_validation_speed_and_time_left(finished_run, monkeypatch):
    """The bar and the lines, of the events that a real run logged."""
    log = (finished_run.folder / "metrics.jsonl").read_text().splitlines()
    events = [e for e in map(json.loads, log) if e.pop("stage") == "pretrain"]
    evaluations = []

    def show() -> None:
        progress = Progress("pretrain", 120)
        for event in events:
            step, _ = event.pop("step"), event.pop("time")
            if "learning_rate" in event:
                progress.report(step, event)
            elif loss := event.get("validation_nats_per_token"):
                evaluations.append({"step": step, "nats_per_token": loss})
                progress.evaluated(evaluations)
        progress.close()

    lines = seen_on_terminal(show, monkeypatch)
    bars = [line for line in lines if line.startswith("pretrain ") and "|" in line]
    assert bars and max(map(len, bars)) <= COLUMNS
    loss, speed = r"loss \d\.\d+ val \d\.\d+ best \d\.\d+", r"[\d.]+k? tokens/s [\d:]+ left"
    assert [bar for bar in bars if re.match(rf"pretrain \d+/120 {loss} {speed} \|", bar)]
    evaluated = [line for line in lines if line.startswith("pretrain ") and "validation" in line]
    assert [e["step"] for e in evaluations] == [0, 40, 80, 120]
    line = r"pretrain \d+/120 validation: nats_per_token \d\.\d+ \(best (so far|\d\.\d+ at \d+)\)"
    for seen, evaluation in zip(evaluated, evaluations, strict=True):
        assert re.fullmatch(line, seen) and seen.startswith(f"pretrain {evaluation['step']}/")
        assert seen in finished_run.errors  # where there is no terminal, the log has the line
