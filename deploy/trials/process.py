"""Runs the trials of a state directory: `python -m deploy.trials.process`.

`springtide up` starts it as a child while a trial exists.

For each trial that should run, the process

1. makes the live trainer write its losses,
2. before the trial's trainer starts, copies what live control requires of every trainer
   (`state/trials/following.py`),
3. keeps the trial's trainer running, as a process with its own registry,
4. pairs the losses of both trainers and stores the comparison.

When a trial should no longer run, its trainer is stopped. Its registry is removed once no promotion
needs it. The process and its trainers use `trials.cores` of the machine, at a lower priority than
other processes. It ends when nothing is left to do.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry

from deploy.children.supervisor import ProcessPlan, Supervisor
from deploy.trials.trial_settings import flags_of
from state import layout
from state.config.sections import TrialSettings
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, SpringtideError, of_disk
from state.metrics import SupervisorMetrics
from state.process.ending import stop_on_signals
from state.process.part import run_part
from state.process.said_once import SaidOnce
from state.registry.control import Control
from state.registry.registry import Registry
from state.trials import comparison, row_losses
from state.trials.comparison import PairedComparison
from state.trials.following import followed
from state.trials.row_losses import LossReader
from state.trials.trial import Trial, Trials

KEEP_S = 5.0
"""Interval at which the comparison is written."""
READS_AT_ONCE = 8
LOOK_S = 0.2
STOP_S = 15.0
NICENESS = 10
ACTOR = "trials"
logger = logging.getLogger(__name__)


class ComparedTrial:
    """The comparison of one running trial; used by one thread.

    Args:
        folder: The trial's directory.
        live: The registry of the live trainer.
        own: The registry of the trial's trainer.
        settings: Confidence level and planned rows.
        elapsed: Monotonic seconds.

    Raises:
        CorruptStore: The stored comparison cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        live: Path,
        own: Path,
        settings: TrialSettings,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._elapsed = folder, elapsed
        self._comparison = comparison.read(folder) or PairedComparison(settings.alpha, settings.planned_rows)
        self._live, self._own = LossReader(live), LossReader(own)
        self._kept_s, self._kept_records = elapsed(), self._comparison.records

    def step(self) -> None:
        """Reads new losses, and stores the comparison if it is due.

        Raises:
            OSError: The write failed; nothing is lost.
        """
        pairing = self._comparison.pairing
        for _ in range(READS_AT_ONCE):
            live_behind, own_behind = pairing.behind
            live = self._live.read() if live_behind else []
            own = self._own.read() if own_behind else []
            if not live and not own:
                break
            pairing.add(live, own)
            self._comparison.take(pairing.pairs())
        if self._elapsed() - self._kept_s >= KEEP_S:
            self.keep()

    def keep(self) -> None:
        """Stores the comparison; durable when this returns.

        Raises:
            OSError: The disk refused; it is tried again.
        """
        self._kept_s = self._elapsed()
        if self._comparison.records != self._kept_records:
            comparison.write(self._folder, self._comparison)
            self._kept_records = self._comparison.records


def part_of(name: str) -> str:
    """Name of a trial's trainer among the processes, and of its log.

    >>> part_of("wider")
    'trial-wider'
    """
    return f"trial-{name}"


def plan_of(settings: Settings, trial: Trial, trials: Trials) -> ProcessPlan:
    """The trainer of a trial, for a supervisor of the loop's settings."""
    flags = flags_of(settings, trial.overrides, trials.registry(trial.name))
    return ProcessPlan(part_of(trial.name), (sys.executable, "-m", "trainer.loop", *flags), STOP_S)


def is_taken_over(live: Registry, trial: Trial) -> bool:
    """Whether the live trainer has what a promoted trial learned, or went on elsewhere."""
    control = live.control()
    assert control is not None, "a trial begins with one"
    return control.epoch > trial.promoted_epoch or live.newest(trial.promoted_epoch) is not None


class _RunningTrial(NamedTuple):
    """What is remembered of a trial that runs."""

    registry: Registry
    compared: ComparedTrial


class TrialRunner:
    """The trials of a state directory. One thread, the main one.

    Args:
        settings: Of the loop.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._trials = settings, Trials(settings.state_dir)
        self._live = Registry(settings.registry_dir)
        metrics = SupervisorMetrics(CollectorRegistry())
        self._supervisor = Supervisor.of(settings, lambda line: logger.warning("%s", line), metrics)
        # Wrong settings are found before a trial begins: a later mistake ends no other trial.
        self._supervisor.settled = True
        self._running: dict[str, _RunningTrial] = {}
        self._say: dict[str, SaidOnce] = {}
        self._trials.sweep()

    def step(self) -> bool:
        """Moves each trial towards its wanted state; returns False if nothing is left to do."""
        for name in self._trials.open():
            say = self._say.setdefault(name, SaidOnce(logger.warning))
            try:
                trial = self._trials.read(name)
                self._run(trial) if trial.runs else self._end(trial)
                say.clear()
            except LockHeld:
                # A command changes it right now.
                continue
            except (SpringtideError, OSError) as error:
                say(f"trial {name}: {of_disk(error)}")
        self._supervisor.look()
        return bool(self._trials.open())

    def close(self) -> None:
        """Ends all trainers; the next start resumes them."""
        self._supervisor.stop_all()
        for running in self._running.values():
            with suppress(OSError):
                running.compared.step()
                running.compared.keep()

    def _run(self, trial: Trial) -> None:
        control = self._live.control()
        assert control is not None, "a trial begins with one"
        if control.epoch != trial.epoch:
            self._end_by_itself(trial, control)
            return
        name, running = trial.name, self._running.get(trial.name)
        if running is None:
            own = self._trials.registry(name)
            compared = ComparedTrial(self._trials.folder(name), self._live.path, own, self._settings.trials)
            running = self._running[name] = _RunningTrial(Registry(own), compared)
        # 1.
        for registry in (self._live, running.registry):
            row_losses.want(registry.path, name)
        # 2.
        running.registry.change(lambda own: followed(own, control))
        # 3.
        if part_of(name) not in self._supervisor.names():
            logger.info("trial %s: its trainer begins", name)
            self._supervisor.start(plan_of(self._settings, trial, self._trials))
        # 4.
        running.compared.step()

    def _end_by_itself(self, trial: Trial, control: Control) -> None:
        reason = (
            f"the live trainer went on in epoch {control.epoch}: {control.action} by {control.actor}, {control.reason}"
        )
        changes: dict[str, Any] = {"actor": ACTOR, "reason": reason, "now_ms": control.created_at_ms}
        self._trials.change(trial.name, lambda now: now.wants("ended", **changes) if now.runs else now)
        logger.warning("trial %s ends: %s", trial.name, reason)

    def _end(self, trial: Trial) -> None:
        if part_of(trial.name) in self._supervisor.names():
            self._supervisor.stop(part_of(trial.name))
            logger.info("trial %s: its trainer ended", trial.name)
        row_losses.unwant(self._live.path, trial.name)
        running = self._running.pop(trial.name, None)
        if running is not None:
            running.compared.step()
            running.compared.keep()
        needed = trial.wanted == "promoting" or (trial.wanted == "promoted" and not is_taken_over(self._live, trial))
        if not needed:
            self._trials.drop_registry(trial.name)
            logger.info("trial %s: what it learned is removed", trial.name)


def step_back(cores: int) -> None:
    """Limits this process and its children to this many cores, at low priority."""
    os.nice(NICENESS)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def run(settings: Settings, stopping: threading.Event) -> None:
    """Runs the trials until none is left, or `stopping` is set.

    Raises:
        LockHeld: Another process runs them.
    """
    with DirectoryLock(settings.state_dir / layout.TRIALS):
        step_back(settings.trials.cores)
        runner = TrialRunner(settings)
        try:
            while not stopping.is_set() and runner.step():
                time.sleep(LOOK_S)
        finally:
            runner.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the trials with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("trials", lambda settings: run(settings, stopping), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
