"""The guard's rules: the signal of a window, its deviation from the past, and the limit. Pure functions.

Each rule has one number per window, its signal. The rule compares it with the signals of earlier windows by their
median and median absolute deviation (the modified z-score, Iglewicz & Hoaglin 1993). A lower bound of the deviation,
the floor, prevents a nearly constant signal from being flagged at its first small change. Deviations beyond the slack
are summed (a one-sided CUSUM, Page 1954, with the deviation of one window capped). Two windows with a large deviation
exceed the limit, and so do many windows with a small one. A single window never does.

Floors, slack and limits were measured by `python -m tests.bench.guard`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

SLACK = 3.0
"""Deviation, in usual deviations, that a window may have without adding to the sum."""

MOST = 8.0
"""Cap of one window's deviation."""

LIMIT = 9.0
"""Sum at which an update is held. From `SUSPECT` on, versions wait for the next window."""

SUSPECT = 4.5
NORMAL = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation


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
