"""The moments at which churn is learned, and how long after the latest event it is answered.

A user has churned at a moment where no event comes in the span after it. An
event is followed by moments of which the first is drawn and the others follow
a stride apart, until the user's next event. So each user is looked at once a
stride, at any time of day, as often as a user is there, and mostly not at a click.
"""

from __future__ import annotations

from typing import NamedTuple

from state.features.ages import DAY_MS
from state.features.spec import FeatureSpec

MOST_STRIDES = 64
"""After an event: a short span would have moments without number in a long window."""


class Horizon(NamedTuple):
    """What is asked.

    Attributes:
        span_ms: The time in which no event comes.
        stride_ms: Between two moments of one user.
        reach_ms: After so long without an event nothing is learned or answered any more.
    """

    span_ms: int
    stride_ms: int
    reach_ms: int

    @classmethod
    def of(cls, span_ms: int, spec: FeatureSpec) -> Horizon:
        """That of a span; nothing is known of a user without an event in the longest window.

        >>> days = [part / 86_400_000 for part in Horizon.of(2 * 86_400_000, FeatureSpec())]
        >>> days
        [2.0, 1.0, 7.0]
        """
        longest_ms = spec.windows_s[-1] * 1000
        stride_ms = min(DAY_MS, span_ms, longest_ms)
        return cls(span_ms, stride_ms, min(longest_ms, MOST_STRIDES * stride_ms))
