"""The window kernel: one row of integers out of one user's recent events.

The stream calls it for whole batches on its arena of rings, serving for one
history; both run this loop, so that the same events give the same bits. It
sees integers only. An event is five 64-bit words, the bytes of `EVENT`:
time, category, item, offset, and topic | partition << 32 | action << 48 |
flags << 56.

For each row:

1. The visible events are put in order, newest first, by (time, offset, source).
   Histories arrive nearly in order, so that insertion is one pass.
2. One pass over them. Ages only grow, so that the window, the step of the
   quantiser and "seen for the first time" need no search.
3. The sums are written out, saturated to 16 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.native import compiled

I64 = NDArray[np.int64]
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


class Scratch(NamedTuple):
    """Working memory of one thread, kept from row to row."""

    order: I64  # [N]: ring positions of visible events, newest first
    labels: I64  # [T, 2]: open addressing, key and generation << 16 | slot
    items: I64  # [T, 2]
    label_counts: I64  # [N, W]
    label_decay: I64  # [L, H]
    label_actions: I64  # [L, A + 1]
    counts: I64  # [(A + 1) * 4, W]: by action and the two low flags
    decays: I64  # [(A + 1) * 4, H]
    sums: I64  # [A + 2, W + H]: by action, labelled, positive
    distinct: I64  # [3, W]: labels, items, events with a label
    gaps: I64  # [GAPS]
    action_recency: I64  # [A + 1]


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
    return bool((ring[left, 4] & 0xFFFFFFFFFFFF) > (ring[right, 4] & 0xFFFFFFFFFFFF))


@compiled
def _scratch(tables: Tables, labels: int) -> Scratch:
    size = 16
    while size < 2 * tables.history:
        size *= 2
    width = tables.windows_ms.shape[0]
    lives = tables.decay.shape[1]
    classes = 4 * (tables.actions + 1)
    return Scratch(
        np.zeros(tables.history, np.int64),
        np.zeros((size, 2), np.int64),
        np.zeros((size, 2), np.int64),
        np.zeros((tables.history, width), np.int64),
        np.zeros((labels, lives), np.int64),
        np.zeros((labels, tables.actions + 1), np.int64),
        np.zeros((classes, width), np.int64),
        np.zeros((classes, lives), np.int64),
        np.zeros((tables.actions + 2, width + lives), np.int64),
        np.zeros((3, width), np.int64),
        np.zeros(GAPS, np.int64),
        np.zeros(tables.actions + 1, np.int64),
    )


@compiled
def _slot(table: I64, key: int, generation: int, fresh: int) -> int:
    """Finds the slot of `key`, or gives it slot `fresh`."""
    place = key & (table.shape[0] - 1)
    while (table[place, 1] >> 16) == generation:
        if table[place, 0] == key:
            return int(table[place, 1] & 0xFFFF)
        place = (place + 1) & (table.shape[0] - 1)
    table[place, 0] = key
    table[place, 1] = (generation << 16) | fresh
    return fresh


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
    labels: I64,
    label_windows: U16,
) -> None:
    """Writes one row from the `count` events that end before ring position `end`."""
    windows, decay, recency = tables.windows_ms, tables.decay, tables.recency
    width, lives, actions = windows.shape[0], decay.shape[1], tables.actions
    slots = labels.shape[0]
    order = work.order
    masked = hidden.offsets.shape[0] + hidden.times.shape[0] > 0

    # 1. Visible events, newest first.
    visible = 0
    truncated = count == tables.history
    horizon = at_ms - windows[width - 1]
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
        if masked and _hides(hidden, ring[place, 4] & 0xFFFFFFFFFFFF, ring[place, 3], time):
            continue
        hole = visible
        while hole > 0 and _newer(ring, place, order[hole - 1]):
            order[hole] = order[hole - 1]
            hole -= 1
        order[hole] = place
        visible += 1

    # 2. Sums.
    work.counts[:] = 0
    work.decays[:] = 0
    work.distinct[:] = 0
    work.label_decay[:] = 0
    work.label_actions[:] = 0
    work.gaps[:] = NEVER
    work.action_recency[:] = NEVER
    labels[:] = 0
    label_windows[:] = 0
    label_count = item_count = 0
    session_events = session_labels = session_items = sessions = 0
    session_start = newer_time = at_ms
    newer_label = switches = days = window = shift = step = 0
    same_label = 0
    day_start = at_ms + 1
    open_session = True
    for k in range(visible):
        place = order[k]
        time = ring[place, 0]
        label = ring[place, 1]
        item = ring[place, 2]
        action = (ring[place, 4] >> 48) & 0xFF
        if action > actions:
            action = actions
        age = at_ms - time
        while age >= windows[window]:
            window += 1
        units = age >> 10
        while (units >> shift) >= EXACT:
            shift += 1
        step = 64 * shift + (units >> shift)

        kind = 4 * action + ((ring[place, 4] >> 56) & 3)
        work.counts[kind, window] += 1
        for h in range(lives):
            work.decays[kind, h] += decay[step, h]
        if work.action_recency[action] == NEVER:
            work.action_recency[action] = recency[step]

        gap = newer_time - time
        newer_time = time
        if gap > SESSION_GAP_MS:
            open_session = False
        if k == 0 or gap > SESSION_GAP_MS:
            sessions += 1
        if 0 < k <= GAPS:
            work.gaps[k - 1] = recency[_quantise(gap >> 10)]
        if 0 < k < SWITCHES and label != newer_label:
            switches += 1
        if k == 1 and label == newer_label and label != 0:
            same_label = 1
        newer_label = label
        if time < day_start:
            days += 1
            day_start = time // DAY_MS * DAY_MS

        if label != 0:
            slot = _slot(work.labels, label, generation, label_count)
            if slot == label_count:
                label_count += 1
                work.distinct[0, window] += 1
                for w in range(width):
                    work.label_counts[slot, w] = 0
                if slot < slots:
                    labels[slot] = label
                    label_windows[slot, width + lives] = recency[step]
            work.label_counts[slot, window] += 1
            work.distinct[2, window] += 1
            if slot < slots:
                work.label_actions[slot, action] += 1
                for h in range(lives):
                    work.label_decay[slot, h] += decay[step, h]
        if item != 0 and _slot(work.items, item, generation, item_count) == item_count:
            item_count += 1
            work.distinct[1, window] += 1
        if open_session:
            session_events += 1
            session_labels = label_count
            session_items = item_count
            session_start = time

    # 3a. What each label did.
    for slot in range(min(slots, label_count)):
        total = 0
        for w in range(width):
            total += work.label_counts[slot, w]
            label_windows[slot, w] = min(total, 65535)
        for h in range(lives):
            label_windows[slot, width + h] = min(work.label_decay[slot, h] >> 8, 65535)
        # The recency at `width + lives` was written at first sight.
        for action in range(actions):
            label_windows[slot, width + lives + 2 + action] = min(work.label_actions[slot, action], 65535)
    for slot in range(label_count, slots):
        label_windows[slot, width + lives] = NEVER
    if visible > 0 and ring[order[0], 1] != 0:
        label_windows[0, width + lives + 1] = 1

    # 3b. The row, in the order of `FeatureSpec.names`.
    f = 0
    # Actions first, then events with a known label, then with a positive one.
    sums = work.sums
    sums[:] = 0
    for kind in range(4 * (actions + 1)):
        action = kind >> 2
        total = 0
        for w in range(width + lives):
            if w < width:
                total += work.counts[kind, w]
            else:
                total = work.decays[kind, w - width]
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
    total = 0
    for w in range(width):
        total += work.distinct[2, w]
        top = 0
        for slot in range(label_count):
            if w > 0:
                work.label_counts[slot, w] += work.label_counts[slot, w - 1]
            top = max(top, work.label_counts[slot, w])
        features[f] = top * 1000 // total if total > 0 else 0
        f += 1
    for k in range(GAPS):
        features[f] = work.gaps[k]
        f += 1
    features[f] = min(session_events, 65535)
    features[f + 1] = recency[_quantise((at_ms - session_start) >> 10)] if session_events else NEVER
    features[f + 2] = min(session_labels, 65535)
    features[f + 3] = min(session_items, 65535)
    features[f + 4] = min(sessions, 65535)
    features[f + 5] = same_label
    features[f + 6] = switches
    features[f + 7] = min(visible, 65535)
    features[f + 8] = truncated
    features[f + 9] = recency[step] if visible > 0 else NEVER
    features[f + 10] = min(days, 65535)
    f += 11
    hour = at_ms // HOUR_MS % 24
    weekday = (at_ms // DAY_MS + 3) % 7  # the first of January 1970 was a Thursday
    features[f] = tables.hour[hour, 0]
    features[f + 1] = tables.hour[hour, 1]
    features[f + 2] = tables.weekday[weekday, 0]
    features[f + 3] = tables.weekday[weekday, 1]
    f += 4
    for slot in range(SLOTS):
        for k in range(label_windows.shape[1]):
            features[f] = label_windows[slot, k]
            f += 1


@compiled
def one_row(
    events: I64,
    at_ms: int,
    tables: Tables,
    hidden: Hidden,
    features: U16,
    labels: I64,
    label_windows: U16,
) -> None:
    """Writes the row of one history.

    Args:
        events: `[m, 5]` int64, at most N events in append order.
        at_ms: the time the row speaks of.
        tables: the spec's constants.
        hidden: the mask.
        features: `[D]` uint16, written.
        labels: `[L]` int64, written: the bits of the labels' ids.
        label_windows: `[L, F]` uint16, written.
    """
    work = _scratch(tables, labels.shape[0])
    count = events.shape[0]
    _row(events, count, count, at_ms, 1, tables, hidden, work, features, labels, label_windows)


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
    labels: I64,
    label_windows: U16,
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
        labels: `[n, L]` int64, written.
        label_windows: `[n, L, F]` uint16, written.
    """
    work = _scratch(tables, labels.shape[1])
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
            labels[n],
            label_windows[n],
        )
        for word in range(WORDS):
            rings[slot, ends[slot], word] = events[n, word]
        ends[slot] = (ends[slot] + 1) % size
        counts[slot] = min(counts[slot] + 1, size)


def words(events: NDArray[Any]) -> I64:
    """Gives the `[n, 5]` int64 view of `[n]` EVENT that the kernels read."""
    return np.ascontiguousarray(events).view(np.int64).reshape(-1, WORDS)
