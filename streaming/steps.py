"""The steps between source and sink: records become events, events become rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from state.events.event_batch import EventBatch
from state.log import PartitionBatch
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


class UpdateProfiles(Step[StreamContext]):
    """Makes rows of events: what time it is, windows, then attributes, then what waits for its label."""

    def process(self, batch: EventBatch) -> Iterator[Rows]:
        """Makes the rows of one batch; an empty batch is passed on."""
        with self.handle.watched() as context:
            now_ms = time.time_ns() // 1_000_000
            batch, told = in_order(batch, context.clock.follow(batch, batch.ranges, now_ms))
            rows = replace(context.profiler.update(batch), told=told)
            if context.join is not None:
                rows = context.join.rows(rows)
            if context.labels is not None:
                rows = context.labels.attribute(rows)
            context.metrics.cached_users.set(context.profiler.cached_users)
        yield rows
