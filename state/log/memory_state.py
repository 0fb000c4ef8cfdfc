"""The content of a log in memory: records and markers by position, open transactions, group positions; and its lock.

Part of `state.log`; `state.log.memory.MemoryLog` is the log.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from state.config.sections import Kafka
from state.errors import LogError
from state.log.failures import unknown_topic, unreachable
from state.log.leader_epochs import Known, noted
from state.log.records import Headers

LARGEST_RECORD = 1_048_588  # default max.message.bytes of Kafka's brokers
RECORD_BYTES = 70  # size of a record in addition to key and value


@dataclass(eq=False, slots=True)
class Transaction:
    """Records that become visible together, or never.

    Attributes:
        open: Whether it has neither committed nor aborted.
        committed: Whether it has committed.
        touched: The partitions with records of it.
    """

    open: bool = True
    committed: bool = False
    touched: list[Partition] = field(default_factory=list)

    def end(self, committed: bool) -> None:
        """Commits or aborts. Each partition gets a marker, which takes a position."""
        self.open, self.committed = False, committed
        for partition in self.touched:
            partition.end += 1


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """One record as it was sent.

    Attributes:
        offset: Its position.
        key: The key, by which a topic may be compacted.
        value: The value; None deletes the key's value.
        headers: Names and values of the headers.
        timestamp_ms: The record's timestamp.
        transaction: Its transaction; None for none.
    """

    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int
    transaction: Transaction | None = None

    @property
    def visible(self) -> bool:
        """Whether a reader of committed records sees it."""
        return self.transaction is None or self.transaction.committed


class Partition:
    """One partition: positions `[begin, end)`, of which some hold a record.

    >>> partition, transaction = Partition(), Transaction()
    >>> partition.append(None, b"a", (), 0, None), partition.append(None, b"b", (), 0, transaction)
    (0, 1)
    >>> [record.value for record in partition.read(0, 10, committed_only=True)[0]], partition.stable_end
    ([b'a'], 1)
    >>> transaction.end(committed=True)
    >>> [record.value for record in partition.read(0, 10, committed_only=True)[0]], partition.stable_end
    ([b'a', b'b'], 3)
    """

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
        self,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        timestamp_ms: int,
        transaction: Transaction | None,
    ) -> int:
        """Appends a record; returns its position."""
        offset = self.end
        if transaction is not None and self not in transaction.touched:
            transaction.touched.append(self)
            self._opened.append((offset, transaction))
        self.records.append(MemoryRecord(offset, key, value, tuple(headers), timestamp_ms, transaction))
        self.end += 1
        return offset

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
        """Truncates the log at `offset`, as a leader without these records does; later records have the next epoch."""
        del self.records[self._index(offset) :]
        self._opened = [one for one in self._opened if one[0] < offset]
        self.end = min(self.end, offset)
        self.leaders = noted(self.leaders, self.end, self.leaders[-1][1] + 1)

    def end_of(self, epoch: int) -> int:
        """The end of the records with `epoch` or an earlier one."""
        return next((first for first, known in self.leaders if known > epoch), self.end)

    def offset_before(self, time_ms: int) -> int:
        """The first position whose record has the timestamp `time_ms` or later, else the end."""
        return next((record.offset for record in self.records if record.timestamp_ms >= time_ms), self.end)

    def delete_before(self, offset: int) -> None:
        """Deletes the records before `offset`."""
        self.begin = max(self.begin, offset)
        del self.records[: self._index(offset)]

    def delete_older(self, time_ms: int) -> None:
        """Deletes the oldest records with timestamps before `time_ms`, as retention does; open transactions stay."""
        young = (record.offset for record in self.records if record.timestamp_ms >= time_ms)
        self.delete_before(min(next(young, self.end), self.stable_end))

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
    """A topic.

    Attributes:
        topic_id: 32 hexadecimal digits.
        config: Kafka's topic configuration; retention.ms, cleanup.policy and max.message.bytes have an effect.
        partitions: Its partitions; their number only grows.
    """

    topic_id: str
    config: Mapping[str, str]
    partitions: list[Partition]

    @property
    def compacted(self) -> bool:
        """Whether only the newest record of each key is kept."""
        return "compact" in self.config.get("cleanup.policy", "delete")

    def refusal(self, key: bytes | None, value: bytes | None) -> str:
        """Why a record is refused; empty if it is accepted.

        >>> Topic("ab" * 16, {}, []).refusal(None, bytes(2_000_000))
        'the record takes 2000070 bytes, and max.message.bytes is 1048588'
        """
        if self.compacted and key is None:
            return "a compacted topic takes no record without a key"
        largest = int(self.config.get("max.message.bytes", LARGEST_RECORD))
        size = RECORD_BYTES + len(key or b"") + len(value or b"")
        return f"the record takes {size} bytes, and max.message.bytes is {largest}" if size > largest else ""


class MemoryState:
    """The state shared by all topics, readers and writers of one log. Hold `changed` to read or write it.

    Args:
        settings: Contains the group, and the servers for messages.
        clock_ms: Wall clock.
        ids: Generates the ids of new topics.
    """

    def __init__(self, settings: Kafka, clock_ms: Callable[[], int], ids: Callable[[], str]) -> None:
        self.settings, self.clock_ms, self.ids = settings, clock_ms, ids
        self.changed = threading.Condition(threading.RLock())
        self.away = False
        self.topics: dict[str, Topic] = {}
        self.groups: dict[tuple[str, str], dict[int, int]] = {}
        self._writers: dict[str, int] = {}
        self._transactions: dict[str, Transaction] = {}

    def require(self, doing: str) -> None:
        """Raises UnreachableBroker while the log is set unreachable."""
        if self.away:
            raise unreachable(self.settings, doing, "the log in memory is away")

    def topic(self, name: str, doing: str) -> Topic:
        """The topic with a name.

        Raises:
            UnknownTopic: There is no such topic.
            UnreachableBroker: The log is unreachable.
        """
        self.require(doing)
        if name not in self.topics:
            raise unknown_topic(self.settings, doing)
        return self.topics[name]

    def partition(self, topic: str, number: int, doing: str) -> Partition:
        """One partition of a topic.

        Raises:
            LogError: There is no such topic or partition, or the log is unreachable.
        """
        partitions = self.topic(topic, doing).partitions
        if not 0 <= number < len(partitions):
            raise LogError(f"cannot {doing}: topic {topic} has no partition {number}, only {len(partitions)}")
        return partitions[number]

    def take_over(self, transactional_id: str) -> int:
        """Makes the caller the writer of this id and aborts its predecessor's transaction; returns the new epoch."""
        left = self._transactions.pop(transactional_id, None)
        if left is not None and left.open:
            left.end(committed=False)
        self._writers[transactional_id] = self._writers.get(transactional_id, -1) + 1
        self.changed.notify_all()
        return self._writers[transactional_id]

    def owns(self, transactional_id: str, epoch: int) -> bool:
        """Whether no later writer took over the id."""
        return self._writers[transactional_id] == epoch

    def begin(self, transactional_id: str) -> Transaction:
        """Opens a transaction."""
        return self._transactions.setdefault(transactional_id, Transaction())

    def end(self, transactional_id: str, committed: bool) -> None:
        """Commits or aborts the open transaction of this id."""
        self._transactions.pop(transactional_id).end(committed)
        self.changed.notify_all()
