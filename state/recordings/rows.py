"""Encodes rows of a recording as records of the topic: JSON objects with the field names of `[events]`. Pure.

The span of a recording is not limited: all of its rows become clicks, however long it is. Strays do not: these are the
few rows at its beginning or its end that a gap of more than `events.max_age_s` separates from the rest, for example those
of a clock that began in 1970. At each end at most one row in `ROWS_PER_STRAY` is a stray.
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
NO_TIMESTAMP = -1
"""The Kafka timestamp of a record without one."""
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
ROWS_PER_STRAY = 25
WARNED_SHARE = 0.001


@dataclass(frozen=True)
class Span:
    """The times of a recording without its strays.

    Attributes:
        oldest_ms: The earliest of these times; NO_TIME if no row is a stray for being early.
        newest_ms: The latest of these times; NO_TIME if no row has a time.
        rows: Rows with a time, strays included.
        first: File and line of the first stray; None without one.
        stray_ms: Earliest and latest time of a stray.
    """

    oldest_ms: int = NO_TIME
    newest_ms: int = NO_TIME
    rows: int = 0
    strays: int = 0
    first: tuple[int, int] | None = None
    stray_ms: tuple[int, int] = (NO_TIME, NO_TIME)

    def is_stray(self, at_ms: I64) -> npt.NDArray[np.bool_]:
        """Which of n times, `[n]` int64, are those of strays, `[n]` bool; NO_TIME is none."""
        outside = (at_ms < self.oldest_ms) | (at_ms > self.newest_ms)
        stray: npt.NDArray[np.bool_] = outside & (at_ms != NO_TIME) & (self.newest_ms != NO_TIME)
        return stray

    def kept_stamps(self, at_ms: I64, now_ms: int) -> I64:
        """Kafka timestamps, `[n]` int64, with which the parser accepts recorded times, `[n]` int64, but not of strays.

        A record of a recorded time has no timestamp, so nothing is compared with it. A stray has `newest_ms`, which is
        too far from it. A row without a time is of `now_ms`.
        """
        stamps = np.where(self.is_stray(at_ms), self.newest_ms, NO_TIMESTAMP)
        return np.where(at_ms == NO_TIME, now_ms, stamps).astype(np.int64)


def far_ms(events: Events) -> int:
    """The distance in time from which the parser refuses a row, however it differs: a stray is further from the rest."""
    return round(max(events.max_age_s, events.max_future_s) * 1000)


@dataclass
class _Hour:
    rows: int
    oldest_ms: int
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
        oldest, newest = np.full(len(hours), np.iinfo(np.int64).max, np.int64), np.full(len(hours), NO_TIME, np.int64)
        np.minimum.at(oldest, numbers, at_ms[rows])
        np.maximum.at(newest, numbers, at_ms[rows])
        for number, hour in enumerate(hours.tolist()):
            row = int(rows[firsts[number]])
            added = _Hour(
                int(counts[number]), int(oldest[number]), int(newest[number]), (int(files[row]), int(line[row]))
            )
            if (counted := self._hours.get(hour)) is not None:
                added = _Hour(
                    counted.rows + added.rows,
                    min(counted.oldest_ms, added.oldest_ms),
                    max(counted.newest_ms, added.newest_ms),
                    min(counted.first, added.first),
                )
            self._hours[hour] = added

    def span(self, far_ms: int) -> Span:
        """The times without strays; `far_ms` is the gap that separates strays from the rest."""
        if not self._hours:
            return Span()
        hours = [self._hours[hour] for hour in sorted(self._hours)]
        oldest, newest = (np.array([getattr(hour, name) for hour in hours]) for name in ("oldest_ms", "newest_ms"))
        until = np.concatenate([[0], np.cumsum([hour.rows for hour in hours])])
        total = int(until[-1])
        cuts = np.concatenate([[0], np.flatnonzero(oldest[1:] - newest[:-1] > far_ms) + 1, [len(hours)]])
        few = total // ROWS_PER_STRAY
        begin = int(cuts[until[cuts] <= few][-1])
        end = int(cuts[total - until[cuts] <= few][0])
        strays = [*hours[:begin], *hours[end:]]
        if not strays:
            return Span(int(oldest[0]), int(newest[-1]), total)
        return Span(
            oldest_ms=int(oldest[begin]),
            newest_ms=int(newest[end - 1]),
            rows=total,
            strays=sum(hour.rows for hour in strays),
            first=min(hour.first for hour in strays),
            stray_ms=(strays[0].oldest_ms, strays[-1].newest_ms),
        )


def as_utc(at_ms: int) -> str:
    """Formats a time as text."""
    return f"{np.datetime64(at_ms, 'ms').astype('datetime64[s]')}Z"


def described(span: Span, first: str, far_ms: int) -> str:
    """Describes the strays in a sentence; `first` is file and line of the first one.

    >>> described(Span(90_000_000, 99_000_000, 5000, 1, (0, 7), (0, 0)), "a.csv:7", 86_400_000)
    'a.csv:7: 1 row of 5,000 is left out: its time (1970-01-01T00:00:00Z) is more than 1 day from the rest (1970-01-02T01:00:00Z to 1970-01-02T03:30:00Z); a larger events.max_age_s takes it'
    """
    is_single, days = span.strays == 1, far_ms / 86_400_000
    rows = f"1 row of {span.rows:,} is" if is_single else f"{span.strays:,} rows of {span.rows:,} are"
    earliest, latest = map(as_utc, span.stray_ms)
    times = f"its time ({earliest}) is" if is_single else f"their times ({earliest} to {latest}) are"
    return (
        f"{_warning(span.strays, span.rows)}{first}{'' if is_single else ' and others'}: {rows} left out: {times} "
        f"more than {days:,.3g} day{'s' * (days != 1)} from the rest ({as_utc(span.oldest_ms)} to "
        f"{as_utc(span.newest_ms)}); a larger events.max_age_s takes {'it' if is_single else 'them'}"
    )


def left_out(refused: Mapping[str, int], rows: int) -> str:
    """A warning if more than `WARNED_SHARE` of `rows` became dead letters, by reason; empty otherwise.

    >>> left_out({"unknown_action": 30}, 2000), left_out({"unknown_action": 2}, 2000)
    ('WARNING: 1.5 % of the rows are left out: 30 dead letters (30 unknown_action)', '')
    """
    total = sum(refused.values())
    warning = _warning(total, rows)
    return f"{warning}{100 * total / rows:.2g} % of the rows are left out: {shown_reasons(refused)}" if warning else ""


def _warning(count: int, rows: int) -> str:
    return "WARNING: " if count > WARNED_SHARE * rows else ""
