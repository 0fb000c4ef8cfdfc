"""The rules: what is looked at in a window, how far it is off its own past, and when that is too much. Pure.

Each rule is one number of a window, its signal. It is compared with the same
number of the windows before by their median and their median absolute
deviation, which a few odd windows do not move (the modified z-score, Iglewicz
& Hoaglin 1993); a floor keeps a signal that hardly ever moves from being off
at the first tremor. What exceeds the slack is summed up (a one-sided CUSUM,
Page 1954, with the deviation of one window capped): two windows that are far
off are too much, and so are many that are a little off, but never one.

Floors, slack and limits were measured (`python -m tests.bench.guard`). In clean traffic (Taobao, KuaiRand, a week of
shoppers) the windows furthest off were so by 4.5 (gradient, once), 2.3 (log loss, calibration) and 1 (engagement) usual
deviations: one of them alone leaves nothing beyond the slack, or half of what makes versions wait. KuaiRand's labels,
turned, are learned anew within four windows, of which the first two have a fourth more loss: with a floor of 0.05 that
was never held, with 0.03 it is at the second window.

Of ten to twenty slices the one furthest off was so by 3.2 at most in 320 clean windows. Turned labels of a fifth of
KuaiRand's rows, of one value of an attribute, were never held with a floor of 0.05, with 0.03 at the fourth window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

SLACK = 3.0
"""Deviations, in units of the usual one, that a window may have for nothing."""

MOST = 8.0
"""What one window's deviation counts at most."""

LIMIT = 9.0
"""Sum at which an update is held. From `SUSPECT` on versions wait for the next window's word."""

SUSPECT = 4.5
NORMAL = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation


@dataclass(frozen=True)
class Rule:
    """One thing that is looked at.

    Attributes:
        name: Its name, in metrics and messages.
        meaning: Its signal, in words.
        floor: The least usual deviation that is believed, in units of the signal.
        least: A signal below this is never off.
        falls: Whether a fall is off too.
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
"""Of several that are equally far off the first one is named: who floods is more telling than that the loss rose."""
NAMES = tuple(rule.name for rule in RULES)

SLICE = Rule("slice", "log loss of one slice over that of all rows", 0.03, is_log=True)
"""Looks at each slice by itself (`slice_watch.py`), and is named where none of RULES is as far off: what moves all rows is no slice's."""


def usual(past: F64, rule: Rule) -> tuple[float, float]:
    """Median and usual deviation of a signal.

    Args:
        past: `[n]` float64 of the windows before; NaN where a window had too little to say.
        rule: Whose signal it is.

    >>> usual(np.array([1.0, 2.0, 2.0, 3.0, 90.0]), Rule("a", "", 0.1))
    (2.0, 1.4826)
    """
    middle = float(np.nanmedian(past))
    return middle, max(NORMAL * float(np.nanmedian(np.abs(past - middle))), rule.floor)


def deviation(signal: float, middle: float, spread: float, rule: Rule) -> float:
    """How far off a signal is, in usual deviations; NaN where it says nothing.

    >>> rule = Rule("a", "", 0.5, least=3.0)
    >>> deviation(4.0, 1.0, 0.5, rule), deviation(2.9, 1.0, 0.5, rule), deviation(math.nan, 1.0, 0.5, rule)
    (6.0, 0.0, nan)
    """
    off = (signal - middle) / spread
    if rule.falls:
        off = abs(off)
    return off if not signal < rule.least else min(off, 0.0)


def summed(before: float, off: float) -> float:
    """The sum after one more window; a window that says nothing leaves it.

    >>> summed(0.0, 2.0), summed(0.0, 50.0), summed(5.0, 50.0), summed(5.0, math.nan)
    (0.0, 5.0, 10.0, 5.0)
    """
    if math.isnan(off):
        return before
    return max(0.0, before + min(off, MOST) - SLACK)
