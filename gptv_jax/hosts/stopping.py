"""The request to stop: SIGTERM, by which a scheduler takes the machine back, and SIGINT (Ctrl-C).

A training answers SIGTERM between two steps, or between two batches of an evaluation: it saves
its state and ends. Anywhere else there is nothing to save, and the process ends at once. SIGINT
ends the process at once anywhere.

A thread waits for the signals, so that a long compilation does not delay the answer, and because
a KeyboardInterrupt in the main thread can be lost in a library's callback. Where several processes
run together, JAX's preemption service takes SIGTERM from this thread: it tells all processes, and
lets them stop at the same sync point.
"""

import contextlib
import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
from etils import epy

from gptv_jax import errors

with epy.lazy_imports():  # see `command`
    import jax
    from jax.experimental import multihost_utils

LOG = logging.getLogger(__name__)
STOPPED = 128 + signal.SIGTERM  # exit codes as of a shell; a scheduler sees that work is left
INTERRUPTED = 128 + signal.SIGINT
# What another start of the command does.
CONTINUES = "the same command continues from the last checkpoint"
BEGINS_ANEW = "the same command begins anew"
POLL = 0.2  # seconds between two sync points outside a training


class StoppedError(Exception):
    """A training was asked to stop: its evaluation, or the training with its state saved, ends."""


class StopRequest:
    """Whether a training is asked to stop, since when, and by what."""

    since: float | None = None  # time.monotonic() of the request
    reason = "SIGTERM"

    def agreed(self) -> bool:
        """Whether any process was asked to stop, with the same answer on every process.

        Every process must call this equally often.
        """
        if _synchronized and self.since is None and _sync_point_reached():
            self.since = time.monotonic()
        return self.since is not None


_lock = threading.Lock()
_training: StopRequest | None = None  # None outside a training
_synchronized = False  # JAX's preemption service hears SIGTERM
_sync_points = 0  # that this process has passed
_again = CONTINUES


def install(again: str = CONTINUES) -> None:
    """Answers SIGTERM and SIGINT from now on; to be called on the main thread.

    `again` tells the user what a new start of the command does.
    """
    global _again
    _again = again
    # A pair of sockets and not a pipe, which Windows cannot wait for.
    heard, write_end = socket.socketpair()
    write_end.setblocking(False)
    # Python writes the number of every signal there. `detach`: the socket is never closed.
    signal.set_wakeup_fd(write_end.detach())
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell ignores it in the background
        signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def synchronize() -> None:
    """Leaves SIGTERM to JAX's preemption service, which `jax.distributed` has started."""
    global _synchronized
    _synchronized = True


def leave() -> None:
    """Waits until every process calls this, and disconnects this process from the others."""
    global _synchronized
    if _synchronized:
        with _lock:
            _synchronized = False
        jax.distributed.shutdown()


@contextlib.contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Within the `with`, a training answers SIGTERM; afterwards the process ends by it again."""
    global _training
    with _lock:
        _training = request = StopRequest()
    try:
        if _synchronized:  # brings every process to the newest sync point that any has passed
            with jax.transfer_guard("allow"):
                newest = multihost_utils.process_allgather(np.int32(_sync_points)).max()
            while _sync_points < newest:
                if _sync_point_reached():
                    _end()
        yield request
    finally:
        with _lock:
            _training = None
    if request.since is not None:  # the request came after the last save: the training is complete
        if request.reason != "SIGTERM":
            raise KeyboardInterrupt
        _end()


def until_stop(batches: Iterator[dict]) -> Iterator[dict]:
    """The batches of an evaluation; StoppedError where the training around it is asked to stop."""
    for batch in batches:
        if _training is not None and _training.agreed():
            raise StoppedError
        yield batch


@contextlib.contextmanager
def saving_interrupts() -> Iterator[None]:
    """Within the `with`, an interrupt lets a training save before it ends as KeyboardInterrupt.

    For Python sessions, in which `install` has not been called. A second interrupt ends the
    training at once. Only the main thread gets interrupts; elsewhere this does nothing.
    """

    def answer(number: int, frame) -> None:
        if _training is None or _training.since is not None:
            raise KeyboardInterrupt
        _training.since, _training.reason = time.monotonic(), "an interrupt"
        LOG.info("Interrupt: saves after the current step, and ends; once more ends at once.")

    before = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if ours := main_thread and before is signal.default_int_handler:  # another handler stays
        signal.signal(signal.SIGINT, answer)
    try:
        yield
    except StoppedError as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _sync_point_reached() -> bool:
    """Passes the next sync point; True at the one at which all processes stop.

    JAX chooses the sync point after the newest that any process has passed when SIGTERM comes. So
    none may be left out, and in a training every process passes the same one at the same step.
    """
    global _sync_points
    _sync_points += 1
    return multihost_utils.reached_preemption_sync_point(_sync_points)


def _listen(heard: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([heard], [], [], POLL)
        signals = heard.recv(64) if ready else b""
        if signal.SIGINT in signals:
            errors.end(INTERRUPTED, f"interrupted; {_again}")
        with _lock:
            if _training is None:
                if signal.SIGTERM in signals or (_synchronized and _sync_point_reached()):
                    _end()
            elif signal.SIGTERM in signals and not _synchronized:
                _training.since = _training.since or time.monotonic()
                LOG.info("SIGTERM: saves after the current step, and ends.")


def _end() -> None:
    if _synchronized:  # a process that left alone would count as dead; the others end as well
        jax.distributed.shutdown()
    errors.end(STOPPED, f"stopped by SIGTERM; {_again}")
