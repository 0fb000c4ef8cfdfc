"""Events taken into a store at once, where no micro-batch is written: a bootstrap's sample, clicks that a rebuild reads."""

from __future__ import annotations

from dataclasses import replace

from state.events.event_batch import EventBatch
from state.history.store import HistoryStore
from streaming.cut import Cut
from streaming.event_clock import EventClock
from streaming.labels import Labels, LookedUp
from streaming.profile import Profiler
from streaming.rows import Rows


def commit_at_once(
    store: HistoryStore, profiler: Profiler, clock: EventClock, labels: Labels | None, events: EventBatch, now_ms: int
) -> Rows:
    """Makes the rows of a batch as the stream does, and commits what they append; returns them complete.

    Args:
        store: Of `profiler` and `labels`.
        profiler: Makes the windows.
        clock: What time it is by the clicks.
        labels: Impressions that wait; None where none can.
        events: In order of arrival.
        now_ms: Wall clock.

    Raises:
        CorruptStore: The store lacks an impression that waits.
        PositionConflict: The events do not go on where the store ends.
        StoreFull: The store or its disk is full.
    """
    told = clock.follow(events, events.ranges, now_ms)
    rows = replace(profiler.update(events), told=told)
    return commit_rows(store, profiler, labels, rows if labels is None else labels.attribute(rows))


def commit_rows(store: HistoryStore, profiler: Profiler, labels: Labels | None, rows: Rows) -> Rows:
    """Commits what the rows of a batch append; returns them complete.

    Args:
        store: Of `profiler` and `labels`.
        profiler: Made them.
        labels: Attributed them, where impressions can wait.
        rows: What time it was is said.

    Raises:
        CorruptStore: The store lacks an impression that waits.
        PositionConflict: They do not go on where the store ends.
        StoreFull: The store or its disk is full.
    """
    found = LookedUp([], {}, {})
    if labels is not None:
        found = labels.look_up([Cut((rows,), 0)])
        ((rows,),) = (cut.pieces for cut in found.cuts)
    state = {} if rows.told is None else rows.told.state
    store.commit(rows.appends, rows.batch.ranges, {**found.extra, **state}, found.waiting)
    profiler.committed(rows)
    return rows
