"""The memory that the window kernel works in, one for each thread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from state.compiled import compiled
from state.features.arrays import GAPS, I64, OF_ORDER, U64, Tables


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
