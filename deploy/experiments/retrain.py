"""Retrains the model on a schedule: `python -m deploy.experiments.retrain`.

1. Record that a retrain is due.
2. Start its experiment, from the clicks of the last days; the process of experiments runs it.
3. Judge it by its state, its comparison and its rollout. Promote or stop it as an operator would.
4. Record the outcome (promoted, dropped or failed) and the reason.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from deploy.experiments.commands import promote, start
from deploy.experiments.status import held_by_guard
from deploy.formats import age
from state import layout
from state.config.sections import RetrainSettings
from state.config.settings import Settings
from state.config.sources import span_ms
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, LockHeld, SpringtideError, UnusableRegistry, of_disk
from state.experiments.comparison import ComparisonFigures, read_figures
from state.experiments.experiment import By, Experiment, Experiments, Outcome, Schedule
from state.process import killpoints
from state.process.environment import wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_part, stop_on_signals
from state.registry.registry import Registry

ACTOR = "retrain"
"""The actor of decisions that no operator made."""
LIMIT_MS = 86_400_000.0
"""Time after which an undecided retrain ends."""
POLL_S = 1.0
logger = logging.getLogger(__name__)


class RetrainDecision(NamedTuple):
    """The outcome of a retrain, and the reason."""

    outcome: Outcome
    reason: str


def judge(
    experiment: Experiment, figures: ComparisonFigures | None, held: str | None, settings: RetrainSettings, took_ms: int
) -> RetrainDecision | None:
    """Judges a retrain; None while it is too early to decide.

    1. An operator's decision about the experiment counts, and so does any other end of the experiment.
    2. An open rollout is awaited. A rollout that was rolled back drops the retrain.
    3. While its guard holds it, the comparison decides nothing, and the retrain fails at the time limit.
    4. The confidence sequence, valid at all times, shows worse or better. Better is enough alone if no rollout is
       configured.
    5. The maximum of rows or time is reached without a decision.

    Args:
        experiment: Its experiment.
        figures: The figures of its comparison; None before anything was compared.
        held: What its guard holds, as text; None for nothing.
        settings: After how many rows, and how much time.
        took_ms: Time since it began.
    """
    # 1.
    decided = experiment.staged
    if experiment.stage == "promoting":
        # A promotion by this process continues where it was interrupted.
        return RetrainDecision("promoted", decided.reason) if decided.actor == ACTOR else None
    author = "" if decided.actor == ACTOR else f"by {decided.actor}: "
    if experiment.stage == "promoted":
        return RetrainDecision("promoted", f"{author}{decided.reason}")
    if experiment.stage == "stopped":
        return RetrainDecision("dropped", f"{author}{decided.reason}")
    if experiment.stage == "ended":
        return RetrainDecision("dropped", f"it ended: {decided.reason}")
    # 2.
    phase = experiment.phase
    if phase in ("starting", "running", "halted"):
        return None
    if phase == "back":
        newest = experiment.newest
        return RetrainDecision("dropped", f"its rollout was rolled back: {newest.reason} ({newest.actor})")
    # 3.
    is_late = took_ms >= LIMIT_MS
    if held is not None:
        return RetrainDecision("failed", f"held by its guard: {held}") if is_late else None
    rows, verdict = (0, "undecided") if figures is None else (figures.rows, figures.verdict)
    difference = "-" if figures is None else figures.difference_text
    compared = f"{difference} nats an example against the live trainer, over {rows:,} examples"
    # 4.
    if verdict == "worse":
        return RetrainDecision("dropped", f"worse: {compared}")
    if phase == "done":
        return RetrainDecision("promoted", f"its rollout is done, and it is not worse: {compared}")
    if verdict == "better" and settings.rollout == "off":
        return RetrainDecision("promoted", f"better: {compared}")
    # 5.
    if rows >= settings.rows and verdict != "better":
        return RetrainDecision("dropped", f"no better: {compared}")
    if not is_late:
        return None
    after = f"after {age(took_ms / 1000)}"
    if not rows:
        return RetrainDecision("failed", f"no example could be compared {after}: see logs/shadow-{experiment.name}.log")
    if verdict == "better":
        return RetrainDecision("dropped", f"better, but its rollout did not end {after}: {compared}")
    return RetrainDecision("dropped", f"no better {after}: {compared}")


class Retrainer:
    """Runs the schedule. Not thread-safe."""

    def __init__(self, settings: Settings, now_ms: Callable[[], int] = wall_ms) -> None:
        self._settings, self._now_ms = settings, now_ms
        self._experiments, self._live = Experiments(settings), Registry(settings.registry_dir)
        self._every_ms = span_ms(settings.retrain.every) or 0.0

    def step(self) -> bool:
        """Advances the schedule; returns False if nothing is due or under way.

        Raises:
            LockHeld: Commands change the document right now; it is tried again.
            SpringtideError: A document cannot be read.
            OSError: The disk cannot be written; it is tried again.
        """
        now_ms = self._now_ms()
        schedule = self._experiments.document().schedule or self._change(lambda now: now)
        if schedule.is_due(self._every_ms, now_ms):
            # 1.
            schedule = self._change(lambda now: now.begin(now_ms))
            killpoints.reach("retrain.due")
        if not schedule.under_way:
            return False
        experiment = self._experiments.document().find(schedule.name)
        if experiment is None:
            # 2.
            self._start(schedule.name)
        else:
            self._judge(experiment, now_ms - schedule.begun_at_ms)
        after = self._experiments.document().schedule
        return after is not None and after.under_way

    def _start(self, name: str) -> None:
        retrain = self._settings.retrain
        source = "files" if retrain.files else "the clicks topic"
        reason = f"each {retrain.every}: learned from scratch from {retrain.days:g} d of {source}"
        try:
            start(self._settings, name, "clicks", {}, self._by(reason))
        except (LockHeld, UnusableRegistry):
            raise
        except SpringtideError as error:
            self._end(RetrainDecision("failed", f"it could not begin: {error}"))
            return
        logger.info("retrain %s begins: %s", name, reason)
        killpoints.reach("retrain.begun")

    def _judge(self, experiment: Experiment, took_ms: int) -> None:
        name, path = experiment.name, self._experiments.registry(experiment.name)
        try:
            figures = read_figures(self._experiments.folder(name))
        except CorruptStore:
            # `springtide status` reports the damage. Without figures nothing can be compared.
            figures = None
        held = held_by_guard(Registry(path).control()) if path.is_dir() else None
        decision = judge(experiment, figures, held, self._settings.retrain, took_ms)
        if decision is None:
            return
        # 3.
        if decision.outcome == "promoted" and (experiment.runs or experiment.stage == "promoting"):
            if held_by_guard(self._live.control()) is not None:
                # A held update must be decided first.
                return
            decision = self._promote(name, decision)
        elif experiment.runs:
            self._stop(name, decision.reason)
        killpoints.reach("retrain.judged")
        # 4.
        self._end(decision)

    def _promote(self, name: str, decision: RetrainDecision) -> RetrainDecision:
        """Promotes an experiment; stops it if promotion is permanently impossible."""
        try:
            promote(self._settings, name, self._by(decision.reason))
        except (LockHeld, UnusableRegistry):
            raise
        except SpringtideError as error:
            decision = RetrainDecision("failed", f"it was better and could not be promoted: {error}")
            self._stop(name, decision.reason)
        return decision

    def _stop(self, name: str, reason: str) -> None:
        self._experiments.change(name, lambda now: now.stop(self._by(reason)))

    def _by(self, reason: str) -> By:
        return By(ACTOR, reason, self._now_ms())

    def _change(self, transition: Callable[[Schedule], Schedule]) -> Schedule:
        first = Schedule(self._now_ms())
        document = self._experiments.edit(lambda now: replace(now, schedule=transition(now.schedule or first)))
        assert document.schedule is not None
        return document.schedule

    def _end(self, decision: RetrainDecision) -> None:
        ended = self._change(lambda now: now.end(*decision, self._now_ms()))
        level = logging.WARNING if decision.outcome == "failed" else logging.INFO
        logger.log(level, "retrain %s is %s: %s", ended.name, decision.outcome, decision.reason)


def run(settings: Settings, stopping: threading.Event) -> None:
    """Runs the schedule until nothing is due, or `stopping` is set.

    Raises:
        LockHeld: Another process does.
    """
    folder, say = settings.state_dir / layout.EXPERIMENTS, SaidOnce(logger.warning)
    with DirectoryLock(folder, layout.RETRAIN_LOCK):
        retrainer, continues = Retrainer(settings), True
        while continues and not stopping.is_set():
            try:
                continues = retrainer.step()
                say.clear()
            except (SpringtideError, OSError) as error:
                say(f"the retrain is tried again: {of_disk(error)}")
            stopping.wait(POLL_S if continues else 0.0)


def main(argv: list[str] | None = None) -> int:
    """Runs the schedule with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("retrain", lambda settings: run(settings, stopping), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
