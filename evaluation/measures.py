"""Figures with 95 % confidence intervals, and their paired differences. Pure.

Clicks of one user are not independent. So the variance of a figure is a sum over users: the squared sums of their
influences, times u / (u - 1) for u users. The influence of a row is how much the figure changes with the row's weight.
For a mean this is the delta method of Deng, Knoblich and Lu (2018). For an AUC it is the method of DeLong et al. (1988)
with the clusters of Obuchowski (1997). The influences of a paired difference are the differences of the influences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.measures.evaluation import Z

F64 = NDArray[np.float64]
OURS = "springtide"


class Estimate(NamedTuple):
    """A figure of n rows; `influence`: `[n]` float64, how much the figure changes with each row's weight."""

    value: float
    influence: F64


class Figure(msgspec.Struct, frozen=True):
    """A figure, and half the width of its 95 % confidence interval; null if it cannot be computed."""

    value: float | None
    interval: float | None


class Score(msgspec.Struct, frozen=True):
    """One predictor in a table.

    `difference` is Springtide's figure minus this one, for the same rows, by measure; empty for Springtide itself.
    """

    name: str
    figures: dict[str, Figure]
    difference: dict[str, Figure]


class Table(msgspec.Struct, frozen=True):
    """The figures of several predictors for the same rows; the first of `scores` is Springtide's."""

    about: str
    rows: int
    users: int
    scores: list[Score]


def mean(values: NDArray[Any]) -> Estimate:
    """The mean of `[n]` values.

    >>> mean(np.array([1.0, 0.0])).value
    0.5
    """
    if not values.size:
        return Estimate(math.nan, np.empty(0))
    value = float(values.mean(dtype=np.float64))
    return Estimate(value, (values.astype(np.float64) - value) / values.size)


def ratio(above: NDArray[Any], below: NDArray[Any]) -> Estimate:
    """The sum of `[n]` values over the sum of `[n]` others.

    >>> ratio(np.array([0.5, 0.25]), np.array([1.0, 0.0])).value
    0.75
    """
    total = float(below.sum(dtype=np.float64))
    if not total:
        return Estimate(math.nan, np.zeros(above.size))
    value = float(above.sum(dtype=np.float64)) / total
    return Estimate(value, (above - value * below.astype(np.float64)) / total)


def area_under_curve(scores: NDArray[Any], positive: NDArray[np.bool_]) -> Estimate:
    """How often a positive row has a higher score than a negative one; ties count half.

    >>> area_under_curve(np.array([0.1, 0.9, 0.9]), np.array([False, True, False])).value
    0.75
    """
    hits = int(positive.sum())
    misses = scores.size - hits
    if not (hits and misses):
        return Estimate(math.nan, np.zeros(scores.size))
    influence = np.empty(scores.size)
    for own, others in ((positive, ~positive), (~positive, positive)):
        sorted_scores = np.sort(scores[others])
        below = np.searchsorted(sorted_scores, scores[own], "left")
        tied = np.searchsorted(sorted_scores, scores[own], "right") - below
        influence[own] = (below + tied / 2) / sorted_scores.size
    value = float(influence[positive].mean())
    influence[positive] = (influence[positive] - value) / hits
    influence[~positive] = (1.0 - influence[~positive] - value) / misses
    return Estimate(value, influence)


def half_width(influence: F64, users: NDArray[Any]) -> float:
    """Half the width of the 95 % confidence interval; NaN with fewer than two users.

    `influence` is `[n]` float64, and `users` `[n]` has the user of each row.
    """
    _, numbers = np.unique(users, return_inverse=True)
    sums = np.bincount(numbers, influence)
    if sums.size < 2:
        return math.nan
    return Z * math.sqrt(float(np.square(sums).sum()) * sums.size / (sums.size - 1))


def figure(estimate: Estimate, users: NDArray[Any]) -> Figure:
    """The figure of an estimate."""
    return Figure(_number(estimate.value), _number(half_width(estimate.influence, users)))


def table(title: str, users: NDArray[Any], estimates: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """The table of several predictors, of which `OURS` is one.

    `users` is `[n]`, the user of each row; `estimates` are by predictor and measure.
    """
    scores = []
    for name, measures in estimates.items():
        differences = {}
        if name != OURS:
            for measure, estimate in measures.items():
                own_estimate = estimates[OURS][measure]
                difference = Estimate(own_estimate.value - estimate.value, own_estimate.influence - estimate.influence)
                differences[measure] = figure(difference, users)
        figures = {measure: figure(estimate, users) for measure, estimate in measures.items()}
        scores.append(Score(name, figures, differences))
    return Table(title, users.size, len(np.unique(users)), scores)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
