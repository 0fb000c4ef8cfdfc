"""The versions that a directory holds, by the names of its entries, listed again only when it changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from state.registry.directory import usable

# A directory that changes again within one tick of the file system's clock keeps its time.
_TICK_NS = 100_000_000


class Numbers:
    """The versions in one directory, whose entries are named by number, or by number and parent: `<number>-<parent>`.

    Args:
        path: The directory; one that is missing holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed_ns = -1
        self._good: tuple[int, ...] = ()
        self._among: frozenset[int] = frozenset()
        self._oldest_parents: dict[int, int] = {}
        self._last = 0

    def good(self) -> tuple[int, ...]:
        """The complete versions, ascending."""
        self._refresh()
        return self._good

    def __contains__(self, version: int) -> bool:
        """Whether a complete version is here."""
        self._refresh()
        return version in self._among

    def oldest_parent(self, version: int) -> int | None:
        """Of the entries of a version the lowest parent that one is named by; None where none is."""
        self._refresh()
        return self._oldest_parents.get(version)

    def last(self) -> int:
        """The highest number ever seen here, those set aside included."""
        self._refresh()
        return self._last

    def _refresh(self) -> None:
        with usable("be listed"):
            try:
                changed_ns = self.path.stat().st_mtime_ns
                if changed_ns == self._changed_ns:
                    return
                names = os.listdir(self.path)  # noqa: PTH208 - thousands of names, polled
            except FileNotFoundError:
                self._good, self._among, self._oldest_parents, self._changed_ns = (), frozenset(), {}, -1
                return
        parents: dict[int, int] = {}
        good: set[int] = set()
        for name in names:
            number, _, parent = name.partition("-")
            if not number.isdecimal() or not (parent.isdecimal() or not parent):
                continue
            good.add(int(number))
            if parent:
                parents[int(number)] = min(int(parent), parents.get(int(number), int(parent)))
        self._good, self._among, self._oldest_parents = tuple(sorted(good)), frozenset(good), parents
        self._last = max((self._last, *(int(name.partition(".")[0].partition("-")[0]) for name in names)))
        self._changed_ns = changed_ns if time.time_ns() - changed_ns > _TICK_NS else -1
