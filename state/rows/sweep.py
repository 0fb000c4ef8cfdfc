"""Deletes from the row store the entries that no retained version reads, and lanes without versions.

Each retained version must keep reading the same values of an embedding row. Version numbers only grow. After a rollback
to version 30 the next epoch begins at, say, 51 with parent 30. The versions that version 52 may see are then closed
intervals, newest first: `((51, 52), (1, 30))`. Versions 31 to 50 are abandoned: their rows may still be stored, but no
reader of 52 sees them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import lmdb

from state.registry.manifest import Visible, sees
from state.rows.tables import LANES, TOP, lane_of, lane_start, u64, version_of


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


def sweep_row(cursor: lmdb.Cursor, start: bytes, branches: Sequence[Branch]) -> int:
    """Deletes the entries of one row that no version reads.

    Args:
        cursor: Of the database of rows, in a write transaction.
        start: Prefix of the keys of the row.
        branches: Branches of the versions that are retained in its lane.

    Returns:
        The newest tombstone that was dropped: no version up to it may be applied to this lane again. 0 if none was.
    """
    size = len(start)
    entries: list[tuple[int, bool]] = []
    found = cursor.set_range(start)
    while found and (key := bytes(cursor.key()))[:size] == start:
        entries.append((version_of(key), not cursor.value()))
        found = cursor.next()
    floor = 0
    kept = needed([version for version, _ in entries], branches)
    for version, empty in reversed(entries):
        # A tombstone with nothing older under it is redundant, but no version up to it may be applied here again.
        if version in kept and not empty:
            break
        if version in kept:
            floor = max(floor, version)
            kept.discard(version)
    for version, _ in entries:
        if version not in kept and cursor.set_key(start + u64(TOP - version)):
            cursor.delete()
    return floor


def has_rows(transaction: lmdb.Transaction, rows: lmdb._Database, lane: int) -> bool:
    """Whether a lane has any rows."""
    cursor = transaction.cursor(rows)
    return bool(cursor.set_range(lane_start(lane))) and lane_of(bytes(cursor.key())) == lane


def delete_dead_lanes(transaction: lmdb.Transaction, rows: lmdb._Database, alive: set[int], at_most: int) -> set[int]:
    """Deletes at most `at_most` rows of lanes without versions; returns those of these lanes that are empty then."""
    empty = set(range(LANES)) - alive
    for lane in sorted(empty):
        cursor = transaction.cursor(rows)
        cursor.set_range(lane_start(lane))
        # The cursor has an empty key after the last row of all.
        while (key := bytes(cursor.key())) and lane_of(key) == lane:
            if not at_most:
                empty.discard(lane)
                break
            cursor.delete()
            at_most -= 1
    return empty
