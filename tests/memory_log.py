"""A log in the memory of one process, for tests: it behaves as Kafka does, without a broker.

It has transactions whose markers take positions, writer fencing, retention, compaction and truncation, and can be
unreachable for a while. `tests/conformance/test_logs.py` holds it and Kafka to the promises of `state.log`.
"""

from __future__ import annotations

import threading
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np

from state.config.sections import Kafka
from state.errors import LogError, UnreachableBroker
from state.log import Log, PartitionBatch, Reader, TopicInfo, Topics, Writer, partition_of
from state.log.client import fenced, made_again, require_kept, truncated, unknown_partition, unknown_topic, unreachable
from state.log.records import Headers, Known, epoch_before, noted
from state.process.environment import wall_ms

LARGEST_RECORD = 1_048_588  # default max.message.bytes of Kafka's brokers
RECORD_BYTES = 70  # size of a record in addition to key and value


@dataclass(eq=False, slots=True)
class Transaction:
    """Records that become visible together, or never."""

    open: bool = True
    committed: bool = False
    touched: list[Partition] = field(default_factory=list)

    def end(self, committed: bool) -> None:
        self.open, self.committed = False, committed
        for partition in self.touched:
            partition.end += 1


class MemoryRecord(NamedTuple):
    """One record as it was sent."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int
    transaction: Transaction | None = None

    @property
    def visible(self) -> bool:
        return self.transaction is None or self.transaction.committed


class Partition:
    """Positions `[begin, end)`, of which some hold a record."""

    def __init__(self) -> None:
        self.begin = self.end = 0
        self.leaders: Known = ((-1, 0),)
        self.records: list[MemoryRecord] = []
        self._opened: list[tuple[int, Transaction]] = []

    @property
    def stable_end(self) -> int:
        """The position before which every transaction has ended."""
        while self._opened and not self._opened[0][1].open:
            self._opened.pop(0)
        return self._opened[0][0] if self._opened else self.end

    def append(
        self, key: bytes | None, value: bytes | None, headers: Headers, time_ms: int, transaction: Transaction | None
    ) -> None:
        if transaction is not None and self not in transaction.touched:
            transaction.touched.append(self)
            self._opened.append((self.end, transaction))
        self.records.append(MemoryRecord(self.end, key, value, tuple(headers), time_ms, transaction))
        self.end += 1

    def read(self, position: int, most: int, committed_only: bool) -> tuple[list[MemoryRecord], int]:
        """At most `most` records from `position` on, and the position after the range that they cover."""
        stop = self.stable_end if committed_only else self.end
        found: list[MemoryRecord] = []
        for record in self.records[self._index(position) : self._index(stop)]:
            if committed_only and not record.visible:
                continue
            if len(found) == most:
                return found, record.offset
            found.append(record)
        return found, max(position, stop)

    def cut_back(self, offset: int) -> None:
        """Truncates the log as a leader without these records does; later records have the next epoch."""
        del self.records[self._index(offset) :]
        self._opened = [one for one in self._opened if one[0] < offset]
        self.end = min(self.end, offset)
        self.leaders = noted(self.leaders, self.end, self.leaders[-1][1] + 1)

    def end_of(self, epoch: int) -> int:
        """The end of the records with `epoch` or an earlier one."""
        return next((first for first, known in self.leaders if known > epoch), self.end)

    def offset_before(self, time_ms: int) -> int:
        return next((record.offset for record in self.records if record.timestamp_ms >= time_ms), self.end)

    def delete_before(self, offset: int) -> None:
        self.begin = max(self.begin, offset)
        del self.records[: self._index(offset)]

    def compact(self) -> None:
        """Keeps the newest record of each key; positions do not change."""
        stop = self.stable_end
        newest = {record.key: record.offset for record in self.records if record.offset < stop and record.visible}
        self.records = [
            record for record in self.records if record.offset >= stop or newest.get(record.key) == record.offset
        ]

    def _index(self, offset: int) -> int:
        return bisect_left(self.records, offset, key=lambda record: record.offset)


@dataclass(frozen=True)
class Topic:
    """A topic with Kafka's configuration, of which retention.ms, cleanup.policy and max.message.bytes have an effect."""

    topic_id: str
    config: Mapping[str, str]
    partitions: list[Partition]

    @property
    def compacted(self) -> bool:
        return "compact" in self.config.get("cleanup.policy", "delete")

    def refusal(self, key: bytes | None, value: bytes | None) -> str:
        """Why a record is refused; empty if it is accepted."""
        if self.compacted and key is None:
            return "a compacted topic takes no record without a key"
        largest = int(self.config.get("max.message.bytes", LARGEST_RECORD))
        size = RECORD_BYTES + len(key or b"") + len(value or b"")
        return f"the record takes {size} bytes, and max.message.bytes is {largest}" if size > largest else ""


class Closing:
    """A context that holds nothing open."""

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryLog(Log):
    """A log without a broker. Any thread may use it; each reader and writer belongs to one.

    >>> log = MemoryLog()
    >>> _ = log.topics().ensure("clicks", 1)
    >>> with log.writer("me") as writer, writer.transaction():
    ...     writer.send("clicks", 0, b"ada", b"shoes")
    >>> [(batch.first, batch.next, batch.values) for batch in log.reader("clicks").poll(0.0)]
    [(0, 2, [b'shoes'])]
    """

    def __init__(
        self,
        settings: Kafka | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        ids: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.settings, self.clock_ms, self.ids = settings or Kafka(), clock_ms, ids
        self.changed = threading.Condition(threading.RLock())
        self.away = False
        self.by_name: dict[str, Topic] = {}
        self.groups: dict[tuple[str, str], dict[int, int]] = {}
        self.epochs: dict[str, int] = {}
        self.transactions: dict[str, Transaction] = {}

    def topics(self) -> MemoryTopics:
        return MemoryTopics(self)

    def reader(self, topic: str, *arguments: Any, **named: Any) -> MemoryReader:
        return MemoryReader(self, topic, *arguments, **named)

    def writer(self, transactional_id: str | None = None) -> MemoryWriter:
        return MemoryWriter(self, transactional_id)

    def records(self, topic: str) -> list[MemoryRecord]:
        """All that a reader of committed records would find, headers included, partition by partition."""
        with self.changed:
            found = self.topic(topic, f"read topic {topic}").partitions
            return [record for each in found for record in each.read(each.begin, len(each.records), True)[0]]

    def cut_back(self, topic: str, positions: Mapping[int, int]) -> None:
        """Loses all records from a position on, per partition, as an unclean election does. Another leader then appends."""
        with self.changed:
            for number, offset in positions.items():
                self.partition(topic, number, f"cut back topic {topic}").cut_back(offset)
            self.changed.notify_all()

    def go_away(self) -> None:
        """Makes the log unreachable until `come_back`: a poll finds nothing, everything else raises UnreachableBroker."""
        self.away = True

    def come_back(self) -> None:
        """Makes the log reachable again, with everything written before."""
        with self.changed:
            self.away = False
            self.changed.notify_all()

    def clean(self) -> None:
        """Does Kafka's periodic cleaning: compacts, and deletes what is older than `retention.ms`; open transactions stay."""
        with self.changed:
            for topic in self.by_name.values():
                keep_ms = int(topic.config.get("retention.ms", -1))
                for partition in topic.partitions:
                    if topic.compacted:
                        partition.compact()
                    elif keep_ms >= 0:
                        young = partition.offset_before(self.clock_ms() - keep_ms)
                        partition.delete_before(min(young, partition.stable_end))
            self.changed.notify_all()

    def require(self, doing: str) -> None:
        if self.away:
            raise unreachable(self.settings, doing, "the log in memory is away")

    def topic(self, name: str, doing: str) -> Topic:
        self.require(doing)
        if name not in self.by_name:
            raise unknown_topic(self.settings, doing)
        return self.by_name[name]

    def partition(self, topic: str, number: int, doing: str) -> Partition:
        partitions = self.topic(topic, doing).partitions
        if not 0 <= number < len(partitions):
            raise LogError(f"cannot {doing}: topic {topic} has no partition {number}, only {len(partitions)}")
        return partitions[number]


class MemoryTopics(Closing, Topics):
    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        log.require("connect to Kafka")

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        with self._log.changed:
            self._log.require(f"create topic {name}")
            if name not in self._log.by_name:
                self._log.by_name[name] = Topic(
                    self._log.ids(), dict(config or {}), [Partition() for _ in range(partitions)]
                )
            return self.describe(name)

    def describe(self, name: str) -> TopicInfo:
        with self._log.changed:
            found = self._log.topic(name, f"describe topic {name}")
            return TopicInfo(found.topic_id, len(found.partitions))

    def names(self) -> list[str]:
        self._log.require("list topics")
        return sorted(self._log.by_name)

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        with self._log.changed:
            found = self._log.topic(name, f"read ends of {name}").partitions
            return {
                number: (each.begin, each.stable_end if committed_only else each.end)
                for number, each in enumerate(found)
            }

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        with self._log.changed:
            found = self._log.topic(name, f"read ends of {name}").partitions
            return {number: each.offset_before(time_ms) for number, each in enumerate(found)}

    def delete(self, name: str) -> None:
        with self._log.changed:
            self._log.topic(name, f"delete topic {name}")
            del self._log.by_name[name]
            self._log.groups = {key: at for key, at in self._log.groups.items() if key[1] != name}
            self._log.changed.notify_all()

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        doing = f"delete records of {name}"
        with self._log.changed:
            for number, offset in positions.items():
                partition = self._log.partition(name, number, doing)
                if offset > partition.end:
                    raise LogError(f"cannot {doing}: partition {number} ends at {partition.end}, before {offset}")
                partition.delete_before(offset)
            self._log.changed.notify_all()

    def grow(self, name: str, partitions: int) -> None:
        with self._log.changed:
            found = self._log.topic(name, f"grow topic {name}").partitions
            found.extend(Partition() for _ in range(partitions - len(found)))
            self._log.changed.notify_all()

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        with self._log.changed:
            for number in positions:
                self._log.partition(name, number, f"commit positions of group {group}")
            self._log.groups.setdefault((group, name), {}).update(positions)

    def committed(self, group: str, name: str) -> dict[int, int]:
        self._log.require(f"read positions of group {group}")
        return dict(self._log.groups.get((group, name), {}))


class MemoryReader(Closing, Reader):
    def __init__(
        self,
        log: MemoryLog,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        leaders: Mapping[int, int] | None = None,
    ) -> None:
        self._log, self.topic = log, topic
        self._all, self._committed_only = partitions is None, committed_only
        with log.changed:
            found = log.topic(topic, f"read topic {topic}")
            self.topic_id = found.topic_id
            wanted = sorted(range(len(found.partitions)) if partitions is None else partitions)
            if wanted and wanted[-1] >= len(found.partitions):
                raise unknown_partition(topic, wanted[-1], len(found.partitions))
            self._positions = {one: (positions or {}).get(one, found.partitions[one].begin) for one in wanted}
            self._leaders = {one: noted((), self._positions[one] - 1, epoch) for one, epoch in (leaders or {}).items()}
            for number in wanted:
                self._require_kept(number)

    @property
    def partitions(self) -> list[int]:
        return sorted(self._positions)

    def poll(
        self, timeout_s: float, max_records: int = 10_000, shares: Mapping[int, int] | None = None
    ) -> list[PartitionBatch]:
        wanted = dict.fromkeys(self.partitions, max_records) if shares is None else shares
        with self._log.changed:
            if not self._log.changed.wait_for(lambda: self._has_news(wanted), timeout_s):
                return []
            self._require_same()
            for number in self._positions:
                self._require_kept(number)
            found = []
            for number, share in wanted.items():
                most = min(max_records, share)
                if most > 0 and (batch := self._take(number, most)) is not None:
                    max_records -= len(batch)
                    found.append(batch)
            return found

    def seek(self, partition: int, offset: int) -> None:
        self._leaders[partition] = self._leaders.get(partition, ()) if offset <= self._positions[partition] else ()
        self._positions[partition] = offset

    def position(self, partition: int) -> int:
        return self._positions[partition]

    def leader_epoch(self, partition: int, offset: int) -> int:
        return epoch_before(self._leaders.get(partition, ()), offset)

    def unread(self, partition: int) -> int:
        topic = self._log.by_name.get(self.topic)
        return max(0, topic.partitions[partition].end - self._positions[partition]) if topic else 1

    def lag(self) -> dict[int, int]:
        with self._log.changed:
            found = self._log.topic(self.topic, f"read ends of {self.topic}").partitions
            return {number: max(0, found[number].end - ours) for number, ours in self._positions.items()}

    def reachable(self) -> bool:
        return not self._log.away

    def refresh(self) -> list[int]:
        with self._log.changed:
            known = range(len(self._require_same().partitions)) if self._all else ()
            added = [number for number in known if number not in self._positions]
            self._positions |= dict.fromkeys(added, 0)
            return added

    def commit_group(self, positions: Mapping[int, int]) -> None:
        self._log.topics().commit(self._log.settings.group, self.topic, positions)

    def _has_news(self, wanted: Mapping[int, int]) -> bool:
        """Whether a poll has something to report, for example that the topic was recreated."""
        if self._log.away:
            return False
        now = self._log.by_name.get(self.topic)
        return now is None or now.topic_id != self.topic_id or any(
            self._positions[number] != (each.stable_end if self._committed_only else each.end)
            for number, each in ((number, now.partitions[number]) for number, most in wanted.items() if most > 0)
        )  # fmt: skip

    def _require_same(self) -> Topic:
        found = self._log.topic(self.topic, f"describe topic {self.topic}")
        if found.topic_id != self.topic_id:
            raise made_again(self.topic, self.topic_id, found.topic_id)
        return found

    def _require_kept(self, number: int) -> None:
        partition, ours = self._log.by_name[self.topic].partitions[number], self._positions[number]
        require_kept(self.topic, self.topic_id, number, ours, partition.begin, partition.end)
        epoch = self.leader_epoch(number, ours)
        if epoch >= 0 and (kept := partition.end_of(epoch)) < ours:
            raise truncated(self.topic, self.topic_id, number, ours, kept, partition.end)

    def _take(self, number: int, max_records: int) -> PartitionBatch | None:
        first = self._positions[number]
        partition = self._log.by_name[self.topic].partitions[number]
        records, after = partition.read(first, max_records, self._committed_only)
        if after == first:
            return None
        self._positions[number] = after
        for start, epoch in partition.leaders:
            if start < after and first < partition.end_of(epoch):
                self._leaders[number] = noted(self._leaders.get(number, ()), max(start, first), epoch)
        offsets = np.array([record.offset for record in records], np.int64)
        times = np.array([record.timestamp_ms for record in records], np.int64)
        keys, values = [record.key for record in records], [record.value for record in records]
        return PartitionBatch(self.topic_id, number, first, after, offsets, times, keys, values)


class MemoryWriter(Closing, Writer):
    def __init__(self, log: MemoryLog, transactional_id: str | None = None) -> None:
        self._log, self._id = log, transactional_id
        self._pending: list[tuple[str, int, bytes | None, bytes | None, Headers, int]] = []
        self._transaction: Transaction | None = None
        self._turn = count()
        with log.changed:
            log.require("connect a writer")
            if transactional_id is not None:
                if (left := log.transactions.pop(transactional_id, None)) is not None:
                    left.end(committed=False)
                self._epoch = log.epochs[transactional_id] = log.epochs.get(transactional_id, -1) + 1
                log.changed.notify_all()

    def send(
        self,
        topic: str,
        partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> None:
        doing = f"write to topic {topic}"
        with self._log.changed:
            self._require_ours(doing)
            if self._id is not None and self._transaction is None:
                raise LogError(f"cannot {doing}: a writer with a transactional id writes in transactions only")
            # As with Kafka, an unreachable log is noticed when the record is to be acknowledged.
            if not self._log.away:
                known = len(self._log.topic(topic, doing).partitions)
                if partition is None:
                    partition = next(self._turn) % known if key is None else partition_of(key, known)
                self._log.partition(topic, partition, doing)
            now_ms = self._log.clock_ms() if timestamp_ms is None else timestamp_ms
            self._pending.append((topic, partition or 0, key, value, headers, now_ms))

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        with self._log.changed:
            self._log.require("write records")
            self._require_ours("write records")
            for topic, number, key, value, headers, time_ms in pending:
                refusal = self._log.topic(topic, "write records").refusal(key, value)
                if refusal:
                    raise LogError(f"cannot write records to topic {topic}: {refusal}")
                partition = self._log.partition(topic, number, "write records")
                partition.append(key, value, headers, time_ms, self._transaction)
            self._log.changed.notify_all()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self._id is None:
            raise LogError("cannot begin a transaction: this writer has no transactional id")
        self._require_ours("begin a transaction")
        self._transaction = self._log.transactions.setdefault(self._id, Transaction())
        try:
            yield
            self.flush()
            self._log.require("commit a transaction")
            self._require_ours("commit a transaction")
            self._finish(committed=True)
        except UnreachableBroker:
            # The abort would reach nothing; the next writer with this id ends the transaction.
            raise
        except BaseException:
            self._pending = []
            if self._log.epochs[self._id] == self._epoch:
                self._finish(committed=False)
            raise
        finally:
            self._transaction = None

    def close(self, timeout_s: float = 5.0) -> None:
        if self._pending and not self._log.away and self._transaction is None:
            self.flush()
        self._pending = []

    def _finish(self, committed: bool) -> None:
        assert self._id is not None
        with self._log.changed:
            self._log.transactions.pop(self._id).end(committed)
            self._log.changed.notify_all()

    def _require_ours(self, doing: str) -> None:
        if self._id is not None and self._log.epochs[self._id] != self._epoch:
            raise fenced(doing)
