"""A client in a process of its own that asks over HTTP and keeps how long each answer took.

Closed loop: each connection asks again once it has its answer; that says how
much can be answered. Open loop: each request has its time, whether or not
those before are answered, and waits from that time on; that says how long a
user waits, without leaving out those who came while others were slow
(Schroeder et al. 2006, "Open Versus Closed: A Cautionary Tale").
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWN = 50_000
"""Requests that differ."""


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        port: Of the server.
        path: Where; `{user}` in it becomes a number below `users`.
        users: How many there are.
        seconds: How long.
        connections: How many, each with one request on its way.
        rate: Requests a second of all connections in an open loop; 0 for a closed one.
        together: How many users a request is about; with 0 it has none in its body.
    """

    port: int
    path: str
    users: int
    seconds: float
    connections: int = 32
    rate: float = 0.0
    together: int = 0

    def requests(self) -> list[bytes]:
        """The requests, drawn once."""
        drawn = random.Random(3)
        if self.together:
            names = [[f"user-{drawn.randrange(self.users)}" for _ in range(self.together)] for _ in range(1000)]
            return [post(self.path, json.dumps({"users": one}).encode()) for one in names]
        count = DRAWN if "{user}" in self.path else 1
        paths = [self.path.format(user=drawn.randrange(self.users)) for _ in range(count)]
        return [f"GET {one} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() for one in paths]


@dataclass(frozen=True)
class Taken:
    """What came of it.

    Attributes:
        per_s: Answers a second.
        p50_ms: Half of them took less.
        p99_ms: 99 of 100 took less.
        bytes: Of the last answer, with its head.
    """

    per_s: float
    p50_ms: float
    p99_ms: float
    bytes: int


def post(path: str, body: bytes) -> bytes:
    """A request with a body of JSON.

    >>> post("/v1/profiles:batch", b"{}").splitlines()[-1]
    b'{}'
    """
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One connection with at most one request on its way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._due_s = 0.0
        self._expected = self._received = 0
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """It can ask."""
        self._transport = transport
        self._client.idle.append(self)

    def ask(self, request: bytes, due_s: float) -> None:
        """Sends a request that was due at a time."""
        self._due_s, self._expected, self._received = due_s, 0, 0
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Takes a piece of an answer; its length stands in its head."""
        if not self._expected:
            assert data.startswith(b"HTTP/1.1 200"), data[:300]
            head = data.index(b"\r\n\r\n") + 4
            at = data.index(b"content-length: ") + 16
            self._expected = head + int(data[at : data.index(b"\r\n", at)])
        self._received += len(data)
        if self._received >= self._expected:
            self._client.answered(self, time.perf_counter() - self._due_s, self._expected)

    def close(self) -> None:
        self._transport.close()


class Client:
    """What the connections share; use it in one event loop."""

    def __init__(self, load: Load) -> None:
        self._load, self._requests, self._next = load, load.requests(), 0
        self.idle: list[Connection] = []
        self._due = deque[float]()
        self._took_s: list[float] = []
        self._bytes = self._sent = 0
        self._began_s = self._until_s = 0.0
        self._ended = asyncio.get_running_loop().create_future()

    async def run(self) -> Taken:
        """Asks for as long as the load says, and waits for the answers."""
        loop, load = asyncio.get_running_loop(), self._load
        made = [
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", load.port)
            for _ in range(load.connections)
        ]
        connections = [connection for _, connection in made]
        self._began_s = time.perf_counter()
        self._until_s = self._began_s + load.seconds
        if load.rate:
            self._tick()
        else:
            self._due.extend([self._began_s] * load.connections)
            self._send()
        await self._ended
        taken_s = time.perf_counter() - self._began_s
        for connection in connections:
            connection.close()
        took_ms = np.array(self._took_s) * 1000
        p50_ms, p99_ms = np.percentile(took_ms, [50, 99]).tolist()
        return Taken(len(took_ms) / taken_s, p50_ms, p99_ms, self._bytes)

    def answered(self, connection: Connection, took_s: float, size: int) -> None:
        self._took_s.append(took_s)
        self._bytes = size
        self.idle.append(connection)
        now_s = time.perf_counter()
        if not self._load.rate and now_s < self._until_s:
            self._due.append(now_s)
        self._send()

    def _tick(self) -> None:
        """Makes due what is due by now, and comes again when the next one is."""
        now_s, rate = time.perf_counter(), self._load.rate
        while (due_s := self._began_s + self._sent / rate) <= min(now_s, self._until_s):
            self._due.append(due_s)
            self._sent += 1
        self._send()
        loop = asyncio.get_running_loop()
        if due_s <= self._until_s:
            loop.call_later(max(0.0, due_s - now_s), self._tick)
        else:
            # The last answer may be there before the time is over.
            loop.call_later(max(0.0, self._until_s - now_s) + 0.001, self._send)

    def _send(self) -> None:
        while self._due and self.idle:
            self._next = (self._next + 1) % len(self._requests)
            self.idle.pop().ask(self._requests[self._next], self._due.popleft())
        over = time.perf_counter() >= self._until_s and not self._due and len(self.idle) == self._load.connections
        if over and not self._ended.done():
            self._ended.set_result(None)


def measure(load: Load) -> Taken:
    """Asks from a process of its own.

    Raises:
        subprocess.CalledProcessError: An answer was none, or another one than 200.
    """
    line = [sys.executable, "-m", "tests.bench.answers.asking", json.dumps(asdict(load))]
    return Taken(**json.loads(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout))


async def _asked(load: Load) -> Taken:
    return await Client(load).run()


if __name__ == "__main__":
    import uvloop

    print(json.dumps(asdict(uvloop.run(_asked(Load(**json.loads(sys.argv[1])))))))
