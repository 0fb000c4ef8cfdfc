"""A worker's answers over HTTP: routes, bodies, errors, as an ASGI application.

    GET  /v1/profiles/{user_id}?item=&category=&at=&context.NAME=
    POST /v1/profiles:batch      {"profiles": [{"user_id": ..., "item": ..., ...}, ...]} or {"users": [...]}
    GET  /v1/models/profile      as TensorFlow Serving's model status
    GET  /healthz /readyz /metrics

Errors are JSON: `error` says what happened, `do` what to do. `API.md` beside
this file is the whole of it for callers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import orjson
from prometheus_client import CollectorRegistry, generate_latest

from deploy.serving.answer import Answer, Query
from deploy.serving.batching import Batcher
from deploy.serving.host import Host
from deploy.serving.requests import MOST_BODY_BYTES, question, questions
from state.errors import BadRequest, SpringtideError, UnknownPath, WrongMethod
from state.metrics import WorkerMetrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PROFILES = "/v1/profiles/"
BATCH = "/v1/profiles:batch"
MODEL = "/v1/models/profile"
_JSON = [(b"content-type", b"application/json")]
_TEXT = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
_log = logging.getLogger(__name__)


class Response(NamedTuple):
    """What a request is answered with."""

    status: int
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = _JSON


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
        self._batcher = Batcher(self._answers, self._held)

    def close(self) -> None:
        """Closes the stores; the next request opens them again."""
        self._host.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        began_s = self._clock_s()
        route = route_of(scope["path"])
        try:
            response = await self._respond(route, scope, receive)
        except SpringtideError as error:
            response = failure(error.http_status, error.what, error.do)
        except Exception:  # noqa: BLE001 - the edge of the process: logged and counted, others are answered
            _log.exception("a request for %s failed", route)
            response = failure(500, "the worker failed; its log says why", "report it with the worker's log")
        headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        self._count(route, response.status, self._clock_s() - began_s)

    async def _respond(self, route: str, scope: Scope, receive: Receive) -> Response:
        path: str = scope["path"]
        if route == "profile":
            only(scope, "GET")
            return Response(200, await self._batcher.one(question(path[len(PROFILES) :], scope["query_string"])))
        if route == "batch":
            only(scope, "POST")
            answers = await self._batcher.many(questions(await body_of(receive)))
            return Response(200, b'{"profiles":[' + b",".join(answers) + b"]}")
        if route == "healthz":
            return Response(200, b'{"status":"ok"}')
        if route == "readyz":
            return self._ready()
        if route == "metrics":
            return Response(200, generate_latest(self._registry), _TEXT)
        if route == "model":
            return self._model()
        offered = f"{PROFILES}<user id>, {BATCH}, {MODEL}, /healthz, /readyz or /metrics"
        raise UnknownPath(f"there is no {path[:200]}", f"ask {offered}")

    def _answers(self, queries: Sequence[Query]) -> list[bytes]:
        return self._bodies(self._host.predictor().profiles(queries))

    @contextmanager
    def _held(self) -> Iterator[Callable[[Sequence[Query]], list[bytes]]]:
        predictor = self._host.predictor()
        with predictor.reading() as reader:
            yield lambda queries: self._bodies(predictor.profiles(queries, reader))

    def _bodies(self, answers: Sequence[Answer]) -> list[bytes]:
        if cold := sum(answer.cold_start for answer in answers):
            self._metrics.cold_starts.inc(cold)
        return [encode(answer) for answer in answers]

    def _ready(self) -> Response:
        missing = self._host.missing()
        parts = {part: part not in missing for part in ("version", "program", "histories")}
        if not missing:
            return Response(200, encode({"ready": True, **parts}))
        reasons = "; ".join(f"{part}: {reason}" for part, reason in missing.items())
        return Response(
            503,
            encode(
                {"ready": False, **parts, "error": f"not ready: {reasons}", "do": "wait, or look at the applier's log"}
            ),
        )

    def _model(self) -> Response:
        served = self._host.predictor().ready()
        status = {"error_code": "OK", "error_message": ""}
        one = {"version": str(served.version), "state": "AVAILABLE", "status": status}
        return Response(200, encode({"model_version_status": [one]}))

    def _count(self, route: str, status: int, took_s: float) -> None:
        series = self._counters.get((route, status))
        if series is None:
            series = (self._metrics.requests.labels(route, str(status)), self._metrics.request_seconds.labels(route))
            self._counters[route, status] = series
        series[0].inc()
        series[1].observe(took_s)


def route_of(path: str) -> str:
    """The route of a path, as metrics name it; it holds no user's id.

    >>> [route_of(path) for path in ("/v1/profiles/ann", "/v1/profiles/", "/readyz")]
    ['profile', 'unknown', 'readyz']
    """
    if path.startswith(PROFILES) and len(path) > len(PROFILES):
        return "profile"
    return _ROUTES.get(path, "unknown")


_ROUTES = {BATCH: "batch", MODEL: "model", "/healthz": "healthz", "/readyz": "readyz", "/metrics": "metrics"}


def only(scope: Scope, method: str) -> None:
    """Refuses another method.

    Raises:
        WrongMethod: It is another one.
    """
    if scope["method"] != method:
        raise WrongMethod(f"{scope['method']} {scope['path'][:40]} is not offered", f"use {method}")


async def body_of(receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        BadRequest: It is too large.
    """
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MOST_BODY_BYTES:
            raise BadRequest(f"the body exceeds {MOST_BODY_BYTES} bytes", "send fewer profiles in one request")
    return body


def encode(document: object) -> bytes:
    """JSON; numpy arrays and dataclasses included."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(status: int, what: str, do: str) -> Response:
    """An error: what happened, and what to do."""
    return Response(status, encode({"error": what, "do": do}))
