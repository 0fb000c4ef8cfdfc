"""Reads a topic by position: no group, no automatic commits, nothing skipped unseen.

Part of `state.log`. The client hands over one object per record instead of one
per record batch; `state.log.hook` changes that, else `plain` serves, slower.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaConsumer
from kafka.structs import TopicPartition

from state.config.sections import Kafka
from state.errors import TruncatedLog, UnreachableBroker
from state.log import hook, plain, truncation
from state.log.buffer import Buffer, rest
from state.log.chunks import as_batch
from state.log.client import connect, translated
from state.log.contract import LogReader
from state.log.failures import gap, made_again, unknown_partition
from state.log.leader_epochs import epoch_before, noted
from state.log.records import PartitionBatch
from state.log.topics import Topics

FETCH_BYTES = 2 * 1024 * 1024
METADATA_S = 1.0
# A fetch that waits at the broker names its topic, not the topic's id: within
# this time a topic may be deleted and made again unseen.
FETCH_WAIT_MS = 250
# After a longer pause no fetch was waiting, and the topic is asked for its id.
PAUSE_S = 0.1
# A broker that has not answered a request for so long hangs, though its connections are open.
HANGS_S = 5.0


class Reader(LogReader):
    """Follows partitions of a topic from given positions. One thread polls; others may commit.

    A broker that goes away and comes back costs only time: `poll` returns nothing meanwhile.
    """

    def __init__(
        self,
        settings: Kafka,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
        batched: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects; the first `poll` fetches.

        Args:
            settings: How to connect.
            topic: Its name.
            partitions: Those to read; None for all, also later ones.
            positions: Where to begin per partition; those not named begin at their beginning; at their end with `from_end`.
            committed_only: Leave out records of open and aborted transactions.
            from_end: See `positions`.
            leaders: Per partition the epoch of the record before its position, where that is known.
            batched: Decode whole record batches; False for the client's way.
            clock: Seconds that never go back.

        Raises:
            UnreachableBroker: no broker answered in time.
            UnknownTopic: there is no such topic or partition.
            GapError: a position lies before the beginning.
            TruncatedLog: the log was cut back behind a position.
        """
        self._settings = settings
        self.topic = topic
        self._all = partitions is None
        self._clock = clock
        self._topics = Topics(settings)
        try:
            self._open(partitions, positions or {}, committed_only, from_end, batched, leaders or {})
        except BaseException:
            self._topics.close()
            raise

    @property
    def partitions(self) -> list[int]:
        """The partitions that are read."""
        return sorted(self._positions)

    def poll(
        self, timeout_s: float, max_records: int = 10_000, shares: Mapping[int, int] | None = None
    ) -> list[PartitionBatch]:
        """Waits until something new is there, at most `timeout_s`; see `LogReader.poll`.

        Raises:
            GapError: records were deleted before we read them.
            TruncatedLog: the log was cut back behind our position.
            UnknownTopic: the topic is gone, or is another topic of that name.
        """
        wanted = [one for one, most in (shares or {}).items() if most > 0]
        if any(one not in self._buffer for one in wanted) if shares is not None else not self._buffer:
            self._fetch(0.0 if any(one in self._buffer for one in wanted) else timeout_s)
        batches = []
        for partition in self._buffer if shares is None else wanted:
            most = max_records if shares is None else min(max_records, shares[partition])
            if most > 0 and partition in self._buffer:
                batches.append(self._deliver(partition, most))
                max_records -= len(batches[-1])
        return batches

    def seek(self, partition: int, offset: int) -> None:
        """The next poll of this partition begins at `offset`; who wrote what is passed over is not known then."""
        self._buffer.drop(partition)
        known = self._leaders.get(partition, ()) if offset <= self._positions[partition] else ()
        self._leaders[partition], self._positions[partition] = known, offset
        truncation.seek(self._consumer, TopicPartition(self.topic, partition), offset, epoch_before(known, offset))

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        return self._positions[partition]

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 where this reader does not know."""
        return epoch_before(self._leaders.get(partition, ()), offset)

    def unread(self, partition: int) -> int:
        """How many positions lie between ours and the end of a partition, as last heard; 1 where nothing was heard yet."""
        mark = self._consumer.highwater(TopicPartition(self.topic, partition))
        return 1 if mark is None else max(0, mark - self._positions[partition])

    def lag(self) -> dict[int, int]:
        """Per partition how many positions lie between ours and the log's end, as last heard."""
        marks = {one: self._consumer.highwater(TopicPartition(self.topic, one)) for one in self._positions}
        if any(mark is None for mark in marks.values()):
            marks |= {partition: end for partition, (_, end) in self._topics.ends(self.topic).items()}
        return {partition: max(0, marks[partition] - ours) for partition, ours in self._positions.items()}

    def reachable(self) -> bool:
        """Whether a broker answers: a connection is open, and no request waits for longer than a broker that runs takes."""
        asked = self._consumer._client
        open_to = [
            asked._manager._conns[one.node_id] for one in asked.cluster.brokers() if asked.connected(one.node_id)
        ]
        # A broker that hangs keeps its connections. A fetch is answered after FETCH_WAIT_MS where nothing is new.
        sent_s = time.monotonic() - HANGS_S
        return any(not one.in_flight_requests or one.in_flight_requests[0][2] > sent_s for one in open_to)

    def refresh(self) -> list[int]:
        """Takes up partitions that the topic got meanwhile, from their beginning; returns them.

        Raises:
            UnknownTopic: the topic is gone, or is another topic of that name.
        """
        info = self._check()
        added = [number for number in range(info) if number not in self._positions] if self._all else []
        if added:
            self._positions |= dict.fromkeys(added, 0)
            self._assign()
        return added

    def commit_group(self, positions: Mapping[int, int]) -> None:
        """Shows positions to lag tools under the group of the settings; nothing is read from there.

        Raises:
            LogError: the group has members, or no broker answered.
        """
        self._topics.commit(self._settings.group, self.topic, positions)

    def close(self) -> None:
        """Closes the connections."""
        self._consumer.close(autocommit=False)
        self._topics.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(
        self,
        partitions: Sequence[int] | None,
        positions: Mapping[int, int],
        committed_only: bool,
        from_end: bool,
        batched: bool,
        leaders: Mapping[int, int],
    ) -> None:
        settings, topic = self._settings, self.topic
        info = self._topics.describe(topic)
        self.topic_id = info.topic_id
        wanted = list(range(info.partitions)) if partitions is None else sorted(partitions)
        if wanted and wanted[-1] >= info.partitions:
            raise unknown_partition(topic, wanted[-1], info.partitions)
        self._positions = self._begin(wanted, positions, from_end)
        self._leaders = {one: noted((), self._positions[one] - 1, epoch) for one, epoch in leaders.items()}
        self._buffer = Buffer()
        self._refused = False
        self._paused = False
        self._polled_s = self._clock()
        self._consumer: Any = connect(
            settings,
            f"read topic {topic}",
            KafkaConsumer,
            enable_auto_commit=False,
            auto_offset_reset="none",
            allow_auto_create_topics=False,
            isolation_level="read_committed" if committed_only else "read_uncommitted",
            max_partition_fetch_bytes=FETCH_BYTES,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            metadata_max_age_ms=int(METADATA_S * 1000),
            metrics_enabled=False,
            retry_backoff_ms=20,
        )
        self._batched = batched and hook.install(self._consumer, self._doubt)
        try:
            self._assign()
            truncation.validate(self._consumer, topic, settings.request_timeout_s)
        except kafka_errors.LogTruncationError as problem:
            self._consumer.close(autocommit=False)
            raise self._truncated(problem) from problem

    def _begin(self, wanted: list[int], positions: Mapping[int, int], from_end: bool) -> dict[int, int]:
        ends = self._topics.ends(self.topic)
        found = {}
        for partition in wanted:
            begin, end = ends[partition]
            ours = positions.get(partition, end if from_end else begin)
            if not begin <= ours <= end:
                raise gap(self.topic, self.topic_id, partition, ours, begin, end)
            found[partition] = ours
        return found

    def _assign(self) -> None:
        self._consumer.assign([TopicPartition(self.topic, number) for number in self.partitions])
        for partition, offset in self._positions.items():
            self.seek(partition, offset)

    def _doubt(self) -> None:
        """The broker answered a fetch with an error: the topic may be gone."""
        self._refused = True

    def _fetch(self, timeout_s: float) -> None:
        self._paused = self._paused or self._clock() - self._polled_s > PAUSE_S
        fetched_to = self._buffer.ends(self._positions)
        rest(self._consumer, self.topic, self._buffer.full)
        try:
            found = self._consumer.poll(timeout_ms=max(0, timeout_s) * 1000, max_records=sys.maxsize)
        except kafka_errors.LogTruncationError as problem:
            raise self._truncated(problem) from problem
        except kafka_errors.OffsetOutOfRangeError as problem:
            self._check()
            ends = self._topics.ends(self.topic)
            for partition, ours in self._positions.items():
                begin, end = ends[partition]
                if not begin <= ours <= end:
                    raise gap(self.topic, self.topic_id, partition, ours, begin, end) from problem
            # Deleted up to our very position since we asked: nothing is lost.
            self._assign()
            return
        except kafka_errors.CorruptRecordError as problem:
            partition, chunk = plain.skip_corrupt(self._consumer, self.topic, fetched_to, problem)
            self._buffer.add(partition, [chunk])
            return
        except kafka_errors.KafkaError as problem:
            with translated(self._settings, f"read topic {self.topic}"):
                raise problem
        finally:
            self._polled_s = self._clock()
        # A name is no identity: before anything is delivered the topic must
        # still be the one whose positions we hold.
        known = self._consumer._fetcher._manager.cluster.topic_id(self.topic)
        changed = known is not None and known.hex != self.topic_id
        if self._refused or changed or (self._paused and found):
            try:
                self._check()
                self._refused = self._paused = False
            except UnreachableBroker:
                self._assign()
                return
        if self._batched:
            fetched = {each.partition: chunks for each, chunks in found.items()}
        else:
            fetched = plain.chunks_of(self._consumer, self.topic, fetched_to, found)
        for partition, chunks in fetched.items():
            self._buffer.add(partition, chunks)

    def _check(self) -> int:
        """Number of partitions, if the topic is still the same one."""
        info = self._topics.describe(self.topic)
        if info.topic_id != self.topic_id:
            raise made_again(self.topic, self.topic_id, info.topic_id)
        return info.partitions

    def _truncated(self, problem: kafka_errors.LogTruncationError) -> TruncatedLog:
        self._check()
        return truncation.as_error(problem, self.topic, self.topic_id, self._positions, self._topics.ends(self.topic))

    def _deliver(self, partition: int, max_records: int) -> PartitionBatch:
        taken = self._buffer.take(partition, max_records)
        first, self._positions[partition] = self._positions[partition], taken[-1].next
        for chunk in taken:
            self._leaders[partition] = noted(self._leaders.get(partition, ()), chunk.first, chunk.leader_epoch)
        return as_batch(self.topic_id, partition, first, taken)
