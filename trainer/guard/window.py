"""What one step reports to the guard, and a window of log time: the sums of its steps, and the signals of the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.microbatch.batch import MicroBatch
from trainer.guard.rules import NAMES

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

CROWDS = ("user", "item", "category")
BUCKETS = 1024
"""Ids are counted by their lowest bits. Ids are digests, so each bucket gets its share of them (a count-min sketch of
one row, Cormode & Muthukrishnan 2005). A share is never underestimated. It is overestimated by 0.1 % on average. No id
is kept."""

FEWEST_OF_A_KIND = 128
"""Rows of new users, pairs or positives below which a window gives no signal for them."""

LEAST_USUAL = 0.01
"""Lower bound of a usual share. Without it, an id without earlier rows would exceed its usual share infinitely."""

SHARES = {"user": 0.2, "item": 0.25, "category": 0.5}
"""A share of a window's rows that counts as taking over the window, by kind of id. Smaller shares give no signal."""

SUMS = (
    "rows", "skipped", "positions", "dead", "known_rows", "known_loss", "new_rows", "new_loss", "pairs", "engagement_loss",
    "predicted", "positives", "squared_norm",
)  # fmt: skip
"""Sums of a record of the training log.

In this order:

- rows, and rows of updates that were skipped as not finite or exploding
- clicks that the record covers, whatever their outcome, and those of them that were refused
- rows with a category whose user is known, and their log loss before learning; the same of new users
- scored pairs, their log loss and predicted probability, and those that were clicked
- over rows, the squared norm of the gradient per square root of rows
"""


@dataclass(frozen=True)
class StepFigures:
    """The figures of one record of the training log.

    Attributes:
        log_ms: Log time after the record.
        sums: By name, SUMS that are not 0.
        crowds: `[3, BUCKETS]` int32, rows by bucket of user, item and category.
        slices: `[measure, dimension, place, 3]` float64, see `Breakdown.update`.
    """

    log_ms: int
    sums: Mapping[str, float]
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
    counts = np.bincount((ids & np.uint64(BUCKETS - 1)).astype(np.int64), minlength=BUCKETS)
    counts[0] -= int((ids == 0).sum())
    return counts.astype(np.int32)


class WindowStart(NamedTuple):
    """The start of a window, stored as a JSON list.

    Attributes:
        offset: Its first record in the training log.
        log_ms: Log time before that record.
        clicks: (topic id, partition, offset) at which its clicks begin.
    """

    offset: int
    log_ms: int
    clicks: tuple[tuple[str, int, int], ...] = ()


@dataclass(slots=True)
class OpenWindow:
    """The sums since the window began.

    Attributes:
        crowds: `[3, BUCKETS]` int32, rows by bucket of user, item and category.
        slices: `[measure, dimension, place, 3]` float64, see `Breakdown.update`; None until something is scored.
    """

    start: WindowStart
    sums: F64 = field(default_factory=lambda: np.zeros(len(SUMS)))
    crowds: I32 = field(default_factory=lambda: np.zeros((len(CROWDS), BUCKETS), np.int32))
    slices: F64 | None = None

    def add(self, step: StepFigures) -> None:
        """Adds one step."""
        self.sums += [step.sums.get(name, 0.0) for name in SUMS]
        if step.crowds is not None:
            self.crowds += step.crowds
        if step.slices is not None:
            self.slices = step.slices.copy() if self.slices is None else self.slices + step.slices

    @property
    def rows(self) -> float:
        """Rows so far."""
        return float(self.sums[0])

    def shares(self) -> F64:
        """`[3, BUCKETS]` float64, each bucket's share of the rows that have an id of this kind."""
        shares: F64 = self.crowds / np.maximum(self.crowds.sum(1, keepdims=True), 1)
        return shares

    def signals(self, usual_shares: F32) -> F64:
        """The signal of each rule, by each bucket's share in earlier windows; NaN if there is too little data."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        signals = {
            "log_loss": _log_mean(sums["known_loss"], sums["known_rows"]),
            "new_users": _log_mean(sums["new_loss"], sums["new_rows"]),
            "engagement": _log_mean(sums["engagement_loss"], sums["pairs"]),
            "calibration": _log_mean(sums["predicted"], sums["positives"]),
            "gradient": 0.5 * _log_mean(sums["squared_norm"], sums["rows"] - sums["skipped"]),
            "skipped": sums["skipped"] / sums["rows"] if sums["rows"] else math.nan,
            "dead_letters": sums["dead"] / sums["positions"] if sums["positions"] else math.nan,
        }
        shares = self.shares()
        for kind, name in enumerate(CROWDS):
            signals[name] = _lift(shares[kind], usual_shares[kind], SHARES[name])
        return np.array([signals[name] for name in NAMES])


def _log_mean(total: float, count: float) -> float:
    """Logarithm of a mean; NaN if the count is too small.

    >>> _log_mean(128.0, 128.0), _log_mean(9.0, 9.0)
    (0.0, nan)
    """
    return math.log(total / count) if count >= FEWEST_OF_A_KIND and total > 0 else math.nan


def _lift(shares: F64, usual: npt.NDArray[Any], least: float) -> float:
    """Logarithm of the largest growth factor of a bucket's share, among shares of at least `least`; at least 0.

    >>> round(_lift(np.array([0.5, 0.3]), np.array([0.5, 0.1]), 0.2), 3), _lift(np.array([0.1]), np.array([0.0]), 0.2)
    (1.099, 0.0)
    """
    large = shares >= least
    return float(np.log(shares[large] / np.maximum(usual[large], LEAST_USUAL)).max(initial=0.0))
