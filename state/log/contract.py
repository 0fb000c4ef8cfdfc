"""What a log is to everybody who reads or writes one: its parts, as protocols.

A log has topics, a topic partitions, a partition positions. A record has one
position; a position may be without a record for ever (a transaction's marker,
an aborted or compacted record). What is written in a transaction becomes
visible when it commits. Positions move at a partition's end by writing and at
its beginning by retention.

`state.log.cluster.KafkaLog` and `state.log.memory.MemoryLog` are such logs;
`tests/conformance/test_logs.py` holds every `Log` to what is said here.
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

    A log that goes away and comes back costs only time: `poll` returns nothing
    meanwhile.
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
        """Waits until something new is there, at most `timeout_s`.

        Args:
            timeout_s: Seconds; 0 takes what has arrived.
            max_records: At most so many records over all partitions.
            shares: By partition at most so many; the others wait, and what was fetched of them is kept. None takes them
                as they come.

        Returns:
            At most one batch per partition; also ranges without a record.

        Raises:
            GapError: records were deleted before we read them.
            TruncatedLog: the log was cut back behind our position.
            UnknownTopic: the topic is gone, or is another topic of that name.
        """
        ...

    def seek(self, partition: int, offset: int) -> None:
        """The next poll of this partition begins at `offset`."""

    def position(self, partition: int) -> int:
        """The position after the last one that `poll` covered."""
        ...

    def leader_epoch(self, partition: int, offset: int) -> int:
        """The epoch of the leader that wrote the newest record before `offset`; -1 where this reader does not know. Any thread.

        Kept with a position and told to the reader that goes on from it, it
        shows whether the log was cut back meanwhile.
        """
        ...

    def unread(self, partition: int) -> int:
        """How many positions lie between ours and the end of a partition, as last heard; 1 where nothing was heard yet.

        Nobody is asked.
        """
        ...

    def lag(self) -> dict[int, int]:
        """Per partition how many positions lie between ours and the log's end, as last heard."""
        ...

    def reachable(self) -> bool:
        """Whether the log is there, as far as this reader knows: `poll` does not say so."""
        ...

    def refresh(self) -> list[int]:
        """Takes up partitions that the topic got meanwhile, from their beginning; returns them.

        Raises:
            UnknownTopic: the topic is gone, or is another topic of that name.
        """
        ...

    def commit_group(self, positions: Mapping[int, int]) -> None:
        """Shows positions to lag tools under the group of the settings; nothing is read from there.

        Raises:
            LogError: the group has members, or the log does not answer.
        """

    def close(self) -> None:
        """Ends it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LogWriter(Protocol):
    """Sends records, each once. One thread uses a writer.

    With a transactional id every record belongs to a `transaction`; a second
    writer with the same id fences the first. After an error close the writer
    and make another.
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
        """Hands a record over; it is not acknowledged before `flush` or the transaction's end.

        Args:
            topic: Its name.
            partition: The partition; None for that of the key.
            key: What compaction goes by.
            value: None takes the key's value away.
            headers: Names and values beside it.
            timestamp_ms: When it was made; None for now.

        Raises:
            UnknownTopic: there is no such topic; none is created.
            FencedWriter: another writer took over the transactional id.
            LogError: the record is too large, or outside a transaction.
        """

    def flush(self) -> None:
        """Returns when every record sent so far is acknowledged.

        Raises:
            UnreachableBroker: no acknowledgement in time; records may or may not be there.
            LogError: the log refused a record.
        """

    def transaction(self) -> AbstractContextManager[None]:
        """What is sent inside becomes visible together when the block ends, or not at all.

        An exception in the block aborts and goes on.

        Raises:
            FencedWriter: another writer took over the transactional id.
            UnreachableBroker: no answer in time; the outcome is unknown.
            LogError: the log refused; nothing became visible.
        """
        ...

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends it; what is not acknowledged by then is given up."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LogTopics(Protocol):
    """Asks and changes what topics there are. Any thread may call.

    Raises:
        UnreachableBroker: the log does not answer; so does every method.
        LogError: the log refused; so does every method.
    """

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Makes the topic if there is none; an existing one stays as it is."""
        ...

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions.

        Raises:
            UnknownTopic: there is no such topic.
        """
        ...

    def names(self) -> list[str]:
        """All topics that we may see, sorted."""
        ...

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Per partition the first position kept and the position of the next record.

        With `committed_only` the position before which every transaction has ended: a reader of committed records
        gets no further.

        Raises:
            UnknownTopic: there is no such topic.
        """
        ...

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Per partition the first position whose record's timestamp is `time_ms` or later, else the end.

        Raises:
            UnknownTopic: there is no such topic.
        """
        ...

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records; returns when it is gone.

        Raises:
            UnknownTopic: there is no such topic.
        """

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""

    def grow(self, name: str, partitions: int) -> None:
        """Gives the topic more partitions."""

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Writes positions of a consumer group without members, for lag tools."""

    def committed(self, group: str, name: str) -> dict[int, int]:
        """Positions of a consumer group in a topic; partitions without one are absent."""
        ...

    def close(self) -> None:
        """Ends it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Log(ABC):
    """A log: where its topics, readers and writers come from.

    Args:
        settings: The section `[kafka]`.
    """

    @abstractmethod
    def __init__(self, settings: Kafka) -> None: ...

    @abstractmethod
    def topics(self) -> LogTopics:
        """What topics there are."""

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
        """Follows partitions of a topic from given positions.

        Args:
            topic: Its name.
            partitions: Those to read; None for all, also later ones.
            positions: Where to begin per partition; those not named begin at
                their beginning, or at their end with `from_end`.
            committed_only: Leave out records of open and aborted transactions.
            from_end: See `positions`.
            leaders: Per partition `LogReader.leader_epoch` of its position, where that is known.

        Raises:
            UnreachableBroker: the log does not answer.
            UnknownTopic: there is no such topic or partition.
            GapError: a position lies before the beginning.
            TruncatedLog: the log was cut back behind a position.
        """

    @abstractmethod
    def writer(self, transactional_id: str | None = None) -> LogWriter:
        """Sends records; with a transactional id also ends what a predecessor left open.

        Raises:
            UnreachableBroker: the log does not answer.
            LogError: the log refused.
        """
