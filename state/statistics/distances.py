"""Distances of two distributions: L-infinity of categorical features, Jensen-Shannon divergence of numeric ones. Pure.

Both as TensorFlow Data Validation has them (`anomalies/metrics.cc` there), so
that a threshold means the same here and there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Largest(NamedTuple):
    """A distance and the value that makes it.

    Attributes:
        distance: From 0 to 1.
        value: Whose share differs most; empty where nothing was counted.
    """

    distance: float
    value: str


def l_infinity(one: Mapping[str, float], other: Mapping[str, float]) -> Largest:
    """The largest difference of any value's share: max over v of |P(v) - Q(v)|, P and Q each of sum 1.

    Args:
        one: Counts by value.
        other: Likewise.

    >>> l_infinity({"a": 3, "b": 1}, {"a": 1, "b": 1, "c": 2})
    Largest(distance=0.5, value='a')

    Raises:
        ValueError: One of them has counted nothing: it has no shares.
    """
    totals = sum(one.values()), sum(other.values())
    if not all(totals):
        raise ValueError("no distance from what has no values")
    found = ((abs(one.get(key, 0) / totals[0] - other.get(key, 0) / totals[1]), key) for key in one.keys() | other)
    # Of equal ones the first by name, whatever order they came in.
    distance, value = min(found, key=lambda entry: (-entry[0], entry[1]))
    return Largest(distance, value)


def jensen_shannon(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two histograms over the same buckets, in bits, so from 0 to 1.

    JSD(P, Q) = (D(P | M) + D(Q | M)) / 2 with M = (P + Q) / 2 and D(P | M) = sum of P log2(P / M) (Lin, Divergence
    measures based on the Shannon entropy, 1991).

    Args:
        one: `[buckets]` float64 counts.
        other: `[buckets]` float64.

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 2.0])), jensen_shannon(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    (1.0, 0.0)

    Raises:
        ValueError: One of them has counted nothing.
    """
    if not one.sum() or not other.sum():
        raise ValueError("no divergence from what has no values")
    p, q = one / one.sum(), other / other.sum()
    m = (p + q) / 2

    def towards(share: NDArray[np.float64]) -> float:
        there = share > 0
        return float((share[there] * np.log2(share[there] / m[there])).sum())

    return min(1.0, max(0.0, (towards(p) + towards(q)) / 2))


def aligned(
    one: Mapping[tuple[float, float], float], other: Mapping[tuple[float, float], float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two histograms over the bounds of both, as if the values of a bucket were spread over it evenly.

    What was counted here has the same bounds everywhere and is only brought together; a histogram of another origin is
    parted.

    Args:
        one: Counts by bucket, (lower, upper) bound, none of them infinite.
        other: Likewise.

    Returns:
        Two `[buckets]` float64: first the buckets between all bounds, then the single points.

    >>> [counts.tolist() for counts in aligned({(0, 2): 4.0}, {(0, 1): 1.0, (1, 3): 2.0})]
    [[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]
    """
    bounds = np.array(sorted({bound for bucket in (*one, *other) if bucket[0] < bucket[1] for bound in bucket}))
    points = sorted({bucket[0] for bucket in (*one, *other) if bucket[0] == bucket[1]})

    def over(histogram: Mapping[tuple[float, float], float]) -> NDArray[np.float64]:
        made = np.zeros(max(0, len(bounds) - 1) + len(points))
        for (low, high), count in histogram.items():
            if low == high:
                made[len(made) - len(points) + points.index(low)] += count
                continue
            first, after = np.searchsorted(bounds, (low, high))
            made[first:after] += count * np.diff(bounds[first : after + 1]) / (high - low)
        return made

    return over(one), over(other)
