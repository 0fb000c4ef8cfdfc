"""A worker's gRPC server: the services, health and reflection, on the worker's own event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deploy.serving.edge.access import Access
from deploy.serving.edge.tls import Certificate
from deploy.serving.grpc_api.health import GrpcHealth
from deploy.serving.grpc_api.messages import POOL
from deploy.serving.grpc_api.model_services import model_services
from deploy.serving.grpc_api.profiles import GrpcProfiles
from deploy.serving.grpc_api.services import Handlers, Service
from deploy.serving.host import Host
from deploy.serving.line import QueueLimits
from state.metrics import WorkerMetrics

MOST_MESSAGE_BYTES = 4 << 20
LOOK_S = 0.2
"""Between two looks whether the server has ended: while a call is open it is told at a look only."""
AGAIN_S = 0.05
"""Between two tries to have the port of a server that ended."""

_log = logging.getLogger(__name__)


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
        most_calls: At a time, those that watch among them; further ones are refused.

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
        most_calls: int,
    ) -> None:
        self._address, self._shared, self._access, self._most_calls = address, shared, access, most_calls
        services, handlers = offered(host, metrics, limits), Handlers(metrics, access.tokens, lambda: host.version)
        self._handlers = [handlers.of(one) for one in services]
        names = [one.name for one in services]
        self._listed: Sequence[str] = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = GrpcHealth(ready, names)
        self._server, self.port = self._made(address)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Takes requests from now on."""
        self._health.look()
        await self._server.start()
        self._tasks = [asyncio.create_task(self._health.follow()), asyncio.create_task(self._keep())]

    def look(self) -> None:
        """Tells those who watch at once where the worker is ready no more, or again."""
        self._health.look()

    async def stop(self, grace_s: float) -> None:
        """Takes no more requests, tells so those who watch, and returns when those under way are answered or `grace_s` is over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._health.end()
        await self._server.stop(grace_s)

    def _made(self, address: str) -> tuple[grpc.aio.Server, int]:
        """A server that has the port of the address, and the port."""
        options = [
            # By default grpc shares its port with whoever comes.
            ("grpc.so_reuseport", int(self._shared)),
            ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=self._most_calls)
        server.add_generic_rpc_handlers(self._handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(self._listed, server, POOL)
        if self._access.certificate is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, _credentials(self._access.certificate))

    async def _keep(self) -> None:
        """Begins the server anew where it ended by itself: grpc's does at a request whose path is no UTF-8."""
        address = f"{self._address.rpartition(':')[0]}:{self.port}"
        while True:
            # It raises what it ended with, whatever that was. Without a time limit a cancelled wait would end its end.
            with suppress(Exception):
                while await self._server.wait_for_termination(LOOK_S):
                    pass
            with suppress(Exception):
                await self._server.stop(0)
            _log.error("the gRPC server ended at a request that it could not read, and is begun anew")
            while True:
                try:
                    self._server, self.port = self._made(address)
                    break
                except RuntimeError:
                    await asyncio.sleep(AGAIN_S)
            await self._server.start()


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """Each handshake has the certificate that was loaded last."""

    def newest() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([certificate.pem])

    return grpc.dynamic_ssl_server_credentials(newest(), newest)
