"""A worker's gRPC server: the services, health and reflection, on the worker's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deploy.serving.edge.access import Access
from deploy.serving.grpc_api.health import GrpcHealth
from deploy.serving.grpc_api.messages import POOL
from deploy.serving.grpc_api.model_services import model_services
from deploy.serving.grpc_api.profiles import GrpcProfiles
from deploy.serving.grpc_api.services import Handlers, Service
from deploy.serving.host import Host
from deploy.serving.line import QueueLimits
from state.metrics import WorkerMetrics

MOST_MESSAGE_BYTES = 4 << 20


def offered(host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> list[Service]:
    """The services of a worker; another one is added here."""
    return [GrpcProfiles(host, metrics, limits).service(), *model_services(host, metrics, limits)]


class GrpcServer:
    """Answers until `stop`; made and used in one event loop.

    Args:
        host: What answers.
        metrics: Of the worker.
        address: `host:port` to listen on; port 0 takes a free one.
        shared: Whether other workers listen there too.
        limits: How long a question may wait.
        ready: Whether the worker can answer.
        access: How clients are let in.

    Attributes:
        port: That it listens on.

    Raises:
        RuntimeError: The address cannot be had.
    """

    def __init__(
        self,
        host: Host,
        metrics: WorkerMetrics,
        address: str,
        shared: bool,
        limits: QueueLimits,
        ready: Callable[[], bool],
        access: Access,
    ) -> None:
        options = [
            # By default grpc shares its port with whoever comes.
            ("grpc.so_reuseport", int(shared)),
            ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
        ]
        services, handlers = offered(host, metrics, limits), Handlers(metrics, access.tokens)
        names = [one.name for one in services]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers([handlers.of(one) for one in services])
        self._health = GrpcHealth(ready, names)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        listed: Sequence[str] = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(listed, self._server, POOL)
        if access.certificate is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, access.certificate.grpc_credentials())
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes requests from now on."""
        self._health.look()
        await self._server.start()
        self._following = asyncio.create_task(self._health.follow())

    def look(self) -> None:
        """Tells those who watch at once where the worker is ready no more, or again."""
        self._health.look()

    async def stop(self, grace_s: float) -> None:
        """Takes no more requests, tells so those who watch, and returns when those under way are answered or `grace_s` is over."""
        if self._following is not None:
            self._following.cancel()
            with suppress(asyncio.CancelledError):
                await self._following
        self._health.end()
        await self._server.stop(grace_s)
