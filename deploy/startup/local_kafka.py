"""The local Kafka of one loop: started, started again when it dies, stopped last."""

from __future__ import annotations

from collections.abc import Callable

from deploy.children.last_words import shortened
from deploy.children.supervisor import Deaths
from deploy.kafka.broker import Broker
from state.config.settings import Settings


class LocalKafka:
    """A broker that is kept alive.

    Args:
        settings: The loop's settings.
        say: Takes one line for the operator.
        clock: Monotonic seconds.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._broker = Broker(settings.kafka_dir, settings.kafka.port, retention_h=settings.kafka.retention_h)
        self._say = say
        self._clock = clock
        self._started_at: float | None = None
        self._deaths = Deaths()

    @property
    def started(self) -> bool:
        """Whether a start was tried."""
        return self._started_at is not None

    def start(self) -> None:
        """Returns when it takes requests.

        Raises:
            PortTaken: Another process listens on its port.
            KafkaFailed: It cannot run; the message quotes its last words.
        """
        self._started_at = self._clock()
        self._broker.start()

    def look(self) -> None:
        """Takes notice of its death, and starts it again.

        Raises:
            KafkaFailed: It keeps dying.
        """
        failure = self._broker.failure()
        if failure is None:
            return
        self._deaths = self._deaths.after(self._clock() - (self._started_at or 0.0))
        if self._deaths.hopeless:
            raise failure
        self._say(f"{shortened(str(failure))}; starting it again")
        self.start()

    def stop(self, timeout_s: float) -> None:
        """Ends it, by force after `timeout_s`."""
        self._broker.stop(timeout_s)
