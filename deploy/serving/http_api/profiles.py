"""Profiles over HTTP.

GET  /v1/profiles/{user_id}?item=&category=&at=&context.NAME=&fields=&top=
POST /v1/profiles:batch      {"profiles": [{"user_id": ..., "item": ..., ...}, ...]} or {"users": [...]}, "fields", "top"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from deploy.serving.answer import Answer, Query
from deploy.serving.batching import Batcher
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import Endpoint, Request, Response, encode
from deploy.serving.http_api.requests import question, questions
from state.metrics import WorkerMetrics


class Profiles:
    """The endpoints that answer profiles.

    Args:
        host: What answers.
        metrics: Of the worker.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics) -> None:
        self._host, self._metrics = host, metrics
        self._batcher = Batcher(self._answers, self._held)

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint("profile", ("GET",), "/v1/profiles/{user_id}", self._one),
            Endpoint("batch", ("POST",), "/v1/profiles:batch", self._many),
        ]

    async def _one(self, request: Request) -> Response:
        return Response(200, await self._batcher.one(question(request.path["user_id"], request.query_string)))

    async def _many(self, request: Request) -> Response:
        answers = await self._batcher.many(questions(await request.body()))
        return Response(200, b'{"profiles":[' + b",".join(answers) + b"]}")

    def _answers(self, queries: Sequence[Query]) -> list[bytes]:
        return self._bodies(self._host.predictor().profiles(queries))

    @contextmanager
    def _held(self) -> Iterator[Callable[[Sequence[Query]], list[bytes]]]:
        predictor = self._host.predictor()
        with predictor.reading() as reader:
            yield lambda queries: self._bodies(predictor.profiles(queries, reader))

    def _bodies(self, answers: Sequence[Answer]) -> list[bytes]:
        if cold := sum(answer.cold_start for answer in answers):
            self._metrics.cold_starts.inc(cold)
        return [encode(answer.document()) for answer in answers]
