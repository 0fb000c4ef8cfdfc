"""When a call is tried again, and after how long: what a worker refused for now, and connections that ended.

Every call only reads, so that one that was perhaps answered may be asked again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AGAIN = frozenset((429, 503))
"""Statuses of HTTP that say "not now"."""


@dataclass(frozen=True)
class Retries:
    """How patient a client is.

    Attributes:
        most: Tries after the first one; 0 for none.
        longest_wait_s: Before one try. A worker that wants a longer pause is not asked again.
        first_wait_s: Before the second try where nobody says how long; twice as long each time.
    """

    most: int = 3
    longest_wait_s: float = 5.0
    first_wait_s: float = 0.1

    def wait_s(self, tried: int, retry_after_s: float | None, chance: float, left_s: float = math.inf) -> float | None:
        """How long to wait before the next try; None for no more tries.

        >>> [Retries(most=3).wait_s(tried, None, 1.0) for tried in (1, 2, 3, 4)]
        [0.1, 0.2, 0.4, None]
        >>> Retries().wait_s(1, 2.0, 0.5), Retries().wait_s(1, 60.0, 0.5)
        (2.0, None)
        >>> Retries().wait_s(1, 2.0, 0.5, left_s=1.5)
        >>> Retries(most=10_000).wait_s(5000, None, 1.0)
        5.0

        Args:
            tried: Tries so far.
            retry_after_s: What the worker asks for; None where it says nothing.
            chance: From 0 to 1; waits of clients are spread by it, between half of it and the whole.
            left_s: Until the deadline of the call; there is no try after it.
        """
        if tried > self.most:
            return None
        if retry_after_s is None:
            # 2.0**1024 overflows; the longest wait is reached long before.
            wait_s = min(self.first_wait_s * 2.0 ** min(tried - 1, 1000), self.longest_wait_s) * (0.5 + chance / 2)
        else:
            wait_s = retry_after_s
        return wait_s if wait_s <= self.longest_wait_s and wait_s < left_s else None


def retry_after_s(value: str | None) -> float | None:
    """The header `retry-after` in seconds; None where there is none, or a date.

    >>> retry_after_s("2"), retry_after_s(None), retry_after_s("Wed, 21 Oct 2026 07:28:00 GMT")
    (2.0, None, None)
    """
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
