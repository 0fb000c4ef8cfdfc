"""Erases users from a host's histories, and reports the progress to the registry; `versions.py` handles the row store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from state.disk.files import HOST
from state.errors import StoreFull
from state.features.erased import Erased
from state.history.store import ForgottenUsers, HistoryStore
from state.process import killpoints
from state.process.said_once import SaidOnce
from state.registry.erasing import ErasureReport, report

_log = logging.getLogger(__name__)


def name_of(folder: Path, part: str = "serving") -> str:
    """Returns the name under which a host reports; it contains the host name and a digest of the path.

    >>> name_of(Path("/srv/state/serving")).startswith(f"serving-{HOST}-")
    True
    """
    return f"{part}-{HOST}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"


class HostErasures:
    """Applies erasures to the histories of one host. Used by the thread that writes the histories.

    `rows` returns the number of the erasure up to which the row store is done.
    """

    def __init__(
        self,
        folder: Path,
        registry: Path,
        histories: HistoryStore,
        rows: Callable[[], int],
        now_ms: Callable[[], int],
    ) -> None:
        self._folder, self._registry, self._histories = folder, registry, histories
        self._rows, self._now_ms = rows, now_ms
        self._done, self._reported = histories.forgotten, ErasureReport("", "", "", -1, -1)
        self._warn_once = SaidOnce(_log.warning)

    def apply(self, erased: Erased, may_compact: bool = True) -> bool:
        """Erases newly erased users, and reports the progress if it has changed; returns whether users were erased.

        It is cheap if there is nothing to do. With `may_compact` False, because a view of the histories is open, they
        are not compacted yet.

        Raises:
            StoreFull: Nothing was changed.
        """
        is_new = self._done.through < erased.last
        if is_new:
            self._done = self._histories.forget(erased)
            killpoints.reach("follow.forgotten")
            _log.info("erasure %d: users are forgotten in the histories", erased.last)
        due_ms = self._done.due_ms()
        if may_compact and due_ms is not None and self._now_ms() >= due_ms:
            try:
                self._done = self._histories.compact_if_due(self._now_ms())
                self._warn_once.clear()
            except StoreFull as full:
                self._warn_once(f"free pages keep bytes of erased users: {full}")
        self._report(self._done)
        return is_new

    def _report(self, forgotten: ForgottenUsers) -> None:
        through = min(forgotten.through, self._rows())
        if (through, forgotten.pages) == (self._reported.through, self._reported.pages):
            return
        name, pages = name_of(self._folder), min(forgotten.pages, through)
        progress = ErasureReport(name, HOST, str(self._folder), through, pages, 0, self._now_ms())
        try:
            report(self._registry, progress)
        except OSError as error:
            self._warn_once(f"the progress of erasures cannot be reported in {self._registry}: {error}")
            return
        self._reported = progress
