"""The transactional id of a stream, by which Kafka fences a stream that was thought dead, and no stream of another deployment.

The id is made of the topics' ids and the consumer group: two
deployments on one Kafka have two, whatever they are called, and a stream that
is started again, here or from a copy of its state, has the one it had. The last
id is kept beside the histories. Where it was another (a topic was made again,
the group renamed, or the release was 0.1.0, whose id was the same in every
deployment), its writer is fenced first: what it left open ends, and a zombie
of then cannot write.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from state.config.settings import Settings
from state.disk import files as durable
from state.layout import HISTORIES, WRITER
from state.log import KafkaLog, Log, LogWriter

logger = logging.getLogger(__name__)


def transactional_id(clicks: str, microbatches: str, group: str, shard: int = 0) -> str:
    """By which Kafka fences a zombie.

    >>> transactional_id("ab" * 16, "cd" * 16, "springtide-stream")
    'springtide-stream-91d1bb5e31a6fa6b-0'

    Args:
        clicks: Id of the topic of clicks.
        microbatches: Id of the topic of micro-batches.
        group: The consumer group.
        shard: 0; another one for what an earlier release called a shard.
    """
    digest = hashlib.sha256("\n".join((clicks, microbatches, group)).encode()).hexdigest()
    return f"springtide-stream-{digest[:16]}-{shard}"


def id_of_first_release(shard: int = 0) -> str:
    """The id that 0.1.0 had.

    >>> id_of_first_release()
    'springtide-stream-0'
    """
    return f"springtide-stream-{shard}"


def open_writer(settings: Settings, log: Log | None = None) -> LogWriter:
    """The writer of the stream; it ends what a predecessor left open, and fences it.

    Args:
        settings: The effective settings.
        log: Where it writes; the cluster of the settings where none is given.

    Raises:
        UnknownTopic: The topic of clicks or of micro-batches is missing.
        UnreachableBroker: No broker answered in time.
        LogError: The cluster refused.
        OSError: The id cannot be kept.
    """
    kafka, log = settings.kafka, log or KafkaLog(settings.kafka)
    with log.topics() as topics:
        clicks, microbatches = (
            topics.describe(name).topic_id for name in (kafka.clicks_topic, kafka.microbatches_topic)
        )
    mine = transactional_id(clicks, microbatches, kafka.group)
    before = last_id(settings.stream_dir)
    if before not in (None, mine):
        logger.info("fencing a stream with the transactional id %s, which this one had before", before)
        log.writer(before).close()
    writer = log.writer(mine)
    if before != mine:
        keep_id(settings.stream_dir, mine)
    return writer


def note_first_release(folder: Path) -> None:
    """Notes the id of 0.1.0 where that release left histories; called before anybody makes any.

    Raises:
        OSError: It cannot be written.
    """
    if (folder / HISTORIES).exists() and not (folder / WRITER).exists():
        keep_id(folder, id_of_first_release())


def last_id(folder: Path) -> str | None:
    """The id that the stream of `folder` had last; None for one that never ran."""
    place = folder / WRITER
    return place.read_text().strip() if place.exists() else None


def keep_id(folder: Path, mine: str) -> None:
    """Keeps the id; durable when this returns.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WRITER}.tmp"
    temporary.unlink(missing_ok=True)
    durable.write(temporary, mine.encode())
    temporary.replace(folder / WRITER)
    durable.sync_directory(folder)
