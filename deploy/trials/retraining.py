"""Retrains the model on a schedule: `python -m deploy.trials.retraining`.

`springtide up` starts it as a child while a retrain is due or running.

1. Record that a retrain is due.
2. Start its trial, from the clicks of the last days; the trials' process runs it.
3. Judge it by its trial, its comparison and a rollout. Promote or stop it with the operator's
   commands.
4. Record the outcome (promoted, dropped or failed) and the reason.

After a kill at any point it continues. The document has the trial's name: that trial exists or is
started, and its document shows what was decided. The process ends when nothing is due.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deploy.operate.times import age
from deploy.trials.commands import trial as command
from deploy.trials.telling import difference, held_by_guard
from state import layout
from state.config.sections import RetrainSettings
from state.config.settings import Settings
from state.config.spans import span_ms
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, SpringtideError, UnusableRegistry, of_disk
from state.process import killpoints
from state.process.actor import acting
from state.process.ending import stop_on_signals
from state.process.part import run_part
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms
from state.registry.registry import Registry
from state.rollouts.rollout import Rollout
from state.rollouts.rollouts import Rollouts
from state.trials.comparison import figures_in
from state.trials.retraining import Outcome, Retraining, Retrainings
from state.trials.trial import Trial, Trials

ACTOR = "retrain"
"""The actor of decisions that no operator made."""
LOOK_S = 1.0
logger = logging.getLogger(__name__)


class RetrainDecision(NamedTuple):
    """What is to become of a retrain.

    Attributes:
        outcome: What.
        reason: Why, in words.
    """

    outcome: Outcome
    reason: str


def judge(
    trial: Trial,
    compared: Mapping[str, Any] | None,
    held: str | None,
    rollout: Rollout | None,
    settings: RetrainSettings,
    begun_at_ms: int,
    now_ms: int,
) -> RetrainDecision | None:
    """Judges a retrain; None while that is too early.

    1. A decision by somebody about its trial counts, and so does whatever ended the trial.
    2. An open rollout of it is awaited, and one that was rolled back drops it.
    3. The confidence sequence, valid at all times, shows worse or better. Better is enough alone if no rollout is
       configured. While the trial's guard holds it, its comparison decides nothing.
    4. The maximum of rows or time is reached without a decision.

    Args:
        trial: Its trial.
        compared: The figures of its comparison; None before anything was compared.
        held: What the trial's guard holds, as text; None for nothing.
        rollout: The newest rollout; None where there was none.
        settings: After how many rows, and how much time.
        begun_at_ms: When it began, wall clock.
        now_ms: Wall clock.
    """
    # 1.
    if trial.wanted == "promoting":
        # A promotion of our own continues where it was interrupted.
        return RetrainDecision("promoted", trial.reason) if trial.actor == ACTOR else None
    if (over := _decided(trial)) is not None:
        return over
    # 2.
    phase = rollout.phase if rollout is not None and rollout.name == trial.name else ""
    if phase in ("starting", "running", "halted"):
        return None
    if rollout is not None and phase == "back":
        return RetrainDecision("dropped", f"its rollout went back: {rollout.reason} ({rollout.actor})")
    rows, verdict = (0, "undecided") if compared is None else (int(compared["rows"]), str(compared["verdict"]))
    told = f"{difference(compared or {})} nats a row against the live trainer, over {rows:,} rows"
    # 3.
    if held is not None:
        if now_ms - begun_at_ms < (span_ms(settings.limit) or 0.0):
            return None
        return RetrainDecision("failed", f"held by its guard: {held}")
    if verdict == "worse":
        return RetrainDecision("dropped", f"worse: {told}")
    if phase == "done":
        return RetrainDecision("promoted", f"its rollout is done with nothing against it, and it is not worse: {told}")
    if verdict == "better" and settings.rollout == "off":
        return RetrainDecision("promoted", f"better: {told}")
    # 4.
    return _too_late(trial, rows, verdict, told, settings, now_ms - begun_at_ms)


def _too_late(
    trial: Trial, rows: int, verdict: str, told: str, settings: RetrainSettings, took_ms: int
) -> RetrainDecision | None:
    """The outcome of a retrain that the maximum of rows or time did not decide; None before that."""
    if rows >= settings.rows and verdict != "better":
        return RetrainDecision("dropped", f"no better: {told}")
    if took_ms < (span_ms(settings.limit) or 0.0):
        return None
    after = f"after {age(took_ms / 1000)} (retrain.limit)"
    if not rows:
        return RetrainDecision(
            "failed", f"not a row could be compared {after}: logs/trial-{trial.name}.log says how far it came"
        )
    if verdict == "better":
        return RetrainDecision("dropped", f"better, and no rollout of it is done {after}: {told}")
    return RetrainDecision("dropped", f"no better {after}: {told}")


def _decided(trial: Trial) -> RetrainDecision | None:
    """What others decided, or we before a crash."""
    by = "" if trial.actor == ACTOR else f"by {trial.actor}: "
    if trial.wanted == "promoted":
        return RetrainDecision("promoted", f"{by}{trial.reason}")
    if trial.wanted == "stopped":
        return RetrainDecision("dropped", f"{by}{trial.reason}")
    return RetrainDecision("dropped", f"it ended: {trial.reason}") if trial.wanted == "ended" else None


class Retrainer:
    """The schedule of a state directory. One thread.

    Args:
        settings: Of the loop.
        now_ms: Wall clock.
    """

    def __init__(self, settings: Settings, now_ms: Callable[[], int] = wall_ms) -> None:
        self._settings, self._now_ms = settings, now_ms
        self._known, self._trials = Retrainings(settings.state_dir), Trials(settings.state_dir)
        self._live, self._rollouts = Registry(settings.registry_dir), Rollouts(settings.registry_dir)
        self._every_ms = span_ms(settings.retrain.every) or 0.0

    def step(self) -> bool:
        """Takes the schedule on; False where nothing is due or under way.

        Raises:
            LockHeld: A command changes the trial right now; it is tried again.
            SpringtideError: A document cannot be read.
            OSError: The disk refused; it is tried again.
        """
        now_ms = self._now_ms()
        known = self._known.change(lambda before: before or Retraining(now_ms))
        if known.is_due(self._every_ms, now_ms):
            # 1.
            known = self._known.change(lambda _: known.begin(now_ms))
            killpoints.reach("retrain.due")
        if not known.under_way:
            return False
        if not self._trials.has(known.name):
            # 2.
            self._begin(known)
        else:
            self._follow(known, self._trials.read(known.name))
        return (self._known.read() or known).under_way

    def _begin(self, known: Retraining) -> None:
        retrain = self._settings.retrain
        source = "files" if retrain.files else "the clicks topic"
        reason = f"each {retrain.every}: learned anew from {retrain.days:g} d of {source}"
        try:
            self._command("start", known.name, reason, origin="clicks")
        except (LockHeld, UnusableRegistry):
            raise
        except SpringtideError as error:
            self._end(RetrainDecision("failed", f"it could not begin: {error}"))
            return
        logger.info("retrain %s begins: %s", known.name, reason)
        killpoints.reach("retrain.begun")

    def _follow(self, known: Retraining, trial: Trial) -> None:
        compared = figures_in(self._trials.folder(trial.name))
        retrain, newest = self._settings.retrain, self._rollouts.newest()
        path = self._trials.registry(trial.name)
        held = held_by_guard(Registry(path).control()) if path.is_dir() else None
        found = judge(trial, compared, held, newest, retrain, known.begun_at_ms, self._now_ms())
        if found is None:
            return
        # 3.
        if found.outcome == "promoted" and trial.wanted in ("running", "promoting"):
            control = self._live.control()
            if control is not None and control.held is not None:
                # What the guard holds comes first.
                return
            found = self._promoted(trial, found)
        elif trial.wanted == "running":
            self._command("stop", trial.name, found.reason)
        killpoints.reach("retrain.judged")
        # 4.
        self._end(found)

    def _promoted(self, trial: Trial, found: RetrainDecision) -> RetrainDecision:
        """Promotes a trial; what keeps it from that for good is what becomes of it."""
        try:
            self._command("promote", trial.name, found.reason)
        except (LockHeld, UnusableRegistry):
            raise
        except SpringtideError as error:
            reason = f"it was better and could not be promoted: {error}"
            self._command("stop", trial.name, reason)
            return RetrainDecision("failed", reason)
        return found

    def _command(self, what: str, name: str, reason: str, origin: str = "live") -> None:
        """Gives a command as an operator would."""
        asked = argparse.Namespace(what=what, name=name, reason=reason, origin=origin, set=[], output="text")
        with acting(ACTOR):
            command(self._settings, asked, self._now_ms(), lambda line: logger.info("%s", line))

    def _end(self, found: RetrainDecision) -> None:
        ended = self._known.change(lambda before: (before or Retraining(0)).end(*found, self._now_ms()))
        logger.log(
            logging.WARNING if found.outcome == "failed" else logging.INFO,
            "retrain %s is %s: %s",
            *(ended.name, found.outcome, found.reason),
        )


def run(settings: Settings, stopping: threading.Event) -> None:
    """Takes the schedule on until nothing is due, or `stopping` is set.

    Raises:
        LockHeld: Another process does.
    """
    folder, say = settings.state_dir / layout.TRIALS, SaidOnce(logger.warning)
    with DirectoryLock(folder, layout.RETRAIN_LOCK):
        retrainer, goes_on = Retrainer(settings), True
        while goes_on and not stopping.is_set():
            try:
                goes_on = retrainer.step()
                say.clear()
            except (SpringtideError, OSError) as error:
                say(f"the retrain is tried again: {of_disk(error)}")
            stopping.wait(LOOK_S if goes_on else 0.0)


def main(argv: list[str] | None = None) -> int:
    """Takes the schedule on with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("retrain", lambda settings: run(settings, stopping), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
