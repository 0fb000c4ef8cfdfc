"""Reads a topic by position: no consumer group, no automatic commits, and no silent gaps. Part of `state.log`."""

from __future__ import annotations

import importlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaConsumer
from kafka.structs import OffsetAndMetadata, TopicPartition

from state.config.sections import Kafka
from state.errors import TruncatedLog, UnreachableBroker
from state.log.client import Topics, connect, made_again, require_kept, translated, truncated, unknown_partition
from state.log.records import Chunk, PartitionBatch, as_batch, epoch_before, noted, take

KERNELS = "state.log.batch_decoder"
"""The module with the kernels of a reader; imported late, because it loads the compiler."""

FETCH_BYTES = 2 * 1024 * 1024
METADATA_S = 1.0
# A fetch that waits at the broker names its topic, not the topic's id. So within
# this time a topic may be deleted and recreated without notice.
FETCH_WAIT_MS = 250
# After a longer pause no fetch was waiting, and the topic's id is requested.
PAUSE_S = 0.1
# A broker that has not answered a request for this long hangs, although its connections are open.
HANGS_S = 5.0


class BatchRecords:
    """Replaces kafka-python's `Fetcher.PartitionRecords`: yields the chunks of one fetch of a partition, not records.

    The fetcher calls it in the thread of `poll`, by the names of the replaced class. It always returns all its chunks;
    the reader limits the records of one poll.
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
        self.next_fetch_offset = fetch_offset
        self.topic_partition = tp
        self.leader_epoch = -1
        self.bytes_read = 0
        self._records = records
        self._aborted = [(entry.producer_id, entry.first_offset) for entry in aborted_transactions or ()]
        self._committed_only = getattr(isolation_level, "name", "READ_COMMITTED") == "READ_COMMITTED"
        self._on_drain = on_drain

    def __bool__(self) -> bool:
        return self._records is not None

    def take(self, n: int | None = None) -> list[Chunk]:
        """All chunks; a second call returns none."""
        del n
        if self._records is None:
            return []
        data = bytes(self._records._buffer)
        self.bytes_read = len(data)
        decoder = importlib.import_module(KERNELS)
        chunks: list[Chunk] = decoder.decode_batches(data, self.next_fetch_offset, self._aborted, self._committed_only)
        if chunks:
            self.next_fetch_offset = chunks[-1].next
            self.leader_epoch = chunks[-1].leader_epoch
        self.drain()
        return chunks

    def drain(self) -> None:
        """Reports to the fetcher that this fetch is consumed."""
        if self._records is not None:
            self._records = None
            self._on_drain(self)


class BatchConsumer:
    """The client's consumer of one topic, by position, with chunks instead of records.

    Only this class and `BatchRecords` use private names of the client's consumer.

    Attributes:
        refused: Whether a broker has answered a fetch with an error, so that the topic may be gone. The caller resets
            it.
    """

    def __init__(self, settings: Kafka, topic: str, committed_only: bool) -> None:
        self._topic = topic
        self.refused = False
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
        self._fetcher = self._consumer._fetcher
        parse = self._fetcher._parse_fetched_data

        def watched(completed: Any) -> Any:
            self.refused = self.refused or bool(completed.partition_data.error_code)
            return parse(completed)

        self._fetcher._parse_fetched_data = watched
        self._fetcher.PartitionRecords = BatchRecords
        # Imported now, not at the first records.
        importlib.import_module(KERNELS)

    def assign(self, partitions: Iterable[int]) -> None:
        """Sets the partitions to fetch; call `seek` for each of them afterwards."""
        self._consumer.assign([TopicPartition(self._topic, partition) for partition in partitions])

    def seek(self, partition: int, offset: int, epoch: int) -> None:
        """Fetches from `offset` on; unlike the client's own `seek` it keeps the epoch of the record before it."""
        self._consumer._subscription.seek(TopicPartition(self._topic, partition), OffsetAndMetadata(offset, "", epoch))

    def validate(self, timeout_s: float) -> None:
        """Checks for each position with an epoch whether the log was truncated below it (KIP-320).

        By itself, the client does this only once it has read a record. A check without an answer in time is repeated
        while the partition is read. Raises the client's `LogTruncationError` if the log was truncated below a position.
        """
        assigned = self._consumer._subscription.assignment
        to_check = [state for state in assigned.values() if state.position.leader_epoch >= 0]
        for state in to_check:
            state.request_position_validation()
        if to_check:
            self._fetcher._manager.run(self._fetcher._validate_offsets_async, timeout_s * 1000)
            self._fetcher.validate_offsets_if_needed()

    def poll(self, timeout_s: float, full: Iterable[int]) -> dict[int, list[Chunk]]:
        """The received chunks by partition.

        For the partitions `full`, the client keeps the received chunks and fetches no more.
        """
        wanted = {TopicPartition(self._topic, partition) for partition in full}
        resting = self._consumer.paused()
        self._consumer.pause(*(wanted - resting))
        self._consumer.resume(*(resting - wanted))
        records = self._consumer.poll(timeout_ms=max(0, timeout_s) * 1000, max_records=sys.maxsize)
        return {partition.partition: chunks for partition, chunks in records.items()}

    def end(self, partition: int) -> int | None:
        """The position of the partition's next record, as last received; None before the first answer."""
        mark: int | None = self._consumer.highwater(TopicPartition(self._topic, partition))
        return mark

    def topic_id(self) -> str | None:
        """The id of the topic of that name, as last received."""
        topic_id = self._fetcher._manager.cluster.topic_id(self._topic)
        return None if topic_id is None else str(topic_id.hex)

    def reachable(self) -> bool:
        """Whether a broker answers: a connection is open, and no request has waited for `HANGS_S`."""
        client = self._consumer._client
        connected = [broker.node_id for broker in client.cluster.brokers() if client.connected(broker.node_id)]
        # A broker that hangs keeps its connections. A fetch without new records is answered after FETCH_WAIT_MS.
        sent_s = time.monotonic() - HANGS_S
        requests = [client._manager._conns[node].in_flight_requests for node in connected]
        return any(not waiting or waiting[0][2] > sent_s for waiting in requests)

    def close(self) -> None:
        """Closes the connections."""
        self._consumer.close(autocommit=False)


class Buffer:
    """The chunks of fetches by partition, in order.

    >>> buffer = Buffer()
    >>> for first in (0, 4): buffer.add(1, [Chunk(first, first + 4)])
    >>> 1 in buffer, buffer.full
    (True, {1})
    >>> [chunk.next for chunk in buffer.take(1, 10)], list(buffer)
    ([4, 8], [])
    """

    def __init__(self) -> None:
        self._fetches: dict[int, deque[deque[Chunk]]] = {}

    def __contains__(self, partition: object) -> bool:
        return partition in self._fetches

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._fetches))

    @property
    def full(self) -> set[int]:
        """The partitions that have a fetch ahead."""
        return {partition for partition, fetches in self._fetches.items() if len(fetches) > 1}

    def add(self, partition: int, chunks: Iterable[Chunk]) -> None:
        """Appends the chunks of one fetch, at least one."""
        self._fetches.setdefault(partition, deque()).append(deque(chunks))

    def take(self, partition: int, max_records: int) -> list[Chunk]:
        """Takes at most `max_records` records of a partition that has some, from the left."""
        fetches, chunks = self._fetches[partition], list[Chunk]()
        while fetches:
            chunks += take(fetches[0], max_records - sum(len(chunk.values) for chunk in chunks))
            if fetches[0]:
                return chunks
            fetches.popleft()
        del self._fetches[partition]
        return chunks

    def drop(self, partition: int) -> None:
        """Drops the chunks of a partition, which are then fetched again."""
        self._fetches.pop(partition, None)


class Reader:
    """Reads partitions of a topic from given positions. One thread polls; others may commit.

    A temporary outage of a broker only delays reading: `poll` returns nothing meanwhile. The reader connects at once
    and fetches with the first `poll`.

    Args:
        partitions: The partitions to read; None for all, including later ones.
        positions: Partition -> start position. Other partitions start at their beginning.
        committed_only: Whether to leave out records of open and aborted transactions.
        leaders: Partition -> `leader_epoch` of its position, if known.

    Raises:
        UnreachableBroker: No broker answered in time.
        UnknownTopic: There is no such topic or partition.
        GapError: A position is before the beginning.
        TruncatedLog: The log was truncated below a position.
    """

    def __init__(
        self,
        settings: Kafka,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        leaders: Mapping[int, int] | None = None,
    ) -> None:
        self._settings = settings
        self.topic = topic
        self._all = partitions is None
        self._buffer = Buffer()
        self._paused = False
        self._polled_s = time.monotonic()
        self._topics = Topics(settings)
        try:
            info, ends = self._topics.describe(topic), self._topics.ends(topic)
            self.topic_id = info.topic_id
            wanted = list(range(info.partitions)) if partitions is None else sorted(partitions)
            if wanted and wanted[-1] >= info.partitions:
                raise unknown_partition(topic, wanted[-1], info.partitions)
            self._positions = {partition: (positions or {}).get(partition, ends[partition][0]) for partition in wanted}
            for partition, position in self._positions.items():
                require_kept(topic, self.topic_id, partition, position, *ends[partition])
            self._leaders = {
                partition: noted((), self._positions[partition] - 1, epoch)
                for partition, epoch in (leaders or {}).items()
            }
            self._consumer = BatchConsumer(settings, topic, committed_only)
            try:
                with self._reading():
                    self._assign()
                    self._consumer.validate(settings.request_timeout_s)
            except BaseException:
                self._consumer.close()
                raise
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
        """Waits up to `timeout_s` for new records or positions; returns at most one batch per partition.

        A batch may also be a range without records.

        Args:
            timeout_s: Seconds; 0 returns the records that have arrived.
            max_records: The maximum number of records over all partitions.
            shares: Partition -> its maximum number of records; further fetched records are kept for later polls. None
                sets no limit per partition.

        Raises:
            GapError: Records were deleted before we read them.
            TruncatedLog: The log was truncated below our position.
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        if shares is None:
            shares = dict.fromkeys(list(self._buffer) or self._positions, max_records)
        wanted = [partition for partition, most in shares.items() if most > 0]
        arrived = [partition for partition in wanted if partition in self._buffer]
        if len(arrived) < len(wanted):
            self._fetch(0.0 if arrived else timeout_s)
        batches = []
        for partition in wanted:
            most = min(max_records, shares[partition])
            if most > 0 and partition in self._buffer:
                batches.append(self._deliver(partition, most))
                max_records -= len(batches[-1])
        return batches

    def seek(self, partition: int, offset: int) -> None:
        """Sets the position of the partition's next poll; the leader epochs of skipped records are unknown then."""
        self._buffer.drop(partition)
        leaders = self._leaders.get(partition, ()) if offset <= self._positions[partition] else ()
        self._leaders[partition], self._positions[partition] = leaders, offset
        self._consumer.seek(partition, offset, epoch_before(leaders, offset))

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        return self._positions[partition]

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 if unknown. Thread-safe.

        Store it with a position and pass it to the reader that resumes there, which then detects whether the log was
        truncated meanwhile.
        """
        return epoch_before(self._leaders.get(partition, ()), offset)

    def unread(self, partition: int) -> int:
        """The number of positions between ours and the partition's end, as last received; 1 before the first response.

        It sends no request.
        """
        end = self._consumer.end(partition)
        return 1 if end is None else max(0, end - self._positions[partition])

    def lag(self) -> dict[int, int]:
        """Partition -> the number of positions between ours and the log's end, as last received."""
        ends = {partition: self._consumer.end(partition) for partition in self._positions}
        if None in ends.values():
            ends |= {partition: end for partition, (_, end) in self._topics.ends(self.topic).items()}
        return {partition: max(0, (ends[partition] or 0) - position) for partition, position in self._positions.items()}

    def reachable(self) -> bool:
        """Whether the log is reachable, as far as this reader knows; `poll` does not report an outage."""
        return self._consumer.reachable()

    def refresh(self) -> list[int]:
        """Starts to read partitions that were added to the topic, from their beginning; returns them.

        Raises:
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        partitions = self._check()
        added = [number for number in range(partitions) if number not in self._positions] if self._all else []
        if added:
            self._positions |= dict.fromkeys(added, 0)
            self._assign()
        return added

    def commit_group(self, positions: Mapping[int, int]) -> None:
        """Commits positions under the group of the settings, for lag tools only; readers never start from there.

        Raises:
            LogError: The group has members, or the log does not answer.
        """
        self._topics.commit(self._settings.group, self.topic, positions)

    def close(self) -> None:
        """Closes the connections."""
        self._consumer.close()
        self._topics.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assign(self) -> None:
        self._consumer.assign(self.partitions)
        for partition, offset in self._positions.items():
            self.seek(partition, offset)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Translates what the client raises while it reads or opens."""
        try:
            yield
        except kafka_errors.LogTruncationError as problem:
            raise self._truncated(problem) from problem
        except kafka_errors.KafkaError as problem:
            with translated(self._settings, f"read topic {self.topic}"):
                raise problem

    def _fetch(self, timeout_s: float) -> None:
        self._paused = self._paused or time.monotonic() - self._polled_s > PAUSE_S
        with self._reading():
            try:
                chunks_of = self._consumer.poll(timeout_s, self._buffer.full)
            except kafka_errors.OffsetOutOfRangeError:
                self._check()
                ends = self._topics.ends(self.topic)
                for partition, position in self._positions.items():
                    require_kept(self.topic, self.topic_id, partition, position, *ends[partition])
                # Only records before our positions were deleted.
                self._assign()
                return
            finally:
                self._polled_s = time.monotonic()
        # A name does not identify a topic. Before any delivery, check that the
        # topic is still the one to which our positions belong.
        changed = self._consumer.topic_id() not in (None, self.topic_id)
        if self._consumer.refused or changed or (self._paused and chunks_of):
            try:
                self._check()
                self._consumer.refused = self._paused = False
            except UnreachableBroker:
                self._assign()
                return
        for partition, chunks in chunks_of.items():
            self._buffer.add(partition, chunks)

    def _check(self) -> int:
        info = self._topics.describe(self.topic)
        if info.topic_id != self.topic_id:
            raise made_again(self.topic, self.topic_id, info.topic_id)
        return info.partitions

    def _truncated(self, problem: kafka_errors.LogTruncationError) -> TruncatedLog:
        self._check()
        partition = min(divergent.partition for divergent in problem.divergent_offsets)
        end_of_epoch = problem.divergent_offsets[TopicPartition(self.topic, partition)]
        begin, end = self._topics.ends(self.topic)[partition]
        # The broker may no longer know that epoch. Then no part of the log is known to be the one that we read.
        kept_end = begin if end_of_epoch is None else max(begin, end_of_epoch.offset)
        return truncated(self.topic, self.topic_id, partition, self._positions[partition], kept_end, end)

    def _deliver(self, partition: int, max_records: int) -> PartitionBatch:
        chunks = self._buffer.take(partition, max_records)
        first, self._positions[partition] = self._positions[partition], chunks[-1].next
        for chunk in chunks:
            self._leaders[partition] = noted(self._leaders.get(partition, ()), chunk.first, chunk.leader_epoch)
        return as_batch(self.topic_id, partition, first, chunks)
