"""Connections that wait are accepted together, however long the turns of the event loop are."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from deploy.serving.requests.access import Certificate
from deploy.serving.requests.server import AT_ONCE, Acceptor
from tests.deploy.serving.edge.certificates import write_certificate


class Echo(asyncio.Protocol):
    """Sends back what comes, and counts the connections."""

    def __init__(self, made: list[Echo]) -> None:
        self._made = made

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._made.append(self)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def run(test: Callable[[int, list[Echo], Acceptor], Awaitable[None]], tls: ssl.SSLContext | None = None) -> None:
    async def go() -> None:
        made: list[Echo] = []
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            acceptor = Acceptor(bound, 1000, lambda: Echo(made), tls)
            await test(bound.getsockname()[1], made, acceptor)
            acceptor.close()
            await acceptor.wait_closed()

    uvloop.run(go())


def test_many_that_wait_are_accepted_in_few_turns() -> None:
    async def test(port: int, made: list[Echo], _: Acceptor) -> None:
        clients = []
        for _number in range(10 * AT_ONCE):
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            clients[-1].connect_ex(("127.0.0.1", port))
        turns = 0
        while (before := len(made)) < len(clients):
            await asyncio.sleep(0)
            # Handshakes may still be under way.
            turns += len(made) > before
        assert turns < 5 * AT_ONCE
        for client in clients:
            client.close()

    run(test)


def test_after_its_end_nothing_is_accepted_and_what_is_there_goes_on() -> None:
    async def test(port: int, made: list[Echo], acceptor: Acceptor) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        acceptor.close()
        _, late = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"b")
        assert await reader.read(1) == b"b" and len(made) == 1
        writer.close()
        late.close()

    run(test)


def test_a_handshake_that_fails_costs_others_nothing(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    write_certificate(cert, tmp_path / "key.pem")

    async def test(port: int, made: list[Echo], _: Acceptor) -> None:
        reader, plain = await asyncio.open_connection("127.0.0.1", port)
        plain.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await plain.drain()
        secure, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=ssl.create_default_context(cafile=str(cert))
        )
        writer.write(b"a")
        assert await secure.read(1) == b"a" and len(made) == 1
        assert not (await reader.read()).startswith(b"HTTP")
        for one in (plain, writer):
            one.close()

    run(test, Certificate(cert, tmp_path / "key.pem").context)
