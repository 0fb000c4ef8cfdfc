"""Who waits for a worker, for how long, and who is refused for it.

An event loop does one thing at a time. A request is let in where what waits
before it, by what such work took lately, is done soon enough; else it is told
at once when to come again. One that has waited too long is given up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from state.errors import Overloaded, TookTooLong

_FASTER = 0.1
"""The weight of the newest piece where it took less than those before it."""
_SLOWER = 4
_AT_LEAST_S = 0.002


class QueueLimits(NamedTuple):
    """How long a question may wait.

    Attributes:
        expected_s: It is refused where it would wait longer.
        waited_s: It is given up where it has waited longer.
    """

    expected_s: float = math.inf
    waited_s: float = math.inf


class Line:
    """Requests that are answered in pieces, those of others between them. Used by one event loop.

    Args:
        limits: How long a request may wait.
        clock_s: A monotonic clock.
    """

    def __init__(self, limits: QueueLimits, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._limits, self.clock_s = limits, clock_s
        self._waiting, self._piece_s = 0, 0.0

    @contextmanager
    def admit(self, pieces: int = 1) -> Iterator[float]:
        """Lets a request of so many pieces in, for as long as the block lasts; gives the time at which it came.

        Raises:
            Overloaded: It would wait too long.
        """
        refuse_beyond(self._limits, self._waiting * self._piece_s)
        self._waiting += pieces
        try:
            yield self.clock_s()
        finally:
            self._waiting -= pieces

    def measure(self, piece_s: float) -> None:
        """A piece took so long."""
        self._piece_s = expected_next(self._piece_s, piece_s)

    def look(self, since_s: float) -> None:
        """Before a piece of a request that came at that time.

        Raises:
            TookTooLong: Nobody waits for it any more.
        """
        if self.clock_s() - since_s > self._limits.waited_s:
            raise too_late(self._limits)


def expected_next(before_s: float, took_s: float) -> float:
    """What the next piece takes: four times as much at most where one was slower, a tenth less at most where one was faster.

    A few slow ones are believed soon; one alone, such as the first of a process, counts for little.

    >>> expected_next(1.0, 1.5), expected_next(1.0, 9.0), expected_next(1.0, 0.5), expected_next(0.0, 9.0)
    (1.5, 4.0, 0.95, 0.002)
    """
    if took_s > before_s:
        return min(took_s, max(_SLOWER * before_s, _AT_LEAST_S))
    return before_s + _FASTER * (took_s - before_s)


def refuse_beyond(limits: QueueLimits, expected_s: float) -> None:
    """Refuses who would wait longer than bearable.

    Raises:
        Overloaded: It would, and when to come again.
    """
    if expected_s > limits.expected_s:
        refusal = Overloaded("more is asked than can be answered in time", "ask again later, and less at a time")
        refusal.http_headers = ((b"retry-after", b"%d" % math.ceil(expected_s)),)
        raise refusal


def too_late(limits: QueueLimits) -> TookTooLong:
    """The error of who waited too long.

    >>> str(too_late(QueueLimits(waited_s=2.0)))
    'no answer within 2 s; ask again later, and less at a time'
    """
    return TookTooLong(f"no answer within {limits.waited_s:g} s", "ask again later, and less at a time")
