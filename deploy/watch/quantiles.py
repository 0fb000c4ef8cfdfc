"""Quantiles of what a process counted in buckets, as Prometheus computes them.

A histogram on /metrics counts from the start of its process. The difference of
two looks at it is the histogram of what lay between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

Buckets = Mapping[float, float]
"""Upper bound -> how many were at most that; the last bound is infinite."""


@dataclass(frozen=True)
class Spread:
    """How something was distributed.

    Attributes:
        count: Of how many observations.
        p50: The median; None where there is no observation.
        p99: The 99th percentile, likewise.
        most: The highest finite bound: a quantile that reaches it may be larger.
    """

    count: float = 0.0
    p50: float | None = None
    p99: float | None = None
    most: float = math.inf


def quantile(buckets: Buckets, q: float) -> float | None:
    """The q-quantile, linear within its bucket; the highest finite bound where it lies beyond; None without observations.

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
    """What was counted after `before`; all of it where the process began anew since.

    >>> between({1.0: 3, math.inf: 5}, {1.0: 1, math.inf: 2})
    {1.0: 2, inf: 3}
    """
    grown = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    counts = [grown[bound] for bound in sorted(grown)]
    cumulative = all(low <= high for low, high in itertools.pairwise([0.0, *counts]))
    return grown if cumulative else after


def spread(buckets: Buckets) -> Spread:
    """Median and 99th percentile.

    >>> spread({0.1: 50, 0.2: 100, math.inf: 100})
    Spread(count=100, p50=0.1, p99=0.198, most=0.2)
    """
    finite = [bound for bound in buckets if not math.isinf(bound)]
    if not finite:
        return Spread()
    return Spread(max(buckets.values()), quantile(buckets, 0.5), quantile(buckets, 0.99), max(finite))
