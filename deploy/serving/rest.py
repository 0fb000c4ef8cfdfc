"""A serving worker's REST interface: raw ASGI on uvicorn, one process, one thread.

    GET  /v1/profiles/{user_id}?item=&category=&at=&context.NAME=
    POST /v1/profiles:batch      {"profiles": [{"user_id": ..., "item": ..., ...}, ...]} or {"users": [...]}
    GET  /v1/models/profile      as TensorFlow Serving's model status
    GET  /healthz /readyz /metrics

Errors are JSON: `error` says what happened, `do` what to do. One process
answers; with `serving.workers` above 1 several share the port. Nobody waits
for a batch to fill: what has arrived by the time the worker is free is
answered together.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import parse_qsl

import orjson
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest

from deploy.serving.host import Host
from deploy.serving.predictor import MOST_AT_ONCE, Query
from state.config.settings import Settings, load
from state.errors import PortTaken, SpringtideError, of_disk
from state.events.identity import load_salt
from state.metrics import WorkerMetrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PROFILES = "/v1/profiles/"
BATCH = "/v1/profiles:batch"
MODEL = "/v1/models/profile"
MOST_PROFILES = 256
MOST_BODY_BYTES = 1 << 20
LATEST_MS = 253_402_300_799_000  # the end of the year 9999
_JSON = [(b"content-type", b"application/json")]
_TEXT = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
_log = logging.getLogger(__name__)
_FIELDS = {"user_id", "item", "category", "at", "context"}


class BadRequest(Exception):
    """The request cannot be answered as it is.

    Attributes:
        do: What the caller should do.
    """

    def __init__(self, what: str, do: str) -> None:
        super().__init__(what)
        self.do = do


def time_ms(text: str | int) -> int:
    """A time given as milliseconds since 1970 or as ISO 8601 (UTC unless it says otherwise).

    >>> time_ms("1500"), time_ms("1970-01-01T00:00:01.5Z")
    (1500, 1500)

    Raises:
        BadRequest: It is neither, or lies outside of the years 1970 to 9999.
    """
    try:
        at_ms = int(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(str(text))
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            at_ms = round(moment.timestamp() * 1000)
        except (ValueError, OverflowError):
            at_ms = -1
    if not 0 <= at_ms <= LATEST_MS:
        raise BadRequest(
            f"at={text!r} is no time", "give ISO 8601 such as 2026-01-31T12:00:00Z, or milliseconds since 1970"
        )
    return at_ms


def encode(document: object) -> bytes:
    """JSON; numpy arrays and dataclasses included."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


class App:
    """The ASGI application.

    Args:
        host: What answers.
        registry: Where the metrics are.
        clock_s: A monotonic clock.
    """

    def __init__(
        self, host: Host, registry: CollectorRegistry, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._host = host
        self._registry = registry
        self._metrics = WorkerMetrics(registry)
        self._clock_s = clock_s
        self._counters: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._waiting: deque[tuple[Query, asyncio.Future[bytes]]] = deque()

    def close(self) -> None:
        """Closes the stores; the next request opens them again."""
        self._host.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        began_s = self._clock_s()
        path: str = scope["path"]
        route, headers = "unknown", _JSON
        try:
            if path.startswith(PROFILES) and len(path) > len(PROFILES):
                route = "profile"
                _only(scope, "GET")
                status, body = 200, await self._profile(question(path[len(PROFILES) :], scope["query_string"]))
            elif path == BATCH:
                route = "batch"
                _only(scope, "POST")
                status, body = 200, await self._batch(receive)
            elif path == "/healthz":
                route, status, body = "healthz", 200, b'{"status":"ok"}'
            elif path == "/readyz":
                route, (status, body) = "readyz", self._ready()
            elif path == "/metrics":
                route, status, headers, body = "metrics", 200, _TEXT, generate_latest(self._registry)
            elif path == MODEL:
                route, (status, body) = "model", self._model()
            else:
                status, body = 404, _error(
                    f"there is no {path[:200]}", f"ask {PROFILES}<user id>, {BATCH}, {MODEL}, /healthz, /readyz or /metrics"
                )  # fmt: skip
        except BadRequest as error:
            status = 405 if error.do.startswith("use ") else 400
            body = _error(str(error), error.do)
        except SpringtideError as error:
            what, _, do = str(error).rpartition("; ")
            status, body = 503, _error(what or do, do if what else str(type(error).__doc__))
        except Exception:  # noqa: BLE001 - the edge of the process: logged and counted, others are answered
            _log.exception("a request for %s failed", route)
            status, body = 500, _error("the worker failed; its log says why", "report it with the worker's log")
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})
        self._count(route, status, self._clock_s() - began_s)

    def _count(self, route: str, status: int, took_s: float) -> None:
        series = self._counters.get((route, status))
        if series is None:
            series = (self._metrics.requests.labels(route, str(status)), self._metrics.request_seconds.labels(route))
            self._counters[route, status] = series
        series[0].inc()
        series[1].observe(took_s)

    def _profile(self, query: Query) -> asyncio.Future[bytes]:
        """The answer to come; questions of the same round of the event loop are answered together."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer_waiting)
        self._waiting.append((query, answer))
        return answer

    def _answer_waiting(self) -> None:
        some = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._answer_waiting)
        try:
            bodies = self._answers([query for query, _ in some])
        except Exception as error:  # noqa: BLE001 - each request answers for itself
            for _, answer in some:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), body in zip(some, bodies, strict=True):
            # A request whose client went away may be cancelled.
            if not answer.done():
                answer.set_result(body)

    def _answers(self, queries: Sequence[Query]) -> list[bytes]:
        answers = self._host.predictor().profiles(queries)
        if cold := sum(answer.cold_start for answer in answers):
            self._metrics.cold_starts.inc(cold)
        return [encode(answer) for answer in answers]

    async def _batch(self, receive: Receive) -> bytes:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BODY_BYTES:
                raise BadRequest(f"the body exceeds {MOST_BODY_BYTES} bytes", "send fewer profiles in one request")
        answers: list[bytes] = []
        queries = questions(body)
        for first in range(0, len(queries), MOST_AT_ONCE):
            answers += self._answers(queries[first : first + MOST_AT_ONCE])
            # Others must not wait for a whole batch.
            await asyncio.sleep(0)
        return b'{"profiles":[' + b",".join(answers) + b"]}"

    def _ready(self) -> tuple[int, bytes]:
        missing = self._host.missing()
        parts = {part: part not in missing for part in ("version", "program", "histories")}
        if not missing:
            return 200, encode({"ready": True, **parts})
        reasons = "; ".join(f"{part}: {reason}" for part, reason in missing.items())
        return 503, encode(
            {"ready": False, **parts, "error": f"not ready: {reasons}", "do": "wait, or look at the applier's log"}
        )

    def _model(self) -> tuple[int, bytes]:
        served = self._host.predictor().ready()
        status = {"error_code": "OK", "error_message": ""}
        return 200, encode(
            {"model_version_status": [{"version": str(served.version), "state": "AVAILABLE", "status": status}]}
        )


def question(user: str, query_string: bytes) -> Query:
    """What a GET asks.

    >>> question("ann", b"item=i1&context.device=tv")
    Query(user='ann', item='i1', category=None, context={'device': 'tv'}, at_ms=None)

    Raises:
        BadRequest: `at` is no time.
    """
    if not query_string:
        return Query(user)
    given = dict(parse_qsl(query_string.decode("latin-1")))
    at = given.get("at")
    return Query(
        user,
        given.get("item"),
        given.get("category"),
        {name[8:]: value for name, value in given.items() if name.startswith("context.")},
        None if at is None else time_ms(at),
    )


def questions(body: bytes) -> list[Query]:
    """What a batch asks.

    >>> questions(b'{"profiles": [{"user_id": "ann", "item": 7}]}')
    [Query(user='ann', item='7', category=None, context={}, at_ms=None)]

    Raises:
        BadRequest: The body is not of the documented form.
    """
    form = 'send {"profiles": [{"user_id": "ann", "item": "i1"}]} or {"users": ["ann"]}'
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON: {error}", form) from None
    if not isinstance(document, dict):
        raise BadRequest("the body is no JSON object", form)
    wanted = document.get("profiles")
    if wanted is None and isinstance(document.get("users"), list):
        wanted = [{"user_id": user} for user in document["users"]]
    if not isinstance(wanted, list) or not wanted:
        raise BadRequest("the body asks for no profile", form)
    if len(wanted) > MOST_PROFILES:
        raise BadRequest(f"the body asks for {len(wanted)} profiles", f"ask for at most {MOST_PROFILES} at once")
    found = []
    for place, one in enumerate(wanted):
        if not isinstance(one, dict) or not isinstance(one.get("user_id"), str | int) or not set(one) <= _FIELDS:
            raise BadRequest(f"profile {place} of the body is not of the documented form", form)
        context = one.get("context") or {}
        if not isinstance(context, dict):
            raise BadRequest(f"profile {place} of the body has a context that is no object", form)
        at, item, category = one.get("at"), one.get("item"), one.get("category")
        found.append(
            Query(
                str(one["user_id"]),
                None if item is None else str(item),
                None if category is None else str(category),
                {str(name): str(value) for name, value in context.items()},
                None if at is None else time_ms(at),
            )
        )
    return found


def _only(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise BadRequest(f"{scope['method']} {scope['path'][:40]} is not offered", f"use {method}")


def _error(what: str, do: str) -> bytes:
    return encode({"error": what, "do": do})


def listen(host: str, port: int, shared: bool) -> socket.socket:
    """A bound socket; `shared` lets other workers bind the same port.

    Raises:
        PortTaken: Somebody listens there.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(f"port {port} of {host} is in use; stop its owner or set serving.port") from None
    return bound


def serve(settings: Settings, shared: bool = False) -> None:
    """One worker, until SIGTERM or SIGINT; requests under way are answered before it returns.

    Raises:
        PortTaken: The port is in use.
    """
    salt = load_salt(settings.salt_path, create=False)
    bound = listen(settings.serving.host, settings.serving.port, shared)
    host = Host(settings, salt, now_ms=lambda: time.time_ns() // 1_000_000)
    app = App(host, CollectorRegistry())
    config = uvicorn.Config(
        cast(Any, app), loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False,
        log_level="warning", server_header=False, timeout_graceful_shutdown=10, backlog=2048,
    )  # fmt: skip
    server = uvicorn.Server(config)
    end_on_signals(server)
    try:
        server.run(sockets=[bound])
    finally:
        app.close()


def end_on_signals(server: uvicorn.Server) -> None:
    """Makes SIGTERM and SIGINT the server's orderly end, from now on and not only once it runs.

    uvicorn has handlers of its own while it runs, and raises the signal again
    after its end; a signal between this process's start and that moment
    would be lost, and with it the end of a worker whose parent was killed.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _shared_worker(argv: list[str]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    # A parent that was killed cannot end its workers, which would hold the port for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(load(argv), shared=True)


def serve_all(settings: Settings, argv: list[str]) -> int:
    """Several workers on one port; when one dies, all end. Returns the exit code."""
    listen(settings.serving.host, settings.serving.port, shared=False).close()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_shared_worker, args=(argv,)) for _ in range(settings.serving.workers)]
    for worker in workers:
        worker.start()
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    orderly = stopping
    stop()
    for worker in workers:
        worker.join()
    return 0 if orderly else 1


def main(argv: list[str] | None = None) -> int:
    """`python -m deploy.serving.rest [flags]`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings = load(arguments)
        if settings.serving.workers > 1:
            return serve_all(settings, arguments)
        serve(settings)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        print(f"serving worker: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
