"""Which rows of a micro-batch a mask or an erasure leaves out. No side effects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.features.erased import Erased
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind


def masked(batch: MicroBatch, mask: Mask) -> NDArray[np.bool_]:
    """Which rows (`[n]` bool) the mask leaves out: those of a masked event, and those labelled by one."""
    ranges = batch.header.ranges
    out = mask.rows(batch.user, batch.at_ms, batch.source, batch.opened, ranges)
    # An event that only ended a wait does not affect the row.
    if len(joined := np.flatnonzero(batch.kind == Kind.JOINED)):
        known_ms = (batch.at_ms + batch.delay_ms)[joined]
        out[joined] |= mask.rows(batch.user[joined], known_ms, batch.source[joined], batch.offset[joined], ranges)
    return out


def erased_rows(batch: MicroBatch, erased: Erased) -> NDArray[np.bool_]:
    """Which rows (`[n]` bool) belong to erased users, by the offset of the row's own event."""
    return erased.rows(batch.user, batch.source, batch.opened, batch.header.ranges)
