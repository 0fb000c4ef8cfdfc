"""The moments at which churn is learned, and how long after the latest event it is answered.

A user has churned at a moment if no event follows within the span. After each
event come moments, up to the user's next event: the first is drawn at random,
the others follow one stride apart. So each user is sampled once a stride, at
any time of day, and mostly not at a click.
"""

from __future__ import annotations

from typing import NamedTuple

from state.features.ages import DAY_MS
from state.features.spec import FeatureSpec

MOST_STRIDES = 64
"""Most moments after one event. It bounds their number where a short span meets a long window."""


class Horizon(NamedTuple):
    """The time spans of a churn question.

    Attributes:
        span_ms: The time without an event that counts as churn.
        stride_ms: The time between two moments of one user.
        reach_ms: After this time without an event nothing is learned or answered.
    """

    span_ms: int
    stride_ms: int
    reach_ms: int

    @classmethod
    def of(cls, span_ms: int, spec: FeatureSpec) -> Horizon:
        """The horizon for a span. A user without an event in the longest window is unknown, so the reach ends there.

        >>> days = [part / 86_400_000 for part in Horizon.of(2 * 86_400_000, FeatureSpec())]
        >>> days
        [2.0, 1.0, 7.0]
        """
        longest_ms = spec.windows_s[-1] * 1000
        stride_ms = min(DAY_MS, span_ms, longest_ms)
        return cls(span_ms, stride_ms, min(longest_ms, MOST_STRIDES * stride_ms))
