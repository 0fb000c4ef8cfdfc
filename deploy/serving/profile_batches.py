"""Batches a worker's profile queries for any protocol: one version per batch; counts cold starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from deploy.serving.answer import Answer, Query
from deploy.serving.batching import Batcher, Body
from deploy.serving.host import Host
from deploy.serving.line import QueueLimits
from state.metrics import WorkerMetrics


def profile_batches(
    host: Host, metrics: WorkerMetrics, body: Callable[[Answer], Body], limits: QueueLimits
) -> Batcher[Body]:
    """Creates a batcher of profile queries.

    Args:
        host: The host whose stores answer.
        metrics: The worker's metrics.
        body: Converts an answer to a response body of the protocol.
        limits: How long a query may wait.
    """

    def bodies(answers: Sequence[Answer]) -> list[Body]:
        if cold := sum(answer.cold_start for answer in answers):
            metrics.cold_starts.inc(cold)
        return [body(answer) for answer in answers]

    @contextmanager
    def held() -> Iterator[Callable[[Sequence[Query]], list[Body]]]:
        predictor = host.predictor()
        with predictor.reading() as reader:
            yield lambda queries: bodies(predictor.profiles(queries, reader))

    return Batcher(lambda queries: bodies(host.predictor().profiles(queries)), held, limits)
