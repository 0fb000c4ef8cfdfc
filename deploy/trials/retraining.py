"""Learns a model anew every so often: `python -m deploy.trials.retraining`, a child of `springtide up` while one is due or under way.

1. One that is due is written down.
2. Its trial begins, from the clicks of the last days; the process of trials runs it.
3. It is judged (`deploy/trials/judging.py`), and promoted or stopped as an operator would do it.
4. What became of it is written down.

Killed anywhere it goes on there: the name in the document is that of the trial,
which is there or begins, and what was decided of the trial is read from it. It
ends once nothing is due.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable

from deploy.trials.commands import trial as command
from deploy.trials.judging import ACTOR, RetrainDecision, judge
from deploy.trials.telling import held_by_guard
from state import layout
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
from state.rollouts.rollouts import Rollouts
from state.trials.comparison import figures_in
from state.trials.retraining import Retraining, Retrainings
from state.trials.trial import Trial, Trials

LOOK_S = 1.0
logger = logging.getLogger(__name__)


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
