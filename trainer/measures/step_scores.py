"""The scores of one step before learning, as sums: for those that judge the step, and for the running metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.measures.predictions import PREDICTORS

F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

USERS = ("all", "new", "known")
"""Groups of users. A known user has a category in the windows, or was seen before and has a row."""

SUMS = ("rows", "log_loss", "log_loss_squares", "reciprocal_rank", "top1", "top5", "offered", "missed")
"""Sums over rows with a category.

In this order:

- number of rows
- log loss, and its squares
- 1 / (1 + rank), 0 for a miss
- rows whose category ranked first, and rows whose category was among the first five
- rows with candidates, and rows whose category was none of their candidates
"""


@dataclass(frozen=True)
class StepScores:
    """The sums of a step, or of several steps together.

    Attributes:
        sums: `[predictor, users, sum]` float64, by PREDICTORS, USERS and SUMS.
        pairs: (User, item) pairs whose engagement was scored.
        positives: Of them, pairs that were clicked, or have a positive label.
    """

    sums: F64
    pairs: int
    positives: int
    predicted: float
    engagement_log_loss: float

    def __add__(self, other: StepScores) -> StepScores:
        return StepScores(
            self.sums + other.sums,
            self.pairs + other.pairs,
            self.positives + other.positives,
            self.predicted + other.predicted,
            self.engagement_log_loss + other.engagement_log_loss,
        )

    def total(self, name: str, predictor: str = "model", users: str = "all") -> float:
        """One entry of SUMS."""
        return float(self.sums[PREDICTORS.index(predictor), USERS.index(users), SUMS.index(name)])


class ScoredPairs(NamedTuple):
    """The (user, item) pairs whose engagement was scored.

    Attributes:
        scored: `[2 n]` bool, which pairs, of n rows and then of their negatives.
        logits: `[m]` float64, shifted as in training if negatives are drawn.
        predicted: `[m]` float64, their probabilities.
        positive: `[m]` bool, whether they were clicked, or labelled so.
        losses: `[m]` float64, their log losses.
    """

    scored: Flags
    logits: F64
    predicted: F64
    positive: Flags
    losses: F64


class Judged(NamedTuple):
    """The evaluated predictions for n rows, before anything learned from them.

    Attributes:
        targets: `[n]` bool, the rows with a category.
        rows: `[t, sum]` float64, SUMS of the model for each row with a category.
    """

    scores: StepScores
    targets: Flags
    rows: F64
    pairs: ScoredPairs


def no_sums(*first: int) -> npt.NDArray[Any]:
    """`[*first, predictor, users, sum]` float64 zeros."""
    return np.zeros((*first, len(PREDICTORS), len(USERS), len(SUMS)))
