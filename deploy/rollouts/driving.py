"""Drives a rollout: reads who was exposed and who engaged, asks the gate, and writes the next generation.

All that it knows comes out of the two topics from the places on where the
rollout began, so that a restart knows the same. Nobody waits for it: while it
is away, shares stay as they are.

1. Exposures, up to their topic's end.
2. Engagements, each some time after it became known: the exposure before it may come later.
3. Once both are read to their ends, the gate.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.config.settings import Settings
from state.errors import GapError, MicroBatchError
from state.log import Log, LogReader, PartitionBatch
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.microbatch.cutting import trim
from state.microbatch.row_kinds import trained
from state.positions import Source
from state.process.said_once import SaidOnce
from state.rollouts import exposure, rollout
from state.rollouts.evidence import Evidence
from state.rollouts.gate import Decision, decide
from state.rollouts.report import RolloutReport, figures, report
from state.rollouts.rollout import GATE, Rollout
from state.rollouts.rollouts import Rollouts

KEEP_MS = 2000
"""Between two times that what is known is kept for whoever tells of it."""

HOLD_MS = 2000
"""So long after it became known, or was read where that clock is ahead, an engagement counts: exposures are on their way for less."""

FETCH_S = 0.1
RECORDS_AT_ONCE = 10_000
_log = logging.getLogger(__name__)

Transition = Callable[..., Rollout]
_TRANSITIONS: Mapping[str, Transition] = {"next": rollout.next_step, "halt": rollout.halt, "back": rollout.back}


class RolloutDriver:
    """Drives the newest rollout of a registry; one thread. `close` it.

    Args:
        settings: Of the loop.
        log: Where the topics are.
        rollouts: The generations.
        began: The newest one, whose name it drives.
        now_ms: The wall clock.

    Attributes:
        evidence: What is known of the arms.
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
        self._exposures = self._reader(kafka.exposures_topic, 0, began.exposures_from)
        try:
            self._clicks = self._reader(kafka.microbatches_topic, self._partition, began.log_from)
        except BaseException:
            self._exposures.close()
            raise

    def close(self) -> None:
        """Ends its connections."""
        self._exposures.close()
        self._clicks.close()

    def step(self) -> Rollout:
        """Takes what came, and decides; waits `FETCH_S` at most. Returns the newest generation.

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
        """What is to be said of the arms now."""
        return report(self.evidence, self._settings.rollout.equal_within)

    def keep(self) -> None:
        """Keeps what is known for whoever tells of it; a disk that refuses is said, and tried again."""
        self._kept_ms = self._now_ms()
        try:
            self._rollouts.keep_figures(self._began, figures(self.report()), self._kept_ms)
            self._say.clear()
        except OSError as error:
            self._say(f"what is known of the rollout cannot be kept: {error}")

    def read(self) -> None:
        """Takes what came.

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
        """Whether all that was written some seconds ago is taken into account."""
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
        """Which rows are engagements: those labelled so; in a log of clicks alone, all clicks."""
        rows: NDArray[np.bool_] = trained(batch.kind)
        settings = self._settings
        if settings.events.label or settings.labels.impressions:
            rows = rows & (batch.label >= 0.5)
        return rows

    def _apply(self, judged: Rollout, decision: Decision) -> Rollout:
        """Writes the next generation, unless somebody decided otherwise meanwhile."""
        take = _TRANSITIONS[decision.action]

        def transition(newest: Rollout) -> Rollout:
            if newest.generation != judged.generation:
                return newest
            return take(newest, actor=GATE, reason=decision.reason, now_ms=self._now_ms())

        return self._rollouts.change(transition)

    def _reader(self, topic: str, partition: int, offset: int) -> LogReader:
        """A reader from where the rollout began, or from what retention left of it."""
        arguments: dict[str, Any] = {"topic": topic, "partitions": [partition]}
        try:
            return self._log.reader(**arguments, positions={partition: offset})
        except GapError as error:
            _log.warning("%s; what is left is judged", error)
            return self._log.reader(**arguments)
