"""Removes erased users from a shard's histories before any click is read, and reports the progress to the registry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from state.disk.files import HOST
from state.errors import StoreFull
from state.features.erased import Erased
from state.history.forgetting import PAGES_MS, forget, forgotten, write_anew
from state.history.store import HistoryStore
from state.process import killpoints
from state.registry.erasing import ErasureReport, report

logger = logging.getLogger(__name__)


def tell(registry: Path, told: ErasureReport, say: Callable[[str], None]) -> bool:
    """Reports to the registry which erasures were applied; returns whether it succeeded, and calls `say` if not."""
    try:
        report(registry, told)
    except OSError as error:
        say(f"how far erasures are taken into account cannot be told in {registry}: {error}")
        return False
    return True


def is_due(store: HistoryStore, erased: Erased, now_ms: int) -> bool:
    """Whether the stores of this shard must be rewritten, so that free pages contain no data of erased users."""
    told = forgotten(store)
    return told.pages < erased.last and now_ms >= told.paged_ms + PAGES_MS


def take_up(store: HistoryStore, registry: Path, erased: Erased, now_ms: int) -> float | None:
    """Removes erased users from `store`, and reports it; after a crash in between, the same work is due again.

    Args:
        store: The shard's store, already rolled back to its branch of the log.
        registry: Where to report.
        erased: All erasures.
        now_ms: Wall clock.

    Returns:
        In how many seconds the store must be rewritten; None if it need not be.

    Raises:
        CorruptStore: A waiting row cannot be read.
        StoreFull: Nothing was changed.
    """
    if not erased:
        return None
    before, told = forgotten(store), forget(store, erased)
    killpoints.reach("stream.forgotten")
    if told.through > before.through:
        logger.info("erasure %d: users are forgotten here", told.through)
    began_s = time.monotonic()
    try:
        told = write_anew(store, now_ms)
    except StoreFull as full:
        logger.warning("free pages keep bytes of erased users: %s", full)
    if told.pages > before.pages:
        logger.info("the histories are written anew, without free pages, in %.1f s", time.monotonic() - began_s)
    shard = store.path.parent
    tell(registry, ErasureReport(shard.name, HOST, str(shard), told.through, told.pages, 0, now_ms), logger.warning)
    due_ms = told.due_ms()
    if due_ms is None:
        return None
    # If there was no space, it is tried again later.
    return (due_ms - now_ms if due_ms > now_ms else PAGES_MS) / 1000
