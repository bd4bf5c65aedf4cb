"""Values that the processes of a run send each other."""

import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptv_jax.errors import InputError


def from_first(function: Callable[[], object]):
    """What `function()` gives on process 0, which alone calls it, as JSON keeps it.

    Raises:
      InputError: it raised one; on all processes.
    """
    if jax.process_count() == 1:
        return function()
    content = b""
    if jax.process_index() == 0:
        try:
            content = json.dumps({"value": function()}).encode()
        except InputError as error:
            content = json.dumps({"error": str(error)}).encode()
    outcome = json.loads(bytes_of_first(content))
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["value"]


def bytes_of_first(content: bytes) -> bytes:
    """Process 0's content, on all processes."""
    if jax.process_count() == 1:
        return content
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return multihost_utils.broadcast_one_to_all(_padded(content, length)).tobytes()[:length]


def from_all(value) -> list:
    """Every process's value, in order, as JSON keeps it."""
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    sent = multihost_utils.process_allgather(_padded(content, max(lengths)))
    return [json.loads(row.tobytes()[:n]) for row, n in zip(sent, lengths, strict=True)]


def _padded(content: bytes, length: int) -> np.ndarray:
    """As uint8, of one of few sizes, for each of which JAX compiles once."""
    size = max(1 << (int(length) - 1).bit_length(), 1024)
    return np.frombuffer(content.ljust(size, b"\0"), np.uint8)
