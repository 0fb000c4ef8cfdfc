"""Drives a rollout: reads exposures and engagements, evaluates the gate, and writes the next generation.

All evidence comes from the two topics, from the offsets at which the rollout began, so a restart has the same evidence.
No other process waits for the driver; while it does not run, shares stay as they are. Each step:

1. Read exposures, up to their topic's end.
2. Read engagements and count each after a delay, because the exposure before it can arrive later.
3. Once both topics are read to their ends, evaluate the gate.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from state.config.settings import Settings
from state.errors import MicroBatchError
from state.log import Log, PartitionBatch, Reader
from state.log.follow import Position, open_topic
from state.microbatch.batch import MicroBatch, trained, trim
from state.microbatch.codec import decode
from state.positions import Source
from state.process.said_once import SaidOnce
from state.rollouts import exposure, rollout
from state.rollouts.evidence import Evidence
from state.rollouts.gate import Decision, decide
from state.rollouts.report import RolloutReport, figures, report
from state.rollouts.rollout import GATE, Rollout
from state.rollouts.rollouts import Rollouts

KEEP_MS = 2000
"""Interval at which the figures are stored for `springtide status`, the page and metrics."""

HOLD_MS = 2000
"""Delay after which an engagement counts, from when it became known or was read, whichever is earlier. Exposures arrive
within less time."""

FETCH_S = 0.1
RECORDS_AT_ONCE = 10_000
_log = logging.getLogger(__name__)

Transition = Callable[..., Rollout]
_TRANSITIONS: Mapping[str, Transition] = {"next": rollout.next_step, "halt": rollout.halt, "back": rollout.back}


class RolloutDriver:
    """Drives the newest rollout of a registry. Used by one thread; call `close` at the end.

    Args:
        settings: Settings of the loop.
        log: The log with the topics.
        rollouts: The generations of rollouts.
        began: The newest generation; the driver drives the rollout of its name.
        now_ms: The wall clock.

    Attributes:
        evidence: The evidence about both arms.
    """

    def __init__(
        self, settings: Settings, log: Log, rollouts: Rollouts, began: Rollout, now_ms: Callable[[], int]
    ) -> None:
        self._settings, self._log, self._rollouts, self._now_ms = settings, log, rollouts, now_ms
        self._began = began
        self.evidence = Evidence(began.name, settings.rollout.planned_answers)
        self._kept_ms = 0
        self._say = SaidOnce(_log.warning)
        self._held: deque[tuple[int, int, NDArray[np.uint64]]] = deque()
        self._marks: dict[Source, int] = {}
        kafka, self._partition = settings.kafka, settings.trainer.partition
        self._exposures = self._open(kafka.exposures_topic, 0, began.exposures_from)
        try:
            self._clicks = self._open(kafka.microbatches_topic, self._partition, began.log_from)
        except BaseException:
            self._exposures.close()
            raise

    def close(self) -> None:
        """Closes the readers."""
        self._exposures.close()
        self._clicks.close()

    def step(self) -> Rollout:
        """Reads new records and evaluates the gate; blocks at most `FETCH_S`. Returns the newest generation.

        Raises:
            LogError: The log cannot be read.
            RegistryError: The generations cannot be read or written.
        """
        self.read()
        newest = self._rollouts.newest() or self._began
        if newest.name != self._began.name or not self.caught_up:
            return newest
        if self._now_ms() - self._kept_ms >= KEEP_MS:
            self.keep()
        # 3.
        decision = decide(newest, self.evidence, self._settings.rollout, self._now_ms())
        return newest if decision is None else self._apply(newest, decision)

    def report(self) -> RolloutReport:
        """Returns the current report about both arms."""
        return report(self.evidence, self._settings.rollout.equal_within)

    def keep(self) -> None:
        """Stores the figures for status, page and metrics; a disk error is logged, and the next call retries."""
        self._kept_ms = self._now_ms()
        try:
            self._rollouts.keep_figures(self._began, figures(self.report()), self._kept_ms)
            self._say.clear()
        except OSError as error:
            self._say(f"what is known of the rollout cannot be kept: {error}")

    def read(self) -> None:
        """Reads new records from both topics.

        Raises:
            LogError: The log cannot be read.
        """
        # 1.
        for batch in self._exposures.poll(FETCH_S, RECORDS_AT_ONCE):
            found = (exposure.decode(value) for value in batch.values if value is not None)
            self.evidence.expose(one for one in found if one is not None)
        # 2.
        now_ms = self._now_ms()
        for batch in self._clicks.poll(0.0, RECORDS_AT_ONCE):
            self._hold(batch, now_ms)
        while self._held and self._held[0][0] <= now_ms and not self._exposures.unread(0):
            _, known_ms, users = self._held.popleft()
            self.evidence.engage(users, known_ms)

    @property
    def caught_up(self) -> bool:
        """Whether both topics are read to their ends."""
        return not (self._exposures.unread(0) or self._clicks.unread(self._partition))

    def _hold(self, batch: PartitionBatch, now_ms: int) -> None:
        for value in batch.values:
            try:
                found = decode(value or b"")
            except MicroBatchError as error:
                _log.warning("a record of the training log is left out: %s", error)
                continue
            fresh, self._marks = trim(found, self._marks)
            users = found.user[fresh & self._engaged(found)]
            if len(users):
                known_ms = found.header.created_ms
                self._held.append((min(now_ms, known_ms) + HOLD_MS, known_ms, users))

    def _engaged(self, batch: MicroBatch) -> NDArray[np.bool_]:
        """Returns which rows are engagements: those with a positive label, or all clicks in a log without labels."""
        rows: NDArray[np.bool_] = trained(batch.kind)
        settings = self._settings
        if settings.events.label or settings.labels.impressions:
            rows = rows & (batch.label >= 0.5)
        return rows

    def _apply(self, judged: Rollout, decision: Decision) -> Rollout:
        """Writes the next generation, unless the newest one has changed since the decision."""
        take = _TRANSITIONS[decision.action]

        def transition(newest: Rollout) -> Rollout:
            if newest.generation != judged.generation:
                return newest
            return take(newest, actor=GATE, reason=decision.reason, now_ms=self._now_ms())

        return self._rollouts.change(transition)

    def _open(self, topic: str, partition: int, offset: int) -> Reader:
        """Opens a topic where the rollout began, or at the first offset that retention has kept."""
        reader, opening = open_topic(self._log, topic, [partition], Position("", {partition: offset}))
        for lost in opening.losses:
            _log.warning("%s; what is left is judged", lost)
        return reader
