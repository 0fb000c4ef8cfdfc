"""95 % confidence intervals of what is measured over weighted rows.

Recent sums weigh a row the less the older it is. n rows of weights w are worth
(sum of w) ** 2 / (sum of w ** 2) equal ones (Kish 1965, Survey Sampling); that
number stands for n in every formula here.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

Z = 1.959963984540054
"""Of the normal distribution 95 % lie within plus and minus this."""

Interval = tuple[float, float]


def of_mean(mean: float, mean_square: float, rows: float) -> Interval:
    """Of a mean, by the normal approximation.

    Args:
        mean: Of the values.
        mean_square: Of their squares.
        rows: Equal ones that they are worth.

    >>> [round(end, 3) for end in of_mean(2.0, 5.0, 100.0)]
    [1.804, 2.196]
    """
    half = Z * math.sqrt(max(mean_square - mean * mean, 0.0) / rows)
    return mean - half, mean + half


def of_share(share: float, rows: float) -> Interval:
    """Of a share of rows, by Wilson's score interval (Wilson 1927): it stays within 0 and 1 also for few rows.

    >>> [round(end, 4) for end in of_share(0.0, 10.0)]
    [0.0, 0.2775]
    """
    spread = Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def of_ratio(predicted: float, observed: float, pairs: float) -> Interval:
    """Of predicted over observed clicks, by Wilson's interval of the observed share.

    Outcomes of unequal probabilities vary less than those of their mean, so that the interval is rather too wide.

    Args:
        predicted: Mean predicted probability.
        observed: Share of the pairs that were clicked; more than 0.
        pairs: Equal ones that they are worth.
    """
    low, high = of_share(observed, pairs)
    return predicted / high, predicted / low


def of_area(negatives: F64, positives: F64, worth: float) -> Interval | None:
    """Of the area under the ROC curve, by the variance of DeLong, DeLong and Clarke-Pearson (1988).

    A score is where it is placed among those of the other outcome: the variance of these places, of positives
    and of negatives, makes that of the area. Within a bin scores are equal, and count half.

    Args:
        negatives: `[bins]` float64, weights of those that were not clicked, in ascending order of scores.
        positives: `[bins]` float64, of those that were.
        worth: Equal rows that a row of weight 1 is worth.

    Returns:
        None where one outcome has not two rows.
    """
    count, others = float(positives.sum()), float(negatives.sum())
    if min(count, others) * worth <= 1.0:
        return None
    below = (np.cumsum(negatives) - negatives + negatives / 2) / others
    above = (count - np.cumsum(positives) + positives / 2) / count
    area = float((below * positives).sum() / count)
    variance = sum(
        float((weights * (place - area) ** 2).sum() / total) / (total * worth - 1.0)
        for place, weights, total in ((below, positives, count), (above, negatives, others))
    )
    half = Z * math.sqrt(variance)
    return max(area - half, 0.0), min(area + half, 1.0)


def widened(count: int, z: float = Z) -> float:
    """By which factor an interval is widened to hold for all of `count` at once (Bonferroni).

    Args:
        count: How many.
        z: Deviations of the normal distribution that one of them spans to each side.

    >>> round(widened(1), 6), round(widened(2), 3), round(widened(2, 3.0), 3)
    (1.0, 1.144, 1.068)
    """
    return -NormalDist().inv_cdf(NormalDist().cdf(-z) / count) / z
