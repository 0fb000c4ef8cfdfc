"""Reports the trainer's lag behind the training log, in positions and seconds, to metrics and a Kafka consumer group.

A separate thread polls once a second, so lag is visible while training is held, and Kafka does not delay a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from state.config.sections import Kafka
from state.errors import LogError
from state.log import Log, Topics
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import TrainerMetrics
from state.process.log_lines import SaidOnce

POLL_S = 1.0
logger = logging.getLogger(__name__)


class Taken(NamedTuple):
    """The trainer's progress in the training log.

    Attributes:
        at_ms: Kafka's timestamp of the newest record that was read; 0 if none was read since the start.
    """

    next: int
    at_ms: int


class TrainingLag:
    """Reports the lag of one trainer from `start` to `close`."""

    def __init__(
        self,
        kafka: Kafka,
        taken: Callable[[], Taken],
        metrics: TrainerMetrics,
        log: Log | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._kafka, self._position, self._metrics = kafka, taken, metrics
        self._log, self._wall_s = log or Log(kafka), wall_s
        self._topics: Topics | None = None
        self._committed = -1
        self.records: int | None = None
        self._warn_once = SaidOnce(logger.warning)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)

    def start(self) -> None:
        """Starts the polling thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops without a final poll, which an unreachable broker would delay."""
        self._closing.set()

    def poll(self) -> None:
        """Polls once: sets the gauges and commits the group's offset to Kafka.

        Raises:
            LogError: Kafka does not answer.
        """
        topic = self._kafka.microbatches_topic
        if self._topics is None:
            self._topics = self._log.topics()
        # Read before the end of the log, so that the lag is never negative.
        position = self._position()
        _, end = self._topics.ends(topic, committed_only=True)[TRAINING_PARTITION]
        lag = max(0, end - position.next)
        self._metrics.lag_records.set(lag)
        self.records = lag
        waits = lag and position.at_ms
        self._metrics.lag_seconds.set(max(0.0, self._wall_s() - position.at_ms / 1000) if waits else 0.0)
        if position.next != self._committed:
            self._topics.commit(self._kafka.group, topic, {TRAINING_PARTITION: position.next})
            self._committed = position.next

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self.poll()
                self._warn_once.clear()
            except LogError as error:
                self._warn_once(f"the lag of the training log is unknown for now: {error}")
        if self._topics is not None:
            self._topics.close()
