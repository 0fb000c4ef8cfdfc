"""Parts the training log into windows of log time and takes the statistics of each: the same log gives the same windows.

A record belongs whole to the window in which its log time lies: what time it was
by the clocks of many users after its last event, and never before that of a record
before it. A window ends with the first record of a later one. Of about one in
`every` records the rows count, chosen by a hash of its offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from state.microbatch.batch import MicroBatch
from state.statistics.collecting import Statistics

_SPREAD = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Window:
    """A span of log time and what was counted in it.

    Attributes:
        start_ms: Its beginning, a multiple of its length.
        end_ms: When it is over.
        first: Offset of its first record in the training log.
        statistics: Of its rows.
        whole: Whether its beginning was seen.
    """

    start_ms: int
    end_ms: int
    first: int
    statistics: Statistics
    whole: bool


def chosen(offset: int, every: int) -> bool:
    """Whether the record at `offset` is one of about one in `every`.

    >>> sum(chosen(2 * offset, 10) for offset in range(10_000))
    1000
    """
    return (offset * _SPREAD % 2**64 >> 32) % every == 0


def log_time_ms(batch: MicroBatch) -> int:
    """What time it was after the last event of a batch by the clocks of many users, ms; 0 where nothing says.

    What 0.1.0 wrote has no clocks: the newest of the rows' own times then.
    """
    if batch.header.clocks:
        return max(after for _, after in batch.header.clocks)
    return int(batch.at_ms.max(initial=0))


class Windows:
    """Takes records in the order of the log.

    Args:
        window_s: Length of a window, seconds.
        new: Makes empty statistics.
        resumed: Whether the first record to come is the first of its window.
    """

    def __init__(self, window_s: int, new: Callable[[], Statistics], resumed: bool = False) -> None:
        self._length_ms = window_s * 1000
        self._new = new
        self._whole = resumed
        self._now_ms = 0
        self.open: Window | None = None

    def take(self, offset: int, batch: MicroBatch) -> Window | None:
        """Counts the rows of the record at `offset`; returns the window that it ended, if it did."""
        self._now_ms = max(self._now_ms, log_time_ms(batch))
        ended = None
        if self.open is None or self._now_ms >= self.open.end_ms:
            ended = self.open
            start_ms = self._now_ms - self._now_ms % self._length_ms
            whole = self._whole or ended is not None
            self.open = Window(start_ms, start_ms + self._length_ms, offset, self._new(), whole)
        self.open.statistics.add(batch.columns, batch.header.attributes)
        return ended
