"""Deletes from the row store the entries that no retained version reads, and lanes without versions."""

from __future__ import annotations

from collections.abc import Sequence

import lmdb

from state.rows.keys import LANES, TOP, lane_of, lane_start, u64, version_of
from state.rows.lineage import Branch, needed


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
