"""Sorts the rows that one poll read from several partitions by event time. Pure.

The order follows the partitions' clocks, not the clicks' own times. So one wrong clock moves no other user's rows, and
rows of one partition keep their order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from state.events.parser import EventBatch
from streaming.event_clock import Told
from streaming.masking import COLUMNS


def in_order(batch: EventBatch, told: Told) -> tuple[EventBatch, Told]:
    """Returns the batch with its rows in order of time, and their event clock in the same order.

    Args:
        batch: Rows partition by partition, each in log order.
        told: The result of `EventClock.follow` for the batch.
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
