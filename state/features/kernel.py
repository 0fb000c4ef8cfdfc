"""The window kernel: one row of integers out of one user's recent events.

The stream calls it for whole batches on its arena of rings, serving for one
history; both run this code, so that the same events give the same bits. It
sees integers only. An event is five 64-bit words, the bytes of `EVENT`:
time, category, item, offset, and topic | partition << 32 | action << 48 |
flags << 56. For each row:

1. The visible events are put in order, newest first, by (time, offset, source).
   Histories arrive nearly in order, so that insertion is one pass.
2. One pass over them. Ages only grow, so that the window, the step of the
   quantiser and "seen for the first time" need no search.
3. The sums are written out, saturated to 16 bits.

All of it is one file, constants included: Numba takes a kernel's machine code
from its cache unless the kernel's own file has changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled
from state.features.mask import Hidden

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]

WORDS = 5
NEVER = 255  # the recency of what never happened
GAPS = 4  # gaps between the latest events that are features
SLOTS = 5  # latest categories whose windows are features
SWITCHES = 16  # events among which changes of category are counted
FEW = 5  # latest events among which each category is counted
MANY = 20
OF_ORDER = 3  # windows of a category by the order of events, not by time; the last of its windows
SESSION_GAP_MS = 30 * 60_000
EXACT = 128  # ages below this many units have a step each, then 64 an octave
DAY_MS = 86_400_000
HOUR_MS = 3_600_000

SOURCE_BITS = 0xFFFFFFFFFFFF


class Tables(NamedTuple):
    """The constants of a spec, as the kernel reads them."""

    windows_ms: I64  # [W], ascending
    decay: I64  # [Q, H]: 65536 is one fresh event
    recency: I64  # [Q]: quantised age -> step, 0..254
    hour: I64  # [24, 2]: sine and cosine, 0..2000
    weekday: I64  # [7, 2]
    actions: int
    history: int


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


class Facts(NamedTuple):
    """What one pass found besides the sums in `Scratch`."""

    visible: int
    recent_categories: int
    session_events: int
    session_start: int
    session_categories: int
    session_items: int
    sessions: int
    same_category: int
    switches: int
    days: int
    oldest_step: int


def quantise(age: int) -> int:
    """Gives the step of an age in units of 1.024 s, exact below 128 units.

    >>> [quantise(age) for age in (0, 127, 128, 129, 130, 256)]
    [0, 127, 128, 128, 129, 192]
    """
    shift = 0
    while (age >> shift) >= EXACT:
        shift += 1
    return 64 * shift + (age >> shift)


_quantise = compiled(quantise)


def words(events: NDArray[Any]) -> I64:
    """Gives the `[n, 5]` int64 view of `[n]` EVENT that the kernels read."""
    return np.ascontiguousarray(events).view(np.int64).reshape(-1, WORDS)


@compiled
def _hides(hidden: Hidden, source: int, offset: int, at_ms: int) -> bool:
    found = False
    for k in range(hidden.offsets.shape[0]):
        if source == hidden.offsets[k, 0] and hidden.offsets[k, 1] <= offset < hidden.offsets[k, 2]:
            found = True
    for k in range(hidden.times.shape[0]):
        if hidden.times[k, 0] <= at_ms < hidden.times[k, 1]:
            found = True
    return found


@compiled
def _newer(ring: I64, left: int, right: int) -> bool:
    if ring[left, 0] != ring[right, 0]:
        return bool(ring[left, 0] > ring[right, 0])
    if ring[left, 3] != ring[right, 3]:
        return bool(ring[left, 3] > ring[right, 3])
    # A partition added or a topic made anew can repeat an offset.
    return bool((ring[left, 4] & SOURCE_BITS) > (ring[right, 4] & SOURCE_BITS))


@compiled
def _scratch(tables: Tables) -> Scratch:
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


@compiled
def _slot(table: I64, key: int, generation: int, fresh: int) -> int:
    """Finds the slot of `key`, or gives it slot `fresh`."""
    # Unsigned indices spare the check for a negative one, here and in `_sum`.
    mask = np.uint64(table.shape[0] - 1)
    place = np.uint64(key) & mask
    while (table[place, 1] >> 16) == generation:
        if table[place, 0] == key:
            return int(table[place, 1] & 0xFFFF)
        place = (place + np.uint64(1)) & mask
    table[place, 0] = key
    table[place, 1] = (generation << 16) | fresh
    return fresh


@compiled
def _order(ring: I64, end: int, count: int, at_ms: int, tables: Tables, hidden: Hidden, order: U64) -> tuple[int, bool]:
    """Step 1; returns how many events are visible, and whether older ones may have been lost."""
    masked = hidden.offsets.shape[0] + hidden.times.shape[0] > 0
    horizon = at_ms - tables.windows_ms[-1]
    truncated = count == tables.history
    visible = 0
    oldest = at_ms
    place = end
    for _ in range(count):
        place -= 1
        if place < 0:
            place += ring.shape[0]
        time = ring[place, 0]
        if time <= horizon:
            truncated = False
            continue
        if time > at_ms:
            continue
        if masked and _hides(hidden, ring[place, 4] & SOURCE_BITS, ring[place, 3], time):
            continue
        hole = visible
        if time >= oldest:
            while hole > 0 and _newer(ring, place, order[hole - 1]):
                order[hole] = order[hole - 1]
                hole -= 1
        else:
            oldest = time
        order[hole] = place
        visible += 1
    return visible, truncated


@compiled
def _sum(
    ring: I64,
    at_ms: int,
    visible: int,
    generation: int,
    tables: Tables,
    work: Scratch,
    recent_categories: I64,
    category_windows: U16,
) -> Facts:
    """Step 2: sums into `work`, categories in order, and what is found on the way."""
    windows, decay, recency = tables.windows_ms, tables.decay, tables.recency
    width, lives, actions, slots = windows.shape[0], decay.shape[1], tables.actions, recent_categories.shape[0]
    work.kind_sums[:] = 0
    work.distinct[:] = 0
    work.gaps[:] = NEVER
    work.action_recency[:] = NEVER
    recent_categories[:] = 0
    category_windows[:] = 0
    category_count = item_count = 0
    session_events = session_categories = session_items = sessions = 0
    session_start = newer_time = at_ms
    newer_category = switches = days = window = shift = step = same_category = 0
    day_start = at_ms + 1
    open_session = True
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
        weights = decay[np.uint64(step)]
        work.kind_sums[kind, np.uint64(window)] += 1
        for h in range(lives):
            work.kind_sums[kind, np.uint64(width + h)] += weights[h]
        if work.action_recency[action] == NEVER:
            work.action_recency[action] = recency[step]

        gap = newer_time - time
        newer_time = time
        # Without a branch: whether a session ends here cannot be predicted.
        sessions += (k == 0) | (gap > SESSION_GAP_MS)
        open_session &= gap <= SESSION_GAP_MS
        if k < SWITCHES and k > 0:
            if k <= GAPS:
                work.gaps[k - 1] = recency[_quantise(gap >> 10)]
            switches += category != newer_category
            if k == 1 and category == newer_category and category != 0:
                same_category = 1
        newer_category = category
        if time < day_start:
            days += 1
            day_start = time // DAY_MS * DAY_MS

        slot = tables.history
        if category != 0:
            slot = _slot(work.recent_categories, category, generation, category_count)
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
        if item != 0 and _slot(work.items, item, generation, item_count) == item_count:
            item_count += 1
            work.distinct[1, window] += 1
        if open_session:
            session_events += 1
            session_categories = category_count
            session_items = item_count
            session_start = time
    return Facts(
        visible,
        category_count,
        session_events,
        session_start,
        session_categories,
        session_items,
        sessions,
        same_category,
        switches,
        days,
        step,
    )


@compiled
def _sum_in_order(work: Scratch, visible: int, category_count: int) -> None:
    """The sums of which only the order of events counts, of each category: `work.of_order`."""
    slots, sums = work.slots, work.of_order
    sums[:, :category_count] = 0
    for k in range(min(visible, MANY)):
        sums[np.uint64(k >= FEW), np.uint64(slots[k])] += 1
    # The newest category has slot 0; an event without a category has nothing next to it.
    if visible > 0 and slots[0] == 0:
        for k in range(1, visible):
            sums[2, np.uint64(slots[k - 1])] += slots[k] == 0


@compiled
def _write_categories(
    tables: Tables, work: Scratch, category_count: int, any_last: bool, category_windows: U16
) -> None:
    """Step 3, what each category did; in the order of `FeatureSpec.window_names`."""
    width, lives = tables.windows_ms.shape[0], tables.decay.shape[1]
    of_order, first = work.of_order, category_windows.shape[1] - OF_ORDER
    for slot in range(category_windows.shape[0]):
        if slot >= category_count:
            category_windows[slot, width + lives] = NEVER
            continue
        total = 0
        for w in range(width):
            total += work.category_sums[slot, w]
            category_windows[slot, w] = min(total, 65535)
        for h in range(lives):
            category_windows[slot, width + h] = min(work.category_sums[slot, width + h] >> 8, 65535)
        # The recency at `width + lives` was written at first sight.
        for action in range(tables.actions):
            category_windows[slot, width + lives + 2 + action] = min(
                work.category_sums[slot, width + lives + action], 65535
            )
        category_windows[slot, first] = of_order[0, slot]
        category_windows[slot, first + 1] = of_order[0, slot] + of_order[1, slot]
        category_windows[slot, first + 2] = of_order[2, slot]
    category_windows[0, width + lives + 1] = any_last


@compiled
def _write(
    at_ms: int, tables: Tables, work: Scratch, facts: Facts, truncated: bool, category_windows: U16, features: U16
) -> None:
    """Step 3, the row; in the order of `FeatureSpec.names`."""
    width, lives, actions, recency = tables.windows_ms.shape[0], tables.decay.shape[1], tables.actions, tables.recency
    # Actions first, then events with a known label, then with a positive one.
    f = 0
    sums = work.sums
    sums[:] = 0
    for kind in range(4 * (actions + 1)):
        action = kind >> 2
        events = 0
        for w in range(width):
            events += work.kind_sums[kind, w]
        if events == 0:
            continue
        total = 0
        for w in range(width + lives):
            if w < width:
                total += work.kind_sums[kind, w]
            else:
                total = work.kind_sums[kind, w]
            if action < actions:
                sums[action, w] += total
            if kind & 1:
                sums[actions, w] += total
            if kind & 2:
                sums[actions + 1, w] += total
    for part in range(actions + 2):
        for w in range(width + lives):
            features[f] = min(sums[part, w] if w < width else sums[part, w] >> 8, 65535)
            f += 1
        if part < actions:
            features[f] = work.action_recency[part]
            f += 1
    for kind in range(2):
        total = 0
        for w in range(width):
            total += work.distinct[kind, w]
            features[f] = min(total, 65535)
            f += 1
    work.tops[:] = 0
    for slot in range(facts.recent_categories):
        total = 0
        for w in range(width):
            total += work.category_sums[slot, w]
            work.tops[0, w] = max(work.tops[0, w], total)
            work.tops[1, w] += total
    for w in range(width):
        features[f] = work.tops[0, w] * 1000 // work.tops[1, w] if work.tops[1, w] > 0 else 0
        f += 1
    for k in range(GAPS):
        features[f] = work.gaps[k]
        f += 1
    features[f] = facts.session_events
    features[f + 1] = recency[_quantise((at_ms - facts.session_start) >> 10)] if facts.session_events else NEVER
    features[f + 2] = facts.session_categories
    features[f + 3] = facts.session_items
    features[f + 4] = facts.sessions
    features[f + 5] = facts.same_category
    features[f + 6] = facts.switches
    features[f + 7] = facts.visible
    features[f + 8] = truncated
    features[f + 9] = recency[facts.oldest_step] if facts.visible else NEVER
    features[f + 10] = facts.days
    f += 11
    hour = at_ms // HOUR_MS % 24
    weekday = (at_ms // DAY_MS + 3) % 7  # the first of January 1970 was a Thursday
    features[f] = tables.hour[hour, 0]
    features[f + 1] = tables.hour[hour, 1]
    features[f + 2] = tables.weekday[weekday, 0]
    features[f + 3] = tables.weekday[weekday, 1]
    f += 4
    for slot in range(SLOTS):
        for k in range(category_windows.shape[1] - OF_ORDER):
            features[f] = category_windows[slot, k]
            f += 1


@compiled
def _row(
    ring: I64,
    end: int,
    count: int,
    at_ms: int,
    generation: int,
    tables: Tables,
    hidden: Hidden,
    work: Scratch,
    features: U16,
    recent_categories: I64,
    category_windows: U16,
) -> None:
    """Writes one row from the `count` events that end before ring position `end`."""
    # 1.
    visible, truncated = _order(ring, end, count, at_ms, tables, hidden, work.order)
    # 2.
    facts = _sum(ring, at_ms, visible, generation, tables, work, recent_categories, category_windows)
    _sum_in_order(work, visible, facts.recent_categories)
    # 3.
    last_is_category = visible > 0 and ring[work.order[0], 1] != 0
    _write_categories(tables, work, facts.recent_categories, last_is_category, category_windows)
    _write(at_ms, tables, work, facts, truncated, category_windows, features)


@compiled
def one_row(
    events: I64,
    at_ms: int,
    tables: Tables,
    hidden: Hidden,
    features: U16,
    recent_categories: I64,
    category_windows: U16,
) -> None:
    """Writes the row of one history.

    Args:
        events: `[m, 5]` int64, at most N events in append order.
        at_ms: the time the row speaks of.
        tables: the spec's constants.
        hidden: the mask.
        features: `[D]` uint16, written.
        recent_categories: `[L]` int64, written: the bits of the categories' ids.
        category_windows: `[L, F]` uint16, written.
    """
    work = _scratch(tables)
    count = events.shape[0]
    _row(events, count, count, at_ms, 1, tables, hidden, work, features, recent_categories, category_windows)


@compiled
def update_rows(
    rings: I64,
    ends: I64,
    counts: I64,
    slots: I64,
    events: I64,
    tables: Tables,
    hidden: Hidden,
    features: U16,
    recent_categories: I64,
    category_windows: U16,
) -> None:
    """Writes the row of each event from the events before it, then appends it.

    Args:
        rings: `[users, N, 5]` int64, updated.
        ends: `[users]` int64, the ring position of each user's next event, updated.
        counts: `[users]` int64, events in each ring, updated.
        slots: `[n]` int64, the ring of each event's user.
        events: `[n, 5]` int64, in order of arrival.
        tables: the spec's constants.
        hidden: the mask.
        features: `[n, D]` uint16, written.
        recent_categories: `[n, L]` int64, written.
        category_windows: `[n, L, F]` uint16, written.
    """
    work = _scratch(tables)
    size = rings.shape[1]
    for n in range(events.shape[0]):
        slot = slots[n]
        _row(
            rings[slot],
            ends[slot],
            counts[slot],
            events[n, 0],
            n + 1,
            tables,
            hidden,
            work,
            features[n],
            recent_categories[n],
            category_windows[n],
        )
        for word in range(WORDS):
            rings[slot, ends[slot], word] = events[n, word]
        ends[slot] = (ends[slot] + 1) % size
        counts[slot] = min(counts[slot] + 1, size)
