"""The visible events of a history, newest first, and what their order alone says: sessions, gaps and switches."""

from __future__ import annotations

from typing import NamedTuple

from state.compiled import inlined
from state.features.ages import DAY_MS, NEVER, quantise
from state.features.arrays import GAPS, I64, SOURCE_BITS, SWITCHES, U64, Tables
from state.features.mask import Hidden
from state.features.scratch import Scratch

SESSION_GAP_MS = 30 * 60_000

step_of = inlined(quantise)


class Course(NamedTuple):
    """What the order of the visible events says."""

    visible: int
    session_events: int
    session_start: int
    sessions: int
    same_category: int
    switches: int
    days: int


@inlined
def hides(hidden: Hidden, source: int, offset: int, at_ms: int) -> bool:
    """Whether a mask takes out the event; `source` is topic | partition << 32."""
    found = False
    for k in range(hidden.offsets.shape[0]):
        if source == hidden.offsets[k, 0] and hidden.offsets[k, 1] <= offset < hidden.offsets[k, 2]:
            found = True
    for k in range(hidden.times.shape[0]):
        if hidden.times[k, 0] <= at_ms < hidden.times[k, 1]:
            found = True
    return found


@inlined
def newer(ring: I64, left: int, right: int) -> bool:
    """Whether the event at `left` comes after that at `right`: by time, then offset, then source."""
    if ring[left, 0] != ring[right, 0]:
        return bool(ring[left, 0] > ring[right, 0])
    if ring[left, 3] != ring[right, 3]:
        return bool(ring[left, 3] > ring[right, 3])
    # A partition added or a topic made anew can repeat an offset.
    return bool((ring[left, 4] & SOURCE_BITS) > (ring[right, 4] & SOURCE_BITS))


@inlined
def put_in_order(
    ring: I64, end: int, count: int, at_ms: int, tables: Tables, hidden: Hidden, order: U64
) -> tuple[int, bool]:
    """Writes `order`; returns how many events are visible, and whether older ones may have been lost.

    Histories arrive nearly in order, so that insertion is one pass.
    """
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
        if masked and hides(hidden, ring[place, 4] & SOURCE_BITS, ring[place, 3], time):
            continue
        hole = visible
        if time >= oldest:
            while hole > 0 and newer(ring, place, order[hole - 1]):
                order[hole] = order[hole - 1]
                hole -= 1
        else:
            oldest = time
        order[hole] = place
        visible += 1
    return visible, truncated


@inlined
def follow(ring: I64, at_ms: int, visible: int, tables: Tables, work: Scratch) -> Course:
    """Walks from the newest visible event to the oldest; writes the gaps."""
    work.gaps[:] = NEVER
    session_events = sessions = same_category = switches = days = 0
    session_start = newer_time = at_ms
    newer_category = 0
    day_start = at_ms + 1
    open_session = True
    for k in range(visible):
        place = work.order[k]
        time, category = ring[place, 0], ring[place, 1]
        gap = newer_time - time
        newer_time = time
        # Without a branch: whether a session ends here cannot be predicted.
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
    return Course(visible, session_events, session_start, sessions, same_category, switches, days)
