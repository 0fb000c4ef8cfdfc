"""The console over HTTP, as an ASGI application: lets in, answers, says errors. It logs no path: that may name a user."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from deploy.console import pages
from deploy.console.commands import status_of
from deploy.console.guarding import TOLD, RequestGuard
from deploy.console.lately_read import LatelyRead
from deploy.console.reading import Reading
from deploy.console.steering import Steering
from deploy.console.watching import LoopWatch
from deploy.serving.exposition import told
from deploy.serving.http_api.endpoints import (
    LAST,
    METHODS,
    Endpoint,
    Receive,
    Request,
    Response,
    Routes,
    Scope,
    Send,
    answer,
    failure,
    header,
)
from state.config.settings import Settings
from state.errors import SpringtideError, WorkerFailed
from state.metrics import ConsoleMetrics, add_process
from state.process.said_once import SaidOnce

MOST_BODY_BYTES = 16 << 10
NO_STORE = (b"cache-control", b"no-store")

_log = logging.getLogger(__name__)


class Console:
    """The ASGI application.

    Args:
        settings: Of the system.
        guard: Lets requests in.
        now_ms: Wall clock.

    Attributes:
        watch: What knows the loop; whoever runs the application starts it.
        endpoints: What is offered.
        draining: Whether the process is about to end: answers then end their connections.
    """

    def __init__(self, settings: Settings, guard: RequestGuard, now_ms: Callable[[], int]) -> None:
        stores, lately = threading.Lock(), LatelyRead()
        self.watch = LoopWatch(settings, stores, wall_ms=now_ms)
        self.draining = False
        self.endpoints = [
            *Reading(settings, self.watch, guard, lately, stores, now_ms).endpoints(),
            *Steering(settings, lately, stores, self.watch.changed, now_ms).endpoints(),
            Endpoint("metrics", METHODS, "/metrics", self._told),
            *pages.endpoints(),
        ]
        self._registry = CollectorRegistry()
        self._metrics = ConsoleMetrics(self._registry)
        add_process(self._registry)
        self._guard, self._routes = guard, Routes(self.endpoints)
        self._say = SaidOnce(_log.warning)

    def count_refused(self, reason: str) -> None:
        """Says once that something was refused at the door, and why."""
        self._say(f"a connection or request was refused: {reason}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        name = "unknown"
        try:
            endpoint, placeholders = self._routes.find(scope)
            name = endpoint.name
            self._guard.require(scope, endpoint)
            response = await endpoint.answer(Request(scope, receive, placeholders, endpoint, MOST_BODY_BYTES))
        except SpringtideError as error:
            response = failure(error)._replace(status=status_of(error))
        except Exception:  # noqa: BLE001 - the edge of the process: logged, others are answered
            _log.exception("a request for %s failed", name)
            response = failure(WorkerFailed("the console failed; its log says why", "report it with the console's log"))
        self._metrics.requests.labels(outcome(response.status)).inc()
        kept = any(one == b"cache-control" for one, _ in response.headers)
        headers = [*response.headers, *TOLD, *(() if kept else (NO_STORE,)), *((LAST,) if self.draining else ())]
        body = b"" if scope["method"] == "HEAD" else response.body
        await answer(send, Response(response.status, body, headers))

    async def _told(self, request: Request) -> Response:
        body, media_type = told(self._registry, header(request.scope, b"accept") or "")
        return Response(200, body, [(b"content-type", media_type.encode())])


def outcome(status: int) -> str:
    """What metrics call a status of HTTP.

    >>> [outcome(status) for status in (200, 304, 403, 409, 503)]
    ['answered', 'answered', 'refused', 'refused', 'failed']
    """
    return "answered" if status < 400 else "refused" if status < 500 else "failed"
