"""The window kernel: one row of integers out of one user's recent events.

The stream calls it for whole batches on its arena of rings, serving for
histories; both run this code, so that the same events give the same bits. It
sees integers only. For each row:

1. The visible events are put in order, newest first, by (time, offset, source): `state/features/order.py`.
2. They are summed up, newest first: `state/features/sums.py`.
3. The sums are written out, saturated to 16 bits: `state/features/writing.py`.
4. Where a spec asks for them, the latest events are written too: `state/features/sequence.py`.
"""

from __future__ import annotations

from state.compiled import compiled, layout
from state.features.arrays import I64, WORDS, Tables, Vector
from state.features.mask import Hidden
from state.features.order import follow, put_in_order
from state.features.scratch import Scratch, scratch_of
from state.features.sequence import write_sequence
from state.features.sums import sum_in_order, sum_up
from state.features.writing import write_categories, write_features

# Not beside the classes: a spec alone, its digest or names, needs no compiler.
layout("i8[::1], i8[:, ::1], i8[::1], i8[:, ::1], i8[:, ::1], i8, i8")(Tables)
layout("i8[:, ::1], i8[:, ::1]")(Hidden)
layout("u2[:, ::1], u8[:, ::1], u2[:, :, ::1], u8[:, ::1], u8[:, ::1], u2[:, ::1], u2[:, ::1]")(Vector)


@compiled
def _write_row(
    ring: I64,
    end: int,
    count: int,
    at_ms: int,
    tables: Tables,
    hidden: Hidden,
    work: Scratch,
    rows: Vector,
    n: int,
) -> None:
    """Writes row `n` from the `count` events that end before ring position `end`."""
    recent_categories, category_windows = rows.recent_categories[n], rows.category_windows[n]
    # 1.
    visible, truncated = put_in_order(ring, end, count, at_ms, tables, hidden, work.order)
    course = follow(ring, at_ms, visible, tables, work)
    # 2.
    found = sum_up(
        ring, at_ms, visible, course.session_events, n + 1, tables, work, recent_categories, category_windows
    )
    sum_in_order(work, visible, found.categories)
    # 3.
    last_is_category = visible > 0 and ring[work.order[0], 1] != 0
    write_categories(tables, work, found.categories, last_is_category, category_windows)
    write_features(at_ms, tables, work, course, found, truncated, category_windows, rows.features[n])
    # 4.
    write_sequence(ring, at_ms, visible, tables, work, rows, n)


@compiled("i8[:, ::1], i8[::1], i8[::1], Tables, Hidden, Vector")
def many_rows(events: I64, starts: I64, at_ms: I64, tables: Tables, hidden: Hidden, rows: Vector) -> None:
    """Writes the rows of n histories.

    Args:
        events: `[m, 5]` int64, the histories one after another, each at most N events in append order.
        starts: `[n + 1]` int64, where each of them begins, and the end of the last.
        at_ms: `[n]` int64, the time each row speaks of.
        tables: the spec's constants.
        hidden: the mask.
        rows: of n rows, written.
    """
    work = scratch_of(tables)
    for n in range(at_ms.shape[0]):
        count = starts[n + 1] - starts[n]
        _write_row(events[starts[n] : starts[n + 1]], count, count, at_ms[n], tables, hidden, work, rows, n)


@compiled("i8[:, :, ::1], i8[::1], i8[::1], i8[::1], i8[:, ::1], Tables, Hidden, Vector")
def update_rows(
    rings: I64,
    ends: I64,
    counts: I64,
    slots: I64,
    events: I64,
    tables: Tables,
    hidden: Hidden,
    rows: Vector,
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
        rows: of n rows, written.
    """
    work = scratch_of(tables)
    size = rings.shape[1]
    for n in range(events.shape[0]):
        slot = slots[n]
        _write_row(rings[slot], ends[slot], counts[slot], events[n, 0], tables, hidden, work, rows, n)
        for word in range(WORDS):
            rings[slot, ends[slot], word] = events[n, word]
        ends[slot] = (ends[slot] + 1) % size
        counts[slot] = min(counts[slot] + 1, size)
