"""The guard's rules: the signals of a window of log time, their deviation from the past, and the limit. Pure functions.

Each rule has one number per window, its signal. The rule compares it with the signals of earlier windows by their
median and median absolute deviation (the modified z-score, Iglewicz & Hoaglin 1993). A lower bound of the deviation,
the floor, prevents a nearly constant signal from being flagged at its first small change. Deviations beyond the slack
are summed (a one-sided CUSUM, Page 1954, with the deviation of one window capped). Two windows with a large deviation
exceed the limit, and so do many windows with a small one. A single window never does.

Floors, slack and limits were measured by `python -m tests.bench.guard`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.microbatch.batch import MicroBatch

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SLACK = 3.0
"""Deviation, in usual deviations, that a window may have without adding to the sum."""

MOST = 8.0
"""Cap of one window's deviation."""

LIMIT = 9.0
"""Sum at which an update is held. From `SUSPECT` on, versions wait for the next window."""

SUSPECT = 4.5
NORMAL = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation

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
class Rule:
    """One signal that the guard monitors.

    Attributes:
        name: Its name, in metrics and messages.
        meaning: Its signal, in words.
        floor: Lower bound of the usual deviation, in units of the signal.
        least: A signal below this value never counts as a deviation.
        falls: Whether a fall is a deviation too.
        is_log: Whether the signal is a natural logarithm, for messages.
    """

    name: str
    meaning: str
    floor: float
    least: float = -math.inf
    falls: bool = False
    is_log: bool = False


RULES = (
    Rule("user", "share of one user over that user's past", 0.3, least=math.log(3.0), is_log=True),
    Rule("item", "share of one item over that item's past", 0.3, least=math.log(3.0), is_log=True),
    Rule("category", "share of one category over that category's past", 0.3, least=math.log(3.0), is_log=True),
    Rule("dead_letters", "share of records that were refused", 0.02, least=0.1),
    Rule("skipped", "share of rows in steps that were not finite or exploded", 0.05, least=0.2),
    Rule("log_loss", "log loss of known users", 0.03, is_log=True),
    Rule("new_users", "log loss of new users", 0.05, is_log=True),
    Rule("engagement", "log loss of the engagement", 0.03, is_log=True),
    Rule("calibration", "predicted over observed engagement", 0.06, falls=True, is_log=True),
    Rule("gradient", "norm of the gradient per square root of rows", 0.2, is_log=True),
)
"""If several rules deviate equally, the first is named: the source of a flood says more than a rise of the loss."""
NAMES = tuple(rule.name for rule in RULES)

SLICE = Rule("slice", "log loss of one slice over that of all rows", 0.03, is_log=True)
"""Monitors each slice separately (`slice_watch.py`). It is named only if none of RULES deviates as much: a change of
all rows is not specific to a slice."""


def usual(past: F64, rule: Rule) -> tuple[float, float]:
    """Median and usual deviation of the signals of earlier windows, `[n]`; NaN for a window with too little data.

    >>> usual(np.array([1.0, 2.0, 2.0, 3.0, 90.0]), Rule("a", "", 0.1))
    (2.0, 1.4826)
    """
    middle = float(np.nanmedian(past))
    return middle, max(NORMAL * float(np.nanmedian(np.abs(past - middle))), rule.floor)


def deviation(signal: float, middle: float, spread: float, rule: Rule) -> float:
    """The deviation of a signal, in usual deviations; NaN if the signal is NaN.

    >>> rule = Rule("a", "", 0.5, least=3.0)
    >>> deviation(4.0, 1.0, 0.5, rule), deviation(2.9, 1.0, 0.5, rule), deviation(math.nan, 1.0, 0.5, rule)
    (6.0, 0.0, nan)
    """
    off = (signal - middle) / spread
    if rule.falls:
        off = abs(off)
    return off if not signal < rule.least else min(off, 0.0)


def summed(before: float, off: float) -> float:
    """The sum after one more window; a NaN deviation leaves it unchanged.

    >>> summed(0.0, 2.0), summed(0.0, 50.0), summed(5.0, 50.0), summed(5.0, math.nan)
    (0.0, 5.0, 10.0, 5.0)
    """
    if math.isnan(off):
        return before
    return max(0.0, before + min(off, MOST) - SLACK)


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
