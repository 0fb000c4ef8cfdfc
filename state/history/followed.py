"""What histories gain by a micro-batch: its events and ranges, without what they have. Pure.

Whoever follows the micro-batch log keeps histories by these two: each serving
host, and the rebuild of a stream's lost store.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from state.features.spec import EVENT, LABELLED, POSITIVE, Events
from state.microbatch.batch import MicroBatch
from state.microbatch.cutting import gaps
from state.microbatch.row_kinds import counts
from state.positions import Range, Source, split_range


def events_of(batch: MicroBatch) -> Events:
    """The rows of a micro-batch, all of which happened at their place, as histories keep them: `[n]` EVENT.

    >>> EVENT.names
    ('at_ms', 'category', 'item', 'offset', 'topic', 'partition', 'action', 'flags')
    """
    sources = [part.source for part in batch.header.ranges]
    events = np.empty(len(batch), EVENT)
    for name in ("at_ms", "category", "item", "offset", "action"):
        events[name] = getattr(batch, name)
    events["topic"] = np.array([source.topic for source in sources] or [0], np.uint32)[batch.source]
    events["partition"] = np.array([source.partition for source in sources] or [0], np.uint16)[batch.source]
    known = ~np.isnan(batch.label)
    positive = known & (batch.label >= 0.5)
    events["flags"] = known * LABELLED + positive * POSITIVE
    return events


def new_ranges(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[list[Range], int]:
    """The ranges of a batch as they go on from `marks`, and how many positions no micro-batch covered.

    A gap becomes a range of absent positions; what lies below the mark is left out.
    """
    found: list[Range] = []
    missing = 0
    for source, mark, first in gaps(batch.header, marks):
        found.append(Range(source, mark, first, absent=first - mark))
        missing += first - mark
    for index, part in enumerate(batch.header.ranges):
        mark = marks.get(part.source, part.first)
        if part.next <= mark:
            continue
        if part.first < mark:
            below = counts(batch.kind[(batch.source == index) & (batch.offset < mark)])
            part = split_range(part, mark, below.pop("rows"), below)[1]
        found.append(part)
    return found, missing
