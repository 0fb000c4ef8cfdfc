"""Profiles as a worker answers them over any protocol: in batches, each batch of one version, cold starts counted."""

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
    """A batcher of questions about users.

    Args:
        host: What answers.
        metrics: Of the worker.
        body: What a protocol makes of an answer.
        limits: How long a question may wait.
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
