"""Several processes, usually one a host: how they meet, exchange values, and stop together.

The rest of the package uses the names below; the commands alone use the modules of this folder.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptv_jax.errors import InputError
from gptv_jax.hosts.stopping import StoppedError, deferred_stop, saving_interrupts, until_stop

__all__ = [
    "StoppedError",
    "bytes_of_first",
    "deferred_stop",
    "from_all",
    "from_first",
    "on_all",
    "saving_interrupts",
    "until_stop",
]


def from_first(function: Callable[[], object]):
    """The value of `function()` on process 0, which alone calls it; sent to the others as JSON.

    An InputError of `function` is raised by every process.
    """
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except InputError as error:
            outcome = {"error": str(error)}
    outcome = json.loads(bytes_of_first(json.dumps(outcome).encode()))
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["value"]


def on_all(function: Callable):
    """The value of `function()`, which every process calls.

    An InputError of any process is raised by every process, and names the process.
    """
    if jax.process_count() == 1:
        return function()
    value = refused = None
    try:
        value = function()
    except InputError as error:
        refused = str(error)
    for index, reason in enumerate(from_all(refused)):
        if reason is not None:
            raise InputError(f"process {index} of {jax.process_count()}: {reason}")
    return value


def bytes_of_first(content: bytes) -> bytes:
    """The content that process 0 gives, on every process."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return multihost_utils.broadcast_one_to_all(_padded(content, length)).tobytes()[:length]


def from_all(value) -> list:
    """The values that all processes give, in the order of the processes; sent as JSON."""
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    sent = multihost_utils.process_allgather(_padded(content, max(lengths)))
    return [json.loads(row.tobytes()[:n]) for row, n in zip(sent, lengths, strict=True)]


def _padded(content: bytes, length: int) -> np.ndarray:
    """The content as uint8, padded to a power of two, so that JAX compiles for few sizes."""
    size = max(1 << (int(length) - 1).bit_length(), 1024)
    return np.frombuffer(content.ljust(size, b"\0"), np.uint8)
