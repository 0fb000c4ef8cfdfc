"""Decides when to retry a call, and after how long: on temporary refusals and broken connections.

Every call only reads, so a call whose response was lost can safely be sent again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AGAIN = frozenset((429, 503))
"""HTTP status codes of temporary refusals."""


@dataclass(frozen=True)
class Retries:
    """How often and for how long a client retries.

    Attributes:
        most: Maximum number of retries after the first attempt; 0 for none.
        longest_wait_s: Maximum wait before one retry. If a worker asks for a longer one, the call is not retried.
        first_wait_s: Wait before the first retry if the worker asks for none; it doubles with each retry.
    """

    most: int = 3
    longest_wait_s: float = 5.0
    first_wait_s: float = 0.1

    def wait_s(self, tried: int, retry_after_s: float | None, chance: float, left_s: float = math.inf) -> float | None:
        """Returns how long to wait before the next attempt; None for no further attempt.

        >>> [Retries(most=3).wait_s(tried, None, 1.0) for tried in (1, 2, 3, 4)]
        [0.1, 0.2, 0.4, None]
        >>> Retries().wait_s(1, 2.0, 0.5), Retries().wait_s(1, 60.0, 0.5)
        (2.0, None)
        >>> Retries().wait_s(1, 2.0, 0.5, left_s=1.5)
        >>> Retries(most=10_000).wait_s(5000, None, 1.0)
        5.0

        Args:
            tried: Attempts so far.
            retry_after_s: The wait that the worker asks for; None if it asks for none.
            chance: From 0 to 1; jitter, which scales the wait to between half of it and the whole.
            left_s: Time until the deadline of the call, after which there is no attempt.
        """
        if tried > self.most:
            return None
        if retry_after_s is None:
            # 2.0**1024 overflows; the wait reaches its maximum long before.
            wait_s = min(self.first_wait_s * 2.0 ** min(tried - 1, 1000), self.longest_wait_s) * (0.5 + chance / 2)
        else:
            wait_s = retry_after_s
        return wait_s if wait_s <= self.longest_wait_s and wait_s < left_s else None


def retry_after_s(value: str | None) -> float | None:
    """Parses the `retry-after` header in seconds; None if it is absent or a date.

    >>> retry_after_s("2"), retry_after_s(None), retry_after_s("Wed, 21 Oct 2026 07:28:00 GMT")
    (2.0, None, None)
    """
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
