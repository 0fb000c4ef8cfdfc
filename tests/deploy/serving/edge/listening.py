"""A server of bounded connections around an application, and raw clients of it, in one event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from deploy.serving.requests.server import BoundedConnection, ConnectionLimits
from state.metrics import WorkerMetrics

LIMITS = ConnectionLimits(head_bytes=2000, timeout_s=10.0, connections=100)
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Listening:
    """A port and its connections.

    Attributes:
        port: Of this machine.
        state: With the connections.
        registry: Of the metrics.
    """

    def __init__(self, port: int, state: ServerState, registry: CollectorRegistry) -> None:
        self.port, self.state, self.registry = port, state, registry
        self.clients: list[socket.socket] = []

    async def client(self) -> socket.socket:
        """One more connection."""
        client = socket.socket()
        self.clients.append(client)
        client.setblocking(False)
        before = len(self.state.connections)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        while len(self.state.connections) == before:
            await asyncio.sleep(0)
        return client

    def refused(self, reason: str) -> float | None:
        return self.registry.get_sample_value("springtide_connections_refused_total", {"reason": reason})


@asynccontextmanager
async def listening(app: Asgi, limits: ConnectionLimits = LIMITS) -> AsyncIterator[Listening]:
    """Listens for as long as the block lasts."""
    loop, registry, state = asyncio.get_running_loop(), CollectorRegistry(), ServerState()
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", access_log=False, proxy_headers=False)
    metrics = WorkerMetrics(registry)

    def count(reason: str) -> None:
        metrics.refused.labels(reason).inc()

    server = await loop.create_server(
        lambda: BoundedConnection(limits, count, config=config, server_state=state, app_state={}),
        "127.0.0.1",
        0,
    )
    on = Listening(server.sockets[0].getsockname()[1], state, registry)
    try:
        yield on
    finally:
        for client in on.clients:
            client.close()
        server.close()
        for one in list(state.connections):
            one.transport.abort()
        await server.wait_closed()


async def read(client: socket.socket, answers: int | None = 1) -> bytes:
    """What is answered: so many whole answers, or all until the connection ends."""
    loop, found = asyncio.get_running_loop(), b""
    while answers is None or found.count(b"\r\n\r\n") < answers or not found.endswith((b"}", b"ok")):
        try:
            more = await loop.sock_recv(client, 1 << 16)
        except ConnectionResetError:
            break
        if not more:
            break
        found += more
    return found
