"""The standard gRPC health service: reports SERVING while the worker can answer, like `/readyz`.

It replaces the implementation of `grpc_health`. There, all watchers of a service
miss updates once one of them leaves, and watchers keep the server from stopping.
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
    """Implements `Check`, which polls at each call, and `Watch`, which reports changes once a second.

    Args:
        ready: Whether the worker can answer.
        services: The names of the services, in addition to the whole worker (the empty name).
    """

    def __init__(self, ready: Callable[[], bool], services: Collection[str]) -> None:
        self._ready, self._services = ready, {"", *services}
        self._is_ready = self._ended = False
        self._news = asyncio.Event()

    def look(self) -> None:
        """Polls the worker's status, and notifies watchers of a change."""
        ready = self._ready()
        if ready != self._is_ready:
            self._is_ready = ready
            self._tell()

    async def follow(self) -> None:
        """Polls until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def end(self) -> None:
        """Reports NOT_SERVING to all watchers, then ends their watches."""
        self._is_ready, self._ended = False, True
        self._tell()

    async def Check(self, request: HealthCheckRequest, context: Any) -> Any:
        """Returns the current status of the worker or of one service."""
        self.look()
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:200]!r}")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: Any) -> None:
        """Sends the current status, and then each change."""
        told: int | None = None
        while True:
            news, ended, status = self._news, self._ended, self._status(request.service)
            if status != told:
                # No lock is held during this write: the client may never read.
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
