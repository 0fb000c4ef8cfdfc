"""Removes masked clicks before histories and rows use them, and counts their positions as masked. Pure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from state.events.parser import EventBatch
from state.features.mask import Mask

COLUMNS = ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "source", "offset", "request")


def leave_out(batch: EventBatch, mask: Mask) -> EventBatch:
    """Returns the batch without the events that `mask` matches."""
    if not mask or not len(batch):
        return batch
    out = mask.rows(batch.user, batch.at_ms, batch.source, batch.offset, batch.ranges)
    if not out.any():
        return batch
    gone = np.bincount(batch.source[out], minlength=len(batch.ranges)).tolist()
    ranges = tuple(
        replace(part, rows=part.rows - count, masked=part.masked + count)
        for part, count in zip(batch.ranges, gone, strict=True)
    )
    columns = {name: getattr(batch, name) for name in COLUMNS}
    kept = {name: column[~out] for name, column in columns.items() if len(column) == len(out)}
    return replace(batch, ranges=ranges, **kept)
