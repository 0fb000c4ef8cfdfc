"""Lets a shard's histories forget erased users before a click is read, and tells the registry how far that is."""

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
    """Tells how far erasures are taken into account; returns whether it is told. Where not, `say` is told why."""
    try:
        report(registry, told)
    except OSError as error:
        say(f"how far erasures are taken into account cannot be told in {registry}: {error}")
        return False
    return True


def is_due(store: HistoryStore, erased: Erased, now_ms: int) -> bool:
    """Whether stores of this shard are to be written anew, so that free pages have nothing of erased users."""
    told = forgotten(store)
    return told.pages < erased.last and now_ms >= told.paged_ms + PAGES_MS


def take_up(store: HistoryStore, registry: Path, erased: Erased, now_ms: int) -> float | None:
    """Lets `store` forget, and reports it; a crash in between leaves the same to be done.

    Args:
        store: The shard's, back on its line of the log.
        registry: Where it is told.
        erased: All erasures.
        now_ms: Wall clock.

    Returns:
        In how many seconds the store is to be written anew; None where it need not be.

    Raises:
        CorruptStore: A row that waits cannot be read.
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
    # Where there was no room it is tried again later.
    return (due_ms - now_ms if due_ms > now_ms else PAGES_MS) / 1000
