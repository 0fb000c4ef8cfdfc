"""Encodes rows of a recording as records of the topic: JSON objects with the field names of `[events]`. Pure.

The newest time of a recording ignores a few stray rows far after all the others. It is the one with the lowest cost:
`STRAY_COST` for each row after it, called a stray, plus one for each row that is too old by `events.max_age_s`. Strays
are excluded only if that at least halves the cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from state.config.sections import Events
from state.errors import DecodeError
from state.events.decoding import parse_time

I64 = npt.NDArray[np.int64]
NO_TIME = np.iinfo(np.int64).min
SECONDS_BELOW = 1e11  # auto reads smaller numbers as seconds


@dataclass(frozen=True, slots=True)
class RecordedRows:
    """Consecutive rows of one file, as columns.

    Attributes:
        columns: Field -> n values, None where a row has none.
        lines: `[n]` int64, the line on which each row begins (for Parquet the row number), from 1.
        broken: Indices of the rows that cannot be split into fields.
        text: Returns the original text of a row.
    """

    columns: Mapping[str, Sequence[Any]]
    lines: I64
    broken: frozenset[int]
    text: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.lines)


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """n records, complete except for their time.

    Attributes:
        keys: n keys, the raw ids of users.
        bodies: n values. Where `at_ms` is a time, the object lacks its end, `,"time":...}`; others are complete.
        at_ms: `[n]` int64, recorded time; NO_TIME if the row has no readable time.
        file: `[n]` int64, number of the file.
        line: `[n]` int64, line in the file.
    """

    keys: list[bytes]
    bodies: list[bytes]
    at_ms: I64
    file: I64
    line: I64

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: I64) -> EncodedRows:
        """The records `rows`, in that order."""
        indices = rows.tolist()
        return EncodedRows(
            [self.keys[row] for row in indices],
            [self.bodies[row] for row in indices],
            self.at_ms[rows],
            self.file[rows],
            self.line[rows],
        )

    def cut(self, first: int, after: int) -> EncodedRows:
        """The records [first, after)."""
        part = slice(first, after)
        return EncodedRows(self.keys[part], self.bodies[part], self.at_ms[part], self.file[part], self.line[part])


def joined(parts: Sequence[EncodedRows]) -> EncodedRows:
    """All records of `parts`, in their order."""
    return EncodedRows(
        [key for part in parts for key in part.keys],
        [body for part in parts for body in part.bodies],
        *(
            np.concatenate([np.empty(0, np.int64), *(getattr(part, name) for part in parts)])
            for name in ("at_ms", "file", "line")
        ),
    )


def order(at_ms: I64) -> I64:
    """Sorts rows by time, `[n]` int64. Equal times keep their order; a row without a time follows the row before it.

    >>> order(np.array([30, NO_TIME, 10, 30])).tolist()
    [2, 0, 1, 3]
    """
    last_timed = np.where(at_ms != NO_TIME, np.arange(len(at_ms)), 0)
    return np.argsort(at_ms[np.maximum.accumulate(last_timed)], kind="stable")


def mapped_fields(events: Events) -> tuple[str, ...]:
    """The fields that `[events]` names, each once. No other column of a file is ever sent.

    >>> mapped_fields(Events(action="", label="is_click", context=("tab", "item")))
    ('user', 'item', 'category', 'time', 'is_click', 'tab')
    """
    names = (
        events.user,
        events.item,
        events.category,
        events.action,
        events.time,
        events.label,
        events.request,
        *events.context,
    )
    return tuple(dict.fromkeys(name for name in names if name))


def _as_label(value: Any) -> Any:
    """Converts a label that is text, as in CSV, to a number. Other text stays, and the parser refuses it.

    >>> [_as_label(value) for value in ("1", "0.5", "true", "", "often", 1)]
    [1, 0.5, True, None, 'often', 1]
    """
    if type(value) is not str:
        return value
    text = value.strip().lower()
    if text in ("", "true", "false"):
        return {"true": True, "false": False}.get(text)
    try:
        number = float(text)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return int(number) if number.is_integer() else number


def time_of(value: Any, unit: str, latest_ms: int) -> int:
    """A row's time in milliseconds; NO_TIME if it is not a time or is after `latest_ms`.

    >>> time_of("1511544070", "auto", 1 << 52), time_of("soon", "auto", 1 << 52) == NO_TIME
    (1511544070000, True)
    """
    if isinstance(value, date):
        moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
        at_ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    else:
        try:
            at_ms = parse_time(value, unit)
        except DecodeError:
            return NO_TIME
    return at_ms if at_ms <= latest_ms else NO_TIME


def _times_as(at_ms: I64, unit: str) -> list[bytes]:
    if unit == "iso":
        return [b'"%sZ"' % text.encode() for text in at_ms.astype("datetime64[ms]").astype(str).tolist()]
    if unit == "s" or (unit == "auto" and len(at_ms) and at_ms.min() < SECONDS_BELOW):
        small = unit == "s"
        return [
            orjson.dumps(at // 1000 if not at % 1000 else at / 1000) if small or at < SECONDS_BELOW else b"%d" % at
            for at in at_ms.tolist()
        ]
    return [b"%d" % at for at in at_ms.tolist()]


class Encoder:
    """Encodes rows as records.

    Args:
        constants: Field -> the value that every row has.
        latest_ms: A later time counts as missing, because a recording is of the past.
    """

    def __init__(self, events: Events, constants: Mapping[str, str], latest_ms: int) -> None:
        self._events = events
        self._latest_ms = latest_ms
        self._constants = {
            name: _as_label(value) if name == events.label else value for name, value in constants.items()
        }
        self._names = tuple(name for name in mapped_fields(events) if name != events.time)
        self._time_key = b"," + orjson.dumps(events.time) + b":"

    def encode(self, rows: RecordedRows, file: int) -> EncodedRows:
        """Encodes `rows` of file number `file`."""
        events, count = self._events, len(rows)
        columns = [self._column(rows, name) for name in self._names]
        times = self._column(rows, events.time) if events.time else [None] * count
        users = columns[self._names.index(events.user)]
        at_ms = np.full(count, NO_TIME, np.int64)
        keys: list[bytes] = []
        bodies: list[bytes] = []
        dumps, names, unit, latest_ms = orjson.dumps, self._names, events.time_unit, self._latest_ms
        for row, values in enumerate(zip(*columns, strict=True)):
            user = users[row]
            keys.append(str(user).encode() if type(user) in (str, int) else b"")
            if row in rows.broken:
                bodies.append(rows.text(row))
                continue
            fields = dict(zip(names, values, strict=True))
            at = time_of(times[row], unit, latest_ms)
            try:
                if at != NO_TIME:
                    bodies.append(dumps(fields)[:-1])
                    at_ms[row] = at
                else:
                    bodies.append(dumps(fields | ({events.time: times[row]} if events.time else {})))
            except (TypeError, ValueError):
                # JSON cannot represent such a value, for example a number of 30 digits.
                bodies.append(rows.text(row))
        return EncodedRows(keys, bodies, at_ms, np.full(count, file, np.int64), rows.lines)

    def values(self, encoded: EncodedRows, at_ms: I64) -> list[bytes]:
        """Completes the values with the times to send; returns a body without a time unchanged."""
        endings = _times_as(np.where(encoded.at_ms == NO_TIME, 1 << 41, at_ms), self._events.time_unit)
        has_time = (encoded.at_ms != NO_TIME).tolist()
        key = self._time_key
        return [
            body + key + ending + b"}" if complete else body
            for body, ending, complete in zip(encoded.bodies, endings, has_time, strict=True)
        ]

    def _column(self, rows: RecordedRows, name: str) -> Sequence[Any]:
        if name in self._constants:
            return [self._constants[name]] * len(rows)
        values = rows.columns.get(name)
        if values is None:
            return [None] * len(rows)
        return [_as_label(value) for value in values] if name == self._events.label else values


def shown_reasons(refused: Mapping[str, int], called: str = "dead letter") -> str:
    """Formats the number of dead letters by reason, the most frequent first.

    >>> shown_reasons({"undecodable": 1, "implausible_time": 35}), shown_reasons({})
    ('36 dead letters (35 implausible_time, 1 undecodable)', '0 dead letters')
    """
    total = sum(refused.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(refused).most_common())
    return f"{total:,} {called}{'s' * (total != 1)}" + (f" ({reasons})" if reasons else "")


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
