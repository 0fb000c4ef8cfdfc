"""Passes each record to the guard, withholds versions while one is suspect, and asks control to hold bad ones.

Until a hold is written, no version is published and no record is learned, so a held update never serves traffic.
"""

from __future__ import annotations

import enum
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from state.config.sections import GuardSettings
from state.config.settings import Settings
from state.disk.documents import convert
from state.errors import UnusableRegistry
from state.metrics import TrainerMetrics
from state.microbatch.batch import MicroBatch
from state.positions import Source
from state.process.environment import Clocks
from state.process.log_lines import SaidOnce
from state.registry.control import Control, HeldUpdate, SuspectClicks, hold
from state.registry.registry import Registry
from trainer import gauges
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.guard import (
    BUCKETS,
    CROWDS,
    F64,
    LIMIT,
    NAMES,
    RULES,
    SLICE,
    SUSPECT,
    OffSlice,
    OpenWindow,
    Rule,
    SliceWatch,
    SliceWords,
    StepFigures,
    WindowStart,
    crowds_of,
    deviation,
    named,
    summed,
    usual,
)
from trainer.intake import TrainingPlace, newest_before
from trainer.measures.slices import LOSSES
from trainer.versions.content import GUARDED

F32 = npt.NDArray[np.float32]

REMEMBERED = 120
"""Windows that a signal is compared with: 20 minutes of windows of the default length."""

WINDOW_ROWS = 1024
"""The fewest examples of a window."""

USERS = 20
"""The guard judges nothing while the median number of users who click in a window is below this."""

WARM_UP = 30
"""Windows before the guard first judges an update."""

MOST_WAIT_MS = 30_000
"""For how long versions wait while the guard is unsure, in log time or in wall time, whichever ends first: half the delay
of serving that raises an alert. If windows are longer than that, because few users click, a suspect version passes then,
and may be held later."""

SLICES = "slices."
"""Prefix of the names of slice state."""

ACTOR = "guard"
STEPS = "steps"
"""The rule by which the step guard holds training (`trainer/engine/guard.py`), whether `[guard]` is on or off."""

AGAIN_S = 1.0
"""Between two attempts to write a hold."""

_MEANINGS = {rule.name: rule.meaning for rule in (*RULES, SLICE)} | {
    STEPS: "number of records in a row with rows that are not finite or far too large"
}
logger = logging.getLogger(__name__)


class Standing(enum.StrEnum):
    """The verdict on the versions that contain a step."""

    PASS = "pass"
    SUSPECT = "suspect"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judgement on one step.

    Attributes:
        signal: Its value in this window, or in the preceding one if this one has too few rows; not logarithmic.
        total: The sum of deviations beyond the slack; LIMIT is too much.
        since: The start of the window before the first deviating one: everything from there on is suspect.
        place: For rule `slice`, the slice: measure, dimension and index in it.
    """

    standing: Standing
    rule: str = ""
    signal: float = 0.0
    usual: float = 0.0
    total: float = 0.0
    since: WindowStart | None = None
    place: tuple[int, int, int] | None = None


PASSED = Judgement(Standing.PASS)


class WindowWatch:
    """Judges each step by the preceding windows of one branch of the training log: pass, suspect or hold. One thread.

    A window ends when it has its length in log time and enough rows to judge. From that many rows on, the open window is
    judged with each step. The windows are a function of the log, so a trainer that reads it again reaches the same
    verdicts at the same offsets. At a hold everything is forgotten.

    `slices` describes the slice numbers; state of another description is dropped.
    """

    def __init__(self, limits: GuardSettings, slices: str = "") -> None:
        self._limits, self._of, self._slices = limits, slices, SliceWatch(WARM_UP)
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
        """Adds one record, which begins at `start`, and judges the update that it made."""
        if self._open is None:
            self._open = OpenWindow(start)
        window = self._open
        window.add(step)
        if window.rows < WINDOW_ROWS:
            return self._in_time(self._standing(self._sums, None, None), step.log_ms)
        signals, words = window.signals(self._shares), self._slices.judge(window.slices)
        sums = self._summed(signals)
        judgement = self._in_time(self._standing(sums, signals, words), step.log_ms)
        if judgement.standing is Standing.HOLD:
            self.clear()
        elif step.log_ms - window.start.log_ms >= 1000 * self._limits.window_s:
            self._end(window, signals, sums, words)
        return judgement

    @property
    def windows(self) -> int:
        """How many windows there are to compare with."""
        return len(self._past)

    def shares_of_limit(self) -> dict[str, float]:
        """How near each rule was to a hold when the last window ended: 1 is a hold."""
        near = {name: total / LIMIT for name, total in zip(NAMES, self._sums.tolist(), strict=True)}
        return {**near, SLICE.name: self._slices.total / LIMIT}

    def _summed(self, signals: F64) -> F64:
        """The sums as they would be if the window ended here."""
        sums = self._sums.copy()
        for number, (rule, known) in enumerate(zip(RULES, self._usual, strict=True)):
            if known is not None:
                sums[number] = summed(float(sums[number]), deviation(float(signals[number]), *known, rule))
        return sums

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

    def _in_time(self, judgement: Judgement, log_ms: int) -> Judgement:
        """The judgement, or a pass once versions have waited long enough."""
        if judgement.standing is not Standing.SUSPECT:
            self._doubt_ms = None
            return judgement
        if self._doubt_ms is None:
            self._doubt_ms = log_ms
        return judgement if log_ms - self._doubt_ms <= MOST_WAIT_MS else PASSED

    def _end(self, window: OpenWindow, signals: F64, sums: F64, words: SliceWords) -> None:
        for name, before, after in zip(NAMES, self._sums.tolist(), sums.tolist(), strict=True):
            if after == 0:
                self._since.pop(name, None)
            elif before == 0:
                self._since[name] = self._before or window.start
        # The first windows are averaged evenly, so that none of them dominates for long.
        share = max(2 / REMEMBERED, 1 / (len(self._past) + 1))
        self._shares += (share * (window.shares() - self._shares)).astype(np.float32)
        self._past = np.concatenate([self._past, signals[None]])[-REMEMBERED:]
        # Buckets that have a user: a lower bound of their number.
        self._users = np.concatenate([self._users, [np.count_nonzero(window.crowds[0])]])[-REMEMBERED:]
        self._sums, self._before, self._open = sums, window.start, None
        self._slices.end(words, window.start, self._crowded)
        self._compare()

    @property
    def _crowded(self) -> bool:
        """Whether enough users usually click for a judgement."""
        return len(self._users) > 0 and float(np.median(self._users)) >= USERS

    def _compare(self) -> None:
        crowded = self._crowded
        enough = np.count_nonzero(~np.isnan(self._past), axis=0) >= WARM_UP
        self._usual = [
            usual(self._past[:, number], rule) if crowded and enough[number] else None
            for number, rule in enumerate(RULES)
        ]

    # State in versions

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything remembered, by name."""
        window, (remembered, arrays) = self._open, self._slices.state()
        document = {
            "names": NAMES,
            "since": self._since,
            "before": self._before,
            "open": None if window is None else window.start,
            "doubt_ms": self._doubt_ms,
            "slices": {"of": self._of, **remembered},
        }
        state: dict[str, npt.NDArray[Any]] = {
            "about": np.frombuffer(json.dumps(document).encode(), np.uint8),
            "past": self._past.copy(),
            "users": self._users.copy(),
            "shares": self._shares.copy(),
            "sums": self._sums.copy(),
        }
        state |= {f"{SLICES}{name}": array for name, array in arrays.items()}
        if window is None:
            return state
        opened = {} if window.slices is None else {f"{SLICES}open": window.slices.copy()}
        return state | {"added": window.sums.copy(), "crowds": window.crowds.copy()} | opened

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Loads the result of `state`. State of other rules is dropped; of other slices, only the slice state is."""
        self.clear()
        document = json.loads(state["about"].tobytes()) if "about" in state else {}
        if document.get("names") != list(NAMES):
            return
        self._past, self._users = np.array(state["past"]), np.array(state["users"])
        self._shares, self._sums = np.array(state["shares"]), np.array(state["sums"])
        self._since = convert(document["since"], dict[str, WindowStart])
        self._before = convert(document["before"], WindowStart | None)
        self._doubt_ms = document["doubt_ms"]
        if document["open"] is not None:
            self._open = OpenWindow(
                convert(document["open"], WindowStart), np.array(state["added"]), np.array(state["crowds"])
            )
        if document.get("slices", {}).get("of") == self._of:
            arrays = {name.removeprefix(SLICES): array for name, array in state.items() if name.startswith(SLICES)}
            self._slices.load(document["slices"], arrays, self._crowded)
            if self._open is not None and "open" in arrays:
                self._open.slices = np.array(arrays["open"])
        self._compare()


def _shown(signal: float, rule: Rule) -> float:
    return math.exp(signal) if rule.is_log else signal


def _of_slice(off: OffSlice, may_hold: bool) -> Judgement:
    """The judgement by the slice with the largest deviation; a window with too few rows holds nothing."""
    if off.total < SUSPECT:
        return PASSED
    standing = Standing.HOLD if off.total >= LIMIT and may_hold else Standing.SUSPECT
    shown = _shown(off.signal, SLICE), _shown(off.usual, SLICE)
    return Judgement(standing, SLICE.name, *shown, off.total, off.since, off.place)


def figures_of(batch: MicroBatch, report: Report | None, log_ms: int) -> StepFigures:
    """The figures of one record for the guard; `report` is None without a row, `log_ms` is log time after the record."""
    ranges = batch.header.ranges
    sums: dict[str, float] = {
        "positions": sum(part.next - part.first for part in ranges),
        "dead": sum(part.dead for part in ranges),
    }
    if report is None:
        return StepFigures(log_ms, sums)
    sums["rows"] = report.rows
    if report.verdict is not Verdict.ACCEPT:
        return StepFigures(log_ms, sums | {"skipped": report.rows}, crowds_of(batch))
    scores = report.quality
    for who in ("known", "new"):
        sums[f"{who}_rows"] = scores.total("rows", users=who)
        sums[f"{who}_loss"] = scores.total("log_loss", users=who)
    sums |= {
        "pairs": scores.pairs,
        "engagement_loss": scores.engagement_log_loss,
        "predicted": scores.predicted,
        "positives": scores.positives,
        "squared_norm": report.squared_norm,
    }
    return StepFigures(log_ms, sums, crowds_of(batch), report.slices)


def version_before(registry: Registry, position: TrainingPlace, offset: int) -> int:
    """The newest durable version of the trainer's branch that learned nothing from `offset` of the log on; 0 for none."""
    if not position.durable:
        return 0
    branch = registry.manifest(position.durable)
    newest = newest_before(registry, branch, Source(branch.log.topic_id, branch.log.partition), offset)
    return 0 if newest is None else newest.version


def clicks_learned(position: TrainingPlace) -> tuple[tuple[str, int, int], ...]:
    """How far the clicks of each partition were learned; for a partition in several shares, the lowest of them."""
    lowest: dict[tuple[str, int], int] = {}
    for source, offset in position.marks.items():
        name = (source.topic_id, source.partition)
        lowest[name] = min(offset, lowest.get(name, offset))
    return tuple((*name, offset) for name, offset in sorted(lowest.items()))


def suspect_clicks(since: WindowStart, after: TrainingPlace) -> tuple[SuspectClicks, ...]:
    """The clicks between the start of a window and a later position."""
    first, ends = {(topic, part): at for topic, part, at in since.clicks}, dict[tuple[str, int], int]()
    for source, at in after.marks.items():
        name = (source.topic_id, source.partition)
        ends[name] = max(at, ends.get(name, at))
    return tuple(
        SuspectClicks(*name, first.get(name, 0), at) for name, at in sorted(ends.items()) if at > first.get(name, 0)
    )


class UpdateGuard:
    """The guard of one trainer; `shown` returns the names of the slices by dimension. The step thread calls every method."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        metrics: TrainerMetrics,
        clocks: Clocks,
        shown: Callable[[], Mapping[str, Sequence[str]]],
    ) -> None:
        wanted, self._shown = settings.guard, shown
        value_counts = {name: len(values) for name, values in shown().items()}
        self._watch = WindowWatch(wanted, json.dumps([value_counts, settings.events.actions]))
        self._enabled, self._registry, self._metrics, self._clocks = wanted.mode == "on", registry, metrics, clocks
        self._last, self._skipped, self._skipped_since = PASSED, 0, WindowStart(0, 0)
        self._unsure_since_s = 0.0
        # A hold that is not in control yet, and the trainer's position at the hold.
        self._unwritten: tuple[HeldUpdate, TrainingPlace] | None = None
        self._tried_s, self._log_once = float("-inf"), SaidOnce(logger.error)

    def enter(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores the guard's state of the loaded version, at the beginning of an epoch or after a start; empty if it has none."""
        self._watch.load(state)
        self._last, self._skipped, self._unwritten = PASSED, 0, None

    @property
    def passes_in_s(self) -> float:
        """Seconds until the present weights may become a version, unless a later record is held; infinity after a hold."""
        if self._last.standing is Standing.SUSPECT:
            return max(0.0, self._unsure_since_s + MOST_WAIT_MS / 1000 - self._clocks.elapsed())
        return 0.0 if self._last.standing is Standing.PASS else math.inf

    @property
    def passes(self) -> bool:
        """Whether the present weights may become a version."""
        return self.passes_in_s == 0.0

    @property
    def waits(self) -> bool:
        """Whether a hold is still to be written: no record may be learned until it is."""
        return self._unwritten is not None

    def take(
        self,
        batch: MicroBatch,
        report: Report | None,
        before: TrainingPlace,
        after: TrainingPlace,
        log_ms: tuple[int, int],
    ) -> bool:
        """Judges one record; returns True if control holds it from now on.

        `report` is None without a row; `log_ms` is log time before and after the record.

        Raises:
            ControlConflict: Other processes kept changing control.
        """
        # The position before may be on either side of a transaction marker.
        start = WindowStart(after.next - 1, log_ms[0], clicks_learned(before))
        judgement = self._watch.take(figures_of(batch, report, log_ms[1]), start) if self._enabled else PASSED
        if report is not None:
            if not self._skipped:
                self._skipped_since = start
            self._skipped = 0 if report.verdict is Verdict.ACCEPT else self._skipped + 1
            if report.verdict is Verdict.HOLD:
                judgement = Judgement(Standing.HOLD, STEPS, float(self._skipped), since=self._skipped_since)
        if judgement.standing is not self._last.standing:
            level = logging.INFO if judgement.standing is Standing.PASS else logging.WARNING
            logger.log(
                level, "versions %s at offset %d (%s)", _SAID[judgement.standing], before.next, self._named(judgement)
            )
            self._unsure_since_s = self._clocks.elapsed()
        self._last = judgement
        if judgement.standing is not Standing.HOLD:
            return False
        self._unwritten, self._tried_s = (self._held(judgement, after, log_ms[1]), after), float("-inf")
        return self.write()

    def write(self) -> bool:
        """Writes a waiting hold, and retries after `AGAIN_S` if that fails; returns True if control holds it now."""
        if self._unwritten is None or self._clocks.elapsed() - self._tried_s < AGAIN_S:
            return False
        update, after = self._unwritten
        self._show_held(update)
        try:
            written = self._hold(update, after)
        except UnusableRegistry as error:
            self._tried_s = self._clocks.elapsed()
            self._log_once(
                f"{update.in_words()}, and its hold cannot be written: {error}; nothing is published until it is"
            )
            return False
        self._log_once.clear()
        self._unwritten = None
        self._show_held(update if written else None)
        return written

    def follow(self, control: Control, version: int) -> None:
        """Applies new control; `version` is the trainer's newest. An update that an operator released passes."""
        update = control.held if self._unwritten is None else self._unwritten[0]
        if update is None and self._last.standing is Standing.HOLD:
            self._last = PASSED
        gauges.show_control(control, version, self._metrics)
        self._show_held(update)

    def _show_held(self, update: HeldUpdate | None) -> None:
        held_rule = "" if update is None else update.rule
        for rule in _MEANINGS:
            self._metrics.held_rule.labels(rule).set(rule == held_rule)
        self._metrics.held_offset.set(0 if update is None else update.first)
        self._metrics.held.set(bool(held_rule))
        self._metrics.hold_waits.set(self.waits)

    def show(self) -> None:
        """Sets the gauges of how near each rule is to a hold, and whether versions wait."""
        for rule, share in self._watch.shares_of_limit().items():
            self._metrics.guard_ratio.labels(rule).set(share)
        self._metrics.guard_windows.set(self._watch.windows)
        self._metrics.withheld.set(not self.passes)

    # State and verdicts in versions

    def verdict(self) -> tuple[str, dict[str, float]]:
        """The guard's entry in a new version: its verdict, and how near each rule is to a hold; empty if it is off."""
        if not self._enabled:
            return "", {}
        near = {rule: round(share, 4) for rule, share in self._watch.shares_of_limit().items() if share > 0}
        return (Standing.PASS if self.passes else self._last.standing).value, near

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """The guard state for a durable version, by name; a copy."""
        return {f"{GUARDED}{name}": array for name, array in self._watch.state().items()} if self._enabled else {}

    def _named(self, judgement: Judgement) -> str:
        if judgement.place is None:
            return judgement.rule or "none"
        return f"{judgement.rule} {named(self._shown(), *judgement.place[1:])}"

    def _held(self, judgement: Judgement, after: TrainingPlace, log_ms: int) -> HeldUpdate:
        since, place = judgement.since, judgement.place
        assert since is not None, "a held update has a start"
        meaning = _MEANINGS[judgement.rule]
        if place is not None:
            meaning = f"{LOSSES[place[0]]} of {named(self._shown(), *place[1:])} over that of all rows"
        return HeldUpdate(
            rule=judgement.rule,
            meaning=meaning,
            signal=judgement.signal,
            usual=judgement.usual,
            version=version_before(self._registry, after, since.offset),
            first=since.offset,
            next=after.next,
            first_ms=since.log_ms,
            next_ms=log_ms,
            clicks=suspect_clicks(since, after),
        )

    def _hold(self, update: HeldUpdate, after: TrainingPlace) -> bool:

        def with_hold(control: Control) -> Control:
            if control.epoch != after.epoch:
                return control
            now_ms = int(self._clocks.wall() * 1000)
            return hold(control, update, actor=ACTOR, reason=update.in_words(), now_ms=now_ms)

        control = self._registry.change(with_hold)
        if control.held is None:
            logger.info("an operator already released the update that the guard would hold at offset %d", after.next)
            self._last = PASSED
            return False
        logger.error(
            "training is held: %s; serving stays at version %d; see `springtide status` for the next command",
            *(update.in_words(), update.version),
        )
        return True


_SAID = {Standing.PASS: "pass the guard again", Standing.SUSPECT: "wait for the guard", Standing.HOLD: "are held"}
