"""Several processes, usually one a host: how they meet, exchange values, and stop together.

The rest of the package uses the names below; the commands alone use the modules of this folder.
"""

import pickle
from collections.abc import Callable

import numpy as np
from etils import epy

from gptv_jax.errors import InputError
from gptv_jax.hosts.stopping import StoppedError, deferred_stop, saving_interrupts, until_stop

with epy.lazy_imports():  # see `command`
    import jax
    from jax.experimental import multihost_utils

__all__ = [
    "StoppedError",
    "deferred_stop",
    "from_all",
    "from_first",
    "on_all",
    "saving_interrupts",
    "until_stop",
]


def from_first(function: Callable[[], object]):
    """The value of `function()` on process 0, which alone calls it; sent to the others by pickle.

    An InputError of `function` is raised by every process.
    """
    if jax.process_count() == 1:
        return function()
    value = refused = None
    if jax.process_index() == 0:
        try:
            value = function()
        except InputError as error:
            refused = error
    content = pickle.dumps((value, refused))
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = multihost_utils.broadcast_one_to_all(_padded(content, length)).tobytes()
    value, refused = pickle.loads(content)
    if refused:
        raise refused
    return value


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


def from_all(value) -> list:
    """The values that all processes give, in the order of the processes; sent by pickle."""
    if jax.process_count() == 1:
        return [value]
    content = pickle.dumps(value)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    sent = multihost_utils.process_allgather(_padded(content, max(lengths)))
    return [pickle.loads(row.tobytes()) for row in sent]


def _padded(content: bytes, length: int) -> np.ndarray:
    """The content as uint8, padded to a power of two, so that JAX compiles for few sizes."""
    size = max(1 << (int(length) - 1).bit_length(), 1024)
    return np.frombuffer(content.ljust(size, b"\0"), np.uint8)
