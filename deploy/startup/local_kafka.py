"""The local Kafka of one loop: started, started again when it dies, stopped last."""

from __future__ import annotations

from collections.abc import Callable

from deploy.children.backoff import HEALTHY_S, Backoff
from deploy.children.last_words import shortened
from deploy.kafka.broker import Broker
from state.config.settings import Settings
from state.errors import KafkaFailed, PortTaken
from state.metrics import StorageMetrics, SupervisorMetrics
from state.storage.shares import KAFKA
from state.storage.waiting import Room, is_full

NAME, WHAT = "kafka", "Kafka"
ROOM_S = 1.0


class LocalKafka:
    """A broker that is kept alive.

    One whose disk is full ends. It is not tried again before there is room:
    that waits, and is no death.

    Args:
        settings: The loop's settings.
        say: Takes one line for the operator.
        metrics: Where deaths and starts are counted.
        clock: Monotonic seconds.
        storage: Where its waits for room are shown.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        metrics: SupervisorMetrics,
        clock: Callable[[], float],
        storage: StorageMetrics,
    ) -> None:
        self._broker = Broker(settings.kafka_dir, settings.kafka.port, retention_h=settings.kafka.retention_h)
        self._say = say
        self._metrics = metrics
        self._clock = clock
        # Nobody waits in `wait_for`: `look` comes again by itself.
        self._room = Room(KAFKA, storage, lambda _: True, lambda form, *words: say(form % words))
        self._started_at: float | None = None
        self._start_at: float | None = None
        self._came_up = False
        self._backoff = Backoff()

    @property
    def started(self) -> bool:
        """Whether a start was tried."""
        return self._started_at is not None

    def begin(self) -> None:
        """Starts it, and does not wait until it takes requests.

        Raises:
            PortTaken: Another process listens on its port.
            KafkaFailed: It cannot run.
        """
        self._started_at, self._start_at = self._clock(), None
        self._metrics.starts.labels(NAME).inc()
        self._broker.begin()

    def is_up(self) -> bool:
        """Whether it takes requests.

        Raises:
            KafkaFailed: It ended, or takes too long; the message quotes its last words.
        """
        self._came_up = self._broker.is_up()
        return self._came_up

    def look(self) -> None:
        """Takes notice of its death, and starts it again once that is due; what it cannot do is said."""
        if self._start_at is None:
            # One that never came up has an end in `is_up`.
            failure = self._broker.failure() if self._came_up else None
            if failure is not None:
                self._bury(failure)
            elif self._backoff.deaths and self._lived_s() >= HEALTHY_S:
                self._backoff = Backoff()
                self._metrics.deaths_in_a_row.labels(NAME).set(0)
        elif self._clock() >= self._start_at:
            try:
                self._broker.require_disk()
                self._room.found(WHAT)
                self.begin()
                self._broker.wait_until_up()
            except (KafkaFailed, PortTaken) as failure:
                if is_full(failure):
                    self._room.refused(failure, WHAT)
                    self._start_at = self._clock() + ROOM_S
                else:
                    self._bury(failure)

    def _bury(self, failure: KafkaFailed | PortTaken) -> None:
        self._backoff = self._backoff.after(self._lived_s())
        self._start_at = self._clock() + self._backoff.wait_s
        self._metrics.deaths.labels(NAME).inc()
        self._metrics.deaths_in_a_row.labels(NAME).set(self._backoff.deaths)
        self._say(f"{shortened(str(failure))}; {self._backoff.told()}")

    def _lived_s(self) -> float:
        return self._clock() - (self._started_at or 0.0)

    def stop(self, timeout_s: float) -> None:
        """Ends it, by force after `timeout_s`."""
        self._broker.stop(timeout_s)
