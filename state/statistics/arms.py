"""Compares two arms of independent users: difference of means, lift, and sample ratio, valid at any time. Pure.

The difference of two running means has, at two times s < t, a covariance equal to its variance at t. Divided by its
variance, it is a random walk in the time 1 / variance, for any present and past shares of the arms. So the boundary of
a single mean is valid (`confidence_sequence.py`). Its clock is the effective number of rows of the difference,
1 / (1 / n + 1 / m).

If behaviour changes with the hour while a share grows, the means over all rows differ although the arms do not
(Simpson's paradox). So the arms are compared within each period of constant shares, a stratum, and the strata are
weighted by their effective number of rows: post-stratification (Cochran, Sampling Techniques, 1977, chapter 5A). These
numbers add up to the clock of the whole. Strata follow each other in time, so the boundary of a single difference stays
valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from state.statistics.confidence_sequence import BLOCKS, TELLING_BLOCKS, UNBOUNDED, BlockSums, half_width, tuning

Strata = Sequence[tuple[BlockSums, BlockSums]]
"""The sums of both arms in each stratum, by blocks of their users; one without rows of one arm is ignored."""


class Contrast(NamedTuple):
    """The comparison of an arm with the other: the estimate, and the ends of its interval."""

    value: float
    low: float
    high: float


def difference(strata: Strata, alpha: float, planned_rows: float) -> Contrast:
    """The mean of the first arm minus that of the other.

    The ends are infinite until both arms have values other than 0 in enough blocks.

    Args:
        strata: The values of both arms. For a click rate, a value is 1 for a click and else 0.
        alpha: The rate of false alarms over all checks together.
        planned_rows: Effective number of rows, 1 / (1 / n + 1 / m), for which the interval is tuned to be narrowest.
            It must be fixed before the first check.
    """
    arm, other, rows = _combined(strata)
    value = arm.mean - other.mean
    if not (arm.telling and other.telling):
        return Contrast(value, *UNBOUNDED)
    half = half_width(arm.variance + other.variance, rows, tuning(planned_rows, alpha), alpha)
    return Contrast(value, value - half, value + half)


def lift(strata: Strata, alpha: float, planned_rows: float) -> Contrast | None:
    """The relative difference of the mean of the first arm to that of the other: 0.1 is a tenth more.

    The arguments are those of `difference`. The interval is that of the difference of logarithms. Their variances are
    those of the means divided by the means' squares (the delta method). It is None if an arm has only zeros, because
    there is no ratio. The ends are -1 and infinite until both arms have enough data.
    """
    arm, other, rows = _combined(strata)
    if arm.mean <= 0 or other.mean <= 0:
        return None
    ratio = math.log(arm.mean / other.mean)
    if not (arm.telling and other.telling):
        return Contrast(math.expm1(ratio), -1.0, math.inf)
    spread = arm.variance / arm.mean**2 + other.variance / other.mean**2
    half = half_width(spread, rows, tuning(planned_rows, alpha), alpha)
    return Contrast(math.expm1(ratio), math.expm1(ratio - half), math.expm1(ratio + half))


class _Arm(NamedTuple):
    """An arm over all strata: the weighted mean of their means, its variance, and whether it has enough data."""

    mean: float
    variance: float
    telling: bool


def _combined(strata: Strata) -> tuple[_Arm, _Arm, float]:
    pairs = [pair for pair in strata if pair[0].rows and pair[1].rows]
    worths = [1 / (1 / first_sums.rows + 1 / second_sums.rows) for first_sums, second_sums in pairs]
    total = sum(worths)
    first, second = (_arm([pair[arm] for pair in pairs], [worth / total for worth in worths]) for arm in (0, 1))
    return first, second, total


def _arm(sums: Sequence[BlockSums], weights: Sequence[float]) -> _Arm:
    """Combines one arm; rows of a user may be in several strata, so the variance is by blocks over all of them."""
    totals, rows, deviations = np.zeros(BLOCKS), np.zeros(BLOCKS, np.int64), np.zeros(BLOCKS)
    for block_sums, weight in zip(sums, weights, strict=True):
        totals += block_sums.totals
        rows += block_sums.counts
        deviations += weight * (block_sums.totals - block_sums.mean * block_sums.counts) / block_sums.rows
    used = int(np.count_nonzero(rows))
    variance = float((deviations * deviations).sum()) * used / (used - 1) if used > 1 else 0.0
    mean = sum(weight * block_sums.mean for block_sums, weight in zip(sums, weights, strict=True))
    return _Arm(mean, variance, int(np.count_nonzero(totals)) >= TELLING_BLOCKS)


# Sample ratio test: whether the split of users between the arms matches its shares. A mismatch means that users or their
# events are lost on one side. Then no other comparison of the arms is valid.
#
# The test is that of Lindon and Malek, Anytime-valid inference for multinomial count data, 2022. If the shares are right,
# the Bayes factor of a Dirichlet mixture against them is a martingale. So it ever reaches 1 / alpha with probability at
# most alpha (Ville, 1939). When the shares change, a new factor begins with the next user, and the product of all factors
# is also a martingale.

CONCENTRATION = 100.0
"""Concentration of the mixture at the stated shares, in users. A higher value detects small deviations of many users
sooner."""


def log_evidence(counts: Sequence[int], shares: Sequence[float]) -> float:
    """The logarithm of the Bayes factor against the shares: log B(c p + n) - log B(c p) - sum of n_i log p_i.

    B is the multivariate beta function, n the users of each arm, p the expected shares, each more than 0, with sum 1,
    and c is `CONCENTRATION`.

    >>> round(log_evidence([500, 500], [0.5, 0.5]), 2), round(log_evidence([450, 550], [0.5, 0.5]), 2)
    (-1.2, 3.35)
    """
    alphas = [CONCENTRATION * share for share in shares]
    return (
        math.lgamma(CONCENTRATION)
        - math.lgamma(CONCENTRATION + sum(counts))
        + sum(
            math.lgamma(alpha + count) - math.lgamma(alpha) - count * math.log(share)
            for alpha, count, share in zip(alphas, counts, shares, strict=True)
        )
    )


class SampleRatio:
    """Test state: the users of each arm since the shares last changed, and the earlier evidence.

    A user counts once under the same shares. Each share is more than 0, and their sum is 1.

    >>> ratio = SampleRatio([0.5, 0.5])
    >>> ratio.add([480, 520])
    >>> ratio.change([0.1, 0.9])
    >>> ratio.add([210, 790])
    >>> ratio.mismatch(alpha=0.001)
    True
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares, self._counts, self._before, self._most = list(shares), [0] * len(shares), 0.0, 0.0

    def add(self, counts: Sequence[int]) -> None:
        """Adds new users of each arm."""
        self._counts = [count + added for count, added in zip(self._counts, counts, strict=True)]
        self._most = max(self._most, self.log_evidence)

    def change(self, shares: Sequence[float]) -> None:
        """Sets the shares that are in force from now on."""
        self._before, self._shares, self._counts = self.log_evidence, list(shares), [0] * len(shares)

    @property
    def log_evidence(self) -> float:
        """Logarithm of the evidence against all shares so far."""
        return self._before + log_evidence(self._counts, self._shares)

    @property
    def p_value(self) -> float:
        """One over the highest evidence ever reached; valid at any time."""
        return math.exp(-self._most)

    def mismatch(self, alpha: float) -> bool:
        """Whether the split of users contradicts the shares; `alpha` is the rate of false alarms over all times."""
        return self.p_value <= alpha
