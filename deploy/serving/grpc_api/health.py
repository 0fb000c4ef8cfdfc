"""The standard health service: says SERVING while the worker can answer, as `/readyz` does.

Not that of `grpc_health`, whose watchers of one service lose their news as
soon as one of them leaves, and keep a server from ending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

LOOK_S = 1.0


class GrpcHealth(HealthServicer):
    """Answers `Check` with a look of its own, and tells those who `Watch` what changed once a second.

    Args:
        ready: Whether the worker can answer.
        services: What is asked about, beside the whole worker (the empty name).
    """

    def __init__(self, ready: Callable[[], bool], services: Collection[str]) -> None:
        self._ready, self._services = ready, {"", *services}
        self._is_ready = self._ended = False
        self._news = asyncio.Event()

    def look(self) -> None:
        """Takes up how the worker is now."""
        ready = self._ready()
        if ready != self._is_ready:
            self._is_ready = ready
            self._tell()

    async def follow(self) -> None:
        """Looks until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def end(self) -> None:
        """Ends all watches, once they are told that nothing is served any more."""
        self._is_ready, self._ended = False, True
        self._tell()

    async def Check(self, request: HealthCheckRequest, context: Any) -> Any:
        """How the worker, or one service, is now."""
        self.look()
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:200]!r}")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: Any) -> None:
        """How it is now, and each time that it has changed."""
        told: int | None = None
        while True:
            news, ended, status = self._news, self._ended, self._status(request.service)
            if status != told:
                # Nothing is held meanwhile: the client may never read.
                await context.write(HealthCheckResponse(status=status))
                told = status
            if ended:
                return
            await news.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        return int(HealthCheckResponse.SERVING if self._is_ready else HealthCheckResponse.NOT_SERVING)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
