"""How long answers took: a histogram of equal ratios, so that quantiles are known within a tenth. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 160
LEAST_US, RATIO = 100.0, 1.1
"""The upper edge of the first bin, and how much larger that of each is than the one before it: the last is some 6 min."""


def empty() -> NDArray[np.int64]:
    """`[BINS]` int64 of no answer."""
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
    """Below which duration so large a share of the answers lies, ms: the upper edge of its bin; 0 of none.

    >>> counts = empty()
    >>> counts[bin_of(1000)] += 99
    >>> counts[bin_of(50_000)] += 1
    >>> 1.0 <= quantile_ms(counts, 0.5) <= 1.1, 50 <= quantile_ms(counts, 0.999) <= 55
    (True, True)

    Args:
        counts: `[BINS]` int64.
        share: 0 to 1.
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    place = int(np.searchsorted(np.cumsum(counts), share * total))
    return float(LEAST_US * RATIO ** min(place, BINS - 1) / 1000)
