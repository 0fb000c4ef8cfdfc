"""The version numbers that a directory holds, listed again only when it changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from state.registry.directory import usable

# A directory that changes again within one tick of the file system's clock keeps its time.
_TICK_NS = 100_000_000


class Numbers:
    """The version numbers in one directory, whose entries are named by them.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed_ns = -1
        self._good: tuple[int, ...] = ()
        self._last = 0

    def good(self) -> tuple[int, ...]:
        """The complete versions, ascending."""
        self._refresh()
        return self._good

    def last(self) -> int:
        """The highest number ever seen here, those set aside included."""
        self._refresh()
        return self._last

    def _refresh(self) -> None:
        with usable("be listed"):
            changed_ns = self.path.stat().st_mtime_ns
            if changed_ns == self._changed_ns:
                return
            names = os.listdir(self.path)  # noqa: PTH208 - thousands of names, polled
        self._good = tuple(sorted(int(name) for name in names if name.isdecimal()))
        self._last = max((self._last, *(int(name.partition(".")[0]) for name in names)))
        self._changed_ns = changed_ns if time.time_ns() - changed_ns > _TICK_NS else -1
