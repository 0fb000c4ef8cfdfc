"""Rows of the stream: a batch of events with their windows, and the events to append to histories. Pure.

The events of several partitions are sorted by the partitions' clocks, so one wrong clock moves no other user's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.attributes.values import Joined
from state.events.parser import EventBatch
from state.features.arrays import Vector
from state.features.mask import ClickColumns, Mask
from state.history.appends import Appends
from state.microbatch.batch import LISTS, SCALARS, WAITING, Known, absent_column
from streaming.event_clock import BatchClock


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch of events with their windows, and the events to append to histories.

    Attributes:
        batch: The events, in order of arrival.
        vectors: Output of the window kernel for each event, `[n, ...]`.
        kind: `[n]` uint8 `Kind`; by default each event is a row.
        known: Earlier impressions whose label became known.
        attributes: Attributes of users and items; None if none are configured.
        clock: The event clock; None if it is not needed.
        delay_ms: `[n]` int64, how far an impression's time is ahead of its partition's clock, at most 0; empty by
            default.
    """

    batch: EventBatch
    vectors: Vector
    appends: Appends
    kind: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    known: Known | None = None
    attributes: Joined | None = None
    clock: BatchClock | None = None
    delay_ms: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.batch.offset) + (0 if self.known is None else len(self.known))

    def __bool__(self) -> bool:
        """True even without rows, because an empty batch still advances positions."""
        return True

    @property
    def events(self) -> dict[str, NDArray[Any]]:
        """The columns of the events alone."""
        batch, rows = self.batch, len(self.batch.offset)
        added: dict[str, NDArray[Any]] = {
            "kind": self.kind,
            "request": batch.request,
            "delay_ms": self.delay_ms,
        }
        none = absent_column("user_attributes", rows)
        return {
            **{name: getattr(batch, name) for name in (*SCALARS, "context") if name not in WAITING},
            **{name: absent_column(name, rows) for name in WAITING},
            **{name: column for name, column in added.items() if len(column) == rows},
            # Sequences are columns only if the spec requests them.
            **{name: column for name, column in self.vectors._asdict().items() if column.shape[1] or name in LISTS},
            "user_attributes": none if self.attributes is None else self.attributes.user,
            "item_attributes": none if self.attributes is None else self.attributes.item,
        }

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of a micro-batch by name; `source` is an index of the batch's ranges.

        Each event comes before the impressions that became known after it.
        """
        events = self.events
        if self.known is None or not len(self.known):
            return events
        assert self.known.columns is not None, "looked up before they are written"
        order = np.argsort(np.concatenate([np.arange(len(self.batch.offset)), self.known.by]), kind="stable")
        return {name: np.concatenate([events[name], self.known.columns[name]])[order] for name in events}


COLUMNS = ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "source", "offset", "request")


def leave_out(batch: EventBatch, mask: Mask) -> EventBatch:
    """Returns the batch without the events that `mask` matches."""
    if not mask or not len(batch):
        return batch
    out = mask.rows(ClickColumns.of(batch), batch.ranges)
    if not out.any():
        return batch
    masked = np.bincount(batch.source[out], minlength=len(batch.ranges)).tolist()
    ranges = tuple(
        replace(part, rows=part.rows - count, masked=part.masked + count)
        for part, count in zip(batch.ranges, masked, strict=True)
    )
    columns = {name: getattr(batch, name) for name in COLUMNS}
    remaining = {name: column[~out] for name, column in columns.items() if len(column) == len(out)}
    return replace(batch, ranges=ranges, **remaining)


def in_order(batch: EventBatch, clock: BatchClock) -> tuple[EventBatch, BatchClock]:
    """Returns the batch with its rows in order of time, and their event clock in the same order.

    Before, the rows come partition by partition, each in log order; `clock` is the result of `EventClock.follow` for them.
    """
    if len(batch.ranges) < 2 or not len(batch):
        return batch, clock
    reached_ms = clock.clock_ms.copy()
    for number in range(len(batch.ranges)):
        is_of_range = batch.source == number
        reached_ms[is_of_range] = np.maximum.accumulate(reached_ms[is_of_range])
    order = np.argsort(reached_ms, kind="stable")
    columns = {name: getattr(batch, name) for name in COLUMNS}
    sorted_columns = {name: column[order] for name, column in columns.items() if len(column) == len(order)}
    return replace(batch, **sorted_columns), replace(clock, clock_ms=clock.clock_ms[order])
