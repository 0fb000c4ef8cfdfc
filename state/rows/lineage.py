"""Decides which entries of an embedding row must be kept, so that each retained version reads the same values.

Version numbers only grow. After a rollback to version 30 the next epoch begins
at, say, 51 with parent 30. The versions that version 52 may see are then closed
intervals, newest first: `((51, 52), (1, 30))`. Versions 31 to 50 are abandoned:
their rows may still be stored, but no reader of 52 sees them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from state.registry.manifest import Visible, sees


class Branch(NamedTuple):
    """Retained versions of one branch.

    Attributes:
        start: The first version of the branch after its branch point.
        before: The versions before it that they see, newest interval first.
        versions: The retained versions, ascending.
    """

    start: int
    before: Visible
    versions: list[int]


def branches_of(retained: Mapping[int, Visible]) -> list[Branch]:
    """The branches that the `retained` versions are on.

    >>> branches_of({52: ((51, 52), (1, 30)), 29: ((1, 29),), 30: ((1, 30),)})
    [Branch(start=1, before=(), versions=[29, 30]), Branch(start=51, before=((1, 30),), versions=[52])]
    """
    found: dict[tuple[int, Visible], list[int]] = {}
    for version in sorted(retained):
        (start, _), *before = retained[version]
        found.setdefault((start, tuple(before)), []).append(version)
    return [Branch(*line, versions) for line, versions in found.items()]


def newest_visible(versions: Iterable[int], visible: Visible) -> int | None:
    """The first of `versions` (newest first) that is inside `visible`, or None.

    >>> newest_visible([52, 44, 12, 3], ((51, 51), (1, 30)))
    12
    """
    for version in versions:
        if sees(visible, version):
            return version
    return None


def needed(versions: Sequence[int], branches: Iterable[Branch]) -> set[int]:
    """The entries of one row (their versions, newest first) that some retained version reads.

    >>> needed([9, 7, 5, 2], [Branch(1, (), [6, 7, 8])]) == {7, 5}
    True
    >>> needed([52, 44, 12, 3], [Branch(51, ((1, 30),), [51, 53])]) == {52, 12}
    True
    """
    kept: set[int] = set()
    for start, before, readers in branches:
        newer: int | None = None
        for version in versions:
            if version < start:
                break
            # The oldest reader that may see it reads it, unless a newer entry hides it.
            place = bisect_left(readers, version)
            if place < len(readers) and (newer is None or readers[place] < newer):
                kept.add(version)
            newer = version
        if before and (newer is None or newer > readers[0]):
            oldest = newest_visible(versions, before)
            if oldest is not None:
                kept.add(oldest)
    return kept
