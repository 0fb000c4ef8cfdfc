"""The steps between source and sink: records become events, events become rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from state.events.event_batch import EventBatch
from state.log import PartitionBatch
from state.process.wall_clock import wall_ms
from streaming.attributes import Join
from streaming.context import JobContext, Step, StreamContext
from streaming.interleaving import in_order
from streaming.masking import leave_out
from streaming.rows import Rows


class ParseEvents(Step[JobContext]):
    """Makes one `EventBatch` of each list of partition batches: bad records are dead letters in it, masked ones are left out."""

    def process(self, batches: list[PartitionBatch]) -> Iterator[EventBatch]:
        """Decodes, validates and pseudonymises."""
        with self.handle.watched() as context:
            events = leave_out(context.parser.parse(batches), context.mask)
        yield events


def rows_of(context: JobContext, join: Join | None, batch: EventBatch, now_ms: int) -> Rows:
    """Makes the rows of one batch: what time it is, windows, then attributes, then what waits for its label.

    Args:
        context: Whose clock, histories and impressions that wait go on.
        join: Attributes of users and items; None where none are configured.
        batch: In order of arrival.
        now_ms: Wall clock.
    """
    batch, told = in_order(batch, context.clock.follow(batch, batch.ranges, now_ms))
    rows = replace(context.profiler.update(batch), told=told)
    if join is not None:
        rows = join.rows(rows)
    return rows if context.labels is None else context.labels.attribute(rows)


class UpdateProfiles(Step[StreamContext]):
    """Makes rows of events, see `rows_of`."""

    def process(self, batch: EventBatch) -> Iterator[Rows]:
        """Makes the rows of one batch; an empty batch is passed on."""
        with self.handle.watched() as context:
            rows = rows_of(context, context.join, batch, wall_ms())
            context.metrics.cached_users.set(context.profiler.cached_users)
        yield rows
