"""The arrays that the window kernel reads and writes, and the constants of its counts.

An event is five 64-bit words, the bytes of `EVENT`: time, category, item, offset, and topic | partition << 32 | action
<< 48 | flags << 56.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]

WORDS = 5
SOURCE_BITS = 0xFFFFFFFFFFFF
GAPS = 4  # gaps between the latest events that are features
SLOTS = 5  # latest categories whose windows are features
SWITCHES = 16  # events among which changes of category are counted
FEW = 5  # latest events among which each category is counted
MANY = 20
OF_ORDER = 3  # windows of a category by order of events instead of time; the last ones of its windows


class Tables(NamedTuple):
    """The constants of a spec, as the kernel reads them."""

    windows_ms: I64  # [W], ascending
    decay: I64  # [Q, H]: 65536 is one fresh event
    recency: I64  # [Q]: quantised age -> step, 0..254
    hour: I64  # [24, 2]: sine and cosine, 0..2000
    weekday: I64  # [7, 2]
    actions: int
    history: int


class Rings(NamedTuple):
    """The latest events of several users, each in a ring buffer.

    Attributes:
        events: `[users, N, 5]` int64.
        ends: `[users]` int64, the position of each user's next event.
        counts: `[users]` int64, the number of events.
    """

    events: I64
    ends: I64
    counts: I64


class Vector(NamedTuple):
    """One row of integers, or `[n, ...]` of each array for n rows.

    Attributes:
        features: `[D]` uint16.
        recent_categories: `[L]` uint64 ids, newest first; 0 pads.
        category_windows: `[L, F]` uint16.
        sequence_items: `[T]` uint64 ids of the latest events, newest first; see `state/features/kernel.py`.
        sequence_categories: `[T]` uint64 ids.
        sequence_actions: `[T]` uint16, 1 and up; 0 pads.
        sequence_ages: `[T]` uint16 recencies of the events.
    """

    features: U16
    recent_categories: U64
    category_windows: U16
    sequence_items: U64
    sequence_categories: U64
    sequence_actions: U16
    sequence_ages: U16


def words(events: NDArray[Any]) -> I64:
    """Views `[n]` EVENT as the `[n, 5]` int64 that the kernels read."""
    return np.ascontiguousarray(events).view(np.int64).reshape(-1, WORDS)
