"""Admission control for a worker's request queue.

An event loop does one thing at a time. A request is admitted if its expected
wait is short enough. The expected wait is derived from the queue's length and the
recent duration of such work. Otherwise the request is refused at once, with the
time after which to retry. A request that has waited too long is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from state.errors import Overloaded, TookTooLong

_FASTER = 0.1
"""The weight of the newest piece if it was faster than expected."""
_SLOWER = 4
_AT_LEAST_S = 0.002


class QueueLimits(NamedTuple):
    """How long a query may wait.

    Attributes:
        expected_s: A query with a longer expected wait is refused.
        waited_s: A query that has waited longer is dropped.
    """

    expected_s: float = math.inf
    waited_s: float = math.inf


class Line:
    """A queue of requests that are answered in interleaved pieces. Used by one event loop.

    Args:
        limits: How long a request may wait.
        clock_s: A monotonic clock.
    """

    def __init__(self, limits: QueueLimits, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._limits, self.clock_s = limits, clock_s
        self._waiting, self._piece_s = 0, 0.0

    @contextmanager
    def admit(self, pieces: int = 1) -> Iterator[float]:
        """Admits a request of `pieces` pieces for the duration of the block; yields its arrival time.

        Raises:
            Overloaded: The expected wait is too long.
        """
        refuse_beyond(self._limits, self._waiting * self._piece_s)
        self._waiting += pieces
        try:
            yield self.clock_s()
        finally:
            self._waiting -= pieces

    def measure(self, piece_s: float) -> None:
        """Records the duration of a piece."""
        self._piece_s = expected_next(self._piece_s, piece_s)

    def look(self, since_s: float) -> None:
        """Checks, before each piece, that a request that arrived at `since_s` has not waited too long.

        Raises:
            TookTooLong: It has.
        """
        if self.clock_s() - since_s > self._limits.waited_s:
            raise too_late(self._limits)


def expected_next(before_s: float, took_s: float) -> float:
    """Estimates the duration of the next piece: grows at most fourfold after a slow one, shrinks at most by a tenth.

    The estimate adapts quickly to several slow pieces. A single one, such as the first of a process, counts little.

    >>> expected_next(1.0, 1.5), expected_next(1.0, 9.0), expected_next(1.0, 0.5), expected_next(0.0, 9.0)
    (1.5, 4.0, 0.95, 0.002)
    """
    if took_s > before_s:
        return min(took_s, max(_SLOWER * before_s, _AT_LEAST_S))
    return before_s + _FASTER * (took_s - before_s)


def refuse_beyond(limits: QueueLimits, expected_s: float) -> None:
    """Refuses a request with too long an expected wait.

    Raises:
        Overloaded: The wait exceeds `limits.expected_s`; the error has a retry-after header.
    """
    if expected_s > limits.expected_s:
        refusal = Overloaded("more is asked than can be answered in time", "ask again later, and less at a time")
        refusal.http_headers = ((b"retry-after", b"%d" % math.ceil(expected_s)),)
        raise refusal


def too_late(limits: QueueLimits) -> TookTooLong:
    """Returns the error for a request that waited too long.

    >>> str(too_late(QueueLimits(waited_s=2.0)))
    'no answer within 2 s; ask again later, and less at a time'
    """
    return TookTooLong(f"no answer within {limits.waited_s:g} s", "ask again later, and less at a time")
