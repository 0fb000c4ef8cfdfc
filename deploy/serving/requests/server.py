"""A worker's HTTP server: uvicorn's, which checks its connections every second and drains before it stops."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, cast

import uvicorn

from deploy.serving.requests.access import Access
from deploy.serving.requests.connections import BoundedConnection, ConnectionLimits
from state.errors import PortTaken

if TYPE_CHECKING:
    from deploy.serving.requests.grpc_server import GrpcServer

AT_ONCE = 64
"""Connections accepted in one iteration of the event loop."""
HANDSHAKE_S = 10.0
PAUSE_S = 0.5
TICK_S = 0.1
GRACE_S = 10
IDLE_S = 60
BACKLOG = 2048
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(__name__)


def listen(host: str, port: int, setting: str = "serving.port") -> socket.socket:
    """Binds a socket to a port; raises PortTaken, which names `setting`, if the port is in use."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(f"port {port} of {host} is in use", f"stop its owner or set {setting}") from None
    return bound


class Acceptor:
    """Accepts connections from its creation until `close`; stands in for the server object that uvicorn expects.

    It accepts many waiting connections per iteration of the event loop. uvloop's own server accepts one, so under
    load a new client would wait for seconds.
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
        """Accepts no more connections; open ones stay."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._bound)

    async def wait_closed(self) -> None:
        """Returns when each accepted connection is open, or was given up."""
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
                    # The waiting client would wake this loop continuously.
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
        # A client that disconnects, or whose handshake fails, is not an error of the server.
        with suppress(OSError):
            await self._loop.connect_accepted_socket(self._make, client, ssl=self._tls, ssl_handshake_timeout=timeout_s)


class Application(Protocol):
    """An ASGI application that this server lets end in order; `draining` is set when the process is about to end."""

    draining: bool

    def count_refused(self, reason: str) -> None:
        """Counts a request or connection that was refused before it reached the application."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""


class DrainingServer(uvicorn.Server):
    """The HTTP server of a worker.

    Connections are still accepted for `drain_s` after a signal. `ready` is called once they are accepted. `grpc`
    makes the gRPC server in the event loop.
    """

    def __init__(
        self,
        app: Application,
        limits: ConnectionLimits,
        drain_s: float,
        ready: Callable[[], None] = lambda: None,
        grpc: Callable[[], GrpcServer] | None = None,
        access: Access | None = None,
    ) -> None:
        config = uvicorn.Config(
            cast(Any, app),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=IDLE_S,
        )
        super().__init__(config)
        self._app, self._limits, self._drain_s, self._ready = app, limits, drain_s, ready
        self._make_grpc, self._access = grpc, access or Access()
        self._grpc: GrpcServer | None = None

    def end_on_signals(self) -> None:
        """Lets SIGTERM and SIGINT start the shutdown from now on, not only once the server runs.

        uvicorn's own handlers exist only while it runs. An earlier signal would be lost, and with it the end of a
        worker whose parent was killed.
        """

        def end(*_: object) -> None:
            self.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections."""
        if self._make_grpc is not None:
            self._grpc = self._make_grpc()
            await self._grpc.start()
        tls = None if self._access.certificate is None else self._access.certificate.context
        self.servers = cast(Any, [Acceptor(bound, BACKLOG, self._connection, tls) for bound in sockets or []])
        self.started = True
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Checks connections and access files once a second; called every `TICK_S`."""
        if counter % 10 == 0:
            now_s = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                cast(BoundedConnection, connection).enforce_limits(now_s)
            self._access.reload()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops as SIGTERM and SIGINT ask.

        1. /readyz answers 503, gRPC's health NOT_SERVING, and each HTTP answer announces that its connection closes.
           Connections are still accepted for `drain_s`, so that clients can switch to another host.
        2. No more connections are accepted. Connections without a request are closed, and pending requests are answered.
        """
        # 1. Clients may switch to another host.
        self._app.draining = True
        if self._grpc is not None:
            self._grpc.poll()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._drain_s
        for turn in count():
            if loop.time() >= until_s or self.force_exit:
                break
            await self.on_tick(turn)
            await asyncio.sleep(TICK_S)
        # 2. The rest is answered.
        ending = [super().shutdown(sockets), *([self._grpc.stop(GRACE_S)] if self._grpc is not None else [])]
        await asyncio.gather(*ending)

    def _connection(self) -> BoundedConnection:
        return BoundedConnection(
            self._limits, self._app.count_refused, config=self.config, server_state=self.server_state, app_state={}
        )
