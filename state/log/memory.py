"""A log in the memory of one process that behaves as Kafka does, without a broker.

It is for tests and experiments. It has partitions, positions, transactions whose markers occupy positions, writer
fencing, retention, compaction, and a log that is unreachable for a while. `tests/conformance/test_logs.py` checks it
and Kafka against the same contract.

`MemoryLog` creates the topics, readers and writers; readers and writers keep the promises of `state.log.contract`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Self

import numpy as np

from state.config.sections import Kafka
from state.errors import LogError, UnreachableBroker
from state.log.contract import Log, LogReader, LogTopics, LogWriter
from state.log.failures import fenced, gap, made_again, truncated, unknown_partition
from state.log.leader_epochs import epoch_before, noted
from state.log.memory_state import MemoryRecord, MemoryState, Partition, Topic, Transaction
from state.log.partitioner import partition_of
from state.log.records import Headers, PartitionBatch, TopicInfo
from state.process.wall_clock import wall_ms


class MemoryTopics(LogTopics):
    """The topics of a log in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        state.require("connect to Kafka")

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Creates the topic if it does not exist; an existing one stays as it is."""
        with self._state.changed:
            self._state.require(f"create topic {name}")
            if name not in self._state.topics:
                made = Topic(self._state.ids(), dict(config or {}), [Partition() for _ in range(partitions)])
                self._state.topics[name] = made
            return self.describe(name)

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions."""
        with self._state.changed:
            found = self._state.topic(name, f"describe topic {name}")
            return TopicInfo(found.topic_id, len(found.partitions))

    def names(self) -> list[str]:
        """All topics, sorted."""
        with self._state.changed:
            self._state.require("list topics")
            return sorted(self._state.topics)

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Per partition the first position kept and the position of the next record."""
        with self._state.changed:
            found = self._state.topic(name, f"read ends of {name}").partitions
            ends = [each.stable_end if committed_only else each.end for each in found]
            return {number: (each.begin, end) for number, (each, end) in enumerate(zip(found, ends, strict=True))}

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Per partition the first position whose record's timestamp is `time_ms` or later, else the end."""
        with self._state.changed:
            found = self._state.topic(name, f"read ends of {name}").partitions
            return {number: each.offset_before(time_ms) for number, each in enumerate(found)}

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records."""
        with self._state.changed:
            self._state.topic(name, f"delete topic {name}")
            del self._state.topics[name]
            self._state.groups = {key: at for key, at in self._state.groups.items() if key[1] != name}
            self._state.changed.notify_all()

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""
        doing = f"delete records of {name}"
        with self._state.changed:
            for number, offset in positions.items():
                partition = self._state.partition(name, number, doing)
                if offset > partition.end:
                    raise LogError(f"cannot {doing}: partition {number} ends at {partition.end}, before {offset}")
                partition.delete_before(offset)
            self._state.changed.notify_all()

    def grow(self, name: str, partitions: int) -> None:
        """Gives the topic more partitions."""
        with self._state.changed:
            found = self._state.topic(name, f"grow topic {name}").partitions
            if partitions <= len(found):
                raise LogError(f"cannot grow topic {name}: it has {len(found)} partitions already")
            found.extend(Partition() for _ in range(partitions - len(found)))
            self._state.changed.notify_all()

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Writes positions of a consumer group."""
        with self._state.changed:
            for number in positions:
                self._state.partition(name, number, f"commit positions of group {group}")
            self._state.groups.setdefault((group, name), {}).update(positions)

    def committed(self, group: str, name: str) -> dict[int, int]:
        """Positions of a consumer group in a topic."""
        with self._state.changed:
            self._state.require(f"read positions of group {group}")
            return dict(self._state.groups.get((group, name), {}))

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryReader(LogReader):
    """Follows partitions of a topic of a log in memory."""

    def __init__(
        self,
        state: MemoryState,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
    ) -> None:
        self._state, self.topic = state, topic
        self._all, self._committed_only = partitions is None, committed_only
        with state.changed:
            found = state.topic(topic, f"read topic {topic}")
            self.topic_id = found.topic_id
            wanted = sorted(range(len(found.partitions)) if partitions is None else partitions)
            if wanted and wanted[-1] >= len(found.partitions):
                raise unknown_partition(topic, wanted[-1], len(found.partitions))
            start = {one: found.partitions[one].end if from_end else found.partitions[one].begin for one in wanted}
            self._positions = start | {one: at for one, at in (positions or {}).items() if one in start}
            self._leaders = {one: noted((), self._positions[one] - 1, told) for one, told in (leaders or {}).items()}
            for number in wanted:
                self._require_kept(number)

    @property
    def partitions(self) -> list[int]:
        """The partitions that are read."""
        return sorted(self._positions)

    def poll(
        self, timeout_s: float, max_records: int = 10_000, shares: Mapping[int, int] | None = None
    ) -> list[PartitionBatch]:
        """Waits until new records arrive, at most `timeout_s`."""
        wanted = dict.fromkeys(self._positions, max_records) if shares is None else shares
        with self._state.changed:
            if not self._state.changed.wait_for(lambda: self._has_news(wanted), timeout_s):
                return []
            self._require_same()
            for number in self._positions:
                self._require_kept(number)
            found = []
            for number in wanted if shares is not None else self.partitions:
                most = min(max_records, wanted[number])
                if most > 0 and (batch := self._take(number, most)) is not None:
                    max_records -= len(batch)
                    found.append(batch)
            return found

    def seek(self, partition: int, offset: int) -> None:
        """The next poll of this partition begins at `offset`; the leader epoch before it is then unknown."""
        self._leaders[partition] = self._leaders.get(partition, ()) if offset <= self._positions[partition] else ()
        self._positions[partition] = offset

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        return self._positions[partition]

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 where this reader does not know."""
        return epoch_before(self._leaders.get(partition, ()), offset)

    def unread(self, partition: int) -> int:
        """How many positions are between this reader's and the end of a partition."""
        with self._state.changed:
            topic = self._state.topics.get(self.topic)
            return max(0, topic.partitions[partition].end - self._positions[partition]) if topic else 1

    def lag(self) -> dict[int, int]:
        """Per partition how many positions are between this reader's and the log's end."""
        with self._state.changed:
            found = self._state.topic(self.topic, f"read ends of {self.topic}").partitions
            return {number: max(0, found[number].end - ours) for number, ours in self._positions.items()}

    def reachable(self) -> bool:
        """Whether the log is reachable."""
        return not self._state.away

    def refresh(self) -> list[int]:
        """Adds partitions that the topic got meanwhile, from their beginning; returns them."""
        with self._state.changed:
            known = range(len(self._require_same().partitions)) if self._all else ()
            added = [number for number in known if number not in self._positions]
            self._positions |= dict.fromkeys(added, 0)
            return added

    def commit_group(self, positions: Mapping[int, int]) -> None:
        """Shows positions to lag tools under the group of the settings."""
        MemoryTopics(self._state).commit(self._state.settings.group, self.topic, positions)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_news(self, wanted: Mapping[int, int]) -> bool:
        """Whether a poll has something to report, for example that the topic was recreated."""
        if self._state.away:
            return False
        now = self._state.topics.get(self.topic)
        return now is None or now.topic_id != self.topic_id or any(
            self._positions[number] != self._end(now.partitions[number]) for number, most in wanted.items() if most > 0
        )  # fmt: skip

    def _end(self, partition: Partition) -> int:
        return partition.stable_end if self._committed_only else partition.end

    def _require_same(self) -> Topic:
        found = self._state.topic(self.topic, f"describe topic {self.topic}")
        if found.topic_id != self.topic_id:
            raise made_again(self.topic, self.topic_id, found.topic_id)
        return found

    def _require_kept(self, number: int) -> None:
        partition, ours = self._state.topics[self.topic].partitions[number], self._positions[number]
        if not partition.begin <= ours <= partition.end:
            raise gap(self.topic, self.topic_id, number, ours, partition.begin, partition.end)
        epoch = self.leader_epoch(number, ours)
        if epoch >= 0 and (kept := partition.end_of(epoch)) < ours:
            raise truncated(self.topic, self.topic_id, number, ours, kept, partition.end)

    def _take(self, number: int, max_records: int) -> PartitionBatch | None:
        first = self._positions[number]
        partition = self._state.topics[self.topic].partitions[number]
        records, after = partition.read(first, max_records, self._committed_only)
        if after == first:
            return None
        self._positions[number] = after
        for start, epoch in partition.leaders:
            if start < after and first < partition.end_of(epoch):
                self._leaders[number] = noted(self._leaders.get(number, ()), max(start, first), epoch)
        return PartitionBatch(
            topic_id=self.topic_id,
            partition=number,
            first=first,
            next=after,
            offsets=np.array([record.offset for record in records], np.int64),
            timestamps_ms=np.array([record.timestamp_ms for record in records], np.int64),
            keys=[record.key for record in records],
            values=[record.value for record in records],
        )


class MemoryWriter(LogWriter):
    """Sends records to a log in memory; they are in it once `flush` or the transaction's end returns."""

    def __init__(self, state: MemoryState, transactional_id: str | None = None) -> None:
        self._state, self._id = state, transactional_id
        self._pending: list[tuple[str, int, bytes | None, bytes | None, Headers, int]] = []
        self._transaction: Transaction | None = None
        self._turn = count()
        with state.changed:
            state.require("connect a writer")
            self._epoch = 0 if transactional_id is None else state.take_over(transactional_id)

    def send(
        self,
        topic: str,
        partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> None:
        """Hands a record over."""
        doing = f"write to topic {topic}"
        with self._state.changed:
            if self._id is not None:
                self._require_ours(doing)
                if self._transaction is None:
                    raise LogError(f"cannot {doing}: a writer with a transactional id writes in transactions only")
            # As with Kafka, an unreachable log is noticed when the record is to be acknowledged.
            if not self._state.away:
                known = len(self._state.topic(topic, doing).partitions)
                if partition is None:
                    partition = next(self._turn) % known if key is None else partition_of(key, known)
                self._state.partition(topic, partition, doing)
            now_ms = self._state.clock_ms() if timestamp_ms is None else timestamp_ms
            self._pending.append((topic, partition or 0, key, value, headers, now_ms))

    def flush(self) -> None:
        """Returns when every record sent so far is in the log."""
        pending, self._pending = self._pending, []
        with self._state.changed:
            self._state.require("write records")
            self._require_ours("write records")
            for topic, number, key, value, headers, timestamp_ms in pending:
                refusal = self._state.topic(topic, "write records").refusal(key, value)
                if refusal:
                    raise LogError(f"cannot write records to topic {topic}: {refusal}")
                partition = self._state.partition(topic, number, "write records")
                partition.append(key, value, headers, timestamp_ms, self._transaction)
            self._state.changed.notify_all()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Records sent inside become visible together when the block ends, or not at all."""
        if self._id is None:
            raise LogError("cannot begin a transaction: this writer has no transactional id")
        with self._state.changed:
            self._require_ours("begin a transaction")
            self._transaction = self._state.begin(self._id)
        try:
            yield
            self.flush()
            with self._state.changed:
                self._state.require("commit a transaction")
                self._require_ours("commit a transaction")
                self._state.end(self._id, committed=True)
        except UnreachableBroker:
            # The abort would reach nothing; the next writer with this id ends the transaction.
            raise
        except BaseException:
            self._pending = []
            with self._state.changed:
                if self._state.owns(self._id, self._epoch):
                    self._state.end(self._id, committed=False)
            raise
        finally:
            self._transaction = None

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the sent records, if the log is reachable."""
        if self._pending and not self._state.away and self._transaction is None:
            self.flush()
        self._pending = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_ours(self, doing: str) -> None:
        if self._id is not None and not self._state.owns(self._id, self._epoch):
            raise fenced(doing)


def _new_id() -> str:
    return uuid.uuid4().hex


class MemoryLog(Log):
    """A log without a broker. Any thread may use it; each reader and writer belongs to one.

    >>> log = MemoryLog()
    >>> _ = log.topics().ensure("clicks", 1)
    >>> with log.writer("me") as writer, writer.transaction():
    ...     writer.send("clicks", 0, b"ada", b"shoes")
    >>> [(batch.first, batch.next, batch.values) for batch in log.reader("clicks").poll(0.0)]
    [(0, 2, [b'shoes'])]

    Args:
        settings: The section `[kafka]`: its group is shown to lag tools.
        clock_ms: Wall clock, for timestamps of records and for retention.
        ids: Returns the id of each new topic, 32 hexadecimal digits.
    """

    def __init__(
        self,
        settings: Kafka | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        ids: Callable[[], str] = _new_id,
    ) -> None:
        self._state = MemoryState(settings or Kafka(), clock_ms, ids)

    def topics(self) -> MemoryTopics:
        """The topics."""
        return MemoryTopics(self._state)

    def reader(
        self,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
    ) -> MemoryReader:
        """Follows partitions of a topic from given positions."""
        return MemoryReader(self._state, topic, partitions, positions, committed_only, from_end, leaders)

    def writer(self, transactional_id: str | None = None) -> MemoryWriter:
        """Sends records; with a transactional id also ends a transaction that a predecessor left open."""
        return MemoryWriter(self._state, transactional_id)

    def records(self, topic: str) -> list[MemoryRecord]:
        """All that a reader of committed records would find, headers included, partition by partition.

        Raises:
            UnknownTopic: There is no such topic.
        """
        with self._state.changed:
            found = self._state.topic(topic, f"read topic {topic}").partitions
            return [
                record for each in found for record in each.read(each.begin, len(each.records), committed_only=True)[0]
            ]

    def cut_back(self, topic: str, positions: Mapping[int, int]) -> None:
        """Loses all records from a position on, per partition, as an unclean election does. Another leader then appends.

        Raises:
            UnknownTopic: There is no such topic.
        """
        with self._state.changed:
            found = self._state.topic(topic, f"cut back topic {topic}").partitions
            for number, offset in positions.items():
                found[number].cut_back(offset)
            self._state.changed.notify_all()

    def go_away(self) -> None:
        """Makes the log unreachable until `come_back`: a poll finds nothing, everything else raises UnreachableBroker."""
        with self._state.changed:
            self._state.away = True

    def come_back(self) -> None:
        """Makes the log reachable again, with everything written before."""
        with self._state.changed:
            self._state.away = False
            self._state.changed.notify_all()

    def clean(self) -> None:
        """Does Kafka's periodic cleaning: compacts, and deletes records that are older than `retention.ms`."""
        with self._state.changed:
            for topic in self._state.topics.values():
                keep_ms = int(topic.config.get("retention.ms", -1))
                for partition in topic.partitions:
                    if topic.compacted:
                        partition.compact()
                    elif keep_ms >= 0:
                        partition.delete_older(self._state.clock_ms() - keep_ms)
            self._state.changed.notify_all()
