"""Two arms of which one grows: compared within each time in which the shares were the same, and put together. Pure.

What users do changes with the hour. Where the share of one arm grows meanwhile,
its rows are of other hours than those of the other arm, so that the means over
all rows differ where the arms do not (Simpson's paradox). Within one stratum they
are of the same time. The differences of the strata are weighted by what each is
worth, 1 / (1 / n + 1 / m) rows, as in post-stratification (Cochran, Sampling
Techniques, 1977, chapter 5A); the worths add up to the clock of the whole. Strata
follow each other in time, so that the weighted sum goes on where it was, and the
boundary of a single difference holds (`arms.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from state.statistics.confidence_sequence import BLOCKS, TELLING_BLOCKS, BlockSums


class StratifiedArm(NamedTuple):
    """An arm over all strata, as `arms.difference` and `arms.lift` take it.

    Attributes:
        rows: What both arms together are worth, as rows of each of two arms of equal size.
        mean: The weighted mean of the strata's means.
        variance: Of the mean, by blocks of users, whose rows may lie in several strata.
        telling: Whether there is enough in enough blocks to say something.
    """

    rows: float
    mean: float
    variance: float
    telling: bool


def stratified(strata: Sequence[tuple[BlockSums, BlockSums]]) -> tuple[StratifiedArm, StratifiedArm]:
    """Both arms over all strata.

    Args:
        strata: Of each the sums of both arms; one of which an arm has no rows tells nothing.

    >>> one, other = BlockSums(), BlockSums()
    >>> one.add(np.array([1.0, 3.0]))
    >>> other.add(np.array([0.0, 2.0]))
    >>> [arm[:3] for arm in stratified([(one, other), (one, BlockSums())])]
    [(2.0, 2.0, 1.0), (2.0, 1.0, 1.0)]
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
