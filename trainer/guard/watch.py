"""Judges each step of the training log by the windows before it: passes, suspect, or to be held.

Windows follow each other in log time. One ends when it is as long as it should
be and has rows enough to say something; from that many rows on the open one is
judged with each step. What is remembered is a function of the log: a trainer
that is started again, or reads the log again, comes to the same verdicts at the
same offsets, and what an operator does changes none of them. At a verdict to
hold everything is forgotten, for what comes after is compared with what it was
let go on with.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.guard.figures import BUCKETS, CROWDS, StepFigures
from trainer.guard.rules import LIMIT, NAMES, RULES, SLICE, SUSPECT, Rule, deviation, summed, usual
from trainer.guard.slice_watch import OffSlice, SliceWatch, SliceWords
from trainer.guard.window import F64, OpenWindow, WindowStart

F32 = npt.NDArray[np.float32]

REMEMBERED = 120
"""Windows that a signal is compared with: 20 minutes of the default ones."""

MOST_WAIT_MS = 30_000
"""Log time for which versions wait where the guard is not sure: half of what answers may be behind before somebody is called.
Where windows are longer than that, because few click, what is suspect passes then, and may be held later."""

SLICES = "slices."
"""How names begin of what is remembered of slices."""


class Standing(enum.StrEnum):
    """What is to become of the versions that have a step."""

    PASS = "pass"
    SUSPECT = "suspect"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one step.

    Attributes:
        standing: What is to become of its versions.
        rule: The rule that is furthest off; empty where none is.
        signal: Its number in this window, or in the one before where this one says nothing yet; logarithms undone.
        usual: What it usually is.
        total: The sum of what was beyond the slack; LIMIT is too much.
        since: The beginning of the window before the first one that was off: what is suspect lies from there on.
        place: Of rule `slice`, which one: measure, dimension and place in it.
    """

    standing: Standing
    rule: str = ""
    signal: float = 0.0
    usual: float = 0.0
    total: float = 0.0
    since: WindowStart | None = None
    place: tuple[int, int, int] | None = None


PASSED = Judgement(Standing.PASS)


@dataclass(frozen=True)
class WatchLimits:
    """The settings of the guard, see `[guard]`.

    Attributes:
        window_s: Least log time of a window.
        window_rows: Rows from which on a window says something.
        users: Users who usually click in a window, below which nothing is judged.
        warm_up: Windows before the first judgement.
    """

    window_s: float = 10.0
    window_rows: int = 1024
    users: int = 20
    warm_up: int = 30


class WindowWatch:
    """Remembers the windows of one line of the training log. One thread.

    Args:
        limits: The settings.
        slices: What the places of slices are, in words; of other ones nothing is remembered.
    """

    def __init__(self, limits: WatchLimits, slices: str = "") -> None:
        self._limits, self._of, self._slices = limits, slices, SliceWatch(limits.warm_up)
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._past: F64 = np.empty((0, len(NAMES)))
        self._users: F64 = np.empty(0)
        self._shares: F32 = np.zeros((len(CROWDS), BUCKETS), np.float32)
        self._sums: F64 = np.zeros(len(NAMES))
        self._since: dict[str, WindowStart] = {}
        self._usual: list[tuple[float, float] | None] = [None] * len(NAMES)
        self._doubt_ms: int | None = None
        self._open: OpenWindow | None = None
        self._before: WindowStart | None = None
        self._slices.clear()

    def take(self, step: StepFigures, start: WindowStart) -> Judgement:
        """Adds one record and judges the update that it made.

        Args:
            step: What it tells.
            start: Where it begins, with the log time before it.
        """
        if self._open is None:
            self._open = OpenWindow(start)
        window = self._open
        window.add(step)
        if window.rows < self._limits.window_rows:
            return self._in_time(self._standing(self._sums, None, None), step.log_ms)
        signals, words = window.signals(self._shares), self._slices.look(window.slices)
        sums = self._summed(signals)
        found = self._in_time(self._standing(sums, signals, words), step.log_ms)
        if found.standing is Standing.HOLD:
            self.clear()
        elif step.log_ms - window.start.log_ms >= 1000 * self._limits.window_s:
            self._end(window, signals, sums, words)
        return found

    @property
    def windows(self) -> int:
        """How many windows there are to compare with."""
        return len(self._past)

    def shares_of_limit(self) -> dict[str, float]:
        """How near each rule was to a hold when the last window ended: 1 is one."""
        near = {name: total / LIMIT for name, total in zip(NAMES, self._sums.tolist(), strict=True)}
        return {**near, SLICE.name: self._slices.total / LIMIT}

    def _summed(self, signals: F64) -> F64:
        """The sums as they would be if the window ended here."""
        found = self._sums.copy()
        for place, (rule, known) in enumerate(zip(RULES, self._usual, strict=True)):
            if known is not None:
                found[place] = summed(float(found[place]), deviation(float(signals[place]), *known, rule))
        return found

    def _standing(self, sums: F64, signals: F64 | None, words: SliceWords | None) -> Judgement:
        worst = int(sums.argmax())
        total = float(sums[worst])
        off = self._slices.worst(words)
        if off is not None and off.total > total:
            return _of_slice(off, words is not None)
        known = self._usual[worst]
        if total < SUSPECT or known is None:
            return PASSED
        rule, signal = RULES[worst], float((self._past[-1] if signals is None else signals)[worst])
        standing = Standing.HOLD if total >= LIMIT and signals is not None else Standing.SUSPECT
        since = self._since.get(rule.name, self._before)
        return Judgement(standing, rule.name, _shown(signal, rule), _shown(known[0], rule), total, since)

    def _in_time(self, found: Judgement, log_ms: int) -> Judgement:
        """The judgement, a pass where versions have waited long enough."""
        if found.standing is not Standing.SUSPECT:
            self._doubt_ms = None
            return found
        if self._doubt_ms is None:
            self._doubt_ms = log_ms
        return found if log_ms - self._doubt_ms <= MOST_WAIT_MS else PASSED

    def _end(self, window: OpenWindow, signals: F64, sums: F64, words: SliceWords) -> None:
        for name, before, after in zip(NAMES, self._sums.tolist(), sums.tolist(), strict=True):
            if after == 0:
                self._since.pop(name, None)
            elif before == 0:
                self._since[name] = self._before or window.start
        # The first windows are averaged evenly, so that none of them weighs for long.
        share = max(2 / REMEMBERED, 1 / (len(self._past) + 1))
        self._shares += (share * (window.shares() - self._shares)).astype(np.float32)
        self._past = np.concatenate([self._past, signals[None]])[-REMEMBERED:]
        self._users = np.concatenate([self._users, [window.distinct_users()]])[-REMEMBERED:]
        self._sums, self._before, self._open = sums, window.start, None
        self._slices.end(words, window.start, self._crowded)
        self._compare()

    @property
    def _crowded(self) -> bool:
        """Whether so many users click usually that anything is judged."""
        return len(self._users) > 0 and float(np.median(self._users)) >= self._limits.users

    def _compare(self) -> None:
        """What is usual from now on; None for rules that know too little yet."""
        crowded = self._crowded
        enough = np.count_nonzero(~np.isnan(self._past), axis=0) >= self._limits.warm_up
        self._usual = [
            usual(self._past[:, place], rule) if crowded and enough[place] else None for place, rule in enumerate(RULES)
        ]

    # What a version keeps

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything remembered, by name."""
        window, (remembered, arrays) = self._open, self._slices.state()
        about = {
            "names": NAMES,
            "since": {name: one.told() for name, one in self._since.items()},
            "before": None if self._before is None else self._before.told(),
            "open": None if window is None else window.start.told(),
            "doubt_ms": self._doubt_ms,
            "slices": {"of": self._of, **remembered},
        }
        found: dict[str, npt.NDArray[Any]] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "past": self._past.copy(),
            "users": self._users.copy(),
            "shares": self._shares.copy(),
            "sums": self._sums.copy(),
        }
        found |= {f"{SLICES}{name}": array for name, array in arrays.items()}
        if window is None:
            return found
        opened = {} if window.slices is None else {f"{SLICES}open": window.slices.copy()}
        return found | {"added": window.sums.copy(), "crowds": window.crowds.copy()} | opened

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; that of other rules, or nothing, is a new beginning, of other slices that of slices."""
        self.clear()
        about = json.loads(state["about"].tobytes()) if "about" in state else {}
        if about.get("names") != list(NAMES):
            return
        self._past, self._users = np.array(state["past"]), np.array(state["users"])
        self._shares, self._sums = np.array(state["shares"]), np.array(state["sums"])
        self._since = {name: WindowStart.of(one) for name, one in about["since"].items()}
        self._before = None if about["before"] is None else WindowStart.of(about["before"])
        self._doubt_ms = about["doubt_ms"]
        if about["open"] is not None:
            self._open = OpenWindow(WindowStart.of(about["open"]), np.array(state["added"]), np.array(state["crowds"]))
        if about.get("slices", {}).get("of") == self._of:
            arrays = {name.removeprefix(SLICES): one for name, one in state.items() if name.startswith(SLICES)}
            self._slices.load(about["slices"], arrays, self._crowded)
            if self._open is not None and "open" in arrays:
                self._open.slices = np.array(arrays["open"])
        self._compare()


def _shown(signal: float, rule: Rule) -> float:
    return math.exp(signal) if rule.is_log else signal


def _of_slice(off: OffSlice, says: bool) -> Judgement:
    """The judgement by the slice that is furthest off; where the window says nothing yet, nothing is held."""
    if off.total < SUSPECT:
        return PASSED
    standing = Standing.HOLD if off.total >= LIMIT and says else Standing.SUSPECT
    shown = _shown(off.signal, SLICE), _shown(off.usual, SLICE)
    return Judgement(standing, SLICE.name, *shown, off.total, off.since, off.place)
