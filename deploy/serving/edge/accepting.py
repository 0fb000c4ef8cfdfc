"""Accepts the connections that wait at a socket, many in a turn of the event loop.

uvloop's own server accepts one in each turn. Where turns are long because much
is asked, a new client would wait for seconds.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

AT_ONCE = 64
"""In one turn."""
HANDSHAKE_S = 10.0
PAUSE_S = 0.5
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger(__name__)


class Acceptor:
    """Accepts from its making on until `close`; what uvicorn takes for a server.

    Args:
        bound: The socket.
        backlog: How many connections may wait.
        make: Makes the protocol of a connection.
        tls: The certificate's context; None without TLS.
    """

    def __init__(
        self, bound: socket.socket, backlog: int, make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
    ) -> None:
        self._bound, self._make, self._tls = bound, make, tls
        self._loop = asyncio.get_running_loop()
        self._opening = set[asyncio.Task[None]]()
        self._again: asyncio.TimerHandle | None = None
        bound.setblocking(False)
        bound.listen(backlog)
        self._listen()

    def close(self) -> None:
        """Accepts no more; connections that are there stay."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._bound)

    async def wait_closed(self) -> None:
        """Returns when what was accepted is open, or was given up."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _listen(self) -> None:
        self._again = None
        self._loop.add_reader(self._bound, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                client, _ = self._bound.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    # The client still waits, and would wake this loop all the time.
                    _log.error("a connection cannot be accepted (%s); trying again", error.strerror)
                    self._loop.remove_reader(self._bound)
                    self._again = self._loop.call_later(PAUSE_S, self._listen)
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._open(client))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, client: socket.socket) -> None:
        timeout_s = HANDSHAKE_S if self._tls is not None else None
        # A client that goes away, or whose handshake fails, is no failure of ours.
        with suppress(OSError):
            await self._loop.connect_accepted_socket(self._make, client, ssl=self._tls, ssl_handshake_timeout=timeout_s)
