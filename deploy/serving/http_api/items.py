"""Items for a user over HTTP.

POST /v1/rank      {"user_id": ..., "items": [...], "context": {...}, "at": ...}
GET  /v1/recommendations/{user_id}?n=&category=&exclude_seen=&at=&context.NAME=
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import Endpoint, Request, Response, encode
from deploy.serving.http_api.item_requests import rank_question, recommendation
from deploy.serving.predictor import Predictor
from deploy.serving.recommending.ranking import rank
from deploy.serving.recommending.recommending import recommend
from deploy.serving.recommending.shelves import Shelves
from state.errors import SpringtideError
from state.metrics import WorkerMetrics

TURN_S = 0.1
"""Items are followed so often, once somebody asked for some."""

Found = TypeVar("Found")


class Items:
    """The endpoints that answer items.

    Args:
        host: What answers.
        metrics: Of the worker.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics) -> None:
        self._host, self._metrics = host, metrics
        self._shelves: tuple[Predictor, Shelves] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint("rank", ("POST",), "/v1/rank", self._rank),
            Endpoint("recommendations", ("GET",), "/v1/recommendations/{user_id}", self._recommend),
        ]

    async def _rank(self, request: Request) -> Response:
        query, items = rank_question(await request.body())
        answer = await in_turns(rank(self._host.predictor(), query, items))
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))

    async def _recommend(self, request: Request) -> Response:
        query, wanted = recommendation(request.path["user_id"], request.query_string)
        predictor = self._host.predictor()
        if self._shelves is None or self._shelves[0] is not predictor:
            self._shelves = predictor, Shelves(predictor.histories)
        shelves = self._shelves[1]
        shelves.turn()
        self._follow()
        answer = await in_turns(recommend(predictor, shelves, query, wanted))
        self._metrics.cold_starts.inc(answer.cold_start)
        return Response(200, encode(answer))

    def _follow(self) -> None:
        """Sees to it that items are followed from now on, between requests."""
        if self._timer is None or self._timer.when() < asyncio.get_running_loop().time() - TURN_S:
            self._timer = asyncio.get_running_loop().call_later(TURN_S, self._turn)

    def _turn(self) -> None:
        self._timer, more = None, False
        with suppress(SpringtideError):
            if self._shelves is not None and self._shelves[0] is self._host.predictor():
                more = self._shelves[1].turn()
        self._timer = asyncio.get_running_loop().call_later(0.005 if more else TURN_S, self._turn)


async def in_turns(steps: Generator[None, None, Found]) -> Found:
    """What a generator returns in the end; others are answered between its steps."""
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Found = end.value
                return found
            await asyncio.sleep(0)
    finally:
        steps.close()
