"""SIGTERM, by which a scheduler asks for the machine: a training saves its state before it ends.

A thread of its own hears the signal, so that nothing, a long compilation say, delays the answer.
Outside a training there is nothing to save, and the process ends at once. Within one, the request
is noted, and the loop acts on it between two steps, or between two batches of an evaluation.

The same thread hears SIGINT, Ctrl-C: a KeyboardInterrupt, raised wherever the main thread happens
to be, is lost in a library's callback, and what was to clean up may wait for what it left undone.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import errors

LOG = logging.getLogger(__name__)
EXIT_CODE = 128 + signal.SIGTERM  # by which schedulers see that the job is not complete


class StoppedError(Exception):
    """A training ended before its end, because it was asked to, and has saved."""


class EvaluationStoppedError(Exception):
    """An evaluation ended before its end, because the training is to stop."""


class Request:
    """What a training knows of being asked to stop."""

    def __init__(self):
        self.since: float | None = None  # time.monotonic()
        self._told: jax.Array | None = None  # by the call before

    def agreed(self) -> bool:
        """Whether any process was asked, the same answer on all of them.

        To be called equally often on each. Several processes learn of it one call late: what they
        tell each other is computed in its turn among the steps, and fetched when that is done.
        """
        if jax.process_count() == 1:
            return self.since is not None
        mesh = jax.sharding.get_mesh()
        shape, sharding = (mesh.size,), NamedSharding(mesh, P(mesh.axis_names))
        asked = np.array([self.since is not None])  # the same for each of its devices
        with jax.transfer_guard_host_to_device("allow"):
            every = jax.make_array_from_callback(shape, sharding, lambda _: asked)
        told, self._told = self._told, _any(every)
        agreed = told is not None and bool(jax.device_get(told))
        if agreed and self.since is None:
            self.since = time.monotonic()
        return agreed


_any = jax.jit(jnp.any)
_lock = threading.Lock()
_current: Request | None = None  # of the training that is under way


def install(interrupted: Callable[[], None]) -> None:
    """Answers SIGTERM and SIGINT from now on; to be called on the main thread.

    Args:
      interrupted: ends the process after SIGINT; called on another thread.
    """
    # JAX's own service would take the signal for itself when several processes connect.
    jax.config.update("jax_enable_preemption_service", False)
    heard, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)  # every signal that Python handles is written there
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell has it in the background
        signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_listen, args=(heard, interrupted), daemon=True).start()


@contextlib.contextmanager
def deferred_stop() -> Iterator[Request]:
    """Within the `with`, SIGTERM is left to a training to act on; at its end, the process ends."""
    global _current
    _current = Request()
    try:
        yield _current
    finally:
        with _lock:
            request, _current = _current, None
    if request.since is not None:  # asked too late, the training is complete
        _end()


def until_stop(batches: Iterator[dict]) -> Iterator[dict]:
    """The batches of an evaluation, which is given up where the training around it is to stop.

    Raises:
      EvaluationStoppedError: it is.
    """
    for batch in batches:
        if _current is not None and _current.agreed():
            raise EvaluationStoppedError
        yield batch


def _listen(heard: int, interrupted: Callable[[], None]) -> None:
    while True:
        signals = os.read(heard, 64)
        if signal.SIGINT in signals:
            interrupted()
        if signal.SIGTERM not in signals:
            continue
        with _lock:
            if _current is None:
                _end()
            if _current.since is None:
                _current.since = time.monotonic()
        LOG.info("SIGTERM: saves after the step under way, and ends.")


def _end() -> None:
    told = "stopped by SIGTERM; the same command continues from the last checkpoint"
    errors.end(EXIT_CODE, told)
