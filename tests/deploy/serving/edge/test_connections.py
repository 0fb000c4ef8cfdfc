"""Bounds of one connection: what is no request, too long, too slow or too much is refused, and others are answered."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvloop

from deploy.serving.requests.http import Response, answer
from deploy.serving.requests.server import BoundedConnection
from tests.deploy.serving.edge.listening import LIMITS, Listening, listening, read

GET = b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path, once the body is there."""
    while (await receive()).get("more_body"):
        pass
    await answer(send, Response(200, scope["path"].encode() + b"ok"))


class Responding:
    """Answers as `echo` does, but is asked as a worker's application is."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Is not asked so."""
        raise AssertionError("it has `respond`")

    async def respond(self, scope: Any, receive: Any, done: Callable[[Response], None]) -> None:
        """Answers with the path, once the body is there."""
        while (await receive()).get("more_body"):
            pass
        done(Response(200, scope["path"].encode() + b"ok"))


def run(test: Callable[[Listening], Awaitable[None]], app: Any = None, **limits: Any) -> None:
    """Runs a test with an application of its own, or with both kinds of one that answers with the path."""

    async def go(asked: Any) -> None:
        async with listening(asked, LIMITS._replace(**limits)) as on:
            await test(on)

    for asked in (echo, Responding()) if app is None else (app,):
        uvloop.run(go(asked))


def send(client: socket.socket, *parts: bytes) -> None:
    for part in parts:
        client.sendall(part)


def test_what_is_no_http_is_a_400_with_what_to_do() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        send(client, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        head, _, body = (await read(client, None)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head
        assert json.loads(body)["do"] and on.refused("no_http") == 1

    run(test)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n", 400),
        (b"GET / HTTP/1.0\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: LOCALHOST:8501\r\n", 200),
        (b"GET / HTTP/1.1\r\nhost: [::1]:8501\r\n", 200),
        (b"GET / HTTP/1.1\r\nhost: evil.example\r\n", 403),
        (b"GET / HTTP/1.1\r\nhost: localhost.evil.example:8501\r\n", 403),
    ],
)
def test_a_request_names_one_host_and_where_it_matters_one_of_ours(head: bytes, status: int) -> None:
    """So that no page of somebody else's, whose name leads here, is answered; also after a request that was right."""

    async def test(on: Listening) -> None:
        for before in (b"", GET.replace(b"host: a", b"host: 127.0.0.1") % 1):
            client = await on.client()
            send(client, before)
            if before:
                await read(client)
            send(client, head + b"\r\n")
            client.shutdown(socket.SHUT_WR)
            assert (await read(client, None)).startswith(b"HTTP/1.1 %d" % status)
        assert on.refused("host") == (2 if status == 403 else None)

    run(test, own_hosts=True)


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_is_too_long_is_a_431(whole: bool) -> None:
    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: a\r\nx: ")
        if whole:
            await loop.sock_sendall(client, b"y" * 3000 + b"\r\n\r\n")
        else:
            for _ in range(3):
                await loop.sock_sendall(client, b"y" * 900)
                await asyncio.sleep(0.001)
        assert (await read(client, None)).startswith(b"HTTP/1.1 431")
        assert on.refused("head") == 1 and not on.state.connections

    run(test)


def test_what_follows_a_body_is_bounded_too() -> None:
    """Trailers and the framing of chunks are no body, which the application bounds."""

    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        await loop.sock_sendall(
            client, b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: "
        )
        for _ in range(3):
            await asyncio.sleep(0.001)
            await loop.sock_sendall(client, b"y" * 900)
        assert (await read(client, None)).startswith(b"HTTP/1.1 431")

    run(test)


@pytest.mark.parametrize(
    "begun",
    [b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\nx: y", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n12"],
)
def test_a_request_that_does_not_arrive_is_a_408(begun: bytes) -> None:
    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        before_s = loop.time()
        send(client, begun)
        await asyncio.sleep(0.01)
        (connection,) = cast(set[BoundedConnection], on.state.connections)
        connection.enforce_limits(before_s + 9.0)
        assert not connection.transport.is_closing()
        connection.enforce_limits(loop.time() + 11.0)
        assert (await read(client, None)).startswith(b"HTTP/1.1 408") and on.refused("slow") == 1

    run(test)


def test_a_connection_that_asks_nothing_is_closed() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        (connection,) = cast(set[BoundedConnection], on.state.connections)
        connection.enforce_limits(asyncio.get_running_loop().time() + 11.0)
        assert await read(client, None) == b""

    run(test)


def test_a_connection_that_was_answered_and_asks_no_more_is_closed() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        send(client, GET % 1)
        await read(client)
        (connection,) = cast(set[BoundedConnection], on.state.connections)
        now_s = asyncio.get_running_loop().time()
        connection.enforce_limits(now_s + connection.timeout_keep_alive - 1.0)
        assert not connection.transport.is_closing()
        connection.enforce_limits(now_s + connection.timeout_keep_alive + 1.0)
        assert await read(client, None) == b""

    run(test)


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, Response(200, b"x" * (16 << 20)))

    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        send(client, GET % 1)
        await loop.sock_recv(client, 100)
        (connection,) = cast(set[BoundedConnection], on.state.connections)
        now_s = loop.time()
        connection.enforce_limits(now_s + 1.0)
        for _ in range(20):
            await loop.sock_recv(client, 1 << 18)
        # What the client's socket has room for now is sent before anybody looks.
        before, left = -1, connection.transport.get_write_buffer_size()
        while left != before:
            await asyncio.sleep(0.05)
            before, left = left, connection.transport.get_write_buffer_size()
        connection.enforce_limits(now_s + 15.0)
        await asyncio.sleep(0.01)
        assert on.state.connections
        connection.enforce_limits(now_s + 26.0)
        await asyncio.sleep(0.01)
        assert not on.state.connections

    run(test, large)


def test_a_client_that_closes_its_half_is_answered() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        send(client, GET % 1 + GET % 2)
        client.shutdown(socket.SHUT_WR)
        found = await read(client, None)
        assert found.count(b"HTTP/1.1 200") == 2 and b"/1ok" in found and found.endswith(b"/2ok")

    run(test)


def test_what_was_asked_before_a_broken_request_is_answered() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        send(client, GET % 1 + GET % 2 + b"\x00\x01 broken\r\n\r\n")
        found = await read(client, None)
        assert found.count(b"HTTP/1.1 200") == 2 and found.endswith(b"/2ok")

    run(test)


def test_nothing_is_offered_to_change_to() -> None:
    async def test(on: Listening) -> None:
        client = await on.client()
        send(client, b"GET /7 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        assert (await read(client, None)).endswith(b"/7ok")

    run(test)


def test_connections_beyond_the_limit_are_told_so() -> None:
    async def test(on: Listening) -> None:
        first, second = await on.client(), await on.client()
        send(second, GET % 2)
        found = await read(second, None)
        assert found.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in found
        send(first, GET % 1)
        assert (await read(first)).endswith(b"/1ok") and on.refused("connections") == 1

    run(test, connections=1)


def test_requests_in_pieces_and_many_at_once_are_answered_in_order() -> None:
    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        for byte in GET % 5:
            await loop.sock_sendall(client, bytes([byte]))
            await asyncio.sleep(0)
        assert (await read(client)).endswith(b"/5ok")
        send(client, b"".join(GET % n for n in range(20)))
        found = await read(client, 20)
        places = [found.index(b"/%dok" % n) for n in range(20)]
        assert places == sorted(places)

    run(test)


def test_requests_that_are_pipelined_and_never_read_stop_their_own_connection_only() -> None:
    """Few of them are held, the socket is read no further, and another client is answered meanwhile."""
    answered = most_waiting = 0
    state: Any = None

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        nonlocal answered, most_waiting
        answered += 1
        most_waiting = max(most_waiting, *(len(cast(BoundedConnection, one).pipeline) for one in state.connections))
        await echo(scope, receive, send)

    async def test(on: Listening) -> None:
        nonlocal state
        state, loop = on.state, asyncio.get_running_loop()
        attacker = await on.client()
        # More than the socket buffers of both sides can hold as requests or as answers.
        pushing = asyncio.ensure_future(loop.sock_sendall(attacker, (GET % 1) * 1_000_000))
        connection = next(iter(cast(set[BoundedConnection], state.connections)))
        deadline_s = loop.time() + 60.0
        while not (connection.flow.write_paused and connection.flow.read_paused):
            assert loop.time() < deadline_s and most_waiting < 200
            await asyncio.sleep(0)
        before = answered
        other = await on.client()
        for _ in range(100):
            send(other, GET % 2)
            assert (await read(other)).endswith(b"/2ok")
        assert not pushing.done() and answered < before + 200
        assert 0 < most_waiting < 200
        pushing.cancel()
        await asyncio.wait([pushing])

    run(test, counting)


def test_pipelined_requests_with_bodies_are_all_answered_in_order() -> None:
    """More than may wait at a time, in one write, and the last of them comes in two."""

    async def test(on: Listening) -> None:
        client, loop = await on.client(), asyncio.get_running_loop()
        body = b"x" * 3000
        posts = b"".join(b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 3000\r\n\r\n" % n + body for n in range(100))
        receiving = asyncio.ensure_future(read(client, 100))
        await loop.sock_sendall(client, posts[:-10])
        (connection,) = cast(set[BoundedConnection], on.state.connections)
        deadline_s = loop.time() + 60.0
        while connection.server_state.total_requests < 99:
            assert loop.time() < deadline_s
            await asyncio.sleep(0)
        await loop.sock_sendall(client, posts[-10:])
        found = await receiving
        places = [found.index(b"/%dok" % n) for n in range(100)]
        assert places == sorted(places) and found.count(b"HTTP/1.1 200") == 100

    run(test)
