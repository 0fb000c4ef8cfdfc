"""Histogram of latencies with bins of equal ratio, so that quantiles are accurate within 10 %. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 160
LEAST_US, RATIO = 100.0, 1.1
"""Upper edge of the first bin, and the ratio between the edges of neighbouring bins. The last edge is about 6 min."""


def empty() -> NDArray[np.int64]:
    """An empty histogram, `[BINS]` int64."""
    return np.zeros(BINS, np.int64)


def bin_of(took_us: float) -> int:
    """The bin of a duration.

    >>> bin_of(0), bin_of(100), bin_of(101), bin_of(1e12) == BINS - 1
    (0, 0, 1, True)
    """
    if took_us <= LEAST_US:
        return 0
    return min(BINS - 1, math.ceil(round(math.log(took_us / LEAST_US) / math.log(RATIO), 9)))


def quantile_ms(counts: NDArray[np.int64], share: float) -> float:
    """The quantile of the latencies, ms: the upper edge of its bin; 0 for an empty histogram.

    >>> counts = empty()
    >>> counts[bin_of(1000)] += 99
    >>> counts[bin_of(50_000)] += 1
    >>> 1.0 <= quantile_ms(counts, 0.5) <= 1.1, 50 <= quantile_ms(counts, 0.999) <= 55
    (True, True)

    Args:
        counts: `[BINS]` int64, the histogram.
        share: The quantile, 0 to 1.
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    place = int(np.searchsorted(np.cumsum(counts), share * total))
    return float(LEAST_US * RATIO ** min(place, BINS - 1) / 1000)
