"""Writes the shard's micro-batches and dead letters in acknowledged transactions, and waits out broker outages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from state.config.settings import Settings
from state.errors import UnreachableBroker
from state.log import Writer
from state.positions import Source
from state.process import killpoints
from streaming.cut import Cut, encode_cut
from streaming.desired import NOTHING_DESIRED, Desired
from streaming.fencing import open_writer
from streaming.letters import send_letters

logger = logging.getLogger(__name__)


class ShardWriter:
    """Writes cuts, each call in one transaction. Not thread-safe.

    Args:
        settings: The effective settings.
        spec: Digest of the feature spec.
        salt: Fingerprint of the salt.
        stopping: Set once the stream was asked to stop; from then on it does not wait for an outage to end.
        opens: Creates a writer of the shard, here and after each outage.
        desired: Provides the mask and the epoch of the log.

    Raises:
        UnreachableBroker: No broker answered in time.
        LogError: The cluster refused.
    """

    def __init__(
        self,
        settings: Settings,
        spec: str,
        salt: str,
        stopping: threading.Event,
        opens: Callable[[Settings], Writer] = open_writer,
        desired: Desired = NOTHING_DESIRED,
    ) -> None:
        self._settings, self._spec, self._salt = settings, spec, salt
        self._stopping, self._opens, self._desired = stopping, opens, desired
        self._told: Mapping[Source, int] = {}
        self._writer = opens(settings)

    def told(self, until: Mapping[Source, int]) -> None:
        """Declares that letters of positions below `until` are in the topic, so that they are not written again."""
        self._told = until

    def write(self, cuts: Sequence[Cut]) -> int:
        """Writes the micro-batches and the dead letters of cuts, acknowledged when it returns.

        If the outcome of a transaction is unknown, its records are written again with a new writer, which first ends
        the old transaction. Records that were already visible then occur twice, with the same positions, as after a
        crash.

        Returns:
            The number of micro-batches.

        Raises:
            MicroBatchError: A row is larger than a record may be.
            LogError: The cluster refused; or the broker is unreachable and the stream was asked to stop.
        """
        values = [value for cut in cuts for value in self._encoded(cut)]
        dead = (letter for cut in cuts for piece in cut.pieces for letter in piece.batch.dead)
        letters = [letter for letter in dead if letter.offset >= self._told.get(letter.source, 0)]
        created_ms = cuts[-1].created_ms
        while True:
            try:
                with self._writer.transaction():
                    self._send(values, created_ms)
                    send_letters(self._writer, self._settings.kafka.dead_letters_topic, letters, created_ms)
                    killpoints.reach("stream.sent")
                return len(values)
            except UnreachableBroker as error:
                if self._stopping.is_set():
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                self._reopen()

    def write_once(self, cut: Cut) -> None:
        """Writes the micro-batches of a cut, acknowledged when it returns; does not wait for an unreachable broker.

        Raises:
            UnreachableBroker: No broker answered in time.
            LogError: The cluster refused.
        """
        with self._writer.transaction():
            self._send(self._encoded(cut), cut.created_ms)

    def close(self) -> None:
        """Closes the connection; an open transaction is discarded."""
        self._writer.close()

    def _encoded(self, cut: Cut) -> list[bytes]:
        stream, desired = self._settings.stream, self._desired
        limits = stream.cut_rows, stream.max_record_bytes
        return encode_cut(cut, self._spec, self._salt, *limits, desired.mask.generation, desired.log_epoch)

    def _send(self, values: Sequence[bytes], created_ms: int) -> None:
        for value in values:
            self._writer.send(self._settings.kafka.microbatches_topic, 0, None, value, [], created_ms)

    def _reopen(self) -> None:
        """Opens a new writer as soon as a broker answers."""
        self._writer.close(0.0)
        while True:
            try:
                self._writer = self._opens(self._settings)
                break
            except UnreachableBroker:
                if self._stopping.is_set():
                    raise
        logger.info("the broker is back")
