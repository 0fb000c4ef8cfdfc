"""Answers together what has arrived together; nobody waits for a batch to fill."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from deploy.serving.answer import Query
from deploy.serving.predictor import MOST_AT_ONCE

Body = TypeVar("Body")
Answer = Callable[[Sequence[Query]], list[Body]]
"""Gives the bodies of at most `MOST_AT_ONCE` questions, in their order."""


class Batcher(Generic[Body]):
    """Gathers questions until the event loop is free, and answers them in one batch. Used by one event loop.

    Args:
        answer: Answers from the version of now.
        held: Answers from one version as long as it is open, whatever comes meanwhile.
    """

    def __init__(self, answer: Answer[Body], held: Callable[[], AbstractContextManager[Answer[Body]]]) -> None:
        self._answer, self._held = answer, held
        self._waiting: deque[tuple[Query, asyncio.Future[Body]]] = deque()

    def one(self, query: Query) -> asyncio.Future[Body]:
        """The answer to come; questions of the same round of the event loop are answered together."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Body] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer_waiting)
        self._waiting.append((query, answer))
        return answer

    async def many(self, queries: Sequence[Query]) -> list[Body]:
        """The answers to the questions of one request, in their order, all from one version."""
        answers: list[Body] = []
        with self._held() as answer:
            for first in range(0, len(queries), MOST_AT_ONCE):
                answers += answer(queries[first : first + MOST_AT_ONCE])
                # Others must not wait for a whole request.
                await asyncio.sleep(0)
        return answers

    def _answer_waiting(self) -> None:
        some = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._answer_waiting)
        try:
            bodies = self._answer([query for query, _ in some])
        except Exception as error:  # noqa: BLE001 - each request answers for itself
            for _, answer in some:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), body in zip(some, bodies, strict=True):
            # A request whose client went away may be cancelled.
            if not answer.done():
                answer.set_result(body)
