"""The line of a worker: who would wait too long is refused at once, who did is given up, and nobody is for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

from deploy.serving.answers.queue import QueueLimits, StepQueue
from state.errors import Overloaded, TookTooLong


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
    """By what such answers took; the others are told when to come again."""
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
    """Its generator is closed."""
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
    """Until it is answered."""
    clock = Clock()
    line = StepQueue(QueueLimits(expected_s=2.5), clock)

    async def go(pieces: int) -> list[str | BaseException]:
        for _ in range(60):
            await line.run(clock.steps(1, "measured"))
        both = line.run(clock.steps(pieces, "first"), pieces), line.run(clock.steps(1, "second"))
        return await asyncio.gather(*both, return_exceptions=True)

    assert asyncio.run(go(2)) == ["first", "second"]
    assert isinstance(asyncio.run(go(3))[1], Overloaded)
