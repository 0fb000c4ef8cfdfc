"""A reader and a writer of a log in memory; each keeps the promises of `state.log.contract`.

Part of `state.log`; `state.log.memory.MemoryLog` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Self

import numpy as np

from state.errors import LogError, UnreachableBroker
from state.log.contract import LogReader, LogWriter
from state.log.failures import fenced, gap, made_again, truncated, unknown_partition
from state.log.leader_epochs import epoch_before, noted
from state.log.memory_state import MemoryState, Partition, Topic, Transaction
from state.log.memory_topics import MemoryTopics
from state.log.partitioner import partition_of
from state.log.records import Headers, PartitionBatch


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
        """Waits until something new is there, at most `timeout_s`."""
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
        """The next poll of this partition begins at `offset`; who wrote what is passed over is not known then."""
        self._leaders[partition] = self._leaders.get(partition, ()) if offset <= self._positions[partition] else ()
        self._positions[partition] = offset

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        return self._positions[partition]

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 where this reader does not know."""
        return epoch_before(self._leaders.get(partition, ()), offset)

    def unread(self, partition: int) -> int:
        """How many positions lie between ours and the end of a partition."""
        with self._state.changed:
            topic = self._state.topics.get(self.topic)
            return max(0, topic.partitions[partition].end - self._positions[partition]) if topic else 1

    def lag(self) -> dict[int, int]:
        """Per partition how many positions lie between ours and the log's end."""
        with self._state.changed:
            found = self._state.topic(self.topic, f"read ends of {self.topic}").partitions
            return {number: max(0, found[number].end - ours) for number, ours in self._positions.items()}

    def reachable(self) -> bool:
        """Whether the log is there."""
        return not self._state.away

    def refresh(self) -> list[int]:
        """Takes up partitions that the topic got meanwhile, from their beginning; returns them."""
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
        """Whether a poll has something to say, if only that the topic is another one."""
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
    """Sends records to a log in memory; they are there once `flush` or the transaction's end returns."""

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
            # As with Kafka, a log that is away is noticed when the record is to be acknowledged.
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
        """What is sent inside becomes visible together when the block ends, or not at all."""
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
            # Nobody would hear the abort; whoever takes the id next ends the transaction.
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
        """Writes what was sent, if the log is there."""
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
