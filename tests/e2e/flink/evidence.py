"""What a job on Flink left in the training log: how far it is, its rows, and the histories that a serving host makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry

from deploy.serving.clicks import HistoryFollower
from deploy.serving.notes import CAUGHT_UP_EXTRA
from state.config.sections import Kafka
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, Reader, Topics
from state.metrics import ApplierMetrics
from state.microbatch.codec import decode
from state.positions import Source
from state.process.wall_clock import wall_ms
from tests.e2e.evidence import Histories, serving_histories
from tests.e2e.running import until


class Reached:
    """How far the training log is, read bit by bit.

    Args:
        kafka: Where it is.
        buckets: Of the job.
    """

    def __init__(self, kafka: Kafka, buckets: int) -> None:
        self._reader, self._buckets = Reader(kafka, kafka.microbatches_topic, [0]), buckets
        self._next: dict[Source, int] = {}

    def has(self, ends: Mapping[int, int]) -> bool:
        """Whether all buckets have all clicks before `ends`, by partition."""
        for batch in self._reader.poll(0.05):
            for value in batch.values:
                for part in decode(value or b"").header.ranges:
                    self._next[part.source] = max(part.next, self._next.get(part.source, 0))
        reached: dict[int, list[int]] = {one: [] for one in ends}
        for source, after in self._next.items():
            reached[source.partition].append(after)
        return all(len(reached[one]) == self._buckets and min(reached[one]) >= end for one, end in ends.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()


def read_values(kafka: Kafka, topic: str) -> list[bytes]:
    """All records of a topic of one partition."""
    with Topics(kafka) as topics:
        end = topics.ends(topic)[0][1]
    values: list[bytes] = []
    with Reader(kafka, topic, [0]) as reader:
        while reader.position(0) < end:
            values += [value or b"" for batch in reader.poll(0.2) for value in batch.values]
    return values


def histories_of_log(settings: Settings) -> Histories:
    """What a serving host keeps of the training log, from its beginning to its end."""
    kafka, log, spec = settings.kafka, Log(settings.kafka), FeatureSpec.from_settings(settings)
    store = HistoryStore(settings.serving_dir / HISTORIES, settings.features.history)
    follower = HistoryFollower(
        store,
        spec,
        settings.events.max_age_s,
        ApplierMetrics(CollectorRegistry()),
        wall_ms,
        actions=lambda digest: spec.actions if digest == spec.digest else None,
    )
    with log.topics() as topics:
        topic_id, ends = topics.describe(kafka.microbatches_topic).topic_id, topics.ends(kafka.microbatches_topic)
    follower.connect(
        topic_id, ends, lambda at, leaders: log.reader(kafka.microbatches_topic, positions=at, leaders=leaders)
    )
    until(
        lambda: not follower.step(0.1) and store.extra(CAUGHT_UP_EXTRA) is not None, "the log has not been read whole"
    )
    follower.disconnect()
    store.close()
    return serving_histories(settings)
