"""Log time: when each row happened, as far as others may feel it.

A row's own time is what its producer's clock said, and decides about its own
user alone. Expiry, sightings, sweeps and serving's event clock go by log time,
which is the row's own time where the micro-batch's header believes it, and else
the time that its partition had reached. Pure.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind

TOLERANCE_MS = 1_200_000
"""20 minutes: more than good clocks differ, less than any time zone is wrong by."""


def log_times(batch: MicroBatch) -> NDArray[np.int64]:
    """`[n]` int64 ms: the log time of each row. Of a header without clocks, the rows' own times.

    A row whose label came later is judged by the time at which that became
    known; an impression that waits is of the time at which its wait began, and
    one whose wait is over may have been over for long.
    """
    clocks = batch.header.clocks
    if not clocks or not len(batch):
        return batch.at_ms
    told = batch.at_ms + batch.delay_ms
    begins, ends = (np.array(times, np.int64)[batch.source] for times in zip(*clocks, strict=True))
    believed, punctual = told <= ends, batch.kind == Kind.EXPIRED
    if (believed & (punctual | (told >= ends - TOLERANCE_MS)) & (batch.delay_ms >= 0)).all():
        return batch.at_ms
    after_ms = np.maximum(batch.delay_ms, 0)
    found = told - after_ms
    for number in range(len(clocks)):
        mine = np.flatnonzero(batch.source == number)
        if len(mine):
            reached = np.maximum.accumulate(np.where(believed, np.maximum(told, begins), begins)[mine])
            off = ~believed[mine] | (~punctual[mine] & (told[mine] < reached - TOLERANCE_MS))
            found[mine[off]] = reached[off] - after_ms[mine[off]]
    return found


def in_log_time(batch: MicroBatch) -> MicroBatch:
    """The batch with each row's log time as its time."""
    found = log_times(batch)
    return batch if found is batch.at_ms else replace(batch, at_ms=found)
