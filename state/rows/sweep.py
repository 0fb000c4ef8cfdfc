"""What is deleted from the row store: entries that no retained version reads, and lanes without versions."""

from __future__ import annotations

from collections.abc import Sequence

import lmdb

from state.rows.keys import LANES, TOP, lane_of, lane_start, u64, version_of
from state.rows.lineage import Branch, needed


def sweep_row(transaction: lmdb.Transaction, rows: lmdb._Database, start: bytes, branches: Sequence[Branch]) -> int:
    """Deletes the entries of one row that nobody reads.

    Args:
        transaction: A write transaction.
        rows: The database of rows.
        start: What the keys of the row begin with.
        branches: Of the versions that are retained in its lane.

    Returns:
        The version up to which none may come back to this lane, for a tombstone was dropped; 0 where all may.
    """
    cursor, size = transaction.cursor(rows), len(start)
    entries: list[tuple[int, bool]] = []
    found = cursor.set_range(start)
    while found and (key := bytes(cursor.key()))[:size] == start:
        entries.append((version_of(key), not cursor.value()))
        found = cursor.next()
    floor = 0
    kept = needed([version for version, _ in entries], branches)
    for version, empty in reversed(entries):
        # A tombstone with nothing older under it says nothing; but no version up to it may come back to this lane.
        if version in kept and not empty:
            break
        if version in kept:
            floor = max(floor, version)
            kept.discard(version)
    for version, _ in entries:
        if version not in kept:
            transaction.delete(start + u64(TOP - version), db=rows)
    return floor


def has_rows(transaction: lmdb.Transaction, rows: lmdb._Database, lane: int) -> bool:
    """Whether a lane has any."""
    cursor = transaction.cursor(rows)
    return bool(cursor.set_range(lane_start(lane))) and lane_of(bytes(cursor.key())) == lane


def delete_dead_lanes(transaction: lmdb.Transaction, rows: lmdb._Database, alive: set[int], at_most: int) -> set[int]:
    """Deletes rows of lanes without versions, `at_most` so many; returns the lanes that have none left."""
    empty = set(range(LANES)) - alive
    for lane in sorted(empty):
        cursor = transaction.cursor(rows)
        cursor.set_range(lane_start(lane))
        # Behind the last row of all there is an empty key.
        while (key := bytes(cursor.key())) and lane_of(key) == lane:
            if not at_most:
                empty.discard(lane)
                break
            cursor.delete()
            at_most -= 1
    return empty
