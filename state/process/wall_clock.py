"""The wall clock, in the form of a function that can be passed as a clock."""

from __future__ import annotations

import time


def wall_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000
