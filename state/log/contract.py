"""The contract of a log for its readers and writers, as protocols.

A log has topics, a topic has partitions, a partition has positions. A record has
one position. A position may never have a record (a transaction marker, an
aborted or compacted record). Records written in a transaction become visible
when it commits. Writing moves a partition's end, retention its beginning.

The implementations are `state.log.cluster.KafkaLog` and
`state.log.memory.MemoryLog`. `tests/conformance/test_logs.py` tests every `Log`
against this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

from state.config.sections import Kafka
from state.log.records import Headers, PartitionBatch, TopicInfo


class LogReader(Protocol):
    """Follows partitions of a topic by position. One thread polls; others may commit.

    While the log is unreachable `poll` returns nothing; reading resumes when it is
    back.
    """

    topic: str
    topic_id: str

    @property
    def partitions(self) -> list[int]:
        """The partitions that are read."""
        ...

    def poll(
        self, timeout_s: float, max_records: int = 10_000, shares: Mapping[int, int] | None = None
    ) -> list[PartitionBatch]:
        """Waits up to `timeout_s` for new records or positions.

        Args:
            timeout_s: Seconds; 0 takes what has arrived.
            max_records: The most records over all partitions.
            shares: Partition -> its most records; further fetched records are kept for later polls. None sets no limit
                per partition.

        Returns:
            At most one batch per partition, including ranges without records.

        Raises:
            GapError: Records were deleted before we read them.
            TruncatedLog: The log was truncated below our position.
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        ...

    def seek(self, partition: int, offset: int) -> None:
        """Sets the position of the partition's next poll."""

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        ...

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 if unknown. Any thread may call.

        Store it with a position and pass it to the reader that resumes there: it shows
        whether the log was truncated meanwhile.
        """
        ...

    def unread(self, partition: int) -> int:
        """The positions between ours and the partition's end, as last received; 1 if nothing was received yet.

        Sends no request.
        """
        ...

    def lag(self) -> dict[int, int]:
        """Partition -> the positions between ours and the log's end, as last received."""
        ...

    def reachable(self) -> bool:
        """Whether the log is reachable, as far as this reader knows; `poll` does not report it."""
        ...

    def refresh(self) -> list[int]:
        """Starts to read partitions that the topic got meanwhile, from their beginning; returns them.

        Raises:
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        ...

    def commit_group(self, positions: Mapping[int, int]) -> None:
        """Commits positions under the group of the settings, for lag tools only; readers never start from there.

        Raises:
            LogError: The group has members, or the log does not answer.
        """

    def close(self) -> None:
        """Closes the reader."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LogWriter(Protocol):
    """Sends records exactly once. For one thread.

    With a transactional id every record belongs to a `transaction`; a second
    writer with the same id fences the first. After an error, close the writer
    and create another.
    """

    def send(
        self,
        topic: str,
        partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> None:
        """Queues a record; it is acknowledged only by `flush` or the end of the transaction.

        Args:
            topic: The topic's name.
            partition: The partition; None for that of the key.
            key: The key, by which the topic may be compacted.
            value: The value; None deletes the key's value.
            headers: Names and values of the record's headers.
            timestamp_ms: The record's timestamp; None for now.

        Raises:
            UnknownTopic: There is no such topic; none is created.
            FencedWriter: Another writer took over the transactional id.
            LogError: The record is too large, or outside a transaction.
        """

    def flush(self) -> None:
        """Waits until every record sent so far is acknowledged.

        Raises:
            UnreachableBroker: No acknowledgement in time; records may or may not be in the log.
            LogError: The log refused a record.
        """

    def transaction(self) -> AbstractContextManager[None]:
        """A transaction: records sent in the block become visible together at its end, or not at all.

        An exception in the block aborts the transaction and propagates.

        Raises:
            FencedWriter: Another writer took over the transactional id.
            UnreachableBroker: No answer in time; the outcome is unknown.
            LogError: The log refused; nothing became visible.
        """
        ...

    def close(self, timeout_s: float = 5.0) -> None:
        """Closes the writer; records not acknowledged by then are dropped."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LogTopics(Protocol):
    """Administers topics. Any thread may call.

    Raises:
        UnreachableBroker: The log does not answer. Every method may raise it.
        LogError: The log refused. Every method may raise it.
    """

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Creates the topic if there is none; an existing topic stays unchanged."""
        ...

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions.

        Raises:
            UnknownTopic: There is no such topic.
        """
        ...

    def names(self) -> list[str]:
        """All topics that we are allowed to see, sorted."""
        ...

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Partition -> the first position kept and the position of the next record.

        With `committed_only` the end is the position before which every transaction has ended: a reader of committed
        records gets no further.

        Raises:
            UnknownTopic: There is no such topic.
        """
        ...

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Partition -> the first position whose record's timestamp is `time_ms` or later, else the end.

        Raises:
            UnknownTopic: There is no such topic.
        """
        ...

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records; returns when it is gone.

        Raises:
            UnknownTopic: There is no such topic.
        """

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""

    def grow(self, name: str, partitions: int) -> None:
        """Increases the number of the topic's partitions."""

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Commits positions of a consumer group without members, for lag tools."""

    def committed(self, group: str, name: str) -> dict[int, int]:
        """The committed positions of a consumer group in a topic; partitions without one are absent."""
        ...

    def close(self) -> None:
        """Closes the connections."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Log(ABC):
    """A log: creates objects for topics, readers and writers.

    Args:
        settings: The section `[kafka]`.
    """

    @abstractmethod
    def __init__(self, settings: Kafka) -> None: ...

    @abstractmethod
    def topics(self) -> LogTopics:
        """Creates an object for topic administration."""

    @abstractmethod
    def reader(
        self,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
    ) -> LogReader:
        """Creates a reader of a topic's partitions from given positions.

        Args:
            topic: The topic's name.
            partitions: The partitions to read; None for all, including later ones.
            positions: Partition -> start position. Other partitions start at their
                beginning, or at their end with `from_end`.
            committed_only: Leave out records of open and aborted transactions.
            from_end: See `positions`.
            leaders: Partition -> `LogReader.leader_epoch` of its position, if known.

        Raises:
            UnreachableBroker: The log does not answer.
            UnknownTopic: There is no such topic or partition.
            GapError: A position is before the beginning.
            TruncatedLog: The log was truncated below a position.
        """

    @abstractmethod
    def writer(self, transactional_id: str | None = None) -> LogWriter:
        """Creates a writer; with a transactional id this also aborts its predecessor's open transaction.

        Raises:
            UnreachableBroker: The log does not answer.
            LogError: The log refused.
        """
