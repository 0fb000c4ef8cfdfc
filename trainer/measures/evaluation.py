"""Progressive validation: each row is scored before it is learned from.

Sums are kept since the beginning and with a half-life in rows, for all users, new ones and known ones. AUC is computed
from histograms of the scores, so that its state is small and its value repeatable.

Metrics over weighted rows have 95 % confidence intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled

F64 = npt.NDArray[np.float64]

Z = 1.959963984540054
"""95 % of the normal distribution are within plus and minus this many standard deviations."""

Interval = tuple[float, float]


def interval_of_mean(mean: float, mean_square: float, rows: float) -> Interval:
    """The interval of a mean, by the normal approximation, of the mean, the mean square and the effective sample size.

    >>> [round(end, 3) for end in interval_of_mean(2.0, 5.0, 100.0)]
    [1.804, 2.196]
    """
    half = Z * math.sqrt(max(mean_square - mean * mean, 0.0) / rows)
    return mean - half, mean + half


def interval_of_share(share: float, rows: float) -> Interval:
    """The interval of a share of rows, by Wilson's score (Wilson 1927). It stays within [0, 1] even for few rows.

    >>> [round(end, 4) for end in interval_of_share(0.0, 10.0)]
    [0.0, 0.2775]
    """
    spread = Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def interval_of_ratio(predicted: float, observed: float, pairs: float) -> Interval:
    """The interval of the mean predicted over the observed share, above 0, by Wilson's interval of the latter.

    Outcomes with unequal probabilities vary less than outcomes with their mean, so the interval is slightly too wide.
    """
    low, high = interval_of_share(observed, pairs)
    return predicted / high, predicted / low


def interval_of_area(negatives: F64, positives: F64, worth: float) -> Interval | None:
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


SLICES = ("all", "new", "known")
SUMS = ("rows", "log_loss", "top1", "top5")
BINS = 512
HALF_LIFE_ROWS = 20_000
SOME = 1e-3
"""The least weighted row count of a recent metric. Below it, sums carry no information, and their squares underflow."""

_GONE = 1e-30
LOGIT_RANGE = 12.0
"""Scores outside plus and minus this value count in the outermost bins."""


class Evaluation:
    """The running metrics of one trainer."""

    def __init__(self) -> None:
        # [total and recent, slice, sum] and [total and recent, negative and positive, bin].
        self._sums: F64 = np.zeros((2, len(SLICES), len(SUMS)))
        self._bins: F64 = np.zeros((2, 2, BINS))
        self._engagement: F64 = np.zeros((2, 2))

    def update(
        self,
        log_loss: npt.NDArray[np.float32],
        top1: npt.NDArray[np.bool_],
        top5: npt.NDArray[np.bool_],
        known: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float32],
        positive: npt.NDArray[np.bool_],
        engagement_log_loss: npt.NDArray[np.float32],
    ) -> None:
        """Adds the rows of one step: `[n]` rows with a category, and `[m]` scored pairs with their logits and outcomes."""
        for sums in (self._sums, self._bins, self._engagement):
            fade(sums[1], log_loss.size)
        columns = np.stack([np.ones(log_loss.size), log_loss.astype(np.float64), top1, top5], 1)
        for position, rows in enumerate((np.ones_like(known), ~known, known)):
            self._sums[:, position] += columns[rows].sum(0)
        placed = bins_of(scores, BINS)
        for outcome in (0, 1):
            self._bins[:, outcome] += np.bincount(placed[positive == bool(outcome)], minlength=BINS)
        self._engagement += (scores.size, engagement_log_loss.astype(np.float64).sum())

    def values(self) -> dict[str, float]:
        """The metrics by name: recent ones without a prefix, those since the beginning with the prefix `total.`.

        `training_loss` is the loss that training minimises. Its last slot holds the row's own category if that is no
        candidate, so it is not comparable between models. The comparable `log_loss` is that of `progressive.py`. A
        metric without rows is absent.
        """
        values: dict[str, float] = {}
        for when, prefix in ((1, ""), (0, "total.")):
            for position, name in enumerate(SLICES):
                rows, log_loss, top1, top5 = self._sums[when, position].tolist()
                where = prefix if name == "all" else f"{prefix}{name}."
                if rows >= SOME:
                    values |= {
                        f"{where}training_loss": log_loss / rows,
                        f"{where}top1": top1 / rows,
                        f"{where}top5": top5 / rows,
                    }
                values[f"{where}rows"] = rows
            scored, loss = self._engagement[when].tolist()
            if scored >= SOME:
                values[f"{prefix}engagement_log_loss"] = loss / scored
            area = area_under_curve(self._bins[when, 0], self._bins[when, 1])
            if area is not None:
                values[f"{prefix}auc"] = area
        return values

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums, to be stored in a version."""
        return {"sums": self._sums.copy(), "bins": self._bins.copy(), "engagement": self._engagement.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned."""
        self._sums = np.array(state["sums"])
        self._bins = np.array(state["bins"])
        self._engagement = np.array(state["engagement"])


def bins_of(logits: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """The bin of each of `[n]` logits, among `count` of equal width within LOGIT_RANGE."""
    return np.clip((logits + LOGIT_RANGE) * (count / (2 * LOGIT_RANGE)), 0, count - 1).astype(np.int64)


def fade(sums: F64, rows: int, power: int = 1) -> None:
    """Decays contiguous sums, none negative, in place: half is left after HALF_LIFE_ROWS rows.

    `power` is that of the summed weights. Values that underflow become 0, because a CPU is slow with denormals.

    >>> sums = np.array([4.0, 1e-29])
    >>> fade(sums, 2 * HALF_LIFE_ROWS, power=2)
    >>> sums.tolist()
    [0.25, 0.0]
    """
    _fade(sums.reshape(-1), 0.5 ** (power * rows / HALF_LIFE_ROWS))


@compiled("f8[::1], f8")
def _fade(sums: F64, share: float) -> None:
    for i in range(sums.shape[0]):
        faded = sums[i] * share
        sums[i] = faded if faded >= _GONE else 0.0


def area_under_curve(negatives: F64, positives: F64) -> float | None:
    """Area under the ROC curve of two histograms over the same ascending bins; ties count half. None without one outcome.

    >>> area_under_curve(np.array([1.0, 1.0]), np.array([0.0, 2.0]))
    0.75
    """
    pairs = float(negatives.sum() * positives.sum())
    if pairs <= 0:
        return None
    below = np.cumsum(negatives) - negatives
    return float(((below + negatives / 2) * positives).sum()) / pairs
