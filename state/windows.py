"""The constants of the windows: what the kernel reads, and how ages become steps.

An event is five 64-bit words, the bytes of `EVENT`: time, category, item,
offset, and topic | partition << 32 | action << 48 | flags << 56.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]

WORDS = 5
NEVER = 255  # the recency of what never happened
GAPS = 4  # gaps between the latest events that are features
SLOTS = 5  # latest labels whose windows are features
SWITCHES = 16  # events among which changes of label are counted
SESSION_GAP_MS = 30 * 60_000
EXACT = 128  # ages below this many units have a step each, then 64 an octave
DAY_MS = 86_400_000
HOUR_MS = 3_600_000


class Tables(NamedTuple):
    """The constants of a spec, as the kernel reads them."""

    windows_ms: I64  # [W], ascending
    decay: I64  # [Q, H]: 65536 is one fresh event
    recency: I64  # [Q]: quantised age -> step, 0..254
    hour: I64  # [24, 2]: sine and cosine, 0..2000
    weekday: I64  # [7, 2]
    actions: int
    history: int


class Hidden(NamedTuple):
    """The parts of a mask that depend on the event alone."""

    offsets: I64  # [k, 3]: topic | partition << 32, first, next
    times: I64  # [t, 2]: from, to; milliseconds


def quantise(age: int) -> int:
    """Gives the step of an age in units of 1.024 s, exact below 128 units.

    >>> [quantise(age) for age in (0, 127, 128, 129, 130, 256)]
    [0, 127, 128, 128, 129, 192]
    """
    shift = 0
    while (age >> shift) >= EXACT:
        shift += 1
    return 64 * shift + (age >> shift)


def words(events: NDArray[Any]) -> I64:
    """Gives the `[n, 5]` int64 view of `[n]` EVENT that the kernels read."""
    return np.ascontiguousarray(events).view(np.int64).reshape(-1, WORDS)
