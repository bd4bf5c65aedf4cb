"""A line between the processes of a run, on which each notices that another one has stopped.

JAX alone would not do. Where a process dies the others wait in a collective, on a CPU until the
connection breaks, on a GPU or a TPU until a heartbeat is missed, and are then aborted with a C++
stack. So every process keeps a connection to process 0. The system closes it when a process dies,
however it dies; one that freezes, or whose machine is gone, falls silent. Process 0 tells the
others, and all of them end with a sentence.
"""

import contextlib
import ctypes
import json
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

SILENCE = 100.0  # seconds without a sign of life after which a process counts as gone; as in JAX
BEAT = 5.0  # seconds between two signs of life
DIED = 75  # exit code after another's death; sysexits.h: temporary, to be tried again
CONTINUE = "the same command continues from the last checkpoint."
GREETING = 60.0  # seconds in which all processes, already found by JAX, must be on the line


class Watch:
    """This process's end of the line."""

    def __init__(
        self,
        who: str,
        peers: dict[int, socket.socket],
        names: dict[int, str],
        on_loss: Callable[[str, int], None],
    ):
        """Starts to watch, in a thread.

        Args:
          who: what to call this process.
          peers: connections by process: to all others from process 0, from them to it.
          names: what to call these processes.
          on_loss: called once, with a sentence and an exit code, when another process has stopped.
        """
        self._who, self._peers, self._names, self._on_loss = who, peers, names, on_loss
        self._lock, self._left, self._lost = threading.Lock(), set(), False
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._unread = dict.fromkeys(peers, b"")
        _delay_aborts()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def tell(self, reason: str, code: int) -> None:
        """Says to all why, and with which code, this process ends now, so that they end too."""
        self._send({"lost": f"{self._who} has ended: {reason}", "code": code})

    def leave(self) -> None:
        """Says that this process is through: that it falls silent from here on is no failure."""
        self._send({"left": True})

    def _send(self, message: dict | None, but: int | None = None) -> None:
        """A JSON object a line; an empty line is a sign of life."""
        line = (json.dumps(message) if message else "").encode() + b"\n"
        with self._lock:
            for peer, connection in self._peers.items():
                if peer != but:
                    # Where it is gone, reading from it tells.
                    with contextlib.suppress(OSError):
                        connection.sendall(line)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for peer, connection in self._peers.items():
            selector.register(connection, selectors.EVENT_READ, peer)
        beat = time.monotonic()
        while not self._lost:
            for key, _ in selector.select(timeout=BEAT):
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - beat >= BEAT:
                self._send(None)
                beat = now
            for peer, heard in self._heard.items():
                if peer not in self._left and now - heard > SILENCE:
                    told = f"has been silent for {SILENCE:g} seconds; {CONTINUE}"
                    self._lose(peer, f"{self._names[peer]} {told}")

    def _read(self, peer: int) -> bool:
        """Whether the connection is still open."""
        try:
            content = self._peers[peer].recv(65536)
        except OSError:
            content = b""
        if not content:
            if peer not in self._left:
                self._lose(peer, f"{self._names[peer]} has stopped answering; {CONTINUE}")
            return False
        self._heard[peer] = time.monotonic()
        *lines, self._unread[peer] = (self._unread[peer] + content).split(b"\n")
        for message in (json.loads(line) for line in lines if line):
            if "left" in message:
                self._left.add(peer)
            else:
                self._lose(peer, message["lost"], message["code"])
        return True

    def _lose(self, peer: int, sentence: str, code: int = DIED) -> None:
        """Passes on what a peer said, or is known of it; once."""
        if not self._lost:
            self._lost = True
            self._send({"lost": sentence, "code": code}, but=peer)
            self._on_loss(sentence, code)


def meet(index: int, count: int, host: str, share: Callable, on_loss: Callable) -> Watch:
    """Connects every process to process 0, and watches.

    Args:
      index: of this process.
      count: of all.
      host: of process 0.
      share: `share(function)` is on every process what `function()` gave on process 0.
      on_loss: as `Watch` takes it.

    Raises:
      OSError: the connection cannot be made.
    """
    server = listen(backlog=count) if index == 0 else None
    # The word keeps out whoever else knocks at open ports.
    port, word = share(lambda: [server.getsockname()[1], secrets.token_hex()])
    own, peers = socket.gethostname(), {}
    names = {0: f"process 0 of {count} ({own if server else host})"}
    if server:
        with server:
            until = time.monotonic() + GREETING
            while len(peers) < count - 1:
                server.settimeout(max(until - time.monotonic(), 0.001))
                connection, _ = server.accept()
                greeting = _greeting(connection)
                if greeting.get("word") == word:
                    peers[greeting["process"]] = connection
                    names[greeting["process"]] = greeting["name"]
    else:
        peers[0] = socket.create_connection((host, port), GREETING)
        peers[0].settimeout(None)
        names[index] = f"process {index} of {count} ({own})"
        greeting = {"word": word, "process": index, "name": names[index]}
        peers[0].sendall(json.dumps(greeting).encode() + b"\n")
    return Watch(names[index], peers, names, on_loss)


def listen(port: int = 0, backlog: int = 1) -> socket.socket:
    """A server on a port, 0 for a free one, for IPv4 and, where there is it, IPv6.

    Raises:
      OSError: the port is taken.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def _greeting(connection: socket.socket) -> dict:
    """The first line, and no byte more; nothing where it is none of ours."""
    line = b""
    try:
        connection.settimeout(GREETING)
        while not line.endswith(b"\n") and len(line) < 1000:
            line += connection.recv(1) or b"\n"
        connection.settimeout(None)
        return json.loads(line)
    except (OSError, ValueError):
        connection.close()
        return {}


def _delay_aborts() -> None:
    """Gives this module's thread the time to say who has stopped.

    JAX aborts the process as soon as process 0 is gone, and nothing in Python may run while it
    does. C's `sleep` may: as the handler of the signal it is given its number, 6, as its seconds;
    when it returns the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
