"""Log time: when each row happened, as far as it affects other users.

A row's own time is what its producer's clock said; it affects only the row's own
user. Expiry, sightings, sweeps and serving's event clock use log time. Log time
is the row's own time if the micro-batch's header confirms it, else the time that
its partition had reached. No side effects.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind

TOLERANCE_MS = 1_200_000
"""20 minutes: more than good clocks differ, less than the error of any wrong time zone."""


def log_times(batch: MicroBatch) -> NDArray[np.int64]:
    """The log time of each row, `[n]` int64 ms; the rows' own times if the header has no clocks.

    A row whose label came later is checked by the time at which the label became
    known. A waiting impression counts by the time at which its wait began. An
    expired one may be arbitrarily late, since its wait may have ended long before.
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
    """The batch with `at_ms` replaced by each row's log time."""
    found = log_times(batch)
    return batch if found is batch.at_ms else replace(batch, at_ms=found)
