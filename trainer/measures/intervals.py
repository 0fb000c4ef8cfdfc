"""95 % confidence intervals of metrics over weighted rows.

Rows with weights w count as (sum of w) ** 2 / (sum of w ** 2) rows of equal weight (Kish 1965, Survey Sampling). Every
formula here uses this effective sample size as n.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

Z = 1.959963984540054
"""95 % of the normal distribution are within plus and minus this many standard deviations."""

Interval = tuple[float, float]


def of_mean(mean: float, mean_square: float, rows: float) -> Interval:
    """The interval of a mean, by the normal approximation, of the mean, the mean square and the effective sample size.

    >>> [round(end, 3) for end in of_mean(2.0, 5.0, 100.0)]
    [1.804, 2.196]
    """
    half = Z * math.sqrt(max(mean_square - mean * mean, 0.0) / rows)
    return mean - half, mean + half


def of_share(share: float, rows: float) -> Interval:
    """The interval of a share of rows, by Wilson's score (Wilson 1927). It stays within [0, 1] even for few rows.

    >>> [round(end, 4) for end in of_share(0.0, 10.0)]
    [0.0, 0.2775]
    """
    spread = Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def of_ratio(predicted: float, observed: float, pairs: float) -> Interval:
    """The interval of the mean predicted over the observed share, above 0, by Wilson's interval of the latter.

    Outcomes with unequal probabilities vary less than outcomes with their mean, so the interval is slightly too wide.
    """
    low, high = of_share(observed, pairs)
    return predicted / high, predicted / low


def of_area(negatives: F64, positives: F64, worth: float) -> Interval | None:
    """The interval of the area under the ROC curve, by the variance of DeLong, DeLong and Clarke-Pearson (1988).

    Each score has a rank among the scores of the other outcome. The variance of the area follows from that of the ranks.
    Scores in the same bin are ties and count half.

    Args:
        negatives: `[bins]` float64, weights of the pairs that were not clicked, in ascending order of scores.
        positives: `[bins]` float64, weights of the pairs that were clicked.
        worth: Effective number of equal rows for each unit of weight.

    Returns:
        None if an outcome has fewer than two rows.
    """
    positive_count, negative_count = float(positives.sum()), float(negatives.sum())
    if min(positive_count, negative_count) * worth <= 1.0:
        return None
    below = (np.cumsum(negatives) - negatives + negatives / 2) / negative_count
    above = (positive_count - np.cumsum(positives) + positives / 2) / positive_count
    area = float((below * positives).sum() / positive_count)
    variance = sum(
        float((weights * (placement - area) ** 2).sum() / total) / (total * worth - 1.0)
        for placement, weights, total in ((below, positives, positive_count), (above, negatives, negative_count))
    )
    half = Z * math.sqrt(variance)
    return max(area - half, 0.0), min(area + half, 1.0)


def widened(count: int, z: float = Z) -> float:
    """The factor that widens an interval of half-width `z` deviations so that `count` intervals hold at once (Bonferroni).

    >>> round(widened(1), 6), round(widened(2), 3), round(widened(2, 3.0), 3)
    (1.0, 1.144, 1.068)
    """
    return -NormalDist().inv_cdf(NormalDist().cdf(-z) / count) / z
