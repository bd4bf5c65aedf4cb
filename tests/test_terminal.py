"""What a person sees on a terminal of 80 columns."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import small_arguments

pytestmark = pytest.mark.process
COLUMNS = 80


def seen_on_terminal(command: list[str]) -> list[str]:
    """The lines that a command writes on a terminal of 80 columns; a bar is a line each time."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as started:
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # the command has closed its end
            while part := os.read(ours, 65536):
                written += part
    os.close(ours)
    assert started.returncode == 0, written[-3000:]
    return re.split(r"[\r\n]+", written.decode())


def test_80_columns_show_loss_validation_speed_and_time_left(tmp_path):
    settings = ["--stages=pretrain", "--config.train.steps=40", "--config.train.eval_every=10"]
    module = [sys.executable, "-m", "gptv_jax.main"]
    lines = seen_on_terminal([*module, *small_arguments(tmp_path, *settings)])
    bars = [line for line in lines if line.startswith("pretrain ") and "|" in line]
    assert bars and max(map(len, bars)) <= COLUMNS
    loss, speed = r"loss \d\.\d+ val \d\.\d+ best \d\.\d+", r"[\d.]+k? tokens/s \d+[smh] left"
    assert [bar for bar in bars if re.match(rf"pretrain \d+/40 {loss} {speed} \|", bar)]
    evaluated = [line for line in lines if line.startswith("pretrain ") and "validation" in line]
    steps = [
        re.match(r"pretrain (\d+)/40 validation: nats_per_token \d\.\d+ \(", e) for e in evaluated
    ]
    assert [int(step[1]) for step in steps] == [0, 10, 20, 30, 40]
    assert all("best so far" in line or "best 1." in line for line in evaluated)
