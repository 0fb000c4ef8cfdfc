"""Commits events to a store without a micro-batch: for a bootstrap's sample, and for clicks that a rebuild reads."""

from __future__ import annotations

from dataclasses import replace

from state.events.parser import EventBatch
from state.history.store import HistoryStore
from streaming.cut import Cut
from streaming.event_clock import EventClock
from streaming.labels import Labels, LookedUp
from streaming.profile import Profiler
from streaming.rows import Rows


def commit_at_once(
    store: HistoryStore, profiler: Profiler, clock: EventClock, labels: Labels | None, events: EventBatch, now_ms: int
) -> Rows:
    """Computes the rows of a batch as the stream does, commits them to the store, and returns them complete.

    Args:
        store: Of `profiler` and `labels`.
        profiler: Computes the windows.
        clock: The event clock.
        labels: Waiting impressions; None if none can wait.
        events: In order of arrival.
        now_ms: Wall clock.

    Raises:
        CorruptStore: The store lacks a waiting impression.
        PositionConflict: The events do not start at the store's positions.
        StoreFull: The store or its disk is full.
    """
    told = clock.follow(events, events.ranges, now_ms)
    rows = replace(profiler.update(events), told=told)
    return commit_rows(store, profiler, labels, rows if labels is None else labels.attribute(rows))


def commit_rows(store: HistoryStore, profiler: Profiler, labels: Labels | None, rows: Rows) -> Rows:
    """Commits the rows of a batch to the store; returns them complete.

    Args:
        store: Of `profiler` and `labels`.
        profiler: Computed the rows.
        labels: Attributed them, if impressions can wait.
        rows: With their event clock.

    Raises:
        CorruptStore: The store lacks a waiting impression.
        PositionConflict: The rows do not start at the store's positions.
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
