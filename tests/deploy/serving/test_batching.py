"""Batches: what came meanwhile is one, nobody waits for too long, and who is refused is told when to come again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from deploy.serving.answers.query import Query
from deploy.serving.answers.queue import MOST_AT_ONCE, Batcher, Profiles, QueueLimits
from deploy.serving.requests.http import Response, answer
from state.errors import Overloaded, TookTooLong
from tests.deploy.serving.edge.listening import listening, read


def body(answer: Any) -> bytes:
    """Encodes what stands in for an answer."""
    encoded: bytes = answer.encode()
    return encoded


class Slow:
    """Answers with the question's user; each batch takes a second of its clock."""

    def __init__(self, limits: QueueLimits) -> None:
        self.now_s, self.batches = 0.0, list[list[str]]()
        self.batcher = Batcher(self.answer, self.held, limits, lambda: self.now_s)

    def answer(self, queries: Sequence[Query]) -> Any:
        self.now_s += 1.0
        self.batches.append([one.user for one in queries])
        return [one.user for one in queries]

    @contextmanager
    def held(self) -> Iterator[Profiles]:
        yield self.answer

    def ask(self, count: int) -> list[asyncio.Future[bytes]]:
        return [self.batcher.one(Query(f"u{n}"), body) for n in range(count)]


def run(slow: Slow, test: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        await test()

    asyncio.run(go())


def test_requests_that_arrive_while_a_batch_is_computed_are_one_batch() -> None:
    """However many connections and reads they come in: nobody waits for a second turn."""
    sizes: list[int] = []
    late: list[Any] = []
    request = b"GET /v1 HTTP/1.1\r\nhost: a\r\n\r\n"

    def answers(queries: Sequence[Query]) -> Any:
        sizes.append(len(queries))
        # While this batch is computed the others send, in pieces.
        for client in late:
            client.sendall(request[:9])
        for client in late:
            client.sendall(request[9:])
        if late:
            # What was sent is there a moment later.
            time.sleep(0.05)
        late.clear()
        return ["ok"] * len(queries)

    @contextmanager
    def held() -> Iterator[Profiles]:
        yield answers

    batcher = Batcher(answers, held)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, Response(200, await batcher.one(Query("ann"), body)))

    async def go() -> None:
        async with listening(app) as on:
            first, *others = [await on.client() for _ in range(13)]
            late.extend(others)
            first.sendall(request)
            for client in (first, *others):
                assert (await read(client)).endswith(b"ok")

    uvloop.run(go())
    assert sizes == [1, 12]


def test_more_than_a_batch_waits_for_the_next_one() -> None:
    """In the order of arrival."""
    slow = Slow(QueueLimits())

    async def test() -> None:
        answers = await asyncio.gather(*slow.ask(MOST_AT_ONCE + 3))
        assert answers == [f"u{n}".encode() for n in range(MOST_AT_ONCE + 3)]

    run(slow, test)
    assert [len(batch) for batch in slow.batches] == [MOST_AT_ONCE, 3]


def test_who_would_wait_too_long_is_refused_at_once() -> None:
    """By what batches took, and with the time after which it may be better; who waits already is answered."""
    slow = Slow(QueueLimits(expected_s=2.5))

    async def test() -> None:
        # Nothing is known yet of what a batch takes.
        for _ in range(60):
            await asyncio.gather(*slow.ask(1))
        accepted = slow.ask(3 * MOST_AT_ONCE)
        assert slow.batcher.expected_s == pytest.approx(3.0, rel=0.01)
        with pytest.raises(Overloaded) as refusal:
            slow.ask(1)
        assert refusal.value.http_headers == ((b"retry-after", b"3"),)
        with pytest.raises(Overloaded):
            await slow.batcher.many([Query("ann")], body)
        assert len(await asyncio.gather(*accepted)) == 3 * MOST_AT_ONCE
        await asyncio.gather(*slow.ask(1))

    run(slow, test)


def test_less_than_a_batch_is_never_refused() -> None:
    """However long batches take, or nothing would ever be measured again."""
    slow = Slow(QueueLimits(expected_s=0.001))

    async def test() -> None:
        for _ in range(5):
            assert len(await asyncio.gather(*slow.ask(MOST_AT_ONCE))) == MOST_AT_ONCE

    run(slow, test)


def test_a_question_that_waited_too_long_is_given_up() -> None:
    """It is not computed."""
    slow = Slow(QueueLimits(waited_s=1.5))

    async def test() -> None:
        answers = await asyncio.gather(*slow.ask(3 * MOST_AT_ONCE), return_exceptions=True)
        assert all(isinstance(one, bytes) for one in answers[: 2 * MOST_AT_ONCE])
        assert all(isinstance(one, TookTooLong) for one in answers[2 * MOST_AT_ONCE :])
        with pytest.raises(TookTooLong):
            await slow.batcher.many([Query("ann")] * 3 * MOST_AT_ONCE, body)

    run(slow, test)
    assert [len(batch) for batch in slow.batches] == [MOST_AT_ONCE] * 4


def test_a_question_that_nobody_waits_for_is_not_computed() -> None:
    """A client went away."""
    slow = Slow(QueueLimits())

    async def test() -> None:
        kept, gone = slow.ask(2)
        gone.cancel()
        assert await kept == b"u0"

    run(slow, test)
    assert slow.batches == [["u0"]]


def test_reading_and_refusing_take_half_of_the_time_at_most() -> None:
    """Where turns of the event loop are long, more than a batch is answered in each."""
    slow, answered = Slow(QueueLimits()), list[int]()

    async def test() -> None:
        asked = slow.ask(7 * MOST_AT_ONCE)
        while not all(one.done() for one in asked):
            answered.append(len(slow.batches))
            slow.now_s += 2.5  # what others do in each turn
            await asyncio.sleep(0)

    run(slow, test)
    assert answered == [0, 1, 4] and len(slow.batches) == 7
