"""Records to columns of events, or to dead letters with a reason: the DoFn around `state.events.parser.Parser`."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam

from state.events.event_batch import EventBatch
from state.log import PartitionBatch
from streaming.shard import current


class ParseEvents(beam.DoFn):
    """Makes one `EventBatch` of each list of partition batches; a bad record never stops the stream."""

    def process(self, batches: list[PartitionBatch]) -> Iterator[EventBatch]:
        """Decodes, validates and pseudonymises."""
        shard = current()
        with shard.watch():
            events = shard.parser.parse(batches)
        yield events
