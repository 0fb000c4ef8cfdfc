"""A worker's answers over HTTP, as an ASGI application: finds the endpoint, answers, says errors, counts.

Errors are JSON: `error` says what happened, `do` what to do, and `where` names
the place in the request, if it is one's fault. `API.md` beside
this file is the whole of it for callers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client import CollectorRegistry

from deploy.serving.edge.tokens import Tokens
from deploy.serving.host import Host
from deploy.serving.http_api.documents import Documents
from deploy.serving.http_api.endpoints import (
    LAST,
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
from deploy.serving.http_api.explanations import Explanations
from deploy.serving.http_api.health import Health
from deploy.serving.http_api.items import Items
from deploy.serving.http_api.models import Models
from deploy.serving.http_api.profiles import Profiles
from deploy.serving.http_api.segments import Segments
from deploy.serving.line import QueueLimits
from deploy.serving.request_counts import RequestCounts
from deploy.serving.splitting.split import Split
from state.config.sections import ServingSettings
from state.errors import SpringtideError, WorkerFailed
from state.metrics import WorkerMetrics

UNKNOWN = "unknown"
"""What metrics name a request that no endpoint is for."""

Done = Callable[[Response], None]

_log = logging.getLogger(__name__)


class App:
    """The ASGI application.

    Args:
        host: What answers.
        registry: Where the metrics are.
        serving: The limits of requests.
        told_metrics: What /metrics says; None for `registry`.
        tokens: That requests need; None where they need none.
        clock_s: A monotonic clock.
        split: Answers a share of the users by a trial; None where this host takes part in no rollout.

    Attributes:
        host: What answers.
        metrics: Of the worker.
        limits: How long a question may wait.
        draining: Whether the worker is about to end: answers then end their connections.
    """

    def __init__(
        self,
        host: Host,
        registry: CollectorRegistry,
        serving: ServingSettings = ServingSettings(),  # noqa: B008 - immutable
        told_metrics: CollectorRegistry | None = None,
        tokens: Tokens | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
        split: Split | None = None,
    ) -> None:
        self.host = host
        self._most_body_bytes = serving.max_body_bytes
        self._tokens = tokens
        self._split = split
        self.draining = False
        self.limits = QueueLimits(serving.max_queue_ms / 1000, serving.timeout_s)
        self.metrics = WorkerMetrics(registry)
        self._counts = RequestCounts(self.metrics, lambda: host.version, clock_s)
        self.endpoints: list[Endpoint] = [
            *Profiles(host, self.metrics, self.limits).endpoints(),
            *Explanations(host, self.metrics, self.limits).endpoints(),
            *Items(host, self.metrics, self.limits).endpoints(),
            *Health(host, told_metrics or registry, lambda: self.draining).endpoints(),
            *Models(host, self.metrics, self.limits).endpoints(),
            *Segments(host).endpoints(),
        ]
        self.endpoints += Documents(self.endpoints).endpoints()
        self._routes = Routes(self.endpoints)

    def ready(self) -> bool:
        """Whether this worker can answer and is not about to end."""
        return not self.draining and not self.host.missing()

    def count_refused(self, reason: str) -> None:
        """Counts a connection or a request that was refused at the door."""
        self.metrics.refused.labels(reason).inc()

    def close(self) -> None:
        """Closes the stores; the next request opens them again."""
        self.host.close()
        if self._split is not None:
            self._split.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        response = asyncio.get_running_loop().create_future()
        answering = self.respond(scope, receive, response.set_result)
        if answering is not None:
            await answering
        await answer(send, await response)

    def respond(self, scope: Scope, receive: Receive, done: Done) -> Coroutine[Any, Any, None] | None:
        """Answers one request with as little as it takes: the endpoint of a profile needs no task.

        Args:
            scope: Of ASGI.
            receive: Likewise.
            done: Is given the response, in a later turn of the event loop.

        Returns:
            What is to be awaited; None where nothing is.
        """
        began_s, name = self._counts.clock_s(), UNKNOWN
        try:
            endpoint, placeholders = self._routes.find(scope)
            name = endpoint.name
            if self._tokens is not None:
                self._tokens.require(header(scope, b"authorization"), endpoint.role)
            request = Request(scope, receive, placeholders, endpoint, self._most_body_bytes)
            if endpoint.soon is None or self._split is not None:
                return self._answer(request, done, began_s)
            body = endpoint.soon(request)
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
            asyncio.get_running_loop().call_soon(lambda: done(self._counted(name, response, began_s)))
            return None

        def end(answered: asyncio.Future[bytes]) -> None:
            try:
                response = Response(200, answered.result())
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as of `_failure`
                response = self._failure(name, error)
            done(self._counted(name, response, began_s))

        body.add_done_callback(end)
        return None

    async def _answer(self, request: Request, done: Done, began_s: float) -> None:
        name = request.endpoint.name
        try:
            response = await (request.endpoint.answer if self._split is None else self._split.answer)(request)
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
        done(self._counted(name, response, began_s))

    def _failure(self, name: str, error: BaseException) -> Response:
        """What an error is answered with: at the edge of the process others are logged, and further requests answered."""
        if isinstance(error, SpringtideError):
            return failure(error)
        _log.error("a request for %s failed", name, exc_info=error)
        return failure(WorkerFailed("the worker failed; its log says why", "report it with the worker's log"))

    def _counted(self, name: str, response: Response, began_s: float) -> Response:
        self._counts.count(name, response.status, began_s)
        return response._replace(headers=[*response.headers, LAST]) if self.draining else response
