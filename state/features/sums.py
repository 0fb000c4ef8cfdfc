"""Counts and decayed counts of the visible events: by action, by category, and of what was seen for the first time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from state.compiled import inlined
from state.features.ages import EXACT, NEVER
from state.features.arrays import FEW, I64, MANY, U16, U64, Tables
from state.features.scratch import Scratch


class Totals(NamedTuple):
    """What the sums found besides those in `Scratch`."""

    categories: int
    session_categories: int
    session_items: int
    oldest_step: int


@inlined
def slot_of(table: I64, key: int, generation: int, fresh: int) -> int:
    """Finds the slot of `key`, or gives it slot `fresh`."""
    # Unsigned indices spare the check for a negative one, here and below.
    mask = np.uint64(table.shape[0] - 1)
    place = np.uint64(key) & mask
    while (table[place, 1] >> 16) == generation:
        if table[place, 0] == key:
            return int(table[place, 1] & 0xFFFF)
        place = (place + np.uint64(1)) & mask
    table[place, 0] = key
    table[place, 1] = (generation << 16) | fresh
    return fresh


@inlined
def sum_up(
    ring: I64,
    at_ms: int,
    visible: int,
    session_events: int,
    generation: int,
    tables: Tables,
    work: Scratch,
    recent_categories: U64,
    category_windows: U16,
) -> Totals:
    """Sums into `work`, and writes the categories in order with their recencies.

    Ages only grow, so that the window, the step of the quantiser and "seen for the first time" need no search.
    """
    windows, recency = tables.windows_ms, tables.recency
    width, lives, actions, slots = windows.shape[0], tables.decay.shape[1], tables.actions, recent_categories.shape[0]
    _begin(work, recent_categories, category_windows)
    category_count = item_count = session_categories = session_items = window = shift = step = 0
    for k in range(visible):
        place = work.order[k]
        time, category, item, packed = ring[place, 0], ring[place, 1], ring[place, 2], ring[place, 4]
        action = min((packed >> 48) & 0xFF, actions)
        age = at_ms - time
        while age >= windows[window]:
            window += 1
        units = age >> 10
        while (units >> shift) >= EXACT:
            shift += 1
        step = 64 * shift + (units >> shift)
        kind = np.uint64(4 * action + ((packed >> 56) & 3))
        weights = tables.decay[np.uint64(step)]
        work.kind_sums[kind, np.uint64(window)] += 1
        for h in range(lives):
            work.kind_sums[kind, np.uint64(width + h)] += weights[h]
        if work.action_recency[action] == NEVER:
            work.action_recency[action] = recency[step]
        slot = tables.history
        if category != 0:
            slot = slot_of(work.recent_categories, category, generation, category_count)
            if slot == category_count:
                category_count += 1
                work.distinct[0, window] += 1
                work.category_sums[slot, :] = 0
                if slot < slots:
                    recent_categories[slot] = category
                    category_windows[slot, width + lives] = recency[step]
            sums = work.category_sums[np.uint64(slot)]
            sums[np.uint64(window)] += 1
            sums[np.uint64(width + lives + action)] += 1
            for h in range(lives):
                sums[np.uint64(width + h)] += weights[h]
        work.slots[k] = slot
        if item != 0 and slot_of(work.items, item, generation, item_count) == item_count:
            item_count += 1
            work.distinct[1, window] += 1
        if k < session_events:
            session_categories, session_items = category_count, item_count
    return Totals(category_count, session_categories, session_items, step)


@inlined
def _begin(work: Scratch, recent_categories: U64, category_windows: U16) -> None:
    work.kind_sums[:] = 0
    work.distinct[:] = 0
    work.action_recency[:] = NEVER
    recent_categories[:] = 0
    category_windows[:] = 0


@inlined
def sum_in_order(work: Scratch, visible: int, category_count: int) -> None:
    """The sums of which only the order of events counts, of each category: `work.of_order`."""
    slots, sums = work.slots, work.of_order
    sums[:, :category_count] = 0
    for k in range(min(visible, MANY)):
        sums[np.uint64(k >= FEW), np.uint64(slots[k])] += 1
    # The newest category has slot 0; an event without a category has nothing next to it.
    if visible > 0 and slots[0] == 0:
        for k in range(1, visible):
            sums[2, np.uint64(slots[k - 1])] += slots[k] == 0
