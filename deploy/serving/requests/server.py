"""A worker's HTTP server: uvicorn's, with limits on what a client may send and leave unread. It drains before it stops.

    event                                                      answer before the connection is closed
    not HTTP, or HTTP/1.1 without exactly one host             400
    a host that another site could own, with `own_hosts`       403
    the head of a request is larger than `head_bytes`          431
    a request does not arrive within `timeout_s`               408
    more than `connections` connections                        429, each request on it
    the client does not read an answer for `timeout_s`         none
    no request for `timeout_s` after the connection opened     none

`own_hosts` protects against DNS rebinding (`docs/reference/api.md`).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deploy.serving.requests.access import Access
from deploy.serving.requests.http import JSON, LAST, Response, answer, failure
from deploy.serving.requests.rotation import Rotation
from state.errors import BadRequest, Forbidden, Overloaded, PortTaken, SpringtideError

if TYPE_CHECKING:
    from deploy.serving.requests.grpc_server import GrpcServer

PIPELINED = 16
"""Requests of one connection that may wait behind the current one."""
MAX_HEAD_BYTES = 32_768
PIECE_BYTES = 2048
"""Bytes parsed at once. The parser cannot stop inside a piece, so its requests may exceed `PIPELINED`."""
_JSON_LINE = b"".join(name + b": " + value + b"\r\n" for name, value in JSON) + b"content-length: "


def one_host(hosts: list[bytes]) -> str:
    """The host of an HTTP/1.1 request, from the values of its header `host`.

    >>> one_host([b"localhost"])
    'localhost'

    Raises:
        BadRequest: The request has no host, or more than one.
    """
    if len(hosts) != 1:
        raise BadRequest(f"the request has {len(hosts)} headers `host`", "send one")
    return hosts[0].decode("latin-1")


def require_own_host(host: str) -> None:
    """Refuses a name that another site could own.

    >>> for host in ("127.0.0.1:8502", "localhost", "[::1]:8502"):
    ...     require_own_host(host)
    >>> require_own_host("shop.example:8502")
    Traceback (most recent call last):
    state.errors.Forbidden: the host of the request is 'shop.example:8502', ...

    Raises:
        Forbidden: It is neither an address nor `localhost`.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() == "localhost":
        return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        raise Forbidden(
            f"the host of the request is {host[:100]!r}, and without tokens only an address or localhost is answered",
            "ask by the address, or set serving.tokens to on",
        ) from None


class ConnectionLimits(NamedTuple):
    """What a connection may do.

    Attributes:
        connections: Of one worker at a time.
        own_hosts: Whether a request must name an address or localhost as its host.
        head_bytes: Size of request line and headers together.
    """

    timeout_s: float
    connections: int
    own_hosts: bool = False
    head_bytes: int = MAX_HEAD_BYTES


class _Flow(FlowControl):
    """uvicorn's flow control, except that an answer does not resume reading while received bytes are unparsed."""

    unparsed = False

    def resume_reading(self) -> None:
        if not self.unparsed:
            super().resume_reading()


class BoundedConnection(HttpToolsProtocol):
    """A connection within limits; uvicorn makes one for each that is accepted.

    Args:
        refused: Counts refusals, by reason.
    """

    flow: _Flow

    def __init__(self, limits: ConnectionLimits, refused: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._limits, self._refused = limits, refused
        self._since_s = self.loop.time()
        self._requests = self._received = self._body = self._buffered = self._arriving_bytes = 0
        self._in_request = self._in_head = self._ended = False
        self._unparsed = memoryview(b"")
        self._known_hosts: list[bytes] | None = None
        self._answered_s = self._since_s
        self._respond = getattr(self.app, "respond", None)

    def connection_made(self, transport: Any) -> None:
        """Counts a new connection; above the limit, each of its requests is refused."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if len(self.connections) > self._limits.connections:
            self._refused("connections")
            self.app, self._respond = cast(Any, _too_many), None

    def data_received(self, data: bytes) -> None:
        """Parses received data; the module docstring lists what is refused."""
        if self._ended:
            return
        if not self._unparsed and len(data) <= PIECE_BYTES and len(self.pipeline) < PIPELINED:
            self._parse_piece(data)
            return
        self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
        self._parse()

    def _parse(self) -> None:
        """Parses what was received, until `PIPELINED` requests wait; then pauses reading."""
        while self._unparsed and not self._ended and len(self.pipeline) < PIPELINED:
            piece, self._unparsed = self._unparsed[:PIECE_BYTES], self._unparsed[PIECE_BYTES:]
            self._parse_piece(piece)
        if self._ended:
            self._unparsed = memoryview(b"")
        self.flow.unparsed = bool(self._unparsed)
        if self._unparsed:
            self.flow.pause_reading()

    def _parse_piece(self, data: bytes | memoryview) -> None:
        # If bytes arrived with the end of another request, their request is unknown.
        only = self._requests + (not self._in_request)
        self._arriving_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Upgrades are not supported: the bytes after one would not be HTTP.
            self._unparsed = memoryview(b"")
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if not self._ended:
                self._refuse("no_http", BadRequest("this is no HTTP/1.1 request", "send one"))
            return
        if self._in_request and only == self._requests and not self._ended:
            self._received += len(data)
            # A body may have one byte of framing per byte.
            if self._received - 2 * self._body > self._limits.head_bytes:
                self._refuse("head", self._too_large())

    def on_response_complete(self) -> None:
        """Continues with pending requests after an answer.

        Unlike in uvicorn, `look` closes idle connections, so no answer needs a timer.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._answered_s = self.loop.time()
        if self._unparsed:
            self._since_s = self._answered_s
            self._parse()
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._respond is None:
            super()._start_asgi_task(cycle, app)
            return
        answering = self._respond(cycle.scope, cycle.receive, partial(self._write, cycle))
        if answering is not None:
            self._start(answering)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _write(self, cycle: RequestResponseCycle, response: Response) -> None:
        """Writes an answer at once, or as uvicorn does if the client does not read or there are more headers."""
        if response.headers is not JSON or self.flow.write_paused or not cycle.keep_alive or cycle.disconnected:
            self._start(answer(cast(Any, cycle.send), response))
            return
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        lines = [STATUS_LINE[response.status]]
        for name, value in cycle.default_headers:
            lines += (name, b": ", value, b"\r\n")
        body = b"" if cycle.scope["method"] == "HEAD" else response.body
        lines += (_JSON_LINE, b"%d\r\n\r\n" % len(response.body), body)
        self.transport.write(b"".join(lines))
        cycle.on_response()
        cycle.on_response = _nothing

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps answering a client that sends no more, except over TLS, which has no half-closed state."""
        if self.scheme == "https" or self._in_request or self.cycle is None or self.cycle.response_complete:
            return False
        self._ended = True
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """Starts a request."""
        self._requests += 1
        self._received = self._body = 0
        self._in_request = self._in_head = True
        self._since_s = self.loop.time()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; one behind the body is ignored."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handles the end of a request's headers."""
        self._in_head = False
        if self._ended:
            return
        if self._arriving_bytes + self._received > self._limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self._limits.head_bytes:
                self._refuse("head", self._too_large())
                return
        hosts = [value for name, value in self.headers if name == b"host"]
        if hosts != self._known_hosts and not self._takes_host(hosts):
            return
        super().on_headers_complete()

    def _takes_host(self, hosts: list[bytes]) -> bool:
        """Checks the hosts of a request; those of the connection's previous request are known."""
        try:
            if hosts or self.parser.get_http_version() != "1.0":
                host = one_host(hosts)
                if self._limits.own_hosts:
                    require_own_host(host)
        except BadRequest as error:
            self._refuse("host" if isinstance(error, Forbidden) else "no_http", error)
            return False
        self._known_hosts = hosts
        return True

    def on_body(self, body: bytes) -> None:
        """Adds a part of the body."""
        self._body += len(body)
        if not self._ended:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Passes a complete request to the application."""
        self._in_request = False
        if not self._ended:
            super().on_message_complete()

    def enforce_limits(self, now_s: float) -> None:
        """Closes a connection that exceeds a time limit, by the loop's clock; called every second."""
        cycle = self.cycle
        is_idle = cycle is not None and cycle.response_complete and not self._in_request and not self._unparsed
        if is_idle and now_s - self._answered_s >= self.timeout_keep_alive:
            self.transport.close()
        buffered = self.transport.get_write_buffer_size()
        if buffered < self._buffered:
            # The client is reading its answer.
            self._since_s = now_s
        self._buffered = buffered
        if now_s - self._since_s < self._limits.timeout_s:
            return
        if self._ended or self.transport.is_closing() or buffered:
            self.transport.abort()
        elif self._in_request and not self._unparsed:
            late = f"the request did not arrive within {self._limits.timeout_s:g} s"
            self._refuse("slow", BadRequest(late, "send it at once, or ask for less", http_status=408))
        elif self.cycle is None:
            self.transport.close()

    def _too_large(self) -> SpringtideError:
        problem = f"request line and headers exceed {self._limits.head_bytes} bytes"
        return BadRequest(problem, "send shorter headers and parameters", http_status=431)

    def _refuse(self, reason: str, error: SpringtideError) -> None:
        """Answers in place of the application, after all pending answers, and closes the connection."""
        self._refused(reason)
        self._ended = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            # Pending answers come first, and the last of them ends the connection.
            cycle.keep_alive = False
            return
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            response = failure(error)
            lines = [STATUS_LINE[response.status], b"connection: close\r\n"]
            lines += [name + b": " + value + b"\r\n" for name, value in response.headers]
            lines += [b"content-length: %d\r\n\r\n" % len(response.body), response.body]
            self.transport.write(b"".join(lines))
        self.transport.close()


def _nothing() -> None:
    """Replaces a callback that would keep a reference to its connection."""


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    error = Overloaded("too many connections are open", "use fewer connections, or ask another host")
    response = failure(error)
    await answer(send, response._replace(headers=[*response.headers, LAST]))


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
    """The HTTP server of a worker, and its gRPC server.

    Connections are accepted while `rotation` says so, and for `drain_s` after a signal. `started` is called once the
    event loop runs, and `opened` each time that connections are accepted from then on. `grpc` makes a gRPC server in
    the event loop.
    """

    def __init__(
        self,
        app: Application,
        limits: ConnectionLimits,
        drain_s: float,
        started: Callable[[], None] = lambda: None,
        opened: Callable[[], None] = lambda: None,
        grpc: Callable[[], GrpcServer] | None = None,
        access: Access | None = None,
        rotation: Rotation | None = None,
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
        self._app, self._limits, self._drain_s = app, limits, drain_s
        self._say_started, self._say_opened = started, opened
        self._make_grpc, self._access, self._rotation = grpc, access or Access(), rotation or Rotation()
        self._grpc: GrpcServer | None = None
        self._bound: Sequence[socket.socket] = ()
        self._is_open = False

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
        """Accepts connections, if this worker is in rotation."""
        self._bound, self.servers = sockets or (), []
        await self._rotate()
        self.started = True
        self._say_started()

    async def _rotate(self) -> None:
        """Accepts connections or not, as the rotation says."""
        if not self._rotation.accepts:
            await self._close()
        elif not self._is_open and self._rotation.open():
            await self._open()

    async def _open(self) -> None:
        self._is_open = True
        if self._make_grpc is not None:
            self._grpc = self._make_grpc()
            await self._grpc.start()
        tls = None if self._access.certificate is None else self._access.certificate.context
        self.servers = cast(Any, [Acceptor(bound, BACKLOG, self._connection, tls) for bound in self._bound])
        self._say_opened()

    async def _close(self) -> None:
        """Accepts no more connections. Those without a request are closed, the others after their answer."""
        for server in self.servers:
            server.close()
        # Again at each call: the last connection that was accepted may have opened late.
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self._is_open:
            self._is_open, self.servers = False, []
            if self._grpc is not None:
                await self._grpc.stop(0.0)
                self._grpc = None
            self._rotation.closed()

    async def on_tick(self, counter: int) -> bool:
        """Checks the rotation, and once a second connections and access files; called every `TICK_S`."""
        await self._rotate()
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
        self._rotation.closed()
        ending = [super().shutdown(sockets), *([self._grpc.stop(GRACE_S)] if self._grpc is not None else [])]
        await asyncio.gather(*ending)

    def _connection(self) -> BoundedConnection:
        return BoundedConnection(
            self._limits, self._app.count_refused, config=self.config, server_state=self.server_state, app_state={}
        )
