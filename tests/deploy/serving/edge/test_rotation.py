"""Servers on one socket: those that are not prepared leave as soon as one is, and come back when none is."""

from __future__ import annotations

import asyncio
import ctypes
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

import uvloop

from deploy.serving.requests.http import Response, answer
from deploy.serving.requests.rotation import Rotation
from deploy.serving.requests.server import ConnectionLimits, DrainingServer, listen

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
ASKED = 20


class Named:
    """An application that answers with its name."""

    def __init__(self, name: str) -> None:
        self._name, self.draining = name, False

    def count_refused(self, reason: str) -> None:
        raise AssertionError(reason)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await answer(send, Response(200, self._name.encode()))


async def asked(port: int) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
    """The name in the answer on a new connection, and the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    return (b"first" if b"content-length: 5" in head.lower() else b"second"), reader, writer


async def names(port: int) -> set[bytes]:
    found = set()
    for _ in range(ASKED):
        name, _, writer = await asked(port)
        writer.close()
        found.add(name)
    return found


async def start(server: DrainingServer, sockets: list[socket.socket]) -> None:
    """What uvicorn does before it waits for a signal."""
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets)


async def tick(servers: Sequence[DrainingServer]) -> None:
    for server in servers:
        await server.on_tick(1)


def test_an_unprepared_server_leaves_with_its_connections_and_comes_back() -> None:
    async def go() -> None:
        states, opened = (ctypes.c_ubyte * 2)(), list[str]()
        rotations = [Rotation(states, number) for number in range(2)]
        bound = listen("127.0.0.1", 0)
        sockets = [bound.dup() for _ in rotations]
        port = bound.getsockname()[1]
        servers = [
            DrainingServer(
                Named(name),
                ConnectionLimits(10.0, 100),
                0.0,
                opened=partial(opened.append, name),
                rotation=rotation,
            )
            for name, rotation in zip(("first", "second"), rotations, strict=True)
        ]
        # 1. None is prepared: each accepts connections, of sockets of its own for the event loop that they share.
        await start(servers[1], sockets[1:])
        name, kept, writer = await asked(port)
        assert name == b"second" and opened == ["second"]
        await start(servers[0], sockets[:1])
        assert opened == ["second", "first"]
        # 2. One is: the other one leaves, and closes what it has open.
        rotations[0].prepare()
        assert not rotations[0].is_settled
        await tick(servers)
        assert rotations[0].is_settled and await names(port) == {b"first"}
        assert await kept.read() == b"second"
        writer.close()
        # 3. It ends, and the other one is still not prepared.
        rotations[0].closed()
        servers[0].servers[0].close()
        await tick(servers[1:])
        assert await names(port) == {b"second"} and not rotations[1].is_settled
        assert opened == ["second", "first", "second"]
        for server, own in zip(servers, sockets, strict=True):
            await server.shutdown([own])
        bound.close()

    uvloop.run(go())


def test_a_server_that_starts_beside_a_prepared_one_accepts_once_it_is_prepared_too() -> None:
    async def go() -> None:
        states = (ctypes.c_ubyte * 2)()
        Rotation(states, 0).prepare()
        rotation, bound, started = Rotation(states, 1), socket.socket(), list[bool]()
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        server = DrainingServer(
            Named("second"), ConnectionLimits(10.0, 100), 0.0, started=lambda: started.append(True), rotation=rotation
        )
        await start(server, [bound])
        await tick([server])
        assert started and not server.servers and rotation.is_settled
        rotation.prepare()
        await tick([server])
        assert await names(bound.getsockname()[1]) == {b"second"}
        await server.shutdown([bound])
        # Its part ends with it: another worker takes over.
        assert states[:] == [2, 0]

    uvloop.run(go())
