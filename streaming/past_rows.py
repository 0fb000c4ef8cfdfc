"""Past clicks as micro-batches: what the stream makes of them, over histories of its own that begin empty.

Which records came in one batch and what a micro-batch ends with changes no bit
of a row, see `streaming/profile.py`; so a row is what the stream made of its
click, where histories reach as far back, and but for attributes, which are
those that are known now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from state.log import PartitionBatch
from state.metrics import StreamMetrics
from state.positions import Source
from state.process.wall_clock import wall_ms
from streaming.alignment import Reached
from streaming.attributes import Join
from streaming.context import JobContext
from streaming.cut import Cut, Cutter, clocks_of, encode_cut
from streaming.masking import leave_out
from streaming.steps import rows_of
from streaming.sweeping import StreamSweep
from streaming.unlogged import commit_rows

NEVER_MS = 1 << 62


@dataclass(frozen=True, kw_only=True)
class PastContext(JobContext):
    """What makes rows of past clicks; its store is new, and thrown away afterwards.

    Attributes:
        join: Attributes of users and items; None where none are configured.
        metrics: Nobody reads them.
    """

    join: Join | None
    metrics: StreamMetrics


class PastRows:
    """Makes micro-batches of clicks that are given in the order of their partitions. One thread.

    Args:
        context: What makes their rows.
        salt: Fingerprint of the users' salt.
        begin_ms: Micro-batches that end before this log time are left out: they only fill histories.
    """

    def __init__(self, context: PastContext, salt: str, begin_ms: int) -> None:
        self._context, self._salt, self._begin_ms = context, salt, begin_ms
        self._cutter, self._sweep = Cutter(context.settings.stream.cut_rows, NEVER_MS), StreamSweep(context)

    def take(self, batches: list[PartitionBatch]) -> list[bytes]:
        """Takes what a poll found; returns the micro-batches that are full.

        Raises:
            StoreError: The store of histories cannot take it.
            MicroBatchError: A row is larger than a record may be.
            SpringtideError: What ended the follower of attributes.
        """
        context, now_ms = self._context, wall_ms()
        events = leave_out(context.parser.parse(batches), context.mask)
        made = rows_of(context, context.join, events, now_ms)
        rows = commit_rows(context.store, context.profiler, context.labels, made)
        self._sweep.note([rows])
        if (due_s := self._sweep.due_s) is not None and time.monotonic() >= due_s:
            self._sweep.look()
        return self._encoded(self._cutter.add(rows, now_ms))

    def flush(self) -> list[bytes]:
        """The last ones."""
        return self._encoded(self._cutter.flush(wall_ms()))

    def reached(self, source: Source) -> Reached:
        """What time it is where a source was read to."""
        return self._context.clock.reached(source)

    def _encoded(self, cuts: Sequence[Cut]) -> list[bytes]:
        context, stream = self._context, self._context.settings.stream
        limits = stream.cut_rows, stream.max_record_bytes, context.mask.generation
        wanted = [cut for cut in cuts if max((end for _, end in clocks_of(cut)), default=NEVER_MS) >= self._begin_ms]
        return [value for cut in wanted for value in encode_cut(cut, context.spec.digest, self._salt, *limits)]
