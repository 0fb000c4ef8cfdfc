"""Compares each slice with its own past: its excess loss over that of all rows. Pure functions.

A slice's signal is the logarithm of its mean log loss over that of all rows of the same windows. A slice reports a signal
once it has enough rows, in one window or in several together. If it has too few in `PATIENCE` windows, it counts as
usual. A signal is compared with the slice's earlier signals as in `rules.py`, with two differences:

- A slice has few rows, so the usual deviation is at least the standard error of the signal.
- The largest deviation of k slices is large by chance. Usual deviations are widened so that the largest exceeds the
  slack as rarely as a single slice would (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.disk.documents import convert
from trainer.guard.rules import FEWEST_OF_A_KIND, MOST, NORMAL, SLACK, SLICE, WindowStart
from trainer.measures.intervals import widened

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
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
