"""Parses times that operators type, and formats numbers, rates, times and durations for people."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from state.config.sources import span_ms
from state.errors import SettingsError

DAY_S, YEAR_S = 86_400.0, 31_536_000.0


def shown(value: float | None, group: str = ",") -> str:
    """Formats a whole number, or a dash.

    >>> shown(12345.0), shown(None)
    ('12,345', '-')
    """
    return "-" if value is None else f"{value:{group}.0f}"


def rate(value: float | None, unit: str = "") -> str:
    """Formats a rate per second, with a decimal if it is low.

    >>> rate(22640.0), rate(9.94, "steps"), rate(0.0), rate(None)
    ('22,640/s', '9.9 steps/s', '0/s', '-')
    """
    if value is None:
        return "-"
    number = f"{value:,.0f}" if value >= 99.95 or value == 0 else f"{value:.1f}"
    return f"{number} {unit}/s" if unit else f"{number}/s"


def decimal(value: float | None, digits: int = 3) -> str:
    """Formats a number with decimals, or a dash.

    >>> decimal(1.45678), decimal(None)
    ('1.457', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """Formats a time span, or a dash.

    >>> seconds(0.234), seconds(75.0), seconds(9000.0), seconds(None)
    ('0.2 s', '75 s', '2.5 h', '-')
    """
    if value is None:
        return "-"
    return (
        f"{value:.1f} s"
        if value < 10
        else f"{value:.0f} s"
        if value < 600
        else f"{value / 60:.0f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
    )


def duration(value: float | None) -> str:
    """Formats a short time span with two significant digits, or a dash.

    >>> [duration(value) for value in (0.00041, 0.0043, 0.0218, 0.234, 12.3, None)]
    ['0.4 ms', '4.3 ms', '22 ms', '0.23 s', '12 s', '-']
    """
    if value is None or value >= 0.995:
        return seconds(value)
    return f"{value:.2f} s" if value >= 0.0995 else f"{value * 1000:.{1 if value < 0.00995 else 0}f} ms"


def far(span_s: float) -> str:
    """Formats a time span that can be long.

    >>> far(3000.0), far(260_000.0), far(2.5e9)
    ('50 min', '3 days', '79 years')
    """
    if span_s < 2 * DAY_S:
        return seconds(span_s)
    return f"{span_s / DAY_S:.0f} days" if span_s < 2 * YEAR_S else f"{span_s / YEAR_S:.0f} years"


def parse_time(text: str, now_ms: int) -> int:
    """Parses a time to ms: ISO 8601 (UTC by default), seconds or ms since 1970, `now`, or `10m` (ago).

    >>> parse_time("10m", 1_000_000), parse_time("1970-01-01T00:01", 0), parse_time("1700000000", 0)
    (400000, 60000, 1700000000000)

    Raises:
        SettingsError: The text has none of these forms.
    """
    text = text.strip()
    if text == "now":
        return now_ms
    if (ago_ms := span_ms(text.removeprefix("-"))) is not None:
        return now_ms - round(ago_ms)
    if re.fullmatch(r"\d+", text):
        return int(text) if len(text) > 11 else int(text) * 1000
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(
            f"time {text!r}: write ISO 8601 such as 2026-05-01T12:00:00, now, or 10m for ten minutes ago"
        ) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def parse_times(text: str, now_ms: int, option: str = "--skip-time") -> tuple[int, int]:
    """Parses `A..B`, the value of `option`, to a half-open range in ms.

    >>> parse_times("10m..now", 1_000_000)
    (400000, 1000000)

    Raises:
        SettingsError: The text is not a range, or B is not after A.
    """
    first, dots, last = text.partition("..")
    if not dots:
        raise SettingsError(f"{option} {text}: write A..B, such as 10m..now")
    span = (parse_time(first, now_ms), parse_time(last, now_ms))
    if span[0] >= span[1]:
        raise SettingsError(f"{option} {text}: it ends before it begins", "write the earlier time first")
    return span


def age(seconds: float) -> str:
    """Formats a duration with its two largest units.

    >>> [age(seconds) for seconds in (0.24, 75, 3 * 3600 + 120, 200_000)]
    ['0.2 s', '1 min 15 s', '3 h 2 min', '2 d 7 h']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole_s = int(seconds)
    for unit, size, below, smaller in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if whole_s < size * {"min": 60, "h": 24, "d": 10**9}[unit]:
            return f"{whole_s // size} {unit} {whole_s % size // smaller} {below}"
    raise AssertionError("days have no bound")


def iso(time_ms: int) -> str:
    """Formats a time in UTC, to the second.

    >>> iso(61_000)
    '1970-01-01T00:01:01Z'
    """
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
