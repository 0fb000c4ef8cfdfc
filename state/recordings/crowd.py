"""Finds the newest time of a recording, ignoring a few stray rows far after all the others. Pure.

The newest time is the one with the lowest cost: `STRAY_COST` for each row after it, called a stray, plus one for each
row that is too old by `events.max_age_s`. Strays are excluded only if that at least halves the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from state.recordings.rows import I64, NO_TIME

HOUR_MS = 3_600_000
STRAY_COST = 25
SMALL = 4  # with fewer than 100 rows, a stray costs a quarter of them, so that one row of ten can be excluded


@dataclass(frozen=True)
class Crowd:
    """The newest time of a recording without its strays.

    Attributes:
        newest_ms: The newest time without strays; NO_TIME if no row has a time.
        first: File and line of the first stray; None without one.
        latest_ms: The newest time of all rows.
        spared: Rows that would be too old only if `latest_ms` were the newest time.
    """

    newest_ms: int
    strays: int = 0
    first: tuple[int, int] | None = None
    latest_ms: int = NO_TIME
    spared: int = 0


@dataclass
class _Hour:
    rows: int
    newest_ms: int
    first: tuple[int, int]


class RecordedTimes:
    """The times of a recording, counted by the hour."""

    def __init__(self) -> None:
        self._hours: dict[int, _Hour] = {}

    def add(self, at_ms: I64, file: int | I64, line: I64) -> None:
        """Counts rows by their times, `[n]` int64, NO_TIME for none; `file` and `line` are those of each row."""
        rows = np.flatnonzero(at_ms != NO_TIME)
        files = np.broadcast_to(np.asarray(file, np.int64), len(at_ms))
        hours, firsts, numbers, counts = np.unique(
            at_ms[rows] // HOUR_MS, return_index=True, return_inverse=True, return_counts=True
        )
        newest = np.full(len(hours), NO_TIME, np.int64)
        np.maximum.at(newest, numbers, at_ms[rows])
        for number, hour in enumerate(hours.tolist()):
            row, count, newest_ms = int(rows[firsts[number]]), int(counts[number]), int(newest[number])
            where = int(files[row]), int(line[row])
            if (counted := self._hours.get(hour)) is None:
                self._hours[hour] = _Hour(count, newest_ms, where)
            else:
                self._hours[hour] = _Hour(
                    counted.rows + count, max(counted.newest_ms, newest_ms), min(counted.first, where)
                )

    def crowd(self, max_age_ms: int) -> Crowd:
        """The newest time, without strays. Rows more than `max_age_ms` before the newest time are too old."""
        if not self._hours:
            return Crowd(NO_TIME)
        hours = [self._hours[hour] for hour in sorted(self._hours)]
        newest = np.array([hour.newest_ms for hour in hours], np.int64)
        until = np.concatenate([[0], np.cumsum([hour.rows for hour in hours])])
        total = int(until[-1])
        old = until[np.searchsorted(newest, newest - max_age_ms)]
        strays = total - until[1:]
        cost = strays * min(STRAY_COST, total / SMALL) + old
        # Selects the latest of several hours with the lowest cost.
        best = len(hours) - 1 - int(np.argmin(cost[::-1]))
        if not cost[best] <= cost[-1] / 2 or not strays[best]:
            return Crowd(int(newest[-1]), latest_ms=int(newest[-1]))
        return Crowd(
            newest_ms=int(newest[best]),
            strays=int(strays[best]),
            first=min(hour.first for hour in hours[best + 1 :]),
            latest_ms=int(newest[-1]),
            spared=int(old[-1] - old[best]),
        )


def as_utc(at_ms: int) -> str:
    """Formats a time as text."""
    return f"{np.datetime64(at_ms, 'ms').astype('datetime64[s]')}Z"


def described(crowd: Crowd, first: str, max_age_s: float) -> str:
    """Describes the excluded strays in a sentence; `first` is file and line of the first one."""
    is_single = crowd.strays == 1
    rows = "1 row is" if is_single else f"this row and {crowd.strays - 1:,} more are"
    return (
        f"{first}: {rows} long after all the others ({'' if is_single else 'up to '}{as_utc(crowd.latest_ms)}): if "
        f"{'it' if is_single else 'they'} set the clock, events.max_age_s ({max_age_s:,.0f} s) would refuse "
        f"{crowd.spared:,} of them; the newest of the others sets it ({as_utc(crowd.newest_ms)})"
    )
