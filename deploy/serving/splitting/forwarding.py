"""Sends the exposures that a host's workers kept to Kafka, in a thread of the applier; nothing waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from deploy.serving.splitting.spool import make_room, settled
from state.errors import LogError
from state.log import Log, LogWriter
from state.process.said_once import SaidOnce

LOOK_S = 0.1
RETRY_S = 1.0
_log = logging.getLogger(__name__)


class ExposureForwarder:
    """Sends what workers keep, until it is told to stop.

    Args:
        folder: The host's directory of exposures.
        log: Where the topic is.
        topic: Its name.
        now_ms: The wall clock.
    """

    def __init__(self, folder: Path, log: Log, topic: str, now_ms: Callable[[], int]) -> None:
        self._folder, self._log, self._topic, self._now_ms = folder, log, topic, now_ms
        self._writer: LogWriter | None = None

    def run(self, stop: threading.Event) -> None:
        """Sends until `stop`; what is left then is sent after the next start."""
        say = SaidOnce(_log.warning)
        try:
            while not stop.is_set():
                try:
                    self.step()
                    stop.wait(LOOK_S)
                except (LogError, OSError) as error:
                    self._close()
                    say(f"exposures wait on the disk: {error}")
                    if removed := make_room(self._folder):
                        _log.error("%d files of exposures were removed unsent: Kafka is away for too long", removed)
                    stop.wait(RETRY_S)
        finally:
            self._close()

    def step(self) -> int:
        """Sends the files that nobody writes any more; returns how many exposures there were.

        1. All records of a file are sent, keyed by their user. 2. Kafka acknowledges them. 3. The file is removed.

        Raises:
            LogError: Kafka is away, or has no such topic; the file stays.
            OSError: A file cannot be read or removed.
        """
        sent = 0
        for path, records in settled(self._folder, self._now_ms()):
            # 1.
            writer = self._writer = self._writer or self._log.writer()
            for record in records:
                user = msgspec.json.decode(record, type=_Keyed).user
                writer.send(self._topic, None, user.encode(), record)
            # 2.
            writer.flush()
            # 3.
            path.unlink()
            sent += len(records)
        return sent

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Keyed(msgspec.Struct):
    """Of an exposure, whose it is."""

    user: str
