"""Formats figures for people: numbers, rates, time spans; a dash for unknown values."""

from __future__ import annotations

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
