"""Requests wait in line, are answered in batches, and are refused or given up where they would wait too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from deploy.serving.answers.query import Query
from deploy.serving.answers.queue import MOST_AT_ONCE, Batcher, Profiles, QueueLimits, StepQueue
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
        self.batcher = Batcher(self.held, limits, lambda: self.now_s)

    def answer(self, queries: Sequence[Query]) -> Any:
        self.now_s += 1.0
        self.batches.append([one.user for one in queries])
        return [one.user for one in queries]

    @contextmanager
    def held(self) -> Iterator[Profiles]:
        yield self.answer

    def ask(self, count: int) -> list[asyncio.Future[bytes]]:
        return [self.batcher.one(Query(f"u{n}"), body) for n in range(count)]


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

    batcher = Batcher(held)

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
    slow = Slow(QueueLimits())

    async def test() -> None:
        answers = await asyncio.gather(*slow.ask(MOST_AT_ONCE + 3))
        assert answers == [f"u{n}".encode() for n in range(MOST_AT_ONCE + 3)]

    asyncio.run(test())
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

    asyncio.run(test())


def test_less_than_a_batch_is_never_refused() -> None:
    slow = Slow(QueueLimits(expected_s=0.001))

    async def test() -> None:
        for _ in range(5):
            assert len(await asyncio.gather(*slow.ask(MOST_AT_ONCE))) == MOST_AT_ONCE

    asyncio.run(test())


def test_a_question_that_waited_too_long_is_given_up() -> None:
    slow = Slow(QueueLimits(waited_s=1.5))

    async def test() -> None:
        answers = await asyncio.gather(*slow.ask(3 * MOST_AT_ONCE), return_exceptions=True)
        assert all(isinstance(one, bytes) for one in answers[: 2 * MOST_AT_ONCE])
        assert all(isinstance(one, TookTooLong) for one in answers[2 * MOST_AT_ONCE :])
        with pytest.raises(TookTooLong):
            await slow.batcher.many([Query("ann")] * 3 * MOST_AT_ONCE, body)

    asyncio.run(test())
    assert [len(batch) for batch in slow.batches] == [MOST_AT_ONCE] * 4


def test_a_question_that_nobody_waits_for_is_not_computed() -> None:
    slow = Slow(QueueLimits())

    async def test() -> None:
        kept, gone = slow.ask(2)
        gone.cancel()
        assert await kept == b"u0"

    asyncio.run(test())
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

    asyncio.run(test())
    assert answered == [0, 1, 4] and len(slow.batches) == 7


class Clock:
    """Goes on by a second at each step of an answer."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def steps(self, count: int, said: str) -> Generator[None, None, str]:
        for _ in range(count):
            self.now_s += 1.0
            yield
        return said


def test_answers_in_steps_are_let_in_while_they_are_soon_enough() -> None:
    clock = Clock()
    line = StepQueue(QueueLimits(expected_s=10.0), clock)

    async def go() -> list[str | BaseException]:
        for _ in range(60):
            assert await line.run(clock.steps(3, "measured")) == "measured"
        return await asyncio.gather(*(line.run(clock.steps(3, f"{n}")) for n in range(6)), return_exceptions=True)

    first, refused = (found := asyncio.run(go()))[:4], found[4:]
    # 3 s each: before the fifth one 12 s are waiting.
    assert first == ["0", "1", "2", "3"] and all(isinstance(one, Overloaded) for one in refused)
    assert all(isinstance(one, Overloaded) and one.http_headers == ((b"retry-after", b"12"),) for one in refused)
    # Where nobody waits, the next one is let in, however long answers took.
    assert asyncio.run(line.run(clock.steps(50, "long"))) == "long"


def test_an_answer_that_takes_too_long_is_given_up_and_leaves_the_line() -> None:
    clock, closed = Clock(), []
    line = StepQueue(QueueLimits(expected_s=5.0, waited_s=10.0), clock)

    def endless() -> Generator[None, None, str]:
        try:
            while True:
                clock.now_s += 1.0
                yield
        finally:
            closed.append(True)

    with pytest.raises(TookTooLong):
        asyncio.run(line.run(endless()))
    assert closed == [True] and clock.now_s == 11.0
    assert asyncio.run(line.run(clock.steps(1, "next"))) == "next"


def test_a_request_of_many_pieces_counts_as_many() -> None:
    clock = Clock()
    line = StepQueue(QueueLimits(expected_s=2.5), clock)

    async def go(pieces: int) -> list[str | BaseException]:
        for _ in range(60):
            await line.run(clock.steps(1, "measured"))
        both = line.run(clock.steps(pieces, "first"), pieces), line.run(clock.steps(1, "second"))
        return list(await asyncio.gather(*both, return_exceptions=True))

    assert asyncio.run(go(2)) == ["first", "second"]
    assert isinstance(asyncio.run(go(3))[1], Overloaded)
