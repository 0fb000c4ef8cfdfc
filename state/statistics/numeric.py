"""Statistics of numeric features: a histogram with fixed buckets, and exact sums.

The buckets are the same for every window and every baseline. So counts can be added and histograms compared without
assumptions about the distribution within a bucket. Whole numbers up to 7 have one bucket each, and larger numbers up to
65,535 have four buckets per octave. Shares have ten buckets of equal width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled

WHOLE = np.array([*range(8), *(8 * 2**octave * quarter // 4 for octave in range(13) for quarter in range(4, 8)), 65536])
"""`[61]` int64 bounds of the buckets of whole numbers from 0 to 65,535; a bucket includes its lower bound."""

SHARES = np.linspace(0.0, 1.0, 11)
"""`[11]` float64 bounds of the buckets of numbers from 0 to 1; the last bucket includes both of its bounds."""

_BUCKET_OF = np.repeat(np.arange(len(WHOLE) - 1, dtype=np.int64), np.diff(WHOLE))


class Numeric:
    """Statistics of D features with the same rows.

    Args:
        width: D.
        edges: Bounds of the buckets: `WHOLE` or `SHARES`.

    Attributes:
        missing: `[D]` int64, rows in which the feature had no value.
        counts: `[D, buckets]` int64.
        total: `[D]` float64, sum of the values.
        squares: `[D]` float64, sum of their squares.
        zeros: `[D]` int64, number of zeros.
        least: `[D]` float64, minimum; infinite if there was no value.
        most: `[D]` float64, maximum; likewise.

    >>> counted = Numeric(2)
    >>> counted.add(np.array([[1, 300], [1, 0]], np.uint16))
    >>> counted.counts[:, :2].tolist(), counted.total.tolist(), counted.most.tolist()
    ([[0, 2], [1, 0]], [2.0, 300.0], [1.0, 300.0])
    """

    def __init__(self, width: int, edges: NDArray[np.int64] | NDArray[np.float64] = WHOLE) -> None:
        self.edges = edges
        self.rows = 0
        self.missing = np.zeros(width, np.int64)
        self.counts = np.zeros((width, len(edges) - 1), np.int64)
        self.total, self.squares = np.zeros(width), np.zeros(width)
        self.zeros = np.zeros(width, np.int64)
        self.least, self.most = np.full(width, np.inf), np.full(width, -np.inf)

    def add(self, values: NDArray[np.uint16]) -> None:
        """Counts `[n, D]` uint16 values without missing ones."""
        if not len(values):
            return
        self.rows += len(values)
        _count(np.ascontiguousarray(values), _BUCKET_OF, self.counts, self.total, self.squares, self.least, self.most)
        self.zeros = self.counts[:, 0].copy()

    def add_reals(self, values: NDArray[np.float64]) -> None:
        """Counts `[n]` float64 of a single feature; NaN is missing. Values outside all buckets count in the nearest."""
        present = values[~np.isnan(values)]
        self.rows += len(values)
        self.missing += len(values) - len(present)
        if not len(present):
            return
        inside = np.clip(np.searchsorted(self.edges, present, side="right") - 1, 0, len(self.edges) - 2)
        self.counts[0] += np.bincount(inside, minlength=self.counts.shape[1])
        self.total += present.sum()
        self.squares += np.dot(present, present)
        self.zeros += np.count_nonzero(present == 0)
        self.least, self.most = np.minimum(self.least, present.min()), np.maximum(self.most, present.max())

    def merge(self, other: Numeric) -> None:
        """Adds the counts of `other`."""
        self.rows += other.rows
        for name in ("missing", "counts", "total", "squares", "zeros"):
            getattr(self, name).__iadd__(getattr(other, name))
        self.least, self.most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)


@compiled(
    "u2[:, ::1], i8[::1], i8[:, ::1], f8[::1], f8[::1], f8[::1], f8[::1]",
    "const(u2[:, ::1]), i8[::1], i8[:, ::1], f8[::1], f8[::1], f8[::1], f8[::1]",
)
def _count(
    values: NDArray[np.uint16],
    bucket_of: NDArray[np.int64],
    counts: NDArray[np.int64],
    total: NDArray[np.float64],
    squares: NDArray[np.float64],
    least: NDArray[np.float64],
    most: NDArray[np.float64],
) -> None:
    """Adds `[n, D]` values to the statistics of D features; whole numbers up to 2**53 sum exactly in any order."""
    for row in range(values.shape[0]):
        for feature in range(values.shape[1]):
            value = float(values[row, feature])
            counts[feature, bucket_of[values[row, feature]]] += 1
            total[feature] += value
            squares[feature] += value * value
            least[feature] = min(least[feature], value)
            most[feature] = max(most[feature], value)


def median(counts: NDArray[np.int64], edges: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """The median of a histogram, as if the values of a bucket were evenly distributed in it.

    >>> median(np.array([2, 2]), np.array([0, 10, 30]))
    10.0
    """
    upto = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(upto[-1] / 2, upto, edges))
