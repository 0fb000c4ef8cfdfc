"""Which of a recording's times is its newest, where a few stray rows lie long after all the others. Pure.

A replay at full speed moves the newest time to now, and `events.max_age_s`
decides which of the others are too old. One row with a wrong clock, weeks
after the rest, would have all the rest refused. So a row counts as stray where
leaving it out spares many others: the newest time is the one that costs least,
a stray counting as `STRAY_COST` refused rows, and rows are told apart only
where that halves the cost.

Times are counted by the hour: a recording larger than memory is judged too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from state.recordings.rows import I64, NO_TIME

HOUR_MS = 3_600_000
STRAY_COST = 25
SMALL = 4  # of fewer than 100 rows a quarter is the cost, so that one of ten may be told apart


@dataclass(frozen=True)
class Crowd:
    """What most rows of a recording agree on.

    Attributes:
        newest_ms: The newest time but for strays; NO_TIME where no row has a time.
        strays: Rows after that.
        first: File and line of the first stray; None without one.
        latest_ms: The newest time of all.
        spared: Rows that would be too old if that were the newest.
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
        """Counts rows.

        Args:
            at_ms: `[n]` int64, times; NO_TIME for none.
            file: `[n]` int64, or one number: which file each is of.
            line: `[n]` int64, which line of it.
        """
        rows = np.flatnonzero(at_ms != NO_TIME)
        files = np.broadcast_to(np.asarray(file, np.int64), len(at_ms))
        hours, firsts, numbers, counts = np.unique(
            at_ms[rows] // HOUR_MS, return_index=True, return_inverse=True, return_counts=True
        )
        newest = np.full(len(hours), NO_TIME, np.int64)
        np.maximum.at(newest, numbers, at_ms[rows])
        for number, hour in enumerate(hours.tolist()):
            row, count, newest_ms = int(rows[firsts[number]]), int(counts[number]), int(newest[number])
            place = int(files[row]), int(line[row])
            if (known := self._hours.get(hour)) is None:
                self._hours[hour] = _Hour(count, newest_ms, place)
            else:
                self._hours[hour] = _Hour(known.rows + count, max(known.newest_ms, newest_ms), min(known.first, place))

    def crowd(self, max_age_ms: int) -> Crowd:
        """The newest time, strays told apart.

        >>> times, day = RecordedTimes(), 86_400_000
        >>> times.add(np.array([*range(0, 9 * day, day), 60 * day]), 0, np.arange(2, 12))
        >>> times.crowd(30 * day)
        Crowd(newest_ms=691200000, strays=1, first=(0, 11), latest_ms=5184000000, spared=9)

        Args:
            max_age_ms: A row that lies further before the newest one is refused.
        """
        if not self._hours:
            return Crowd(NO_TIME)
        hours = [self._hours[hour] for hour in sorted(self._hours)]
        newest = np.array([hour.newest_ms for hour in hours], np.int64)
        until = np.concatenate([[0], np.cumsum([hour.rows for hour in hours])])
        total = int(until[-1])
        old = until[np.searchsorted(newest, newest - max_age_ms)]
        strays = total - until[1:]
        cost = strays * min(STRAY_COST, total / SMALL) + old
        # The latest of those that cost least.
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
    """A time as text.

    >>> as_utc(1_511_544_070_000)
    '2017-11-24T17:21:10Z'
    """
    return f"{np.datetime64(at_ms, 'ms').astype('datetime64[s]')}Z"


def told_apart(crowd: Crowd, first: str, max_age_s: float) -> str:
    """What was told apart, in a sentence.

    >>> told_apart(Crowd(0, 1, (0, 17), 10**12, 900), "clicks.csv:17", 2_592_000.0)
    'clicks.csv:17: 1 row lies long after all the others (2001-09-09T01:46:40Z): if it set the clock, events.max_age_s (2,592,000 s) would refuse 900 of them; the newest of the others sets it (1970-01-01T00:00:00Z)'

    Args:
        crowd: With strays.
        first: Where the first stray stands.
        max_age_s: The setting that decides.
    """
    one = crowd.strays == 1
    rows = "1 row lies" if one else f"this row and {crowd.strays - 1:,} more lie"
    return (
        f"{first}: {rows} long after all the others ({'' if one else 'up to '}{as_utc(crowd.latest_ms)}): if "
        f"{'it' if one else 'they'} set the clock, events.max_age_s ({max_age_s:,.0f} s) would refuse "
        f"{crowd.spared:,} of them; the newest of the others sets it ({as_utc(crowd.newest_ms)})"
    )
