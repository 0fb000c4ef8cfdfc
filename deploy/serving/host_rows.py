"""The host's row store and the follower that fills it; where memory stays full both move to the disk, and answers go on meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from deploy.serving.following import VersionFollower
from state.config.settings import Settings
from state.disk import memory_place as place
from state.disk.memory_place import Place
from state.errors import StoreError, StoreFull
from state.layout import PROGRAMS, ROWS
from state.metrics import ApplierMetrics
from state.ranking.configured import crosses_of
from state.registry.registry import Registry
from state.rows.store import RowStore
from state.storage.shares import SERVING, map_bytes

FULL_S = 5.0
"""How long memory may be full before the rows move to the disk: others in it may make room."""

_log = logging.getLogger(__name__)


class PlacedRows(NamedTuple):
    """A row store, where it lies, and what fills it."""

    place: Place
    store: RowStore
    versions: VersionFollower


class HostRows:
    """The rows that answers of this host read; used by one thread, with the lock of the serving directory held.

    Args:
        settings: Of the whole system.
        metrics: Of the applier.
        now_ms: The wall clock.
        clock_s: A clock that never goes back.

    Raises:
        StoreError: The store cannot be opened.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: ApplierMetrics,
        now_ms: Callable[[], int],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._metrics, self._now_ms, self._clock_s = settings, metrics, now_ms, clock_s
        self._link, memory = settings.serving_dir / ROWS, settings.storage.memory_dir
        for gone in place.remove_forgotten(memory):
            _log.info("%s is removed: its state directory is gone, or has its store elsewhere", gone)
        found = place.choose(self._link, settings.serving.rows_dir, memory)
        place.settle(self._link, found)
        if found.why:
            _log.warning("the rows lie on the disk, %s: %s. Each version is written there", found.path, found.why)
        self._rows = self._open(found)
        self._moving: PlacedRows | None = None
        self._full_since_s: float | None = None

    @property
    def versions(self) -> VersionFollower:
        """What fills the store that answers read."""
        return self._rows.versions

    def step(self) -> bool:
        """One round of following and of forgetting old versions; says whether there may be more to do at once.

        Raises:
            StoreFull: There is no room now; nothing was changed, and the next call tries again.
            RegistryError, OSError: The registry cannot be followed now.
        """
        if self._moving is not None:
            return self._move(self._moving)
        try:
            more = self._rows.versions.step()
            self._rows.versions.sweep()
        except StoreFull as error:
            # What a sweep gives back may be all that is missing.
            with suppress(StoreFull):
                self._rows.versions.sweep()
            if not self._stays_full():
                raise
            found = place.on_disk(self._link, f"memory is full: {error.what}")
            _log.warning("the rows move to the disk, %s: %s. Answers go on meanwhile", found.path, found.why)
            self._moving = self._open(found)
            return True
        self._full_since_s = None
        return more

    def keep_house(self) -> None:
        """Frees what readers that died have left, and measures; every second or so."""
        self._rows.store.clear_stale_readers()
        used = {False: 0, True: 0, self._rows.place.in_memory: place.size(self._rows.place.path)}
        self._metrics.rows_bytes.labels("memory").set(used[True])
        self._metrics.rows_bytes.labels("disk").set(used[False])

    def close(self) -> None:
        """Closes the store."""
        if self._moving is not None:
            with suppress(StoreError):
                self._moving.store.close()
        self._rows.store.close()

    def _stays_full(self) -> bool:
        """Whether the rows lie in memory because nobody said otherwise, and it has been full for a while."""
        if self._settings.serving.rows_dir or not self._rows.place.in_memory:
            return False
        now_s = self._clock_s()
        self._full_since_s = now_s if self._full_since_s is None else self._full_since_s
        return now_s - self._full_since_s >= FULL_S

    def _move(self, to: PlacedRows) -> bool:
        """Fills the store on the disk, and lets answers turn to it once it is where they want to be."""
        more = to.versions.step()
        if more or to.versions.served is None:
            return more
        place.settle(self._link, to.place, anew=False)
        before, self._rows, self._moving, self._full_since_s = self._rows, to, None, None
        # Its directory is gone.
        with suppress(StoreError):
            before.store.close()
        _log.info("the rows lie on the disk now, %s", to.place.path)
        return False

    def _open(self, found: Place) -> PlacedRows:
        settings = self._settings
        most = settings.serving.map_gb << 30 if found.in_memory else map_bytes(settings, SERVING, ROWS, found.path)
        store = RowStore.open_anew(found.path, most)
        return PlacedRows(
            found,
            store,
            VersionFollower(
                Registry(settings.registry_dir),
                store,
                settings.serving_dir / PROGRAMS,
                self._metrics,
                settings.serving.keep_s,
                self._now_ms,
                crosses_of(settings),
            ),
        )
