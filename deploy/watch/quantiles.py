"""Quantiles of histograms on /metrics, computed as Prometheus does.

A histogram counts from the start of its process. The difference of two polls is the histogram of the time between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

Buckets = Mapping[float, float]
"""By upper bound, how many observations were at most that; the last bound is infinite."""


@dataclass(frozen=True)
class Spread:
    """Summary of a distribution.

    Attributes:
        count: Number of observations.
        p50: The median; None without observations.
        p99: The 99th percentile; None without observations.
        most: The highest finite bound; a quantile that reaches it may be larger.
    """

    count: float = 0.0
    p50: float | None = None
    p99: float | None = None
    most: float = math.inf


def quantile(buckets: Buckets, q: float) -> float | None:
    """Returns the q-quantile, interpolated linearly within its bucket; None without observations.

    If the quantile is beyond the highest finite bound, that bound is returned.

    >>> quantile({1: 50, 2: 100, math.inf: 100}, 0.75)
    1.5
    >>> quantile({0.1: 1, math.inf: 100}, 0.99), quantile({0.1: 0, math.inf: 0}, 0.5)
    (0.1, None)
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]] > 0:
        return None
    rank = q * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


def between(after: Buckets, before: Buckets) -> Buckets:
    """Returns what was counted after `before`; all of `after` if the process has restarted since.

    >>> between({1.0: 3, math.inf: 5}, {1.0: 1, math.inf: 2})
    {1.0: 2, inf: 3}
    """
    grown = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    counts = [grown[bound] for bound in sorted(grown)]
    cumulative = all(low <= high for low, high in itertools.pairwise([0.0, *counts]))
    return grown if cumulative else after


def spread(buckets: Buckets) -> Spread:
    """Computes the median and the 99th percentile.

    >>> spread({0.1: 50, 0.2: 100, math.inf: 100})
    Spread(count=100, p50=0.1, p99=0.198, most=0.2)
    """
    finite = [bound for bound in buckets if not math.isinf(bound)]
    if not finite:
        return Spread()
    return Spread(max(buckets.values()), quantile(buckets, 0.5), quantile(buckets, 0.99), max(finite))
