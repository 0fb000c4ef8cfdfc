"""Finds the ranges that a micro-batch adds to histories. No side effects.

Every follower of the micro-batch log updates its histories with it: each
serving host, and the rebuild of a stream's lost store.
"""

from __future__ import annotations

from collections.abc import Mapping

from state.microbatch.batch import MicroBatch, counts, gaps
from state.positions import Range, Source, split_range


def new_ranges(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[list[Range], int]:
    """The ranges of a batch that follow `marks`, and how many positions no micro-batch covered.

    A gap becomes a range of absent positions; what is below the mark is left out.
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
