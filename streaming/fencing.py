"""The transactional id of a stream: Kafka fences zombies of this stream with it, but no stream of another deployment.

The id is derived from the topics' ids and the consumer group. So two deployments on one Kafka have different ids,
whatever their names. A restarted stream, here or from a copy of its state, keeps its id.

The last id is stored next to the histories. It differs if a topic was recreated, if the group was renamed, or if the
release was 0.1.0, whose id was the same in every deployment. Then the writer of the last id is fenced first: its open
transaction ends, and a zombie with that id cannot write.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from state.config.settings import Settings
from state.disk import files as durable
from state.layout import HISTORIES, WRITER
from state.log import Log, Writer

logger = logging.getLogger(__name__)


def transactional_id(clicks: str, microbatches: str, group: str, shard: int = 0) -> str:
    """The id with which Kafka fences a zombie.

    >>> transactional_id("ab" * 16, "cd" * 16, "springtide-stream")
    'springtide-stream-91d1bb5e31a6fa6b-0'

    Args:
        clicks: Id of the topic of clicks.
        microbatches: Id of the topic of micro-batches.
        group: The consumer group.
        shard: 0; another number for a shard of an earlier release.
    """
    digest = hashlib.sha256("\n".join((clicks, microbatches, group)).encode()).hexdigest()
    return f"springtide-stream-{digest[:16]}-{shard}"


def id_of_first_release(shard: int = 0) -> str:
    """The id that 0.1.0 used.

    >>> id_of_first_release()
    'springtide-stream-0'
    """
    return f"springtide-stream-{shard}"


def open_writer(settings: Settings, log: Log | None = None) -> Writer:
    """Opens the writer of the stream; this ends a predecessor's open transaction, and fences the predecessor.

    Args:
        settings: The effective settings.
        log: Where to write; by default the cluster of the settings.

    Raises:
        UnknownTopic: The topic of clicks or of micro-batches is missing.
        UnreachableBroker: No broker answered in time.
        LogError: The cluster refused.
        OSError: The id cannot be stored.
    """
    kafka, log = settings.kafka, log or Log(settings.kafka)
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
    """Stores the id of 0.1.0 if that release left histories; must run before new histories are created.

    Raises:
        OSError: It cannot be written.
    """
    if (folder / HISTORIES).exists() and not (folder / WRITER).exists():
        keep_id(folder, id_of_first_release())


def last_id(folder: Path) -> str | None:
    """The last id of the stream of `folder`; None if it never ran."""
    place = folder / WRITER
    return place.read_text().strip() if place.exists() else None


def keep_id(folder: Path, mine: str) -> None:
    """Stores the id; durable when this returns.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / WRITER, mine.encode())
