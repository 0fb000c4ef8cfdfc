"""How far the trainer is behind the training log, in positions and seconds: as metrics, and as a group for Kafka's own tools.

A thread of its own asks once a second, so that lag is seen also while an
operator or the guard holds training, and Kafka's answers cost no step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from state.config.sections import Kafka
from state.errors import LogError
from state.log import KafkaLog, Log, LogTopics
from state.metrics import TrainerMetrics
from state.process.said_once import SaidOnce

LOOK_S = 1.0
logger = logging.getLogger(__name__)


class Taken(NamedTuple):
    """How far the trainer has come.

    Attributes:
        next: The first position of the training log that it has not taken.
        at_ms: When Kafka took the newest record that it has; 0 for none since its start.
    """

    next: int
    at_ms: int


class TrainingLag:
    """Shows the lag of one trainer from `start` to `close`.

    Args:
        kafka: The section `[kafka]`.
        partition: That the trainer reads.
        taken: How far it is; called by the thread.
        metrics: Of the trainer.
        log: Where the training log is; the cluster of the settings where none is given.
        wall_s: Seconds since 1970.

    Attributes:
        records: The lag as last seen, in positions of the log; None before the first look.
    """

    def __init__(
        self,
        kafka: Kafka,
        partition: int,
        taken: Callable[[], Taken],
        metrics: TrainerMetrics,
        log: Log | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._kafka, self._partition, self._taken, self._metrics = kafka, partition, taken, metrics
        self._log, self._wall_s = log or KafkaLog(kafka), wall_s
        self._topics: LogTopics | None = None
        self._told = -1
        self.records: int | None = None
        self._say = SaidOnce(logger.warning)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def close(self) -> None:
        """Ends without a last look, which a broker that is away would hold up."""
        self._closing.set()

    def look(self) -> None:
        """Sets the gauges and tells Kafka the group's offset.

        Raises:
            LogError: Kafka does not answer.
        """
        topic = self._kafka.microbatches_topic
        if self._topics is None:
            self._topics = self._log.topics()
        # Before the end: what comes meanwhile is not taken yet, and no lag is below nothing.
        taken = self._taken()
        _, end = self._topics.ends(topic, committed_only=True)[self._partition]
        lag = max(0, end - taken.next)
        self._metrics.lag_records.set(lag)
        self.records = lag
        waits = lag and taken.at_ms
        self._metrics.lag_seconds.set(max(0.0, self._wall_s() - taken.at_ms / 1000) if waits else 0.0)
        if taken.next != self._told:
            self._topics.commit(self._kafka.group, topic, {self._partition: taken.next})
            self._told = taken.next

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                self.look()
                self._say.clear()
            except LogError as error:
                self._say(f"the lag of the training log is unknown for now: {error}")
        if self._topics is not None:
            self._topics.close()
