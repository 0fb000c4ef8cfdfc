"""What a sweep deletes from the row store: entries that no retained version reads, and lanes without versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import lmdb

from state.registry.manifest import Visible
from state.rows.keys import LANES, TOP, lane_of, lane_start, stem, u64, version_of
from state.rows.lineage import needed, segments

LANE_ROWS_PER_SWEEP = 50_000


def sweep_rows(
    transaction: lmdb.Transaction,
    rows: lmdb._Database,
    lane: int,
    changes: Iterable[tuple[int, int]],
    retained: Mapping[int, Visible],
) -> int:
    """Deletes what a retired version leaves without a reader.

    Args:
        transaction: A write transaction.
        rows: The database of rows.
        lane: Where the version's rows are.
        changes: Table and id of each row that it wrote.
        retained: What each version may see that stays in the lane.

    Returns:
        The version up to which none may come back to this lane, for a tombstone was dropped; 0 where all may.
    """
    runs = segments(retained)
    floor = 0
    cursor = transaction.cursor(rows)
    for table, identity in changes:
        start = stem(lane, table, identity)
        entries: list[tuple[int, bool]] = []
        found = cursor.set_range(start)
        while found and cursor.key()[: len(start)] == start:
            entries.append((version_of(bytes(cursor.key())), not cursor.value()))
            found = cursor.next()
        kept = needed([version for version, _ in entries], runs)
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


def delete_dead_lanes(transaction: lmdb.Transaction, rows: lmdb._Database, alive: set[int]) -> set[int]:
    """Deletes rows of lanes without versions, at most `LANE_ROWS_PER_SWEEP`; returns these lanes."""
    budget = LANE_ROWS_PER_SWEEP
    dead = set(range(LANES)) - alive
    for lane in dead:
        cursor = transaction.cursor(rows)
        cursor.set_range(lane_start(lane))
        while budget and (key := cursor.key()) and lane_of(bytes(key)) == lane:
            cursor.delete()
            budget -= 1
    return dead
