"""Two arms of independent users: the difference of their means, and the lift, with intervals that hold at all looks at once. Pure.

The difference of two running means has, at two times s < t, the covariance of its
variance at t; divided by its variance it is a random walk in the time 1 /
variance, whatever shares of the rows the arms have and had. So the boundary of a
single mean holds (`confidence_sequence.py`), with the rows that the difference is
worth, 1 / (1 / n + 1 / m), for its clock. A share that grows from 1 to 50 % spoils
nothing as long as what users do stays as it is; where it changes with the hour, `strata.py` compares within each share.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from state.statistics.confidence_sequence import ALPHA, PLANNED_ROWS, UNBOUNDED, half_width, tuning


class ArmMean(Protocol):
    """What is known of the mean of an arm: `BlockSums`, or those of several strata (`strata.py`)."""

    @property
    def rows(self) -> float:
        """How many there are."""

    @property
    def mean(self) -> float:
        """Of all values."""

    @property
    def variance(self) -> float:
        """Of the mean."""

    @property
    def telling(self) -> bool:
        """Whether there is enough to say something."""


class Contrast(NamedTuple):
    """An arm held against the other.

    Attributes:
        value: What was found.
        low: From where on it may be.
        high: Up to where.
    """

    value: float
    low: float
    high: float


def difference(arm: ArmMean, other: ArmMean, alpha: float = ALPHA, planned_rows: float = PLANNED_ROWS) -> Contrast:
    """The mean of an arm less that of the other.

    Args:
        arm: Values of its rows, by blocks of its users: of a click rate, 1 where it was clicked and else 0.
        other: Likewise, of other users.
        alpha: The rate of false alarms over all looks together.
        planned_rows: What the difference shall be worth where its interval is narrowest for what it is, 1 / (1 / n + 1 /
            m); fixed before the first look.

    Returns:
        Infinite ends until both arms have something other than 0 in enough blocks.
    """
    value = arm.mean - other.mean
    if not (arm.telling and other.telling):
        return Contrast(value, *UNBOUNDED)
    half = _half(arm.variance + other.variance, arm, other, alpha, planned_rows)
    return Contrast(value, value - half, value + half)


def lift(arm: ArmMean, other: ArmMean, alpha: float = ALPHA, planned_rows: float = PLANNED_ROWS) -> Contrast | None:
    """By which part the mean of an arm is more than that of the other: 0.1 is a tenth more.

    The interval is that of the difference of logarithms, whose variances are those of the means over the means'
    squares (the delta method).

    Args:
        arm: Values that are not negative, as in `difference`.
        other: Likewise.
        alpha: The rate of false alarms over all looks together.
        planned_rows: As in `difference`.

    Returns:
        None where one arm has nothing but 0: there is no ratio; the ends are -1 and infinite until both have enough.
    """
    if arm.mean <= 0 or other.mean <= 0:
        return None
    ratio = math.log(arm.mean / other.mean)
    if not (arm.telling and other.telling):
        return Contrast(math.expm1(ratio), -1.0, math.inf)
    spread = arm.variance / arm.mean**2 + other.variance / other.mean**2
    half = _half(spread, arm, other, alpha, planned_rows)
    return Contrast(math.expm1(ratio), math.expm1(ratio - half), math.expm1(ratio + half))


def _half(variance: float, arm: ArmMean, other: ArmMean, alpha: float, planned_rows: float) -> float:
    worth = 1 / (1 / arm.rows + 1 / other.rows)
    return half_width(variance, worth, tuning(planned_rows, alpha), alpha)
