"""A link to a server on this machine that carries so many bytes a second, counts them and can be cut: a proxy, in its block."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

PIECE_BYTES = 8192
"""What is passed on at once, so that connections share the link."""


class SlowLink:
    """Passes connections on to a port of an address of this machine.

    Attributes:
        port: Where the link begins.
        connections: How many were made.
        carried_bytes: What was passed on so far.
    """

    def __init__(self, port: int, bytes_per_s: float = float("inf"), host: str = "127.0.0.1") -> None:
        self._to, self._bytes_per_s = (host, port), bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._flows = threading.Event()
        self._flows.set()
        self.port: int = self._listener.getsockname()[1]
        self.connections, self.carried_bytes = 0, 0
        self._lock, self._free_s = threading.Lock(), 0.0

    @property
    def url(self) -> str:
        """Where an HTTP server is reached over it."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> SlowLink:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def cut(self) -> None:
        """Lets no byte and no end of a connection through, and no new connection."""
        self._flows.clear()
        with suppress(OSError):
            # Closing alone does not end a call of `accept`.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def mend(self) -> None:
        """Carries again, first what was held."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._flows.set()
        self.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        # It ends when the listener is closed.
        with suppress(OSError):
            while True:
                near = listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(self._to) as far:
            there = threading.Thread(target=self._pass, args=(near, far), daemon=True)
            there.start()
            self._pass(far, near)
            there.join()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                time.sleep(self._turn(len(piece)))
                self._flows.wait()
                sink.sendall(piece)
        self._flows.wait()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _turn(self, size: int) -> float:
        """Seconds until so many bytes have gone over the link."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s) + size / self._bytes_per_s
            self.carried_bytes += size
            return self._free_s - now_s
