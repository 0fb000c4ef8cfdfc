"""Opens the histories of a stream or of a serving host for their writer: in memory where there is room."""

from __future__ import annotations

import logging
from pathlib import Path

from state.config.settings import Settings
from state.disk import memory_place
from state.disk.memory_store import enter
from state.errors import CorruptStore
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.storage.shares import map_bytes

logger = logging.getLogger(__name__)


def open_histories(settings: Settings, part: str, folder: Path) -> HistoryStore:
    """The histories in `folder`, whose lock this process holds; closing them leaves them on the disk.

    Args:
        settings: The effective settings.
        part: `stream` or `serving`, whose share of the disk limits them, wherever they lie.
        folder: The directory of a shard, or of serving.

    Raises:
        CorruptStore: A power cut took them or may have damaged them.
        StoreError: They cannot be opened.
        OSError: The disk refused.
    """
    link, memory = folder / HISTORIES, settings.storage.memory_dir
    for gone in memory_place.remove_forgotten(memory):
        logger.info("%s is removed: its state directory is gone, or has its store elsewhere", gone)
    place = enter(link, memory)
    if place.why:
        logger.warning(
            "the histories lie on the disk, %s: %s. Each page that a click changes is written there, at 5,000 clicks/s "
            "some 8 GB an hour",
            link,
            place.why,
        )
    return HistoryStore(link, settings.features.history, map_bytes(settings, part, HISTORIES, link))


def open_anew(settings: Settings, part: str, folder: Path) -> HistoryStore:
    """As `open_histories`; where they cannot be used, empty ones in their place: they are a copy of the training log.

    Raises:
        StoreError: They cannot be opened.
        OSError: The disk refused.
    """
    try:
        return open_histories(settings, part, folder)
    except CorruptStore as error:
        logger.warning("the histories at %s are begun anew from %s: %s", folder, HistoryStore.origin, error.what)
        memory_place.forget(folder / HISTORIES)
        return open_histories(settings, part, folder)
