"""The clicks themselves, for a rebuild: what the micro-batch log no longer holds, as far as they reach back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from state.config.settings import Settings
from state.errors import UnknownTopic
from state.events.event_batch import EventBatch
from state.events.identity import Salt
from state.events.parser import Parser
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.log import PartitionBatch, Reader, Topics
from state.positions import Range, Source
from state.process.wall_clock import wall_ms
from streaming.event_clock import EventClock
from streaming.labels import Labels, open_labels
from streaming.masking import leave_out
from streaming.profile import Profiler
from streaming.rebuild_report import Rebuilt
from streaming.unlogged import commit_at_once

CLICKS_AT_ONCE = 20_000
POLL_S = 0.5
STALLED_S = 60.0
logger = logging.getLogger(__name__)


def read_to(reader: Reader, partition: int, end: int, most: int, what: str) -> Iterator[list[PartitionBatch]]:
    """What each poll finds until the reader stands at `end`.

    Args:
        reader: Of the one partition.
        partition: Its number.
        end: An offset that the topic has reached.
        most: The most records of a poll.
        what: What the topic is called in a message.

    Raises:
        UnknownTopic: Nothing came for a minute.
        LogError: Kafka is not reachable.
    """
    heard_s = time.monotonic()
    while (at := reader.position(partition)) < end:
        batches = reader.poll(POLL_S, most)
        yield batches
        heard_s = time.monotonic() if batches else heard_s
        if time.monotonic() - heard_s > STALLED_S:
            raise UnknownTopic(
                f"{what} gave nothing for {STALLED_S:.0f} s at position {at} of {end}: a transaction may still be open",
                "try again",
            )


class ClicksLeft:
    """What the topic of clicks still holds, and what the stream had read of it by the word of its group.

    Args:
        settings: Of the stream.
        store: Being rebuilt.
        clock: Of its clicks.
        salt: Of the users' pseudonyms.
        topics: Of the cluster.
        found: Counts what is taken and what is lost.
        mask: The clicks that are left out.

    Raises:
        LogError: Kafka is not reachable.
    """

    def __init__(
        self,
        settings: Settings,
        store: HistoryStore,
        clock: EventClock,
        salt: Salt,
        topics: Topics,
        found: Rebuilt,
        mask: Mask = Mask.NONE,
    ) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._found, self._mask = found, mask
        self._parser = Parser(settings.events, salt)
        self._topic_id: str | None = None
        self._kept: Mapping[int, tuple[int, int]] = {}
        self._group: Mapping[int, int] = {}
        kafka = settings.kafka
        try:
            self._topic_id = topics.describe(kafka.clicks_topic).topic_id
            self._kept = topics.ends(kafka.clicks_topic)
            self._group = topics.committed(kafka.group, kafka.clicks_topic)
        except UnknownTopic as error:
            logger.warning("%s; only what the micro-batch log holds is rebuilt", error)

    def committed(self) -> dict[Source, int]:
        """The next offset of each source as the group has it, in the order of the partitions."""
        if self._topic_id is None:
            return {}
        return {Source(self._topic_id, partition): after for partition, after in sorted(self._group.items())}

    def has(self, source: Source, mark: int | None, after: int) -> bool:
        """Whether the clicks may still hold positions of `source` from `mark` (None: its first) to below `after`."""
        if source.topic_id != self._topic_id or source.partition not in self._kept:
            return False
        return self._kept[source.partition][0] < after or mark is None

    def fill(self, source: Source, mark: int | None, after: int) -> None:
        """Takes the positions of `source` from `mark` up to `after` into the store; counts those that are gone.

        Raises:
            LogError: Kafka is not reachable, or stops answering.
        """
        at = mark or 0
        first = min(max(at, self._kept[source.partition][0]), after)
        self._found.lost += first - at
        if mark is not None and first > at:
            self._store.commit(Appends.none(), [Range(source, at, first, absent=first - at)])
        if first == after:
            return
        logger.info("the log does not hold positions %d to %d of %s: reading the clicks", first, after, source)
        self._found.clicks += after - first
        labels = open_labels(self._settings, self._store, source.topic_id)
        profiler = Profiler(self._store, FeatureSpec.from_settings(self._settings), 1, self._mask) if labels else None
        kafka, partition = self._settings.kafka, source.partition
        with Reader(kafka, kafka.clicks_topic, [partition], {partition: first}) as reader:
            for batches in read_to(reader, partition, after, CLICKS_AT_ONCE, kafka.clicks_topic):
                events = self._parser.parse([one.between(one.first, min(after, one.next)) for one in batches])
                self._take(leave_out(events, self._mask), profiler, labels)

    def _take(self, events: EventBatch, profiler: Profiler | None, labels: Labels | None) -> None:
        """One commit for clicks; impressions among them may still wait, with the windows of then."""
        now_ms = wall_ms()
        if profiler is None or labels is None:
            told = self._clock.follow(events, events.ranges, now_ms)
            self._store.commit(Appends.of(events.user, events_of(events, events.ranges)), events.ranges, told.state)
        else:
            commit_at_once(self._store, profiler, self._clock, labels, events, now_ms)
