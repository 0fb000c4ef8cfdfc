"""Which leader wrote a partition's records: by its epoch one knows whether the log was cut back behind a position. Pure.

A partition's leader has an epoch, one more with each election, and every record
names the epoch of the leader that wrote it. Where the log was cut back (a
leader was elected that lacked records, or a broker lost what was not on disk)
and grew again, offsets are used twice: then the epoch of the record before our
position ends before it. What is known of a partition is a tuple of (first
offset, epoch), ascending.
"""

from __future__ import annotations

Known = tuple[tuple[int, int], ...]

UNKNOWN = -1
MOST = 64


def epoch_before(known: Known, offset: int) -> int:
    """The epoch of the newest record before `offset`, as far as it is known; -1 where it is not.

    >>> known = ((0, 3), (40, 5))
    >>> epoch_before(known, 40), epoch_before(known, 41), epoch_before(known, 0)
    (3, 5, -1)
    """
    return next((epoch for first, epoch in reversed(known) if first < offset), UNKNOWN)


def noted(known: Known, first: int, epoch: int) -> Known:
    """`known`, and that the record at `first` is of `epoch`; what was known of later ones is forgotten where it differs.

    >>> noted(((0, 3),), 40, 5), noted(((0, 3), (40, 5)), 41, 5)
    (((0, 3), (40, 5)), ((0, 3), (40, 5)))
    >>> noted(((0, 3), (40, 5)), 30, 6)
    ((0, 3), (30, 6))
    """
    if epoch < 0 or epoch_before(known, first + 1) == epoch:
        return known
    return (*(one for one in known if one[0] < first), (first, epoch))[-MOST:]
