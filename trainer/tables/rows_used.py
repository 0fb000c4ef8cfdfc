"""Compiled loops over the rows that a step used: mark them, date them, make them distinct."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from trainer.tables.index import I32, U64

I64 = npt.NDArray[np.int64]


@compiled("i4[::1], u1[::1], i4[::1], i8")
def mark_rows(rows: I32, flags: npt.NDArray[np.uint8], listed: I32, count: int) -> int:
    """Appends those of `[n]` rows that are not in `flags` to the first `count` of `listed`; returns the new count."""
    for i in range(rows.shape[0]):
        row = rows[i]
        if row != 0 and flags[row] == 0:
            flags[row] = 1
            listed[count] = row
            count += 1
    return count


@compiled("i4[::1], const(i8[::1]), i8[::1]", "i4[::1], i8[::1], i8[::1]")
def see(rows: I32, at_ms: I64, last_seen_ms: I64) -> None:
    """Raises the last-seen time of each of `[n]` rows to the newest of its log times, in ms."""
    for i in range(rows.shape[0]):
        if at_ms[i] > last_seen_ms[rows[i]]:
            last_seen_ms[rows[i]] = at_ms[i]


@compiled("i4[::1], i4[::1], i4[::1], i4[::1]")
def distinct_rows(rows: I32, scratch: I32, unique: I32, positions: I32) -> int:
    """Distinct rows in order of first use, after the missing row 0, and the position of each of `[n]` rows among them.

    Returns their number. `scratch` has a 0 for each row of the table, before and after.
    """
    unique[0] = 0
    count = 1
    for i in range(rows.shape[0]):
        row = rows[i]
        if row == 0:
            positions[i] = 0
            continue
        if scratch[row] == 0:
            scratch[row] = count
            unique[count] = row
            count += 1
        positions[i] = scratch[row]
    for k in range(1, count):
        scratch[unique[k]] = 0
    return count


def first_occurrences(ids: U64) -> U64:
    """Distinct ids in the order in which they first occur.

    >>> first_occurrences(np.array([9, 3, 9, 1], np.uint64)).tolist()
    [9, 3, 1]
    """
    _, first = np.unique(ids, return_index=True)
    return ids[np.sort(first)]
