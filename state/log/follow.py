"""Follows a topic from a stored position, and reads a topic up to an end. Part of `state.log`.

- A position belongs to a topic's id. In a recreated topic, reading starts at the beginning.
- If records were deleted before they were read, or the log was truncated below the position, `lost` decides where
  reading continues. The default is the first retained record or, after a truncation, the truncation point.
- After a loss or an error the reader is closed and a new one is opened, from the position that is stored by then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from state.disk import documents
from state.errors import GapError, LogError, TruncatedLog
from state.log import Log, PartitionBatch, Reader

logger = logging.getLogger(__name__)

POLL_S = 0.5
STALLED_S = 60.0
REFRESH_S = 5.0


@dataclass(frozen=True, slots=True)
class Position:
    """The read position in a topic.

    Attributes:
        topic_id: The topic's id, 32 hexadecimal digits; empty for the topic that has the name, with any id.
        next: Partition -> offset of its next record.
        leaders: Partition -> `Reader.leader_epoch` of that offset, if known.
    """

    topic_id: str
    next: Mapping[int, int]
    leaders: Mapping[int, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Encodes the position."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes | None) -> Position | None:
        """Decodes the output of `to_json`; None for no data."""
        return documents.decode(data, cls) if data else None


@dataclass(frozen=True, slots=True)
class Opening:
    """The result of opening a topic.

    Attributes:
        ends: Partition -> its first retained offset and the offset of its next record.
        next: Partition -> the offset at which reading starts.
        stored: The requested position; None for none.
        losses: The losses between that position and `next`.
    """

    topic_id: str
    ends: Mapping[int, tuple[int, int]]
    next: Mapping[int, int]
    stored: Position | None = None
    losses: tuple[GapError, ...] = ()

    @property
    def recreated(self) -> bool:
        """Whether the stored position belongs to another topic of that name."""
        return self.stored is not None and self.stored.topic_id not in ("", self.topic_id)

    @property
    def resumed(self) -> bool:
        """Whether reading resumes at a stored position without a loss."""
        return self.stored is not None and not self.recreated and not self.losses

    @property
    def unread(self) -> int:
        """The positions up to the end."""
        return sum(end - self.next[partition] for partition, (_, end) in self.ends.items())


def nearest(error: GapError) -> int:
    """The offset at which reading continues after a loss: the first retained offset, or the truncation point."""
    (gap,) = error.gaps
    return gap.first if isinstance(error, TruncatedLog) else gap.next


def open_topic(
    log: Log,
    topic: str,
    partitions: Sequence[int] | None = None,
    stored: Position | None = None,
    lost: Callable[[GapError], int] = nearest,
) -> tuple[Reader, Opening]:
    """Opens a topic at a stored position; partitions that it does not name start at their beginning.

    `partitions` None reads all partitions, including later ones. `lost` returns the offset at which to continue after a
    loss, or raises.
    """
    while True:
        with log.topics() as topics:
            topic_id, ends = topics.describe(topic).topic_id, topics.ends(topic)
        if partitions is not None:
            ends = {partition: ends[partition] for partition in partitions if partition in ends}
        start = stored if stored is not None and stored.topic_id in ("", topic_id) else Position(topic_id, {})
        positions = {partition: start.next.get(partition, begin) for partition, (begin, _) in ends.items()}
        leaders = {partition: epoch for partition, epoch in start.leaders.items() if partition in positions}
        losses, reader = list[GapError](), None
        while reader is None:
            try:
                reader = log.reader(topic, partitions, positions, leaders=leaders)
            except GapError as error:
                partition = error.gaps[0].source.partition
                positions[partition] = lost(error)
                leaders.pop(partition, None)
                losses.append(error)
        if reader.topic_id == topic_id:
            return reader, Opening(topic_id, ends, positions, stored, tuple(losses))
        # The topic was recreated just now.
        reader.close()


class Follower:
    """Follows a topic. Connects with the first poll, and again after an error. Not thread-safe.

    `stored` returns the position from which reading resumes, and `opened` is called, for each connection. `reader` is
    then open, and the callback may seek in it. `partitions` None reads all partitions, including later ones.
    """

    def __init__(
        self,
        log: Log,
        topic: str,
        partitions: Sequence[int] | None = None,
        stored: Callable[[], Position | None] = lambda: None,
        opened: Callable[[Opening], None] = lambda _: None,
    ) -> None:
        self._log, self._topic, self._partitions = log, topic, partitions
        self._stored, self._opened = stored, opened
        self._reader: Reader | None = None
        self._refresh_s = 0.0

    @property
    def connected(self) -> bool:
        """Whether the topic is open."""
        return self._reader is not None

    @property
    def reader(self) -> Reader:
        """The open reader."""
        assert self._reader is not None, "connect first"
        return self._reader

    def connect(self) -> None:
        """Opens the topic, unless it is open.

        Raises:
            LogError: See `open_topic`.
        """
        if self._reader is None:
            stored = self._stored()
            self._reader, opening = open_topic(self._log, self._topic, self._partitions, stored)
            self._refresh_s = time.monotonic() + REFRESH_S
            try:
                self._opened(opening)
            except BaseException:
                self.disconnect()
                raise

    def poll(self, timeout_s: float, max_records: int = 10_000) -> list[PartitionBatch]:
        """Connects if needed, and waits up to `timeout_s` for new records or positions.

        After a loss it opens the topic again, at the position that follows from `stored` and `lost`, and returns
        nothing. After a LogError the topic is closed, and the next call opens it at the stored position.
        """
        try:
            self.connect()
            if self._partitions is None and time.monotonic() >= self._refresh_s:
                self.reader.refresh()
                self._refresh_s = time.monotonic() + REFRESH_S
            try:
                return self.reader.poll(timeout_s, max_records)
            except GapError as error:
                logger.warning("%s", error.what)
                self.disconnect()
                self.connect()
                return []
        except LogError:
            self.disconnect()
            raise

    def lag(self) -> int:
        """The number of positions up to the log's end, as last received.

        Raises:
            LogError: The log does not answer; the topic is closed.
        """
        try:
            return sum(self.reader.lag().values())
        except LogError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Closes the topic; the next poll opens it at the stored position."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def read_to(
    reader: Reader,
    ends: Mapping[int, int],
    max_records: int = 10_000,
    stalled_s: float = STALLED_S,
    poll: Callable[[], list[PartitionBatch]] | None = None,
) -> Iterator[list[PartitionBatch]]:
    """Yields the batches of each poll until all partitions are read to their ends; the last batch may go beyond.

    Raises:
        LogError: Nothing arrived for `stalled_s`, or the log cannot be read.
    """
    heard_s = time.monotonic()
    while any(reader.position(partition) < end for partition, end in ends.items()):
        batches = poll() if poll is not None else reader.poll(POLL_S, max_records)
        if batches:
            yield batches
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > stalled_s:
            partition, end = next(item for item in ends.items() if reader.position(item[0]) < item[1])
            raise LogError(
                f"topic {reader.topic} gave nothing for {stalled_s:g} s at offset {reader.position(partition)} of {end} of "
                f"partition {partition}",
                "check the broker and try again: a transaction may still be open",
            )
