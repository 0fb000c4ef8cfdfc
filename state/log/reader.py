"""Reads a topic by position: no consumer group, no automatic commits, and nothing skipped unseen. Part of `state.log`.

The Kafka client returns one object per record. A private hook makes it return
whole record batches; its version is pinned below 3.1, and a test compares both
ways. Where the hook cannot be installed, records are read one by one, slower.

A reader holds one fetch of each partition beyond the one that it delivers.
While some partitions wait for others, no more is fetched, so that memory is
bounded.

A reader that begins at a stored position asks the broker whether the log is
still the one that was read up to there (KIP-320). The client does so by itself
only after it has read a record.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaConsumer
from kafka.structs import OffsetAndMetadata, TopicPartition

from state.config.sections import Kafka
from state.errors import LogError, TruncatedLog, UnreachableBroker
from state.log.chunks import Chunk, as_batch, of_records, take
from state.log.client import connect, translated
from state.log.contract import LogReader
from state.log.failures import gap, made_again, truncated, unknown_partition
from state.log.leader_epochs import epoch_before, noted
from state.log.records import PartitionBatch
from state.log.topics import Topics


class BatchRecords:
    """Takes the place of kafka-python's `Fetcher.PartitionRecords`: yields chunks, not records.

    Called by the fetcher in the thread of `poll`. It always gives all it has:
    how many records one poll delivers is the reader's business.
    """

    def __init__(
        self,
        fetch_offset: int,
        tp: TopicPartition,
        records: Any,
        aborted_transactions: Iterable[Any] | None = None,
        on_drain: Callable[[BatchRecords], object] = lambda _: None,
        isolation_level: Any = None,
        **_: object,
    ) -> None:
        self.fetch_offset = self.next_fetch_offset = fetch_offset
        self.topic_partition = tp
        self.leader_epoch = -1
        self.bytes_read = 0
        self._records = records
        self._aborted = [(each.producer_id, each.first_offset) for each in aborted_transactions or ()]
        self._committed_only = getattr(isolation_level, "name", "READ_COMMITTED") == "READ_COMMITTED"
        self._on_drain = on_drain

    def __bool__(self) -> bool:
        return self._records is not None

    def take(self, n: int | None = None) -> list[Chunk]:
        """All chunks; a second call has none."""
        del n
        if self._records is None:
            return []
        data = bytes(self._records._buffer)
        self.bytes_read = len(data)
        # Not at the top: it loads the compiler, and commands that ask for a topic's ends only are typed in a hurry.
        from state.log.batch_decoder import decode_batches

        chunks = decode_batches(data, self.fetch_offset, self._aborted, self._committed_only)
        if chunks:
            self.next_fetch_offset = chunks[-1].next
            self.leader_epoch = chunks[-1].leader_epoch
        self.drain()
        return chunks

    def drain(self) -> None:
        """Says to the fetcher that this piece is done."""
        if self._records is not None:
            self._records = None
            self._on_drain(self)


def install(consumer: Any, on_error: Callable[[], None]) -> bool:
    """Puts `BatchRecords` into the client; False where this client has no such place."""
    fetcher: Any = getattr(consumer, "_fetcher", None)
    parse = getattr(fetcher, "_parse_fetched_data", None)
    if parse is None or not hasattr(fetcher, "PartitionRecords"):
        return False
    # Now, and not at the first records.
    importlib.import_module("state.log.batch_decoder")

    def watched(completed: Any) -> Any:
        if completed.partition_data.error_code:
            on_error()
        return parse(completed)

    fetcher._parse_fetched_data = watched
    fetcher.PartitionRecords = BatchRecords
    return True


class Buffer:
    """Chunks by partition, in order.

    >>> buffer = Buffer()
    >>> for first in (0, 4): buffer.add(1, [Chunk(first, first + 4)])
    >>> 1 in buffer, buffer.full, buffer.ends({0: 3, 1: 0})
    (True, {1}, {0: 3, 1: 8})
    >>> [chunk.next for chunk in buffer.take(1, 10)], list(buffer)
    ([4, 8], [])
    """

    def __init__(self) -> None:
        self._now: dict[int, deque[Chunk]] = {}
        self._ahead: dict[int, deque[Chunk]] = {}

    def __contains__(self, partition: object) -> bool:
        return partition in self._now

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._now))

    def __bool__(self) -> bool:
        return bool(self._now)

    @property
    def full(self) -> set[int]:
        """The partitions that have a fetch ahead."""
        return set(self._ahead)

    def ends(self, positions: Mapping[int, int]) -> dict[int, int]:
        """By partition the position after what is here, else that of `positions`."""
        last = {one: chunks[-1].next for held in (self._now, self._ahead) for one, chunks in held.items()}
        return {**positions, **last}

    def add(self, partition: int, chunks: Iterable[Chunk]) -> None:
        """Takes what one fetch found, at least one chunk, behind what is here."""
        place = self._ahead if partition in self._now else self._now
        place.setdefault(partition, deque()).extend(chunks)

    def take(self, partition: int, max_records: int) -> list[Chunk]:
        """At most so many records of a partition that has some, from the left."""
        taken = take(self._now[partition], max_records)
        while not self._now[partition]:
            del self._now[partition]
            if partition not in self._ahead:
                break
            self._now[partition] = self._ahead.pop(partition)
            taken += take(self._now[partition], max_records - sum(len(chunk.values) for chunk in taken))
        return taken

    def drop(self, partition: int) -> None:
        """Forgets what is here of a partition: it is fetched again."""
        self._now.pop(partition, None)
        self._ahead.pop(partition, None)


def rest(consumer: Any, topic: str, full: Iterable[int]) -> None:
    """Lets the client fetch of all partitions but those of `full`; what is on its way it keeps."""
    wanted = {TopicPartition(topic, one) for one in full}
    resting = consumer.paused()
    consumer.pause(*(wanted - resting))
    consumer.resume(*(resting - wanted))


def seek(consumer: Any, partition: TopicPartition, offset: int, epoch: int) -> None:
    """As the client's own `seek`, which forgets the epoch of the record before the position."""
    consumer._subscription.seek(partition, OffsetAndMetadata(offset, "", epoch))


def validate(consumer: Any, topic: str, timeout_s: float) -> None:
    """Asks for each partition whose position has an epoch; what is not answered in time is asked again while it is read.

    Raises:
        LogTruncationError: The client's: the log was cut back behind a position.
    """
    assigned = consumer._subscription.assignment
    asked = [one for one in assigned if assigned[one].position.leader_epoch >= 0]
    if not asked:
        return
    for one in asked:
        assigned[one].request_position_validation()
    fetcher = consumer._fetcher
    fetcher._manager.run(fetcher._validate_offsets_async, timeout_s * 1000)
    fetcher.validate_offsets_if_needed()


def as_error(
    problem: kafka_errors.LogTruncationError,
    topic: str,
    topic_id: str,
    positions: Mapping[int, int],
    ends: Mapping[int, tuple[int, int]],
) -> TruncatedLog:
    """What the client found as an error of ours, of the first partition that it names.

    Args:
        problem: The client's.
        topic: The topic's name.
        topic_id: Its id.
        positions: Where we are.
        ends: First and next position of each partition.
    """
    partition = min(each.partition for each in problem.divergent_offsets)
    found = problem.divergent_offsets[TopicPartition(topic, partition)]
    begin, end = ends[partition]
    # The broker may know nothing of that epoch any more: then nothing is known to be what we read.
    kept = begin if found is None else max(begin, found.offset)
    return truncated(topic, topic_id, partition, positions[partition], kept, end)


def chunks_of(
    consumer: Any, topic: str, positions: Mapping[int, int], found: Mapping[TopicPartition, Sequence[Any]]
) -> dict[int, deque[Chunk]]:
    """Chunks out of the client's own records; its position tells of those without any.

    Args:
        consumer: The client.
        topic: The topic's name.
        positions: Where we are.
        found: What its poll gave.
    """
    buffer = {}
    for partition, ours in positions.items():
        each = TopicPartition(topic, partition)
        records = found.get(each, ())
        after = consumer.position(each)
        if records or after > ours:
            buffer[partition] = deque([of_records(ours, after, records)])
    return buffer


def skip_corrupt(consumer: Any, topic: str, positions: Mapping[int, int], problem: Exception) -> tuple[int, Chunk]:
    """Goes past a corrupt batch, which without the hook shows only as an error of one of the partitions.

    Returns:
        The partition, and what is corrupt there.

    Raises:
        LogError: The error names none of the partitions.
    """
    for partition, ours in positions.items():
        each = TopicPartition(topic, partition)
        if f"{each}" in str(problem):
            at = consumer.position(each)
            consumer.seek(each, at + 1)
            return partition, Chunk(ours, at + 1, corrupt=str(problem))
    raise LogError(f"cannot read topic {topic}: {problem}") from problem


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
        seek(self._consumer, TopicPartition(self.topic, partition), offset, epoch_before(known, offset))

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
        self._batched = batched and install(self._consumer, self._doubt)
        try:
            self._assign()
            validate(self._consumer, topic, settings.request_timeout_s)
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
            partition, chunk = skip_corrupt(self._consumer, self.topic, fetched_to, problem)
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
            fetched = chunks_of(self._consumer, self.topic, fetched_to, found)
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
        return as_error(problem, self.topic, self.topic_id, self._positions, self._topics.ends(self.topic))

    def _deliver(self, partition: int, max_records: int) -> PartitionBatch:
        taken = self._buffer.take(partition, max_records)
        first, self._positions[partition] = self._positions[partition], taken[-1].next
        for chunk in taken:
            self._leaders[partition] = noted(self._leaders.get(partition, ()), chunk.first, chunk.leader_epoch)
        return as_batch(self.topic_id, partition, first, taken)
