"""Branches of the training log: which records count, and where to read next when a segment ends. Pure.

An exact rollback rewinds the stream, which then writes its clicks again at the log's end, in a new epoch of the log.
Records after the version that was rolled back to no longer count. A branch is a sequence of segments (`BranchSegment`).
Each segment has an epoch, which its records name, and follows the previous segment in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from state.positions import Source

FIRST_EPOCH = 1


class BranchSegment(NamedTuple):
    """A segment of a branch: the records of one epoch of the log at offsets `[first, until)`.

    Attributes:
        epoch: Epoch of the log; a record's header names it.
        first: No record of the epoch is before this offset.
        until: Offset at which the next segment takes over; None for the last one.
        sources: Per source the offset of the clicks from which the epoch was written; none for the first epoch.
    """

    epoch: int
    first: int
    until: int | None = None
    sources: tuple[tuple[Source, int], ...] = ()

    def reaches(self, offset: int) -> bool:
        """Whether `offset` is before the segment's end."""
        return self.until is None or offset < self.until


LogLine = tuple[BranchSegment, ...]
WHOLE: LogLine = (BranchSegment(FIRST_EPOCH, 0),)


class _Parting(NamedTuple):
    """The offset at which two branches diverge, and per source the offset up to which both contain the clicks."""

    offset: int
    sources: tuple[tuple[Source, int], ...]


def counts(line: LogLine, epoch: int, offset: int) -> bool:
    """Whether the record of `epoch` at `offset` is on the branch.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> [counts(line, 1, 39), counts(line, 1, 40), counts(line, 1, 70), counts(line, 2, 70)]
    [True, False, False, True]
    """
    return any(segment.epoch == epoch and segment.first <= offset and segment.reaches(offset) for segment in line)


def onward(line: LogLine, offset: int) -> int:
    """The next offset to read for a reader at `offset`: that offset, or the start of the next segment.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> onward(line, 39), onward(line, 40), onward(line, 61)
    (39, 60, 61)
    """
    return max(offset, _at(line, offset).first)


def epoch_at(line: LogLine, offset: int) -> int:
    """The epoch of the segment that a reader at `offset` is in, or reaches next."""
    return _at(line, offset).epoch


def has(line: LogLine, epoch: int, offset: int) -> bool:
    """Whether a reader at `offset`, whose last records were of `epoch`, has read only records of the branch.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> [has(line, 1, 40), has(line, 1, 41), has(line, 1, 70), has(line, 2, 60)]
    [True, False, False, True]
    """
    return any(
        segment.epoch == epoch and segment.first <= offset and (segment.until is None or offset <= segment.until)
        for segment in line
    )


def turned(line: LogLine, epoch: int, offset: int, end: int, sources: Sequence[tuple[Source, int]]) -> LogLine:
    """Creates a branch: it leaves `line` at a branch point and continues in a new epoch at the log's end.

    Args:
        line: The branch to start from; it has the branch point.
        epoch: Epoch of the log at the branch point.
        offset: Offset of the branch point.
        end: The end offset of the log, or an earlier offset.
        sources: Per source the offset of the clicks at the branch point.

    >>> twice = turned(turned(WHOLE, 1, 40, 60, ()), 1, 30, 90, ())
    >>> [(segment.epoch, segment.first, segment.until) for segment in twice]
    [(1, 0, 30), (3, 90, None)]

    Raises:
        ValueError: The branch point is not on the branch.
    """
    if not has(line, epoch, offset):
        raise ValueError(f"offset {offset} of log epoch {epoch} is not on the branch {line}")
    segments = [segment for segment in line if segment.epoch <= epoch]
    segments[-1] = segments[-1]._replace(until=offset)
    return (*segments, BranchSegment(line[-1].epoch + 1, max(end, offset), None, tuple(sorted(sources))))


def parting(own: LogLine, now: LogLine) -> _Parting | None:
    """The point to which a reader of branch `own` must rewind to read `now`; None if the branches are equal.

    >>> once = turned(WHOLE, 1, 40, 60, ())
    >>> [parting(WHOLE, once).offset, parting(once, turned(once, 2, 70, 90, ())).offset, parting(once, once)]
    [40, 70, None]

    Raises:
        ValueError: `now` does not continue beyond the common part, so it is not a later branch.
    """
    if own == now:
        return None
    shared = 0
    while shared < min(len(own), len(now)) and own[shared] == now[shared]:
        shared += 1
    cut = shared < len(own) and shared < len(now) and own[shared].epoch == now[shared].epoch
    after = shared + 1 if cut else shared
    if after >= len(now):
        raise ValueError(f"the branch {now} does not continue {own}")
    before = now[after - 1].until
    assert before is not None, "only the last segment is open"
    return _Parting(before, now[after].sources)


def to_json(line: LogLine) -> list[dict[str, Any]]:
    """Converts a branch to JSON values."""
    return [
        {
            "epoch": segment.epoch,
            "first": segment.first,
            "until": segment.until,
            "sources": {str(source): after for source, after in segment.sources},
        }
        for segment in line
    ]


def from_json(document: Sequence[Mapping[str, Any]]) -> LogLine:
    """Reads the branch that `to_json` returned.

    Raises:
        KeyError: A field is missing.
    """
    return tuple(
        BranchSegment(
            int(segment["epoch"]),
            int(segment["first"]),
            None if segment["until"] is None else int(segment["until"]),
            tuple(sorted((Source.parse(source), int(after)) for source, after in segment["sources"].items())),
        )
        for segment in document
    )


def _at(line: LogLine, offset: int) -> BranchSegment:
    return next(segment for segment in line if segment.reaches(offset))
