"""Handles the histories of former shards: earlier releases split the partitions that one stream reads now.

A stream never continues next to such histories. A deployment that had one stream has none of them. Otherwise a rebuild
creates one store of all partitions. It ends the open transactions of the shards' writers and fences them, also those on
other hosts. Once the new store is in place, theirs are set aside.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore
from state.log import Log
from streaming import takeover
from streaming.fencing import id_of_first_release, last_id, transactional_id

logger = logging.getLogger(__name__)


def former_shards(state: Path) -> list[Path]:
    """The directories of all shards but the first that still have histories, by name."""
    return [one.parent for one in layout.streams(state) if one.parent != layout.stream(state)]


def refuse_beside(state: Path) -> None:
    """Refuses to continue while histories of former shards exist.

    Raises:
        CorruptStore: There are such histories.
    """
    if found := former_shards(state):
        raise CorruptStore(
            f"{', '.join(map(str, found))}: histories of partitions that one stream reads now",
            "stop the streams of all shards, and run `springtide rebuild-history`: it makes one store of all partitions",
        )


@contextmanager
def replaced(settings: Settings, log: Log) -> Iterator[None]:
    """Wraps a rebuild: locks the shards' directories, fences their writers, and then sets their stores aside.

    Raises:
        LockHeld: A shard's stream runs here.
        LogError: Kafka is unreachable, or a topic is missing.
    """
    found = former_shards(settings.state_dir)
    with ExitStack() as stack:
        for folder in found:
            stack.enter_context(DirectoryLock(folder))
        if found:
            _fence(settings, log, found)
        yield
        for folder in found:
            aside = takeover.set_aside(folder / layout.HISTORIES)
            logger.info("%s is part of the rebuilt histories; the store before them is %s", folder, aside)


def _fence(settings: Settings, log: Log, found: list[Path]) -> None:
    """Takes over the transactional id of each possible shard; a shard beyond the number of partitions read nothing."""
    kafka = settings.kafka
    with log.topics() as topics:
        clicks, microbatches = topics.describe(kafka.clicks_topic), topics.describe(kafka.microbatches_topic)
    ids = {last_id(folder) or id_of_first_release(int(folder.name.rpartition("-")[2])) for folder in found}
    ids |= {
        transactional_id(clicks.topic_id, microbatches.topic_id, kafka.group, shard)
        for shard in range(1, clicks.partitions)
    }
    for one in sorted(ids):
        log.writer(one).close()
