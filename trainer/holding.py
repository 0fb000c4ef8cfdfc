"""Takes each record to the guard, keeps versions back while one is suspect, and asks control to hold what is bad.

Where control cannot be written, as while the store of a shared registry is
away, the hold waits: nothing is published and no record taken until it is
written, so that nobody is ever answered by what is held.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from state.config.settings import Settings
from state.errors import UnusableRegistry
from state.metrics import TrainerMetrics
from state.microbatch.batch import MicroBatch
from state.process.said_once import SaidOnce
from state.registry import holding
from state.registry.control import Control
from state.registry.held_update import HeldUpdate
from state.registry.registry import Registry
from trainer import gauges
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.guard.rules import RULES, SLICE
from trainer.guard.slice_watch import named
from trainer.guard.watch import PASSED, Judgement, Standing, WatchLimits, WindowWatch
from trainer.guard.window import WindowStart
from trainer.measures.breakdown import LOSSES
from trainer.place import TrainingPlace
from trainer.suspects import clicks_learned, figures_of, suspect_clicks, version_before
from trainer.versions.content import GUARDED

ACTOR = "guard"
STEPS = "steps"
"""The rule by which the guard of steps holds training (`trainer/engine/guard.py`), whether `[guard]` is on or off."""

AGAIN_S = 1.0
"""Between two tries to write a hold."""

_MEANINGS = {rule.name: rule.meaning for rule in (*RULES, SLICE)} | {
    STEPS: "number of records in a row with rows that are not finite or far too large"
}
logger = logging.getLogger(__name__)


class UnwrittenHold(NamedTuple):
    """A hold that control does not have yet.

    Attributes:
        held: What is held.
        after: Where the trainer was then.
    """

    held: HeldUpdate
    after: TrainingPlace


class UpdateGuard:
    """The guard of one trainer. The step thread calls every method.

    Args:
        settings: All settings.
        registry: Where control and versions are.
        metrics: What is shown.
        clock: Wall clock in seconds.
        elapsed: Monotonic seconds.
        shown: Of each dimension of slices the names of its places, as they are now.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        metrics: TrainerMetrics,
        clock: Callable[[], float],
        elapsed: Callable[[], float],
        shown: Callable[[], Mapping[str, Sequence[str]]],
    ) -> None:
        wanted, self._shown = settings.guard, shown
        limits = WatchLimits(wanted.window_s, wanted.window_rows, wanted.users, wanted.warm_up)
        places = {name: len(values) for name, values in shown().items()}
        self._watch = WindowWatch(limits, json.dumps([places, settings.events.actions]))
        self._enabled, self._registry, self._metrics, self._clock = wanted.mode == "on", registry, metrics, clock
        self._last, self._elapsed = PASSED, elapsed
        self._skipped, self._skipped_since = 0, WindowStart(0, 0)
        self._unwritten: UnwrittenHold | None = None
        self._tried_s, self._say = float("-inf"), SaidOnce(logger.error)

    def enter(self, kept: Mapping[str, npt.NDArray[Any]]) -> None:
        """At the beginning of an epoch, or after a start: the guard is as it was at the version that was loaded.

        Args:
            kept: What that version kept of it, without the prefix; nothing where it kept nothing.
        """
        self._watch.load(kept)
        self._last, self._skipped, self._unwritten = PASSED, 0, None

    @property
    def passes(self) -> bool:
        """Whether what was learned so far may become a version."""
        return self._last.standing is Standing.PASS

    @property
    def waits(self) -> bool:
        """Whether a hold is still to be written: no record is to be taken until it is."""
        return self._unwritten is not None

    def take(
        self,
        batch: MicroBatch,
        report: Report | None,
        before: TrainingPlace,
        after: TrainingPlace,
        log_ms: tuple[int, int],
    ) -> bool:
        """Judges one record; True where control holds it from now on.

        Args:
            batch: What was learned of it; perhaps no row.
            report: Of the step; None without a row.
            before: Where the trainer was.
            after: Where it is.
            log_ms: Log time before and after.

        Raises:
            ControlConflict: Somebody changed control all the time.
        """
        # Where the trainer was before may be behind a marker, or not yet.
        start = WindowStart(after.next - 1, log_ms[0], clicks_learned(before))
        found = self._watch.take(figures_of(batch, report, log_ms[1]), start) if self._enabled else PASSED
        if report is not None:
            if not self._skipped:
                self._skipped_since = start
            self._skipped = 0 if report.verdict is Verdict.ACCEPT else self._skipped + 1
            if report.verdict is Verdict.HOLD:
                found = Judgement(Standing.HOLD, STEPS, float(self._skipped), since=self._skipped_since)
        if found.standing is not self._last.standing:
            level = logging.INFO if found.standing is Standing.PASS else logging.WARNING
            logger.log(level, "versions %s at offset %d (%s)", _SAID[found.standing], before.next, self._named(found))
        self._last = found
        if found.standing is not Standing.HOLD:
            return False
        self._unwritten, self._tried_s = UnwrittenHold(self._held(found, after, log_ms[1]), after), float("-inf")
        return self.write()

    def write(self) -> bool:
        """Writes the hold that waits, where one does, again after `AGAIN_S` where it cannot be; True where control holds it now.

        Raises:
            ControlConflict: Somebody changed control all the time.
        """
        waiting = self._unwritten
        if waiting is None or self._elapsed() - self._tried_s < AGAIN_S:
            return False
        self._show_held(waiting.held)
        try:
            written = self._hold(*waiting)
        except UnusableRegistry as error:
            self._tried_s = self._elapsed()
            self._say(
                f"{waiting.held.in_words()}, and its hold cannot be written: {error}; nothing is published until it is"
            )
            return False
        self._say.clear()
        self._unwritten = None
        self._show_held(waiting.held if written else None)
        return written

    def look(self, control: Control, version: int) -> None:
        """Takes up what control says: what an operator let go on passes, until the guard says otherwise.

        Args:
            control: The newest.
            version: The trainer's newest version.
        """
        held = control.held if self._unwritten is None else self._unwritten.held
        if held is None and self._last.standing is Standing.HOLD:
            self._last = PASSED
        gauges.show_control(control, version, self._metrics)
        self._show_held(held)

    def _show_held(self, held: HeldUpdate | None) -> None:
        by = "" if held is None else held.rule
        for rule in _MEANINGS:
            self._metrics.held_rule.labels(rule).set(rule == by)
        self._metrics.held_offset.set(0 if held is None else held.first)
        self._metrics.held.set(bool(by))
        self._metrics.hold_waits.set(self.waits)

    def show(self) -> None:
        """Sets the gauges of how near each rule is to a hold, and whether versions wait."""
        for rule, share in self._watch.shares_of_limit().items():
            self._metrics.guard_ratio.labels(rule).set(share)
        self._metrics.guard_windows.set(self._watch.windows)
        self._metrics.withheld.set(not self.passes)

    # What a version says and keeps

    def verdict(self) -> tuple[str, dict[str, float]]:
        """What a version made now says: that it passed, and how near each rule is to a hold; nothing where nobody judges."""
        if not self._enabled:
            return "", {}
        near = {rule: round(share, 4) for rule, share in self._watch.shares_of_limit().items() if share > 0}
        return self._last.standing.value, near

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """What a durable version keeps, by name; a copy."""
        return {f"{GUARDED}{name}": array for name, array in self._watch.state().items()} if self._enabled else {}

    def _named(self, found: Judgement) -> str:
        """The rule, and which slice it is about."""
        return f"{found.rule} {self._slice(found.place)}" if found.place else found.rule or "none"

    def _meaning(self, found: Judgement) -> str:
        if found.place is None:
            return _MEANINGS[found.rule]
        return f"{LOSSES[found.place[0]]} of {self._slice(found.place)} over that of all rows"

    def _slice(self, place: tuple[int, int, int]) -> str:
        return named(self._shown(), *place[1:])

    def _held(self, found: Judgement, after: TrainingPlace, log_ms: int) -> HeldUpdate:
        since = found.since
        assert since is not None, "what is held began somewhere"
        return HeldUpdate(
            rule=found.rule,
            meaning=self._meaning(found),
            signal=found.signal,
            usual=found.usual,
            version=version_before(self._registry, after, since.offset),
            first=since.offset,
            next=after.next,
            first_ms=since.log_ms,
            next_ms=log_ms,
            clicks=suspect_clicks(since, after),
        )

    def _hold(self, held: HeldUpdate, after: TrainingPlace) -> bool:
        """Asks control to hold it; True where it does from now on."""

        def asked(control: Control) -> Control:
            if control.epoch != after.epoch:
                return control
            now_ms = int(self._clock() * 1000)
            return holding.hold(control, held, actor=ACTOR, reason=held.in_words(), now_ms=now_ms)

        control = self._registry.change(asked)
        if control.held is None:
            logger.info("what the guard would hold at offset %d was let go on before", after.next)
            self._last = PASSED
            return False
        logger.error(
            "training is held: %s; answers stay at version %d; `springtide status` says what to type",
            *(held.in_words(), held.version),
        )
        return True


_SAID = {Standing.PASS: "pass the guard again", Standing.SUSPECT: "wait for the guard", Standing.HOLD: "are held"}
