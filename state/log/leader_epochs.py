"""Tracks which leader epoch wrote a partition's records, to detect that a log was truncated. No side effects.

A partition's leader has an epoch, which increases with each election. Every
record carries the epoch of the leader that wrote it. A log is truncated if the
elected leader lacks records, or if a broker lost what was not on disk. If it
grows again, offsets are used twice. Then the epoch of the record before our
position ends before that position. The known epochs of a partition are a tuple
of (first offset, epoch), ascending.
"""

from __future__ import annotations

Known = tuple[tuple[int, int], ...]

UNKNOWN = -1
MOST = 64


def epoch_before(known: Known, offset: int) -> int:
    """The epoch of the newest record before `offset`; -1 if it is unknown.

    >>> known = ((0, 3), (40, 5))
    >>> epoch_before(known, 40), epoch_before(known, 41), epoch_before(known, 0)
    (3, 5, -1)
    """
    return next((epoch for first, epoch in reversed(known) if first < offset), UNKNOWN)


def noted(known: Known, first: int, epoch: int) -> Known:
    """Adds to `known` that the record at `first` has `epoch`; if that is news, later entries are dropped.

    >>> noted(((0, 3),), 40, 5), noted(((0, 3), (40, 5)), 41, 5)
    (((0, 3), (40, 5)), ((0, 3), (40, 5)))
    >>> noted(((0, 3), (40, 5)), 30, 6)
    ((0, 3), (30, 6))
    """
    if epoch < 0 or epoch_before(known, first + 1) == epoch:
        return known
    return (*(one for one in known if one[0] < first), (first, epoch))[-MOST:]
