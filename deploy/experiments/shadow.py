"""Runs the trainers of experiments: `python -m deploy.experiments.shadow`.

`springtide up` starts it as a child while an experiment has a registry. For each experiment that should run, the process

1. makes the live trainer write its losses,
2. before the experiment's trainer starts, copies what live control requires of every trainer,
3. keeps the experiment's trainer running, as a process with its own registry,
4. pairs the losses of both trainers and stores the comparison.

When an experiment should no longer run, its trainer is stopped. Its registry is removed once no promotion needs it.
The process and its trainers use `trials.cores` of the machine, at a lower priority than other processes. It ends when
nothing is left to do.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from deploy.experiments.commands import copied_control, flags_of
from deploy.supervisor import ProcessPlan, Supervisor
from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, SpringtideError, of_disk
from state.experiments import comparison
from state.experiments.comparison import LossReader, PairedComparison
from state.experiments.experiment import By, Experiment, Experiments
from state.metrics import SupervisorMetrics
from state.process.environment import run_in_background, wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_part, stop_on_signals
from state.registry.control import Control
from state.registry.registry import Registry

KEEP_S = 5.0
"""Interval at which the comparison is written."""
READS_AT_ONCE = 8
POLL_S = 0.2
STOP_S = 15.0
ACTOR = "experiments"
logger = logging.getLogger(__name__)


class LossComparison:
    """The comparison of one running experiment with the live trainer, by their registries. Not thread-safe.

    Raises:
        CorruptStore: The stored comparison cannot be read.
    """

    def __init__(self, folder: Path, live: Path, experiment: Path) -> None:
        self._folder = folder
        self._comparison = comparison.read(folder) or PairedComparison()
        self._live, self._own = LossReader(live), LossReader(experiment)
        self._kept_s, self._kept_records = time.monotonic(), self._comparison.records

    def step(self) -> None:
        """Reads new losses, and stores the comparison if it is due.

        Raises:
            OSError: The write failed; nothing is lost.
        """
        for _ in range(READS_AT_ONCE):
            live_behind, own_behind = self._comparison.behind
            live = self._live.read() if live_behind else []
            experiment_losses = self._own.read() if own_behind else []
            if not live and not experiment_losses:
                break
            self._comparison.add(live, experiment_losses)
        if time.monotonic() - self._kept_s >= KEEP_S:
            self.keep()

    def keep(self) -> None:
        """Stores the comparison; durable when this returns.

        Raises:
            OSError: The disk cannot be written; it is tried again.
        """
        self._kept_s = time.monotonic()
        if self._comparison.records != self._kept_records:
            comparison.write(self._folder, self._comparison)
            self._kept_records = self._comparison.records


def is_taken_over(live: Registry, experiment: Experiment) -> bool:
    """Whether the live trainer has what a promoted experiment learned, or continued elsewhere."""
    control = live.control()
    assert control is not None, "an experiment begins with one"
    return control.epoch > experiment.promoted_epoch or live.newest(experiment.promoted_epoch) is not None


def _part_of(name: str) -> str:
    return f"shadow-{name}"


class _Running(NamedTuple):
    registry: Registry
    compared: LossComparison


class ShadowRunner:
    """Runs the trainers of experiments. Use it from the main thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._experiments = settings, Experiments(settings)
        self._live = Registry(settings.registry_dir)
        metrics = SupervisorMetrics(CollectorRegistry())
        self._supervisor = Supervisor.of(settings, lambda line: logger.warning("%s", line), metrics)
        # Settings are checked before an experiment begins, so that an error in one does not end the others.
        self._supervisor.settled = True
        self._running: dict[str, _Running] = {}
        self._warn_once_of: dict[str, SaidOnce] = {}

    def step(self) -> bool:
        """Moves each experiment towards its desired state; returns False if nothing is left to do."""
        for name in self._experiments.open():
            say = self._warn_once_of.setdefault(name, SaidOnce(logger.warning))
            try:
                experiment = self._experiments.document().find(name)
                if experiment is None:
                    self._experiments.sweep()
                elif experiment.runs:
                    self._run(experiment)
                else:
                    self._end(experiment)
                say.clear()
            except LockHeld:
                # A command is changing the document; the next step tries again.
                continue
            except (SpringtideError, OSError) as error:
                say(f"experiment {name}: {of_disk(error)}")
        self._supervisor.poll()
        return bool(self._experiments.open())

    def close(self) -> None:
        """Ends all trainers; the next start resumes them."""
        self._supervisor.stop_all()
        for running in self._running.values():
            with suppress(OSError):
                running.compared.step()
                running.compared.keep()

    def _run(self, experiment: Experiment) -> None:
        control = self._live.control()
        assert control is not None, "an experiment begins with one"
        if control.epoch != experiment.epoch:
            self._end_by_itself(experiment, control)
            return
        name, running = experiment.name, self._running.get(experiment.name)
        path = self._experiments.registry(name)
        if running is None:
            compared = LossComparison(self._experiments.folder(name), self._live.path, path)
            running = self._running[name] = _Running(Registry(path), compared)
        # 1.
        for registry in (self._live, running.registry):
            comparison.want(registry.path, name)
        # 2.
        running.registry.change(lambda now: copied_control(now, control))
        # 3.
        if _part_of(name) not in self._supervisor.names():
            logger.info("experiment %s: its trainer begins", name)
            command = (sys.executable, "-m", "trainer.loop", *flags_of(self._settings, experiment.overrides, path))
            self._supervisor.start(ProcessPlan(_part_of(name), command, STOP_S))
        # 4.
        running.compared.step()

    def _end_by_itself(self, experiment: Experiment, control: Control) -> None:
        reason = f"the live trainer continued in epoch {control.epoch}: {control.action} by {control.actor}, {control.reason}"
        by = By(ACTOR, reason, control.created_at_ms)
        self._experiments.change(experiment.name, lambda now: now.end(by))
        logger.warning("experiment %s ends: %s", experiment.name, reason)

    def _end(self, experiment: Experiment) -> None:
        name = experiment.name
        if _part_of(name) in self._supervisor.names():
            self._supervisor.stop(_part_of(name))
            logger.info("experiment %s: its trainer ended", name)
        comparison.unwant(self._live.path, name)
        running = self._running.pop(name, None)
        if running is not None:
            running.compared.step()
            running.compared.keep()
        if experiment.stage == "promoting":
            return
        if experiment.stage == "promoted":
            if not is_taken_over(self._live, experiment):
                return
            by = By(ACTOR, "the live trainer has its weights", wall_ms())
            self._experiments.change(name, lambda now: now.taken_over(by))
        self._experiments.drop_registry(name)
        logger.info("experiment %s: its weights are removed", name)


def run(settings: Settings, stopping: threading.Event) -> None:
    """Runs the trainers until none is left, or `stopping` is set.

    Raises:
        LockHeld: Another process runs them.
    """
    with DirectoryLock(settings.state_dir / layout.EXPERIMENTS):
        run_in_background()
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-settings.trials.cores :])
        runner = ShadowRunner(settings)
        try:
            while not stopping.is_set() and runner.step():
                time.sleep(POLL_S)
        finally:
            runner.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the trainers with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("experiments", lambda settings: run(settings, stopping), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
