"""Drives a rollout: `springtide experiment rollout NAME`, and its report.

The command stays in the foreground until the rollout is done or rolled back, or Ctrl-C; the same command resumes it.
While it does not run, shares stay as they are. All evidence comes from the two topics, from the offsets at which the
rollout began, so a restart has the same evidence. Each round:

1. Read exposures, up to their topic's end.
2. Read engagements and count each after a delay, because the exposure before it can arrive later.
3. Once both topics are read to their ends, evaluate the gate, and write its decision.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deploy.formats import age
from deploy.operate.control import Say
from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import ControlConflict, GapError, LogError, MicroBatchError, RegistryError, SettingsError
from state.experiments import evidence
from state.experiments.evidence import Evidence
from state.experiments.experiment import GATE, By, Experiment, Experiments
from state.experiments.gate import Decision, RolloutReport, as_lines, decide, report
from state.log import Log, PartitionBatch, Reader, topic_plan
from state.log.follow import Position, open_topic
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.batch import MicroBatch, trained, trim
from state.microbatch.codec import decode
from state.positions import Source
from state.process import network
from state.process.environment import wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import stop_on_signals

KEEP_MS = 2000
"""Interval at which the report is stored for `springtide status`, the page and metrics."""

HOLD_MS = 2000
"""Delay after which an engagement counts, from when it became known or was read, whichever is earlier. Exposures arrive
within less time."""

FETCH_S = 0.1
RECORDS_AT_ONCE = 10_000
RETRY_S = 1.0
POLL_S, READY_S = 0.25, 2.0
"""Interval between two checks that the experiment answers, and the timeout of a check."""

SETTLE_S = 30.0
"""How long a report reads the topics at most."""

_log = logging.getLogger(__name__)


class RolloutDriver:
    """Drives the newest rollout of an experiment, which must have one. Not thread-safe; call `close` at the end."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        experiments: Experiments,
        experiment: Experiment,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._settings, self._log, self._experiments, self._now_ms = settings, log, experiments, now_ms
        assert experiment.rollout is not None
        self._experiment, self._rollout = experiment, experiment.rollout
        self.evidence = Evidence(experiment.name)
        self._kept_ms = 0
        self._warn_once = SaidOnce(_log.warning)
        self._pending: deque[tuple[int, int, NDArray[np.uint64]]] = deque()
        self._marks: dict[Source, int] = {}
        kafka, self._partition = settings.kafka, TRAINING_PARTITION
        self._exposures = self._open(kafka.exposures_topic, 0, self._rollout.exposures_from)
        try:
            self._clicks = self._open(kafka.microbatches_topic, self._partition, self._rollout.log_from)
        except BaseException:
            self._exposures.close()
            raise

    def close(self) -> None:
        """Closes the readers."""
        self._exposures.close()
        self._clicks.close()

    def step(self) -> Experiment:
        """Reads new records and evaluates the gate; blocks at most `FETCH_S`. Returns the experiment.

        Raises:
            LogError: The log cannot be read.
            RegistryError: The document cannot be read or written.
        """
        self.read()
        newest = self._experiments.get(self._experiment.name)
        if not self.drives(newest) or not self.caught_up:
            return newest
        if self._now_ms() - self._kept_ms >= KEEP_MS:
            self.keep()
        # 3.
        decision = decide(newest, self.evidence, self._settings.rollout, self._now_ms())
        return newest if decision is None else self._apply(newest, decision)

    def drives(self, experiment: Experiment) -> bool:
        """Whether the rollout of this driver is still the newest one of the experiment."""
        return experiment.rollout is not None and experiment.rollout.started_ms == self._rollout.started_ms

    def report(self) -> RolloutReport:
        """Returns the current report about both arms."""
        return report(self._experiment, self.evidence, self._now_ms())

    def keep(self) -> None:
        """Stores the report for status, page and metrics; a disk error is logged, and the next call retries."""
        self._kept_ms = self._now_ms()
        try:
            self._experiments.write_report(self.report())
            self._warn_once.clear()
        except OSError as error:
            self._warn_once(f"the report of the rollout cannot be stored: {error}")

    def read(self) -> None:
        """Reads new records from both topics.

        Raises:
            LogError: The log cannot be read.
        """
        # 1.
        for batch in self._exposures.poll(FETCH_S, RECORDS_AT_ONCE):
            exposures = (evidence.decode_exposure(value) for value in batch.values if value is not None)
            self.evidence.expose(shown for shown in exposures if shown is not None)
        # 2.
        now_ms = self._now_ms()
        for batch in self._clicks.poll(0.0, RECORDS_AT_ONCE):
            self._hold(batch, now_ms)
        while self._pending and self._pending[0][0] <= now_ms and not self._exposures.unread(0):
            _, known_ms, users = self._pending.popleft()
            self.evidence.engage(users, known_ms)

    @property
    def caught_up(self) -> bool:
        """Whether both topics are read to their ends."""
        return not (self._exposures.unread(0) or self._clicks.unread(self._partition))

    def counted(self, until_ms: int) -> bool:
        """Whether both topics are read to their ends, and all engagements that were known at `until_ms` are counted."""
        return self.caught_up and not (self._pending and self._pending[0][1] <= until_ms)

    def _hold(self, batch: PartitionBatch, now_ms: int) -> None:
        for value in batch.values:
            try:
                microbatch = decode(value or b"")
            except MicroBatchError as error:
                _log.warning("a record of the training log is left out: %s", error)
                continue
            fresh, self._marks = trim(microbatch, self._marks)
            users = microbatch.user[fresh & self._engaged(microbatch)]
            if len(users):
                known_ms = microbatch.header.created_ms
                self._pending.append((min(now_ms, known_ms) + HOLD_MS, known_ms, users))

    def _engaged(self, batch: MicroBatch) -> NDArray[np.bool_]:
        """Returns which rows are engagements: those with a positive label, or all clicks in a log without labels."""
        rows: NDArray[np.bool_] = trained(batch.kind)
        settings = self._settings
        if settings.events.label or settings.labels.impressions:
            rows = rows & (batch.label >= 0.5)
        return rows

    def _apply(self, judged: Experiment, decision: Decision) -> Experiment:
        """Writes the decision, unless the experiment has changed since it was judged."""
        by = By(GATE, decision.reason, self._now_ms())

        def transition(newest: Experiment) -> Experiment:
            if newest != judged:
                return newest
            take = {"next": newest.next_step, "halt": newest.halt, "back": newest.back}[decision.action]
            return take(by)

        return self._experiments.change(judged.name, transition)

    def _open(self, topic: str, partition: int, offset: int) -> Reader:
        reader, opening = open_topic(self._log, topic, [partition], Position("", {partition: offset}))
        for lost in opening.losses:
            _log.warning("%s; the remaining records are judged", lost)
        return reader


def roll_out(settings: Settings, name: str, steps: tuple[float, ...], every_s: float, by: By, say: Say) -> None:
    """Starts the rollout of an experiment, or continues it, until it is over or a signal ends this process.

    `steps`, shares of the users in percent, and `every_s`, their minimum duration, are for a new rollout.

    Raises:
        SettingsError: No address is set, or the steps are invalid.
        ControlConflict: Another rollout is open, or the experiment does not run.
        LockHeld: Another command drives a rollout.
        LogError: Kafka does not answer.
    """
    if not settings.rollout.address:
        raise SettingsError(
            "rollout.address is not set: no worker knows where the experiment answers",
            "set it for this command and for `springtide up`, which runs the experiment's workers at an address of its machine "
            "such as http://127.0.0.1:8601; elsewhere start them first (`springtide serve` with the experiment's registry and "
            "its own state directory)",
        )
    experiments, log, stop = Experiments(settings), Log(settings.kafka), stop_on_signals()

    def say_now(line: str) -> None:
        say(line)
        sys.stdout.flush()

    with DirectoryLock(experiments.shared, layout.ROLLOUT_LOCK):
        newest = experiments.get(name)
        if newest.stage != "rollout":
            ends = _ends(settings, log)
            newest = experiments.change(name, lambda now: now.start_rollout(steps, every_s, *ends, by))
        say_now(as_line(newest))
        _drive(settings, experiments, newest, log, stop, say_now)


def _drive(
    settings: Settings, experiments: Experiments, newest: Experiment, log: Log, stop: threading.Event, say: Say
) -> None:
    complain = SaidOnce(lambda _, line: print(line, file=sys.stderr))
    begun = _when_it_answers(settings, experiments, newest, stop, complain)
    if begun is not newest:
        newest = begun
        say(as_line(newest))
    driver = None
    while not stop.is_set() and newest.stage == "rollout" and newest.phase in ("running", "halted"):
        try:
            driver = driver or RolloutDriver(settings, log, experiments, newest)
            now = driver.step()
        except (GapError, LogError, RegistryError) as error:
            complain(f"{error}; shares stay as they are, and it is tried again")
            if driver is not None:
                driver.close()
                driver = None
            stop.wait(RETRY_S)
            continue
        if now != newest:
            newest = now
            say(as_line(newest))
        if not driver.drives(now):
            break
    if driver is not None:
        driver.keep()
        driver.close()
        for line in as_lines(driver.report(), newest):
            say(line)


def _when_it_answers(
    settings: Settings,
    experiments: Experiments,
    newest: Experiment,
    stop: threading.Event,
    complain: Callable[[str], None],
) -> Experiment:
    """Waits until the experiment answers, its rollout is ended, or `stop` is set; returns its newest state.

    Without the wait, requests of its first users would fail.
    """
    while newest.stage == "rollout" and newest.phase == "starting" and not stop.is_set():
        status, why = network.ask(f"{settings.rollout.address}/readyz", READY_S)
        if status == 200:
            return experiments.change(newest.name, lambda now: now.begin(By(GATE, "the trial answers", wall_ms())))
        complain(f"the trial does not answer at {settings.rollout.address} yet ({status or why}): its first step waits")
        stop.wait(POLL_S)
        newest = experiments.get(newest.name)
    return newest


def _ends(settings: Settings, log: Log) -> tuple[int, int]:
    """Returns the end offsets of exposures and training log; creates the topic of exposures if it is missing."""
    kafka = settings.kafka
    with log.topics() as topics:
        topics.ensure(*topic_plan.exposures(settings))
        return (
            topics.ends(kafka.exposures_topic)[0][1],
            topics.ends(kafka.microbatches_topic)[TRAINING_PARTITION][1],
        )


def as_line(experiment: Experiment) -> str:
    """Formats the rollout of an experiment in one line."""
    rollout, decided = experiment.rollout, experiment.newest
    phase = experiment.stage if rollout is None else rollout.phase
    lasts = f", each step {age(rollout.every_s)}" if rollout is not None and phase == "running" else ""
    return f"{experiment.name} {phase}, {experiment.share:.4g} of the users{lasts} ({decided.actor}: {decided.reason})"


def evaluate(settings: Settings, experiment: Experiment, log: Log) -> RolloutReport:
    """Reads all evidence about the newest rollout of an experiment.

    Raises:
        ControlConflict: It has no rollout.
        LogError: Kafka does not answer.
    """
    name = experiment.name
    if experiment.rollout is None:
        raise ControlConflict(f"there is no rollout of {name}", f"start it: `springtide experiment rollout {name}`")
    driver, until_s = RolloutDriver(settings, log, Experiments(settings), experiment), time.monotonic() + SETTLE_S
    asked_ms = wall_ms()
    try:
        # Engagements count after `HOLD_MS`. Without the last ones, the rate of an arm with recent answers is too low.
        while not (driver.counted(asked_ms) or time.monotonic() > until_s):
            driver.read()
    finally:
        driver.close()
    return driver.report()
