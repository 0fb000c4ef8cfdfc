"""Confidence sequences: intervals for a mean that are valid at all times at once, for any number of checks. Pure.

The probability that any of them ever misses the true mean is at most `alpha`. So it is valid to stop as soon as the
result is clear, and to continue while it is not.

The boundary is the two-sided normal mixture (Robbins, Statistical methods related to the law of the iterated logarithm,
1970; Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences, 2021,
equation 14). S with variance process V meets |S| >= sqrt((V + r) log((V + r) / (alpha^2 r))) at some time with
probability at most alpha. The variance is estimated, which is valid asymptotically (Waudby-Smith, Arbour, Sinha,
Kennedy and Ramdas, Time-uniform central limit theory and asymptotic confidence sequences, 2021, theorem 2.2; its
1 / rho^2 is `r` here).

Rows of one user are not independent. So all rows of a user are in one of BLOCKS blocks, and the variance is that of the
blocks' sums (the ratio estimator of cluster sampling: Cochran, Sampling Techniques, 1977, chapter 9A). Later parts of
the sums may correlate with earlier ones. Such sums meet a boundary more rarely than a random walk of the same variances
(Slepian, The one-sided barrier problem for Gaussian noise, 1962), so the sequence stays valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCKS = 512
"""Number of user blocks.

The error of the estimated variance is about 6 % (sqrt(2 / BLOCKS)), which changes the rate of false alarms little.
"""

TELLING_BLOCKS = 64
"""Number of blocks that must have a sum other than 0 before there is an interval, for the normal approximation."""

ALPHA = 0.05
PLANNED_ROWS = 100_000

UNBOUNDED = (-math.inf, math.inf)


def tuning(planned_rows: float, alpha: float) -> float:
    """The `r` of the normal mixture for which intervals are about as narrow as possible after `planned_rows` rows.

    r = n / (log(1 / alpha^2) + log(1 + log(1 / alpha^2))) (Howard et al. 2021, section 3.5). It must be fixed before
    the first row. Intervals are wider than the narrowest possible ones by a quarter after a tenth of the rows, and by
    7 % after ten times the rows.

    >>> round(tuning(1000, 0.05), 1)
    126.0
    """
    squared = -2 * math.log(alpha)
    return planned_rows / (squared + math.log1p(squared))


def half_width(variance: float, rows: float, tuned: float, alpha: float) -> float:
    """Half the width of the interval of a mean: sqrt(variance (1 + r / n) log((n + r) / (alpha^2 r))), see above.

    Args:
        variance: Estimated variance of the mean.
        rows: Number of independent rows n, more than 0. The variance of the sum grows in proportion to it.
        tuned: r, the `tuning` for the planned rows.
        alpha: The rate of false alarms.

    >>> round(half_width(1 / 1000, 1000, tuning(1000, 0.05), 0.05) / (1.96 * math.sqrt(1 / 1000)), 2)
    1.55
    """
    return math.sqrt(variance * (1 + tuned / rows) * math.log((rows + tuned) / (alpha * alpha * tuned)))


class BlockSums:
    """Sums of values (`totals`, float64) and numbers of rows (`counts`, int64), `[BLOCKS]` by blocks of users.

    >>> sums = BlockSums()
    >>> sums.add(np.array([1.0, 3.0]))
    >>> sums.rows, sums.mean, sums.variance
    (2, 2.0, 1.0)
    """

    def __init__(self) -> None:
        self.totals: NDArray[np.float64] = np.zeros(BLOCKS)
        self.counts: NDArray[np.int64] = np.zeros(BLOCKS, np.int64)

    def add(self, values: NDArray[np.floating[Any]], users: NDArray[np.uint64] | None = None) -> None:
        """Adds rows: finite values `[n]`, and `[n]` uint64 pseudonyms, whose low bits are evenly distributed.

        Without pseudonyms each row counts as independent of all others.
        """
        if users is None:
            blocks = ((self.rows + np.arange(len(values))) % BLOCKS).astype(np.int64)
        else:
            blocks = (users % np.uint64(BLOCKS)).astype(np.int64)
        self.totals += np.bincount(blocks, values, BLOCKS)
        self.counts += np.bincount(blocks, minlength=BLOCKS)

    def credit(self, values: NDArray[np.floating[Any]], users: NDArray[np.uint64]) -> None:
        """Adds `[n]` float values to earlier rows of `[n]` uint64 users, such as clicks on items that were shown."""
        self.totals += np.bincount((users % np.uint64(BLOCKS)).astype(np.int64), values, BLOCKS)

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of all values; 0 if there are none."""
        return float(self.totals.sum()) / max(self.rows, 1)

    @property
    def telling(self) -> bool:
        """Whether enough blocks have enough data for an interval."""
        return int(np.count_nonzero(self.totals)) >= TELLING_BLOCKS

    @property
    def variance(self) -> float:
        """Variance of the mean: the squared deviations of the blocks' sums from their expectation, times b / (b - 1).

        b is the number of blocks with rows; 0 if fewer than two have rows.
        """
        used = int(np.count_nonzero(self.counts))
        if used < 2:
            return 0.0
        deviations = self.totals - self.mean * self.counts
        return float((deviations * deviations).sum()) / self.rows**2 * used / (used - 1)

    def document(self) -> dict[str, Any]:
        """The sums as JSON values, exact to the last bit."""
        return {"totals": self.totals.tolist(), "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> BlockSums:
        """Restores the sums that `document` returned.

        Raises:
            KeyError, ValueError: The document does not have `BLOCKS` blocks.
        """
        sums = cls()
        sums.totals[:] = np.asarray(document["totals"], np.float64).reshape(BLOCKS)
        sums.counts[:] = np.asarray(document["counts"], np.int64).reshape(BLOCKS)
        return sums


class ConfidenceSequence(BlockSums):
    """The mean of paired differences, one per row, with an interval that is valid at all times at once.

    Always add the users too, because a user has several rows, which correlate.

    Args:
        alpha: The rate of false alarms over all checks together.
        planned_rows: Number of rows for which the interval is tuned to be narrowest; cannot be changed later.

    >>> sequence = ConfidenceSequence(alpha=0.05, planned_rows=10_000)
    >>> sequence.add(np.random.default_rng(8).normal(0.1, 1.0, 10_000))
    >>> sequence.rows, round(sequence.mean, 2), [round(end, 2) for end in sequence.interval()]
    (10000, 0.09, [0.06, 0.12])
    """

    def __init__(self, alpha: float = ALPHA, planned_rows: int = PLANNED_ROWS) -> None:
        super().__init__()
        self.alpha, self.planned_rows = alpha, planned_rows
        self._tuned = tuning(planned_rows, alpha)

    def interval(self) -> tuple[float, float]:
        """The interval of the true mean, valid at this check and at all others.

        The ends are infinite until `TELLING_BLOCKS` blocks have a sum other than 0. So if no row differs, there is no
        interval for any number of rows, and the mean is 0.
        """
        if not self.telling:
            return UNBOUNDED
        half = half_width(self.variance, self.rows, self._tuned, self.alpha)
        return self.mean - half, self.mean + half

    def document(self) -> dict[str, Any]:
        """The whole state as JSON values."""
        return {"alpha": self.alpha, "planned_rows": self.planned_rows, **super().document()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ConfidenceSequence:
        """Restores the sequence that `document` returned."""
        sequence, sums = cls(document["alpha"], document["planned_rows"]), BlockSums.from_json(document)
        sequence.totals, sequence.counts = sums.totals, sums.counts
        return sequence
