"""Parses time spans as people write them, such as `30m`. The module has no side effects."""

from __future__ import annotations

import re

UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def span_ms(text: str) -> float | None:
    """The milliseconds of a time span such as `30m`; None if the text is no time span.

    >>> span_ms("30m"), span_ms("1.5s"), span_ms("30")
    (1800000.0, 1500.0, None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    return float(found[1]) * UNITS_MS[found[2]] if found else None
