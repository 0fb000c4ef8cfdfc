"""The arrays that the window kernel reads, works in and writes.

An event is five 64-bit words, the bytes of `EVENT`: time, category, item,
offset, and topic | partition << 32 | action << 48 | flags << 56.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]

WORDS = 5
SOURCE_BITS = 0xFFFFFFFFFFFF
GAPS = 4  # gaps between the latest events that are features
SLOTS = 5  # latest categories whose windows are features
OF_ORDER = 3  # windows of a category by the order of events, not by time; the last of its windows


class Tables(NamedTuple):
    """The constants of a spec, as the kernel reads them."""

    windows_ms: I64  # [W], ascending
    decay: I64  # [Q, H]: 65536 is one fresh event
    recency: I64  # [Q]: quantised age -> step, 0..254
    hour: I64  # [24, 2]: sine and cosine, 0..2000
    weekday: I64  # [7, 2]
    actions: int
    history: int


class Vector(NamedTuple):
    """One row of integers, or `[n, ...]` of each for n rows.

    Attributes:
        features: `[D]` uint16.
        recent_categories: `[L]` uint64 ids, newest first; 0 pads.
        category_windows: `[L, F]` uint16.
        sequence_items: `[T]` uint64 ids of the latest events, newest first; see `state/features/sequence.py`.
        sequence_categories: `[T]` uint64 ids.
        sequence_actions: `[T]` uint16, 1 and up; 0 pads.
        sequence_ages: `[T]` uint16 recencies.
    """

    features: U16
    recent_categories: U64
    category_windows: U16
    sequence_items: U64
    sequence_categories: U64
    sequence_actions: U16
    sequence_ages: U16


class Scratch(NamedTuple):
    """Working memory of one thread, kept from row to row."""

    order: U64  # [N]: ring positions of visible events, newest first
    recent_categories: I64  # [T, 2]: open addressing, key and generation << 16 | slot
    items: I64  # [T, 2]
    category_sums: I64  # [N, W + H + A + 1]: counts, decays, counts by action of each category
    slots: I64  # [N]: the category's slot of each visible event, newest first; N without a category
    of_order: (
        I64  # [3, N + 1]: of each category among the latest FEW, the others of the latest MANY, next to the newest
    )
    kind_sums: I64  # [(A + 1) * 4, W + H]: the same by action and the two low flags
    sums: I64  # [A + 2, W + H]: by action, labelled, positive
    distinct: I64  # [2, W]: categories, items
    tops: I64  # [2, W]: events of the top category, events with a category
    gaps: I64  # [GAPS]
    action_recency: I64  # [A + 1]


@compiled
def scratch_of(tables: Tables) -> Scratch:
    """Working memory for the rows of a spec."""
    # A quarter full at most: collisions cost more than memory.
    size = 64
    while size < 4 * tables.history:
        size *= 2
    width = tables.windows_ms.shape[0]
    lives = tables.decay.shape[1]
    return Scratch(
        np.zeros(tables.history, np.uint64),
        np.zeros((size, 2), np.int64),
        np.zeros((size, 2), np.int64),
        np.zeros((tables.history, width + lives + tables.actions + 1), np.int64),
        np.zeros(tables.history, np.int64),
        np.zeros((OF_ORDER, tables.history + 1), np.int64),
        np.zeros((4 * (tables.actions + 1), width + lives), np.int64),
        np.zeros((tables.actions + 2, width + lives), np.int64),
        np.zeros((2, width), np.int64),
        np.zeros((2, width), np.int64),
        np.zeros(GAPS, np.int64),
        np.zeros(tables.actions + 1, np.int64),
    )


def words(events: NDArray[Any]) -> I64:
    """Gives the `[n, 5]` int64 view of `[n]` EVENT that the kernels read."""
    return np.ascontiguousarray(events).view(np.int64).reshape(-1, WORDS)
