"""The window kernel: computes one row of integer features from one user's recent events.

The stream calls it for whole batches on its arena of ring buffers; serving calls it for stored histories. For each row:

1. The visible events are put in order, newest first, by (time, offset, source). Their order alone gives sessions, gaps
   and switches (`put_in_order`, `follow`).
2. They are summed, newest first: counts and decayed counts by action, by category, and of first occurrences (`sum_up`).
3. The sums are written as the row, saturated to 16 bits, in the order of the names of `FeatureSpec` (`write_features`).
4. If the spec requests them, the latest events are written, newest first (`write_sequence`): item, category, action and
   recency. Actions count from 1 in the order of `events.actions`; an unnamed action gets the next number. The recency
   is the age in eight steps per octave of 1.024 s, 0 to 254. Slots beyond the visible events are 0 in all columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from state.compiled import compiled, inlined, layout
from state.features.arrays import (
    DAY_MS,
    EXACT,
    FEW,
    GAPS,
    HOUR_MS,
    I64,
    MANY,
    NEVER,
    OF_ORDER,
    SLOTS,
    SOURCE_BITS,
    SWITCHES,
    U16,
    U64,
    WORDS,
    Rings,
    Tables,
    Vector,
    quantise,
)
from state.features.mask import Hidden


class Work(NamedTuple):
    """The constants of a spec, the mask, and the working memory of one thread, which is reused from row to row."""

    tables: Tables
    hidden: Hidden
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
def work_of(tables: Tables, hidden: Hidden) -> Work:
    """Working memory for the rows of a spec under a mask. Only the hash tables start with zeros: a row sets the rest."""
    # At most a quarter full, because collisions cost more than memory.
    size = 64
    while size < 4 * tables.history:
        size *= 2
    width = tables.windows_ms.shape[0]
    lives = tables.decay.shape[1]
    return Work(
        tables,
        hidden,
        np.empty(tables.history, np.uint64),
        np.zeros((size, 2), np.int64),
        np.zeros((size, 2), np.int64),
        np.empty((tables.history, width + lives + tables.actions + 1), np.int64),
        np.empty(tables.history, np.int64),
        np.empty((OF_ORDER, tables.history + 1), np.int64),
        np.empty((4 * (tables.actions + 1), width + lives), np.int64),
        np.empty((tables.actions + 2, width + lives), np.int64),
        np.empty((2, width), np.int64),
        np.empty((2, width), np.int64),
        np.empty(GAPS, np.int64),
        np.empty(tables.actions + 1, np.int64),
    )


SESSION_GAP_MS = 30 * 60_000

step_of = inlined(quantise)


class Course(NamedTuple):
    """The facts that follow from the order of the visible events."""

    visible: int
    truncated: bool
    session_events: int
    session_start: int
    sessions: int
    same_category: int
    switches: int
    days: int


@inlined
def hides(hidden: Hidden, event: I64) -> bool:
    """Whether a mask hides the event, one row of a ring."""
    at_ms, offset, source = event[0], event[3], event[4] & SOURCE_BITS
    is_hidden = False
    for k in range(hidden.offsets.shape[0]):
        if source == hidden.offsets[k, 0] and hidden.offsets[k, 1] <= offset < hidden.offsets[k, 2]:
            is_hidden = True
    for k in range(hidden.times.shape[0]):
        if hidden.times[k, 0] <= at_ms < hidden.times[k, 1]:
            is_hidden = True
    for k in range(hidden.named.shape[0]):
        if event[hidden.named[k, 0]] == hidden.named[k, 1] and hidden.named[k, 2] <= at_ms < hidden.named[k, 3]:
            is_hidden = True
    return is_hidden


@inlined
def newer(ring: I64, first: int, second: int) -> bool:
    """Whether the event at `first` comes after that at `second`: by time, then offset, then source."""
    if ring[first, 0] != ring[second, 0]:
        return bool(ring[first, 0] > ring[second, 0])
    if ring[first, 3] != ring[second, 3]:
        return bool(ring[first, 3] > ring[second, 3])
    # An added partition or a recreated topic can repeat an offset.
    return bool((ring[first, 4] & SOURCE_BITS) > (ring[second, 4] & SOURCE_BITS))


@inlined
def put_in_order(ring: I64, end: int, count: int, at_ms: int, work: Work) -> tuple[int, bool]:
    """Writes `work.order`; returns the number of visible events, and whether older events may have been lost.

    Histories are nearly in order, so insertion takes one pass.
    """
    tables, hidden, order = work.tables, work.hidden, work.order
    masked = hidden.offsets.shape[0] + hidden.times.shape[0] + hidden.named.shape[0] > 0
    horizon = at_ms - tables.windows_ms[-1]
    truncated = count == tables.history
    visible = 0
    oldest = at_ms
    slot = end
    for _ in range(count):
        slot -= 1
        if slot < 0:
            slot += ring.shape[0]
        time = ring[slot, 0]
        if time <= horizon:
            truncated = False
            continue
        if time > at_ms:
            continue
        if masked and hides(hidden, ring[slot]):
            continue
        hole = visible
        if time >= oldest:
            while hole > 0 and newer(ring, slot, order[hole - 1]):
                order[hole] = order[hole - 1]
                hole -= 1
        else:
            oldest = time
        order[hole] = slot
        visible += 1
    return visible, truncated


@inlined
def follow(ring: I64, at_ms: int, visible: int, truncated: bool, work: Work) -> Course:
    """Walks from the newest visible event to the oldest; writes the gaps."""
    tables = work.tables
    work.gaps[:] = NEVER
    session_events = sessions = same_category = switches = days = 0
    session_start = newer_time = at_ms
    newer_category = 0
    day_start = at_ms + 1
    open_session = True
    for k in range(visible):
        slot = work.order[k]
        time, category = ring[slot, 0], ring[slot, 1]
        gap = newer_time - time
        newer_time = time
        # Without a branch, because the processor cannot predict whether a session ends here.
        sessions += (k == 0) | (gap > SESSION_GAP_MS)
        open_session &= gap <= SESSION_GAP_MS
        if k < SWITCHES and k > 0:
            if k <= GAPS:
                work.gaps[k - 1] = tables.recency[step_of(gap >> 10)]
            switches += category != newer_category
            if k == 1 and category == newer_category and category != 0:
                same_category = 1
        newer_category = category
        if time < day_start:
            days += 1
            day_start = time // DAY_MS * DAY_MS
        if open_session:
            session_events += 1
            session_start = time
    return Course(visible, truncated, session_events, session_start, sessions, same_category, switches, days)


class Totals(NamedTuple):
    """The results of the sums that are not in `Work`."""

    categories: int
    session_categories: int
    session_items: int
    oldest_step: int


@inlined
def slot_of(table: I64, key: int, generation: int, fresh: int) -> int:
    """Finds the slot of `key`, or assigns slot `fresh` to it."""
    # Unsigned indices avoid the check for a negative index, here and below.
    mask = np.uint64(table.shape[0] - 1)
    slot = np.uint64(key) & mask
    while (table[slot, 1] >> 16) == generation:
        if table[slot, 0] == key:
            return int(table[slot, 1] & 0xFFFF)
        slot = (slot + np.uint64(1)) & mask
    table[slot, 0] = key
    table[slot, 1] = (generation << 16) | fresh
    return fresh


@inlined
def sum_up(ring: I64, at_ms: int, course: Course, work: Work, rows: Vector, n: int) -> Totals:
    """Sums into `work`, and writes the categories of row `n` in order with their recencies.

    Ages only grow. So finding the window, the step of the quantiser and the first occurrence needs no search.
    """
    tables, recent_categories, category_windows = work.tables, rows.recent_categories[n], rows.category_windows[n]
    windows, recency, generation = tables.windows_ms, tables.recency, n + 1
    width, lives, actions, slots = windows.shape[0], tables.decay.shape[1], tables.actions, recent_categories.shape[0]
    work.kind_sums[:] = 0
    work.distinct[:] = 0
    work.action_recency[:] = NEVER
    recent_categories[:] = 0
    category_windows[:] = 0
    category_count = item_count = session_categories = session_items = window = shift = step = 0
    for k in range(course.visible):
        event = work.order[k]
        time, category, item, packed = ring[event, 0], ring[event, 1], ring[event, 2], ring[event, 4]
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
        if k < course.session_events:
            session_categories, session_items = category_count, item_count
    return Totals(category_count, session_categories, session_items, step)


@inlined
def sum_in_order(work: Work, visible: int, category_count: int) -> None:
    """Writes `work.of_order`: the sums of each category that depend only on the order of events."""
    slots, sums = work.slots, work.of_order
    sums[:, :category_count] = 0
    for k in range(min(visible, MANY)):
        sums[np.uint64(k >= FEW), np.uint64(slots[k])] += 1
    # The newest category has slot 0; no category counts as next to an event without a category.
    if visible > 0 and slots[0] == 0:
        for k in range(1, visible):
            sums[2, np.uint64(slots[k - 1])] += slots[k] == 0


@inlined
def write_categories(work: Work, category_count: int, any_last: bool, category_windows: U16) -> None:
    """Writes the windows of each category, in the order of `FeatureSpec.window_names`."""
    tables = work.tables
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
        # The recency at `width + lives` was written at the category's first occurrence.
        for action in range(tables.actions):
            category_windows[slot, width + lives + 2 + action] = min(
                work.category_sums[slot, width + lives + action], 65535
            )
        category_windows[slot, first] = of_order[0, slot]
        category_windows[slot, first + 1] = of_order[0, slot] + of_order[1, slot]
        category_windows[slot, first + 2] = of_order[2, slot]
    category_windows[0, width + lives + 1] = any_last


@inlined
def write_features(at_ms: int, work: Work, course: Course, totals: Totals, rows: Vector, n: int) -> None:
    """Writes the features of row `n`, in the order of `FeatureSpec.names`."""
    tables, features, category_windows = work.tables, rows.features[n], rows.category_windows[n]
    f = _write_sums(work, features)
    f = _write_distinct(work, totals.categories, features, f)
    for k in range(GAPS):
        features[f] = work.gaps[k]
        f += 1
    recency = tables.recency
    features[f] = course.session_events
    features[f + 1] = recency[step_of((at_ms - course.session_start) >> 10)] if course.session_events else NEVER
    features[f + 2] = totals.session_categories
    features[f + 3] = totals.session_items
    features[f + 4] = course.sessions
    features[f + 5] = course.same_category
    features[f + 6] = course.switches
    features[f + 7] = course.visible
    features[f + 8] = course.truncated
    features[f + 9] = recency[totals.oldest_step] if course.visible else NEVER
    features[f + 10] = course.days
    f = _write_clock(at_ms, tables, features, f + 11)
    for slot in range(SLOTS):
        for k in range(category_windows.shape[1] - OF_ORDER):
            features[f] = category_windows[slot, k]
            f += 1


@inlined
def _write_sums(work: Work, features: U16) -> int:
    """Writes sums by action, then of events with a known label, then with a positive one; returns the next index."""
    tables = work.tables
    width, lives, actions = tables.windows_ms.shape[0], tables.decay.shape[1], tables.actions
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
    return f


@inlined
def _write_distinct(work: Work, category_count: int, features: U16, f: int) -> int:
    """Writes the numbers of distinct categories and items, and the share of the top category in thousandths."""
    width = work.tables.windows_ms.shape[0]
    for kind in range(2):
        total = 0
        for w in range(width):
            total += work.distinct[kind, w]
            features[f] = min(total, 65535)
            f += 1
    work.tops[:] = 0
    for slot in range(category_count):
        total = 0
        for w in range(width):
            total += work.category_sums[slot, w]
            work.tops[0, w] = max(work.tops[0, w], total)
            work.tops[1, w] += total
    for w in range(width):
        features[f] = work.tops[0, w] * 1000 // work.tops[1, w] if work.tops[1, w] > 0 else 0
        f += 1
    return f


@inlined
def _write_clock(at_ms: int, tables: Tables, features: U16, f: int) -> int:
    hour = at_ms // HOUR_MS % 24
    weekday = (at_ms // DAY_MS + 3) % 7  # the first of January 1970 was a Thursday
    features[f] = tables.hour[hour, 0]
    features[f + 1] = tables.hour[hour, 1]
    features[f + 2] = tables.weekday[weekday, 0]
    features[f + 3] = tables.weekday[weekday, 1]
    return f + 4


@inlined
def write_sequence(ring: I64, at_ms: int, visible: int, work: Work, rows: Vector, n: int) -> None:
    """Writes the four `sequence_*` of row `n`; writes nothing if they have length 0."""
    tables = work.tables
    for k in range(rows.sequence_items.shape[1]):
        if k >= visible:
            rows.sequence_items[n, k] = 0
            rows.sequence_categories[n, k] = 0
            rows.sequence_actions[n, k] = 0
            rows.sequence_ages[n, k] = 0
            continue
        event = work.order[k]
        rows.sequence_items[n, k] = ring[event, 2]
        rows.sequence_categories[n, k] = ring[event, 1]
        rows.sequence_actions[n, k] = 1 + min((ring[event, 4] >> 48) & 0xFF, tables.actions)
        rows.sequence_ages[n, k] = tables.recency[step_of((at_ms - ring[event, 0]) >> 10)]


# Not in the module of the classes: using only a spec, its digest or names needs no compiler.
layout("i8[::1], i8[:, ::1], i8[::1], i8[:, ::1], i8[:, ::1], i8, i8")(Tables)
layout("i8[:, ::1], i8[:, ::1], i8[:, ::1]")(Hidden)
layout("i8[:, :, ::1], i8[::1], i8[::1]")(Rings)
layout("u2[:, ::1], u8[:, ::1], u2[:, :, ::1], u8[:, ::1], u8[:, ::1], u2[:, ::1], u2[:, ::1]")(Vector)


@inlined
def _write_row(ring: I64, end: int, count: int, at_ms: int, work: Work, rows: Vector, n: int) -> None:
    """Writes row `n` from the `count` events that end before ring position `end`."""
    # 1.
    visible, truncated = put_in_order(ring, end, count, at_ms, work)
    course = follow(ring, at_ms, visible, truncated, work)
    # 2.
    totals = sum_up(ring, at_ms, course, work, rows, n)
    sum_in_order(work, visible, totals.categories)
    # 3.
    last_is_category = visible > 0 and ring[work.order[0], 1] != 0
    write_categories(work, totals.categories, last_is_category, rows.category_windows[n])
    write_features(at_ms, work, course, totals, rows, n)
    # 4.
    write_sequence(ring, at_ms, visible, work, rows, n)


@compiled("i8[:, ::1], i8[::1], i8[::1], plain(Tables), plain(Hidden), plain(Vector)")
def many_rows(
    events: I64, starts: I64, at_ms: I64, tables: tuple[Any, ...], hidden: tuple[Any, ...], rows: tuple[Any, ...]
) -> None:
    """Writes the rows of n histories.

    Args:
        events: `[m, 5]` int64, the histories one after another, each at most N events in append order.
        starts: `[n + 1]` int64, the index at which each history begins, and the end of the last one.
        at_ms: `[n]` int64, the time of each row.
        tables: The spec's constants, the fields of `Tables`.
        hidden: The mask, the fields of `Hidden`.
        rows: The n rows, written by this function, the fields of `Vector`.
    """
    work, vector = work_of(Tables(*tables), Hidden(*hidden)), Vector(*rows)
    for n in range(at_ms.shape[0]):
        count = starts[n + 1] - starts[n]
        _write_row(events[starts[n] : starts[n + 1]], count, count, at_ms[n], work, vector, n)


@compiled("Rings, i8[::1], i8[:, ::1], Tables, Hidden, Vector")
def update_rows(rings: Rings, slots: I64, events: I64, tables: Tables, hidden: Hidden, rows: Vector) -> None:
    """Writes the row of each event from the events before it, then appends it.

    Args:
        rings: The events of the users, updated.
        slots: `[n]` int64, the ring of each event's user.
        events: `[n, 5]` int64, in order of arrival.
        tables: The spec's constants.
        hidden: The mask.
        rows: The n rows, written by this function.
    """
    work = work_of(tables, hidden)
    ends, counts, size = rings.ends, rings.counts, rings.events.shape[1]
    for n in range(events.shape[0]):
        slot = slots[n]
        ring = rings.events[slot]
        _write_row(ring, ends[slot], counts[slot], events[n, 0], work, rows, n)
        for word in range(WORDS):
            ring[ends[slot], word] = events[n, word]
        ends[slot] = (ends[slot] + 1) % size
        counts[slot] = min(counts[slot] + 1, size)
