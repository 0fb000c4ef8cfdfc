"""The Beam steps between source and sink: records become events, events become rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from state.events.parser import EventBatch
from state.log import PartitionBatch
from state.process.wall_clock import wall_ms
from streaming.attributes import Join
from streaming.context import JobContext, Step, StreamContext
from streaming.interleaving import in_order
from streaming.masking import leave_out
from streaming.rows import Rows


class ParseEvents(Step[JobContext]):
    """Parses each list of partition batches into one `EventBatch`.

    Bad records become dead letters in it; masked events are left out.
    """

    def process(self, batches: list[PartitionBatch]) -> Iterator[EventBatch]:
        """Decodes, validates and pseudonymises."""
        with self.handle.watched() as context:
            events = leave_out(context.parser.parse(batches), context.mask)
        yield events


def rows_of(context: JobContext, join: Join | None, batch: EventBatch, now_ms: int) -> Rows:
    """Computes the rows of one batch: event clock, windows, then attributes, then delayed labels.

    Args:
        context: Provides the clock, histories and waiting impressions, and is updated.
        join: Attributes of users and items; None if none are configured.
        batch: In order of arrival.
        now_ms: Wall clock.
    """
    batch, told = in_order(batch, context.clock.follow(batch, batch.ranges, now_ms))
    rows = replace(context.profiler.update(batch), told=told)
    if join is not None:
        rows = join.rows(rows)
    return rows if context.labels is None else context.labels.attribute(rows)


class UpdateProfiles(Step[StreamContext]):
    """Turns events into rows; see `rows_of`."""

    def process(self, batch: EventBatch) -> Iterator[Rows]:
        """Yields the rows of one batch; an empty batch is passed on."""
        with self.handle.watched() as context:
            rows = rows_of(context, context.join, batch, wall_ms())
            context.metrics.cached_users.set(context.profiler.cached_users)
        yield rows
