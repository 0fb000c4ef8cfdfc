"""The guard's rules. Pure functions.

The signals of a window of log time are compared with the past: their deviation, and the limit. Each slice is compared
with its own past: its excess loss over that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.disk.documents import convert
from state.microbatch.batch import MicroBatch
from trainer.measures.evaluation import widened

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
"""Monitors each slice separately (`SliceWatch`). It is named only if none of RULES deviates as much: a change of
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


I64 = npt.NDArray[np.int64]

PATIENCE = 6
"""The most windows in which a slice collects enough rows for a signal."""

REMEMBERED = 60
"""Signals of a slice that the next one is compared with."""

ARRAYS = ("added", "whole", "past", "sums", "counts", "silent")


class SliceWords(NamedTuple):
    """The signals of k slices, from the windows since each one's last signal.

    Attributes:
        added: `[measure, dimension, place, 3]` float64, rows, log loss and squared log loss.
        whole: `[measure, dimension, place, 2]` float64, rows and log loss of all slices of the same windows.
        signals: `[k]` float64; NaN for slices that have no signal yet.
        sums: `[k]` float64, the sums beyond the slack if the window ended now.
    """

    added: F64
    whole: F64
    signals: F64
    sums: F64


class OffSlice(NamedTuple):
    """The slice with the largest deviation.

    Attributes:
        place: Measure, dimension, and index in the dimension.
        total: Its sum.
        since: The start of the window before the first one that deviates.
    """

    place: tuple[int, int, int]
    signal: float
    usual: float
    total: float
    since: WindowStart | None


class SliceWatch:
    """Remembers the signals of each slice; judges it after `warm_up` signals. Not thread-safe."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._begin((0, 0, 0))

    def _begin(self, shape: tuple[int, ...]) -> None:
        count = math.prod(shape)
        self._added: F64 = np.zeros((*shape, 3))
        self._whole: F64 = np.zeros((*shape, 2))
        self._past: F32 = np.full((REMEMBERED, count), np.nan, np.float32)
        self._sums: F64 = np.zeros(count)
        # Signals so far, and windows since the last one.
        self._counts: I64 = np.zeros(count, np.int64)
        self._silent: I64 = np.zeros(count, np.int64)
        self._since: dict[int, WindowStart] = {}
        self._starts: list[WindowStart] = []
        self._compare(False)

    def judge(self, opened: F64 | None) -> SliceWords:
        """The signal of each slice, including the open window (see `Breakdown.update`); None if nothing was scored in it."""
        if opened is not None and opened.shape != self._added.shape:
            self._begin(opened.shape[:3])
        added, totals = self._added, self._whole
        if opened is not None:
            # Each row belongs to one slice of each dimension.
            added, totals = added + opened, totals + opened[:, :1, :, :2].sum(2, keepdims=True)
        signals, errors = _spoken(added.reshape(-1, 3), totals.reshape(-1, 2))
        off = (signals - self._middle) / (self._wider * np.maximum(self._spread, errors))
        after = np.maximum(self._sums + np.minimum(off, MOST) - SLACK, 0.0)
        return SliceWords(added, totals, signals, np.where(np.isnan(off), self._sums, after))

    def end(self, words: SliceWords, start: WindowStart, judged: bool) -> None:
        """Ends the window that began at `start`; `judged`: whether slices with enough signals are judged from now on."""
        spoke = ~np.isnan(words.signals)
        faded = ~spoke & (self._silent + 1 >= PATIENCE)
        sums = np.where(faded, np.maximum(words.sums - SLACK, 0.0), words.sums)
        for at in np.flatnonzero((sums > 0) & (self._sums <= 0)).tolist():
            self._since[at] = self._window_before(at) or start
        self._since = {at: began for at, began in self._since.items() if sums[at] > 0}
        heard = np.flatnonzero(spoke)
        self._past[self._counts[heard] % REMEMBERED, heard] = words.signals[heard]
        self._counts[heard] += 1
        ended = spoke | faded
        self._silent = np.where(ended, 0, self._silent + 1)
        self._added, self._whole, self._sums = words.added.copy(), words.whole.copy(), sums
        self._added.reshape(-1, 3)[ended] = 0.0
        self._whole.reshape(-1, 2)[ended] = 0.0
        self._starts = [*self._starts, start][-PATIENCE:]
        self._compare(judged)

    @property
    def total(self) -> float:
        """The largest sum at the end of the last window."""
        return float(self._sums.max(initial=0.0))

    def worst(self, words: SliceWords | None) -> OffSlice | None:
        """The slice with the largest deviation, if any; `words` are None if the open window has too little data."""
        sums = self._sums if words is None else words.sums
        at = int(sums.argmax()) if sums.size else 0
        if not sums.size or sums[at] <= 0 or math.isnan(self._middle[at]):
            return None
        signal = math.nan if words is None else float(words.signals[at])
        if math.isnan(signal):
            signal = float(self._past[(self._counts[at] - 1) % REMEMBERED, at])
        measure, dimension, value = (int(index) for index in np.unravel_index(at, self._added.shape[:3]))
        since = self._since.get(at) or self._window_before(at)
        return OffSlice((measure, dimension, value), signal, float(self._middle[at]), float(sums[at]), since)

    def _window_before(self, at: int) -> WindowStart | None:
        """The last window before those that a slice's next signal covers, or else the first known window."""
        if not self._starts:
            return None
        return self._starts[max(len(self._starts) - 1 - int(self._silent[at]), 0)]

    def _compare(self, judged: bool) -> None:
        self._middle: F64 = np.full(self._counts.size, np.nan)
        self._spread: F64 = np.full(self._counts.size, np.nan)
        known = np.flatnonzero(self._counts >= self._warm_up) if judged else np.empty(0, np.int64)
        past = self._past[:, known]
        middle = medians(past)
        self._middle[known] = middle
        self._spread[known] = np.maximum(NORMAL * medians(np.abs(past - middle)), SLICE.floor)
        self._wider = widened(max(known.size, 1), SLACK)

    # State in versions

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """The whole state: as JSON, and arrays by name."""
        document = {
            "since": {str(at): began for at, began in sorted(self._since.items())},
            "starts": self._starts,
        }
        return document, {name: getattr(self, f"_{name}").copy() for name in ARRAYS}

    def load(self, document: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], judged: bool) -> None:
        """Restores what `state` returned; if arrays are missing, slices start from scratch."""
        self.clear()
        if any(name not in arrays for name in ARRAYS):
            return
        for name in ARRAYS:
            setattr(self, f"_{name}", np.array(arrays[name]))
        self._since = convert(document["since"], dict[int, WindowStart], strict=False)
        self._starts = convert(document["starts"], list[WindowStart])
        self._compare(judged)


def _spoken(added: F64, totals: F64) -> tuple[F64, F64]:
    """Signal and standard error of k slices, `[k]` float64 each; NaN with too few rows. See `SliceWords` for the arguments.

    >>> signals, errors = _spoken(np.array([[200.0, 600.0, 2000.0], [9.0, 9.0, 9.0]]), np.array([[900.0, 900.0]] * 2))
    >>> np.exp(signals).round(6).tolist(), errors.round(6).tolist()
    ([3.0, nan], [0.02357, nan])
    """
    signals, errors = np.full((2, len(added)), np.nan)
    at = (added[:, 0] >= FEWEST_OF_A_KIND) & (added[:, 1] > 0)
    rows, loss, squares = added[at].T
    mean = loss / rows
    signals[at] = np.log(mean) - np.log(totals[at, 1] / totals[at, 0])
    errors[at] = np.sqrt(np.maximum(squares / rows - mean * mean, 0.0) / rows) / mean
    return signals, errors


def medians(values: npt.NDArray[np.floating[Any]]) -> F64:
    """`[k]` float64 medians of the columns of `[n, k]`, without NaN; each column has at least one value.

    >>> medians(np.array([[3.0, 1.0], [1.0, np.nan], [2.0, 2.0]])).tolist()
    [2.0, 1.5]
    """
    ordered = np.sort(values, axis=0).astype(np.float64)
    counts, columns = np.count_nonzero(~np.isnan(ordered), axis=0), np.arange(ordered.shape[1])
    return np.asarray((ordered[(counts - 1) // 2, columns] + ordered[counts // 2, columns]) / 2)


def named(shown: Mapping[str, Sequence[str]], dimension: int, value_index: int) -> str:
    r"""The name of a slice, on one line.

    >>> shown = {"action": ("view", "buy"), "city": ("Oslo", "Bergen\n")}
    >>> named(shown, 0, 1), named(shown, 1, 1)
    ('action=buy', "city='Bergen\\n'")
    """
    name = list(shown)[dimension]
    value = shown[name][value_index]
    return f"{name}={value if value.isprintable() else ascii(value)}"
