"""The standard health service: says SERVING while the worker can answer, as `/readyz` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

LOOK_S = 1.0


class GrpcHealth(health.aio.HealthServicer):
    """Answers `Check` with a look of its own, and tells those who `Watch` what changed once a second.

    Args:
        ready: Whether the worker can answer.
        services: What is asked about, beside the whole worker (the empty name).
    """

    def __init__(self, ready: Callable[[], bool], services: Collection[str]) -> None:
        super().__init__()
        self._ready, self._services = ready, ("", *services)

    async def look(self) -> None:
        """Takes up how the worker is now."""
        status = HealthCheckResponse.SERVING if self._ready() else HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.set(service, status)

    async def follow(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def Check(self, request: HealthCheckRequest, context: Any) -> Any:
        """How the worker, or one service, is now."""
        await self.look()
        return await super().Check(request, context)
