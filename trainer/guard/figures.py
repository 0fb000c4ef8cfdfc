"""What one step reports to the guard, as counts and sums that add up over a window. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from state.microbatch.batch import MicroBatch

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

CROWDS = ("user", "item", "category")
BUCKETS = 1024
"""Ids are counted by their lowest bits. Ids are digests, so each bucket gets its share of them (a count-min sketch of
one row, Cormode & Muthukrishnan 2005). A share is never underestimated. It is overestimated by 0.1 % on average. No id
is kept."""


@dataclass(frozen=True)
class StepFigures:
    """Counts and sums of one record of the training log.

    Attributes:
        log_ms: Log time after the record.
        rows: Rows learned from or skipped.
        skipped: Of them, rows of updates that were skipped as not finite or exploding.
        positions: Clicks that the record covers, whatever their outcome.
        dead: Of them, those that were refused.
        known: (rows, summed log loss) of rows with a category whose user is known, before learning.
        new: The same of new users.
        pairs: Pairs whose engagement was scored.
        engagement_loss: Summed log loss of these pairs.
        predicted: Their summed probability.
        positives: How many of them were positive.
        squared_norm: Sum over rows of the squared norm of the gradient per square root of rows.
        crowds: `[3, BUCKETS]` int32, rows by bucket of user, item and category.
        slices: `[measure, dimension, place, 3]` float64, see `Breakdown.update`.
    """

    log_ms: int
    rows: int
    skipped: int = 0
    positions: int = 0
    dead: int = 0
    known: tuple[int, float] = (0, 0.0)
    new: tuple[int, float] = (0, 0.0)
    pairs: int = 0
    engagement_loss: float = 0.0
    predicted: float = 0.0
    positives: int = 0
    squared_norm: float = 0.0
    crowds: I32 | None = None
    slices: F64 | None = None


def crowds_of(batch: MicroBatch) -> I32:
    """`[3, BUCKETS]` int32: a micro-batch's rows by bucket of user, item and category. Id 0 (none) is not counted."""
    return np.stack([_counted(getattr(batch, name)) for name in CROWDS])


def _counted(ids: npt.NDArray[np.uint64]) -> I32:
    """Rows by bucket.

    >>> _counted(np.array([5, 5, BUCKETS + 5, 0], np.uint64))[:6].tolist()
    [0, 0, 0, 0, 0, 3]
    """
    found = np.bincount((ids & np.uint64(BUCKETS - 1)).astype(np.int64), minlength=BUCKETS)
    found[0] -= int((ids == 0).sum())
    return found.astype(np.int32)
