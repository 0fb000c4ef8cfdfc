"""Which records of the training log count, and where to read on where a stretch of it ends. Pure.

An exact rollback makes the stream go back and write its clicks again, at the
log's end, into a new epoch of the log. What it had written since the version
gone back to counts no more. So the log that is read is a line of stretches:
each has an epoch, which its records name, and lies behind the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from state.positions import Source

FIRST_EPOCH = 1


class Stretch(NamedTuple):
    """The records of one epoch of the log at offsets `[first, until)`.

    Attributes:
        epoch: Of the log; a record's header names it.
        first: No record of the epoch lies before it.
        until: Where the next stretch takes over; None for the last one.
        sources: Per source the offset of the clicks from which the epoch was written; none for the first epoch.
    """

    epoch: int
    first: int
    until: int | None = None
    sources: tuple[tuple[Source, int], ...] = ()

    def reaches(self, offset: int) -> bool:
        """Whether `offset` lies before its end."""
        return self.until is None or offset < self.until


LogLine = tuple[Stretch, ...]
WHOLE: LogLine = (Stretch(FIRST_EPOCH, 0),)


class Parting(NamedTuple):
    """Where two lines part.

    Attributes:
        offset: Of the log: what one line has from here on, the other has not.
        sources: Per source the offset of the clicks up to which both have them.
    """

    offset: int
    sources: tuple[tuple[Source, int], ...]


def counts(line: LogLine, epoch: int, offset: int) -> bool:
    """Whether the record of `epoch` at `offset` is on the line.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> [counts(line, 1, 39), counts(line, 1, 40), counts(line, 1, 70), counts(line, 2, 70)]
    [True, False, False, True]
    """
    return any(one.epoch == epoch and one.first <= offset and one.reaches(offset) for one in line)


def onward(line: LogLine, offset: int) -> int:
    """Where a reader that stands at `offset` goes on: there, or where the next stretch begins.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> onward(line, 39), onward(line, 40), onward(line, 61)
    (39, 60, 61)
    """
    return max(offset, _at(line, offset).first)


def epoch_at(line: LogLine, offset: int) -> int:
    """The epoch of the stretch that a reader at `offset` is in, or comes to."""
    return _at(line, offset).epoch


def has(line: LogLine, epoch: int, offset: int) -> bool:
    """Whether a reader that took the records of `epoch` up to before `offset` last has read nothing but the line.

    >>> line = turned(WHOLE, 1, 40, 60, ())
    >>> [has(line, 1, 40), has(line, 1, 41), has(line, 1, 70), has(line, 2, 60)]
    [True, False, False, True]
    """
    return any(
        one.epoch == epoch and one.first <= offset and (one.until is None or offset <= one.until) for one in line
    )


def turned(line: LogLine, epoch: int, offset: int, end: int, sources: Sequence[tuple[Source, int]]) -> LogLine:
    """The line that turns off at a place of `line`, into a new epoch at the log's end.

    Args:
        line: Has that place.
        epoch: Of the log at the place.
        offset: The place.
        end: Where the log ends now, or before.
        sources: Per source the offset of the clicks at the place.

    >>> twice = turned(turned(WHOLE, 1, 40, 60, ()), 1, 30, 90, ())
    >>> [(one.epoch, one.first, one.until) for one in twice]
    [(1, 0, 30), (3, 90, None)]

    Raises:
        ValueError: The place is not on the line.
    """
    if not has(line, epoch, offset):
        raise ValueError(f"offset {offset} of log epoch {epoch} is not on the line {line}")
    kept = [one for one in line if one.epoch <= epoch]
    kept[-1] = kept[-1]._replace(until=offset)
    return (*kept, Stretch(line[-1].epoch + 1, max(end, offset), None, tuple(sorted(sources))))


def parting(mine: LogLine, now: LogLine) -> Parting | None:
    """Where a reader of the line `mine` has to go back to, to read `now`; None where they are the same.

    >>> once = turned(WHOLE, 1, 40, 60, ())
    >>> [parting(WHOLE, once).offset, parting(once, turned(once, 2, 70, 90, ())).offset, parting(once, once)]
    [40, 70, None]

    Raises:
        ValueError: `now` does not go on beyond what they share: it is not a later line.
    """
    if mine == now:
        return None
    shared = 0
    while shared < min(len(mine), len(now)) and mine[shared] == now[shared]:
        shared += 1
    cut = shared < len(mine) and shared < len(now) and mine[shared].epoch == now[shared].epoch
    after = shared + 1 if cut else shared
    if after >= len(now):
        raise ValueError(f"the line {now} does not go on from {mine}")
    before = now[after - 1].until
    assert before is not None, "only the last stretch is open"
    return Parting(before, now[after].sources)


def to_json(line: LogLine) -> list[dict[str, Any]]:
    """A line as JSON values.

    >>> from_json(to_json(WHOLE)) == WHOLE
    True
    """
    return [
        {
            "epoch": one.epoch,
            "first": one.first,
            "until": one.until,
            "sources": {str(source): after for source, after in one.sources},
        }
        for one in line
    ]


def from_json(document: Sequence[Mapping[str, Any]]) -> LogLine:
    """The line that `to_json` gave.

    Raises:
        KeyError: A field is missing.
    """
    return tuple(
        Stretch(
            int(one["epoch"]),
            int(one["first"]),
            None if one["until"] is None else int(one["until"]),
            tuple(sorted((Source.parse(source), int(after)) for source, after in one["sources"].items())),
        )
        for one in document
    )


def _at(line: LogLine, offset: int) -> Stretch:
    return next(one for one in line if one.reaches(offset))
