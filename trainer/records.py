"""Iterates over the records of the training log, including damaged ones, and skips those that an operator accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from state.errors import MicroBatchError, SaltMismatch, SpecMismatch
from state.log import PartitionBatch
from state.positions import Gap, Source
from trainer.accounts import Passages

BAD = (MicroBatchError, SpecMismatch, SaltMismatch)
"""The errors that concern a single record."""

Taken = TypeVar("Taken")


class LogRecord(NamedTuple):
    """A record of the training log, or the records of a batch that cannot be read.

    Attributes:
        first: Its offset.
        next: The offset after it.
        value: Its value.
        damage: Why it cannot be read; empty if it can.
    """

    first: int
    next: int
    value: bytes | None = None
    damage: str = ""

    def require_whole(self, where: str) -> None:
        """Raises if the record is damaged.

        Raises:
            MicroBatchError: It is damaged.
        """
        if self.damage:
            raise MicroBatchError(
                f"{where} cannot be read: {self.damage}",
                "look after the broker's disk, and restore the topic if you can",
            )


def records_of(batch: PartitionBatch) -> Iterator[LogRecord]:
    """All records of a poll, in log order.

    >>> import numpy as np
    >>> at = np.array([4, 9])
    >>> batch = PartitionBatch("ab" * 16, 0, 4, 11, at, at, [None] * 2, [b"a", b"b"], corrupt=((5, 9, "checksum"),))
    >>> [(one.first, one.next, one.value) for one in records_of(batch)]
    [(4, 5, b'a'), (5, 9, None), (9, 10, b'b')]
    """
    read = zip(batch.offsets.tolist(), batch.values, strict=True)
    damaged = [LogRecord(first, after, damage=reason) for first, after, reason in batch.corrupt]
    if not damaged:
        yield from (LogRecord(offset, offset + 1, value) for offset, value in read)
        return
    yield from sorted([*damaged, *(LogRecord(offset, offset + 1, value) for offset, value in read)])


def take_or_leave(
    record: LogRecord,
    where: str,
    source: Source,
    marks: Mapping[Source, int],
    passages: Passages,
    take: Callable[[bytes | None], Taken],
) -> Taken | None:
    """Calls `take` on a record and returns its result; None if the record is skipped, which is permanent.

    Args:
        record: The record.
        where: Its offset, for messages.
        source: The training log's partition.
        marks: The next offset of each source of clicks.
        passages: Knows which records were skipped, and skips those that an operator accepts.
        take: Learns the record's value; raises one of `BAD` if it cannot.

    Raises:
        SpringtideError: From `take`, if the operator does not accept to skip the record.
    """
    if passages.is_left_out(source, record.first):
        return None
    try:
        record.require_whole(where)
        return take(record.value)
    except BAD as problem:
        passages.leave_out(Gap(source, record.first, record.next), marks, problem)
        return None
