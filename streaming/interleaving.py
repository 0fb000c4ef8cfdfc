"""Brings the rows that one poll found in several partitions into the order in which they happened. Pure.

By the clocks of the partitions, not by the clicks' own times: one wrong clock
moves no other user's rows, and of one partition no row passes another.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from state.events.event_batch import EventBatch
from streaming.event_clock import Told
from streaming.masking import COLUMNS


def in_order(batch: EventBatch, told: Told) -> tuple[EventBatch, Told]:
    """The batch with its rows in the order of time, and what was told of them.

    Args:
        batch: Rows partition by partition, each in the order of its log.
        told: What `EventClock.follow` said of the batch.
    """
    if len(batch.ranges) < 2 or not len(batch):
        return batch, told
    reached_ms = told.clock_ms.copy()
    for number in range(len(batch.ranges)):
        mine = batch.source == number
        reached_ms[mine] = np.maximum.accumulate(reached_ms[mine])
    order = np.argsort(reached_ms, kind="stable")
    columns = {name: getattr(batch, name) for name in COLUMNS}
    sorted_columns = {name: column[order] for name, column in columns.items() if len(column) == len(order)}
    return replace(batch, **sorted_columns), replace(told, clock_ms=told.clock_ms[order])
