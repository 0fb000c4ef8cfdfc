"""Opens the clicks of a source where it stands: behind losses that an operator accepted, and never at an offset that is used twice.

    1. The topic; one that was made anew is read from its beginning.
    2. Positions that were deleted unread: counted as a gap where somebody accepts it, else an error.
    3. The reader. A log that was cut back behind a position is known by the leader's epoch before it, and filled up where
       somebody accepts that.

A step that fails begins its job anew from the last checkpoint, which meets the
same loss: so the error says how to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from state.errors import GapError, TruncatedLog
from state.log import LogReader, accepted_gaps
from state.log.gaps import how_to_go_on
from state.positions import Gap
from state.process.wall_clock import wall_ms
from streaming.accounts import missing, require_accepted
from streaming.cut_back import fill, newly_accepted, open_behind
from streaming.distributed.reading import SourceReading
from streaming.distributed.worker import JobWorker

RESUME = "springtide stream --runner RUNNER --savepoint_path=PATH"
"""How a job is begun again that cannot go on; `springtide flink status` says what it is resumed from."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedClicks:
    """The clicks of a source.

    Attributes:
        topic_id: The topic.
        reading: Where they are read from, with what was accepted.
        passed: The gaps before that; no bundle has told of them yet.
        reader: Of its partitions; None where it has none, until the topic grows.
    """

    topic_id: str
    reading: SourceReading
    passed: list[Gap]
    reader: LogReader | None


def of_source(source: int, sources: int, partitions: int) -> list[int]:
    """The partitions that a source reads, those made later included.

    >>> of_source(1, 2, 5)
    [1, 3]
    """
    return [one for one in range(partitions) if one % sources == source]


def open_clicks(worker: JobWorker, source: int, reading: SourceReading) -> OpenedClicks:
    """Opens the clicks of a source.

    Args:
        worker: Of this process.
        source: Its number.
        reading: How far it is.

    Raises:
        GapError: Positions are gone, or used twice, and nobody accepted it.
        LogError: Kafka is not reachable, or the topic is missing.
    """
    kafka, consent = worker.settings.kafka, worker.plan.consent
    now_ms = wall_ms()
    with telling_how(), worker.log.topics() as topics:
        # 1.
        info, ends = topics.describe(kafka.clicks_topic), topics.ends(kafka.clicks_topic)
        if reading.topic_id not in ("", info.topic_id):
            logger.warning("topic %s is another one than before: reading it from its beginning", kafka.clicks_topic)
            # The clock of all partitions goes on.
            reading = replace(reading, topic_id="", next={}, leaders={})
        mine = of_source(source, worker.settings.stream.sources, info.partitions)
        known = {partition: at for partition, at in reading.next.items() if partition in mine}
        # 2.
        positions = replace(reading, topic_id=info.topic_id, next=known).positions()
        passed = missing(info.topic_id, positions, {one: ends[one] for one in mine})
        require_accepted(passed, consent, kafka.clicks_topic)
        accepted = [*reading.accepted, *(accepted_gaps.accept(gap, consent, now_ms) for gap in passed)]
        for gap in passed:
            logger.warning("gap accepted by %s (%s): %s", consent.actor, consent.reason, gap)
        at = known | {gap.source.partition: gap.next for gap in passed}
        leaders = {one: epoch for one, epoch in reading.leaders.items() if at.get(one, -1) == known.get(one)}

        # 3.
        def opens(told: Mapping[int, int]) -> LogReader:
            return worker.log.reader(kafka.clicks_topic, mine, at, leaders=told)

        def accepts(lost: TruncatedLog) -> None:
            accepted.extend(newly_accepted(accepted, consent, now_ms, lost))

        fills = partial(fill, kafka, topics, worker.log.writer)
        reader = open_behind(opens, leaders, accepts, fills) if mine else None
    worker.metrics.gaps_accepted.inc(len(accepted) - len(reading.accepted))
    return OpenedClicks(info.topic_id, replace(reading, accepted=tuple(accepted)), passed, reader)


@contextmanager
def telling_how() -> Iterator[None]:
    """Lets the error of a loss say how the job goes on without it."""
    try:
        yield
    except GapError as error:
        raise how_to_go_on(error, RESUME) from error
