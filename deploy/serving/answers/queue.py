"""Admission control for the work of one event loop: answers in steps, and profile queries in batches.

A request is refused at once if its expected wait is too long, and dropped if it has waited too long.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from deploy.serving.answers.program import BATCHES
from deploy.serving.answers.query import Query
from springtide_client.answers import Profile
from state.errors import Overloaded, TookTooLong

MOST_AT_ONCE = BATCHES[-1]
"""The maximum number of queries in a batch."""
_FASTER = 0.1
_SLOWER = 4
_AT_LEAST_S = 0.002

Result = TypeVar("Result")
Profiles = Callable[[Sequence[Query]], Sequence[Profile]]
"""Answers at most `MOST_AT_ONCE` queries, in their order."""


class QueueLimits(NamedTuple):
    """How long a query may wait: longer expected waits are refused, longer actual waits dropped."""

    expected_s: float = math.inf
    waited_s: float = math.inf

    def admit(self, expected_s: float) -> None:
        """Refuses a request with too long an expected wait: raises Overloaded, with a retry-after header."""
        if expected_s > self.expected_s:
            refusal = Overloaded("more is asked than can be answered in time", "ask again later, and less at a time")
            refusal.http_headers = ((b"retry-after", b"%d" % math.ceil(expected_s)),)
            raise refusal

    def too_late(self) -> TookTooLong:
        """Returns the error for a request that waited too long.

        >>> str(QueueLimits(waited_s=2.0).too_late())
        'no answer within 2 s; ask again later, and less at a time'
        """
        return TookTooLong(f"no answer within {self.waited_s:g} s", "ask again later, and less at a time")


def expected_next(before_s: float, took_s: float) -> float:
    """Estimates the duration of the next piece: grows at most fourfold after a slow one, shrinks at most by a tenth.

    A single slow piece, such as the first of a process, counts little.

    >>> expected_next(1.0, 1.5), expected_next(1.0, 9.0), expected_next(1.0, 0.5), expected_next(0.0, 9.0)
    (1.5, 4.0, 0.95, 0.002)
    """
    if took_s > before_s:
        return min(took_s, max(_SLOWER * before_s, _AT_LEAST_S))
    return before_s + _FASTER * (took_s - before_s)


def finished(steps: Generator[None, None, Result]) -> Result:
    """Runs a generator to its end and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


class StepQueue:
    """Answers requests in steps, one request's between those of others. Used by one event loop."""

    def __init__(self, limits: QueueLimits, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._limits, self._clock_s = limits, clock_s
        self._waiting, self._piece_s = 0, 0.0

    async def run(self, steps: Generator[None, None, Result], pieces: int = 1) -> Result:
        """Runs a generator and returns its result; other requests are answered between its steps.

        `pieces` is the amount of work, in pieces of about equal duration.

        Raises:
            Overloaded: The expected wait is too long.
            TookTooLong: The actual wait was too long.
        """
        spent_s = 0.0
        try:
            self._limits.admit(self._waiting * self._piece_s)
            self._waiting += pieces
            try:
                since_s = began_s = self._clock_s()
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        spent_s += self._clock_s() - began_s
                        self._piece_s = expected_next(self._piece_s, spent_s / pieces)
                        result: Result = end.value
                        return result
                    spent_s += self._clock_s() - began_s
                    await asyncio.sleep(0)
                    began_s = self._clock_s()
                    if began_s - since_s > self._limits.waited_s:
                        raise self._limits.too_late()
            finally:
                self._waiting -= pieces
        finally:
            steps.close()


class _Waiting(NamedTuple):
    query: Query
    body: Callable[[Profile], Any]
    future: asyncio.Future[Any]
    since_s: float


class Batcher:
    """Answers queries that arrive together in one batch, without waiting for a batch to fill. Used by one event loop.

    Queries that arrive while a batch is computed form the next batch. Queries of clients that no longer wait are
    dropped.

    Args:
        snapshot: A context manager whose function answers from one version while it is open, even if a newer one arrives.
    """

    def __init__(
        self,
        snapshot: Callable[[], AbstractContextManager[Profiles]],
        limits: QueueLimits = QueueLimits(),  # noqa: B008 - immutable
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._snapshot, self._limits, self._clock_s = snapshot, limits, clock_s
        self._waiting: deque[_Waiting] = deque()
        self._of_requests = 0
        self._batch_s = 0.0
        self._ended_s: float | None = None

    def one(self, query: Query, body: Callable[[Profile], Result]) -> asyncio.Future[Result]:
        """Queues a query and returns the future of its answer, converted by `body`; raises Overloaded.

        Queries of one event loop iteration are answered together.
        """
        self._limits.admit(self.expected_s)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer_waiting)
        self._waiting.append(_Waiting(query, body, future, self._clock_s()))
        return future

    async def many(self, queries: Sequence[Query], body: Callable[[Profile], Result]) -> list[Result]:
        """Returns the converted answers to the queries of one request, in their order, all from one version.

        Raises:
            Overloaded: The expected wait is too long.
            TookTooLong: The actual wait was too long.
        """
        self._limits.admit(self.expected_s)
        bodies: list[Result] = []
        since_s = self._clock_s()
        self._of_requests += len(queries)
        try:
            with self._snapshot() as answer:
                for first in range(0, len(queries), MOST_AT_ONCE):
                    if self._clock_s() - since_s > self._limits.waited_s:
                        raise self._limits.too_late()
                    bodies += map(body, answer(queries[first : first + MOST_AT_ONCE]))
                    # Yield, so that other queries do not wait for the whole request.
                    await asyncio.sleep(0)
        finally:
            self._of_requests -= len(queries)
        return bodies

    @property
    def expected_s(self) -> float:
        """The expected wait of one more query, in seconds; 0 if it fits into the next batch."""
        return (len(self._waiting) + self._of_requests) // MOST_AT_ONCE * self._batch_s

    def _answer_waiting(self) -> None:
        """Answers one batch, or more after a long gap, so that reading and refusing take at most half of the time."""
        began_s = self._clock_s()
        gap_s = 0.0 if self._ended_s is None else began_s - self._ended_s
        batches = 0
        while self._waiting and (not batches or self._clock_s() - began_s < gap_s):
            self._answer_batch()
            batches += 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._answer_waiting)
        now_s = self._clock_s()
        self._batch_s = expected_next(self._batch_s, (now_s - began_s + gap_s) / batches)
        # If the queue is empty, the idle time before the next batch does not count.
        self._ended_s = now_s if self._waiting else None

    def _answer_batch(self) -> None:
        began_s = self._clock_s()
        batch = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
        for waiting in batch:
            if not waiting.future.done() and began_s - waiting.since_s > self._limits.waited_s:
                waiting.future.set_exception(self._limits.too_late())
        batch = [waiting for waiting in batch if not waiting.future.done()]
        if not batch:
            return
        try:
            with self._snapshot() as answer:
                for waiting, profile in zip(batch, answer([waiting.query for waiting in batch]), strict=True):
                    waiting.future.set_result(waiting.body(profile))
        except Exception as error:  # noqa: BLE001 - each request answers for itself
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
