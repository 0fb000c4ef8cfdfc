"""What is done once in a while by a loop that turns more often."""

from __future__ import annotations


class Every:
    """Says at most once in `period_s` that it is time.

    >>> due = Every(1.0)
    >>> due(10.0), due(10.5), due(11.0)
    (True, False, True)
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next_s = 0.0

    def __call__(self, now_s: float) -> bool:
        """Whether the period has passed since the last True."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._period_s
        return True
