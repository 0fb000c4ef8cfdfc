"""Opens the histories of a stream or of a serving host for their writer, in memory if there is room."""

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
    """Opens the histories in `folder`, whose lock this process holds; closing them saves them to the disk.

    Args:
        settings: The effective settings.
        part: `stream` or `serving`: the part whose share of the disk limits them, even in memory.
        folder: The directory of the stream, or of serving.

    Raises:
        CorruptStore: A power cut removed them or may have damaged them.
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
    """Like `open_histories`, but replaces unusable histories by empty ones: they are derived from the training log.

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
