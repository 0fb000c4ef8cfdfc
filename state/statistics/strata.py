"""Compares two arms whose shares change over time: within each period of constant shares, then combined. Pure.

User behaviour changes with the hour. If the share of one arm grows meanwhile, its rows are of other hours than those of
the other arm. The means over all rows then differ although the arms do not (Simpson's paradox). Within one stratum the
rows are of the same time.

The differences of the strata are weighted by their effective number of rows, 1 / (1 / n + 1 / m). This is
post-stratification (Cochran, Sampling Techniques, 1977, chapter 5A). These numbers add up to the clock of the whole.
Strata follow each other in time, so the weighted sum continues from one to the next, and the boundary of a single
difference stays valid (`arms.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from state.statistics.confidence_sequence import BLOCKS, TELLING_BLOCKS, BlockSums


class StratifiedArm(NamedTuple):
    """An arm over all strata, in the form that `arms.difference` and `arms.lift` take.

    Attributes:
        rows: Effective number of rows of both arms together, as rows of each of two arms of equal size.
        mean: The weighted mean of the strata's means.
        variance: Variance of the mean, by blocks of users, whose rows may be in several strata.
        telling: Whether enough blocks have enough data for an interval.
    """

    rows: float
    mean: float
    variance: float
    telling: bool


def stratified(strata: Sequence[tuple[BlockSums, BlockSums]]) -> tuple[StratifiedArm, StratifiedArm]:
    """Combines both arms over all strata.

    Args:
        strata: The sums of both arms in each stratum. A stratum without rows of one arm is ignored.
    """
    known = [pair for pair in strata if pair[0].rows and pair[1].rows]
    worths = [1 / (1 / one.rows + 1 / other.rows) for one, other in known]
    whole = sum(worths)
    first, second = (_arm([pair[place] for pair in known], [worth / whole for worth in worths]) for place in (0, 1))
    return first._replace(rows=2 * whole), second._replace(rows=2 * whole)


def _arm(sums: Sequence[BlockSums], weights: Sequence[float]) -> StratifiedArm:
    totals, rows, apart = np.zeros(BLOCKS), np.zeros(BLOCKS, np.int64), np.zeros(BLOCKS)
    for one, weight in zip(sums, weights, strict=True):
        totals += one.totals
        rows += one.counts
        apart += weight * (one.totals - one.mean * one.counts) / one.rows
    used = int(np.count_nonzero(rows))
    variance = float((apart * apart).sum()) * used / (used - 1) if used > 1 else 0.0
    mean = sum(weight * one.mean for one, weight in zip(sums, weights, strict=True))
    return StratifiedArm(0.0, mean, variance, int(np.count_nonzero(totals)) >= TELLING_BLOCKS)
