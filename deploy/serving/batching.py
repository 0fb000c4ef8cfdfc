"""Batches queries that arrive together, without waiting for a batch to fill.

Queries that arrive while a batch is computed are read from the network when it
ends, and form the next batch. A query is refused at once if its expected wait
is too long. The expected wait is derived from the number of queries ahead and
the recent duration of a batch. A query whose client no longer waits is not
computed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

from deploy.serving.answer import Query
from deploy.serving.line import QueueLimits, expected_next, refuse_beyond, too_late
from deploy.serving.predictor import MOST_AT_ONCE

Body = TypeVar("Body")
Answer = Callable[[Sequence[Query]], list[Body]]
"""Returns the bodies for at most `MOST_AT_ONCE` queries, in their order."""


class Waiting(NamedTuple, Generic[Body]):
    """A queued query, the future of its answer, and the time it was queued."""

    query: Query
    answer: asyncio.Future[Body]
    since_s: float


class Batcher(Generic[Body]):
    """Collects queries until the event loop is free, and answers them in one batch. Used by one event loop.

    Args:
        answer: Answers from the current version.
        held: A context manager whose function answers from one version while it is open, even if a newer one arrives.
        limits: How long a query may wait.
        clock_s: A monotonic clock.
    """

    def __init__(
        self,
        answer: Answer[Body],
        held: Callable[[], AbstractContextManager[Answer[Body]]],
        limits: QueueLimits = QueueLimits(),  # noqa: B008 - immutable
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._answer, self._held = answer, held
        self._limits, self._clock_s = limits, clock_s
        self._waiting: deque[Waiting[Body]] = deque()
        self._of_requests = 0
        self._batch_s = 0.0
        self._ended_s: float | None = None

    def one(self, query: Query) -> asyncio.Future[Body]:
        """Queues a query and returns a future; queries of one event loop iteration are answered together.

        Raises:
            Overloaded: The expected wait is too long.
        """
        self._admit()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Body] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer_waiting)
        self._waiting.append(Waiting(query, answer, self._clock_s()))
        return answer

    async def many(self, queries: Sequence[Query]) -> list[Body]:
        """Returns the answers to the queries of one request, in their order, all from one version.

        Raises:
            Overloaded: The expected wait is too long.
            TookTooLong: The actual wait was too long.
        """
        self._admit()
        answers: list[Body] = []
        since_s = self._clock_s()
        self._of_requests += len(queries)
        try:
            with self._held() as answer:
                for first in range(0, len(queries), MOST_AT_ONCE):
                    if self._is_late(since_s):
                        raise too_late(self._limits)
                    some = queries[first : first + MOST_AT_ONCE]
                    answers += answer(some)
                    # Yield, so that other queries do not wait for the whole request.
                    await asyncio.sleep(0)
        finally:
            self._of_requests -= len(queries)
        return answers

    @property
    def expected_s(self) -> float:
        """The expected wait of one more query, in seconds."""
        return (len(self._waiting) + self._of_requests) // MOST_AT_ONCE * self._batch_s

    def _admit(self) -> None:
        # If less than a full batch waits, the query joins the next batch, so batch duration does not matter.
        refuse_beyond(self._limits, self.expected_s)

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
        some = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
        wanted = [one for one in some if not one.answer.done()]
        for one in wanted:
            if self._is_late(one.since_s, began_s):
                one.answer.set_exception(too_late(self._limits))
        wanted = [one for one in wanted if not one.answer.done()]
        try:
            bodies = self._answer([one.query for one in wanted]) if wanted else []
        except Exception as error:  # noqa: BLE001 - each request answers for itself
            for one in wanted:
                one.answer.set_exception(error)
            bodies = []
        for one, body in zip(wanted, bodies, strict=False):
            one.answer.set_result(body)

    def _is_late(self, since_s: float, now_s: float | None = None) -> bool:
        return (self._clock_s() if now_s is None else now_s) - since_s > self._limits.waited_s
