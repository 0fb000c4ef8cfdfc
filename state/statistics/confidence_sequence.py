"""Confidence sequences: intervals for a mean that are valid at all times at once, for any number of checks.

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

Two arms of independent users are compared by the difference of means, the lift and the sample ratio.
The difference of two running means has, at two times s < t, a covariance equal to its variance at t. Divided by its
variance, it is a random walk in the time 1 / variance, for any present and past shares of the arms. So the boundary of
a single mean is valid too. Its clock is the effective number of rows of the difference,
1 / (1 / n + 1 / m).

If behaviour changes with the hour while a share grows, the means over all rows differ although the arms do not
(Simpson's paradox). So the arms are compared within each period of constant shares, a stratum, and the strata are
weighted by their effective number of rows: post-stratification (Cochran, Sampling Techniques, 1977, chapter 5A). These
numbers add up to the clock of the whole. Strata follow each other in time, so the boundary of a single difference stays
valid.

All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
