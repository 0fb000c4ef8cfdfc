"""Writes the stream's micro-batches and dead letters in acknowledged transactions, fenced against zombies.

The transactional id is derived from the topics' ids and the consumer group. The last id is stored next to the
histories. If it differs, the writer of the last id is fenced first.

A dead letter has the coordinates of a refused record and the reason in its headers, and the record's position as key.
It contains neither that record's key, which is a user's id, nor its value. A dead letter may occur more than once;
readers count distinct keys.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from state.attributes.follower import Report
from state.config.sections import Kafka
from state.config.settings import Settings
from state.disk import files as durable
from state.errors import UnreachableBroker
from state.events.decoding import DeadLetter
from state.layout import HISTORIES, WRITER
from state.log import Log, Writer
from state.metrics import StreamMetrics
from state.positions import Source
from state.process import killpoints
from streaming.rows import Cut, Encoding, encode_cut

logger = logging.getLogger(__name__)


def transactional_id(clicks: str, microbatches: str, group: str, shard: int = 0) -> str:
    """The id with which Kafka fences a zombie, from the ids of the two topics and the consumer group.

    >>> transactional_id("ab" * 16, "cd" * 16, "springtide-stream")
    'springtide-stream-91d1bb5e31a6fa6b-0'

    Shards other than 0 exist only in earlier releases.
    """
    digest = hashlib.sha256("\n".join((clicks, microbatches, group)).encode()).hexdigest()
    return f"springtide-stream-{digest[:16]}-{shard}"


def id_of_first_release(shard: int = 0) -> str:
    """The transactional id that release 0.1.0 used."""
    return f"springtide-stream-{shard}"


def open_writer(settings: Settings, log: Log | None = None) -> Writer:
    """Opens the writer of the stream; this ends a predecessor's open transaction, and fences the predecessor.

    Raises:
        UnknownTopic: The topic of clicks or of micro-batches is missing.
        LogError: No broker answered in time, or the cluster refused.
        OSError: The id cannot be stored.
    """
    kafka, log = settings.kafka, log or Log(settings.kafka)
    with log.topics() as topics:
        clicks = topics.describe(kafka.clicks_topic).topic_id
        microbatches = topics.describe(kafka.microbatches_topic).topic_id
    own_id = transactional_id(clicks, microbatches, kafka.group)
    before = last_id(settings.stream_dir)
    if before not in (None, own_id):
        logger.info("fencing a stream with the transactional id %s, which this one had before", before)
        log.writer(before).close()
    writer = log.writer(own_id)
    if before != own_id:
        keep_id(settings.stream_dir, own_id)
    return writer


def note_first_release(folder: Path) -> None:
    """Stores the id of 0.1.0 if that release left histories; must run before new histories are created."""
    if (folder / HISTORIES).exists() and not (folder / WRITER).exists():
        keep_id(folder, id_of_first_release())


def last_id(folder: Path) -> str | None:
    """The last id of the stream of `folder`; None if it never ran."""
    path = folder / WRITER
    return path.read_text().strip() if path.exists() else None


def keep_id(folder: Path, own_id: str) -> None:
    """Stores the id; durable when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / WRITER, own_id.encode())


def send_records(
    writer: Writer, kafka: Kafka, values: Sequence[bytes], letters: Sequence[DeadLetter], at_ms: int | None = None
) -> None:
    """Passes micro-batches and dead letters to `writer`; they are acknowledged with its flush or transaction.

    `at_ms` is their timestamp; None for the time of writing.
    """
    for value in values:
        writer.send(kafka.microbatches_topic, 0, None, value, [], at_ms)
    for letter in letters:
        topic_id, partition, offset = letter.source.topic_id, letter.source.partition, letter.offset
        headers = {"reason": letter.reason, "topic_id": topic_id, "partition": partition, "offset": offset}
        encoded = [(name, str(value).encode()) for name, value in headers.items()]
        key = f"{topic_id}:{partition}:{offset}".encode()
        writer.send(kafka.dead_letters_topic, 0, key, b"", encoded, at_ms)


def report_to(kafka: Kafka, metrics: StreamMetrics) -> Report:
    """Returns a function that writes refused records of attributes as dead letters, acknowledged, and counts them."""

    def report(bad: Sequence[DeadLetter]) -> None:
        with Writer(kafka) as writer:
            send_records(writer, kafka, (), bad)
            writer.flush()
        for letter in bad:
            metrics.dead_letters.labels(str(letter.reason)).inc()

    return report


class StreamWriter:
    """Writes cuts, each call in one transaction. Not thread-safe.

    Args:
        stopping: Set once the stream was asked to stop; from then on the writer does not wait for an outage to end.
        opens: Opens a fencing writer, here and after each outage.

    Raises:
        LogError: See `open_writer`.
    """

    def __init__(
        self,
        settings: Settings,
        encoding: Encoding,
        stopping: threading.Event,
        opens: Callable[[Settings], Writer] = open_writer,
    ) -> None:
        self._settings, self._encoding, self._stopping, self._opens = settings, encoding, stopping, opens
        self._written_dead_letters: Mapping[Source, int] = {}
        self._writer = opens(settings)

    def skip_dead_letters(self, until: Mapping[Source, int]) -> None:
        """Marks dead letters of positions below `until` as already in the topic, so that they are not written again."""
        self._written_dead_letters = until

    def write(self, cuts: Sequence[Cut], patient: bool = True) -> int:
        """Writes the micro-batches and the dead letters of cuts, acknowledged when it returns.

        If the outcome of a transaction is unknown, its records are written again with a new writer, which first ends
        the old transaction. Records that were already visible then occur twice, with the same positions, as after a
        crash. Without `patient`, an unreachable broker is an error.

        Returns:
            The number of micro-batches.

        Raises:
            MicroBatchError: A row is larger than a record may be.
            LogError: The cluster refused; or the broker is unreachable and the stream was asked to stop.
        """
        values = [value for cut in cuts for value in encode_cut(cut, self._encoding)]
        dead = (letter for cut in cuts for piece in cut.pieces for letter in piece.batch.dead)
        letters = [letter for letter in dead if letter.offset >= self._written_dead_letters.get(letter.source, 0)]
        while True:
            try:
                with self._writer.transaction():
                    send_records(self._writer, self._settings.kafka, values, letters, cuts[-1].created_ms)
                    killpoints.reach("stream.sent")
                return len(values)
            except UnreachableBroker as error:
                if self._stopping.is_set() or not patient:
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                self._reopen()

    def close(self) -> None:
        """Closes the connection; an open transaction is discarded."""
        self._writer.close()

    def _reopen(self) -> None:
        self._writer.close(0.0)
        while True:
            try:
                self._writer = self._opens(self._settings)
                break
            except UnreachableBroker:
                if self._stopping.is_set():
                    raise
        logger.info("the broker is back")
