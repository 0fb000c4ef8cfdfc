"""Locates the directories of each version, by how it is kept, and lists which versions exist.

`Numbers` lists the versions of one directory from the names of its entries. It lists them again only when the
directory changed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from state import layout
from state.errors import CorruptVersion
from state.registry.directory import Directory, usable
from state.registry.manifest import Kind, Manifest

# A directory that changes again within one tick of the file system's clock keeps its modification time.
_TICK_NS = 100_000_000

_FOLDERS: dict[Kind, str] = {
    "delta": layout.VERSIONS,
    "merged": layout.MERGED,
    "base": layout.BASES,
    "recent": layout.RECENT,
}


class Numbers:
    """The versions in one directory, whose entries are named by number, or by number and parent: `<number>-<parent>`.

    Args:
        path: The directory; a missing one counts as empty.
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
        """The lowest parent in the names of a version's entries; None if no name has one."""
        self._refresh()
        return self._oldest_parents.get(version)

    def last(self) -> int:
        """The highest number ever seen here, including damaged versions that were set aside."""
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


def appears(temporary: Path, final: Path) -> bool:
    """Moves a version from `tmp/` to its final path by one rename; returns False if the number is taken."""
    try:
        temporary.rename(final)
    except OSError:
        if final.is_dir():
            return False
        raise
    return True


class BadPart(CorruptVersion):
    """A corrupt version, and which of its directories it is."""

    def __init__(self, part: Path, version: int, message: str) -> None:
        super().__init__(f"version {version}: {message}", "roll back to another version")
        self.part = part
        self.version = version


class Folders(Directory):
    """The directories of the versions of one registry."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, *_FOLDERS.values())
        self._numbers = {kind: Numbers(path / name) for kind, name in _FOLDERS.items()}

    def versions(self) -> list[int]:
        """The numbers of all durable versions, ascending; not all need be of control's epoch."""
        return sorted({*self.deltas(), *self.bases()})

    def deltas(self) -> tuple[int, ...]:
        """The durable versions whose delta to an older version is kept, ascending."""
        merged = self._numbers["merged"].good()
        return tuple(sorted({*self._numbers["delta"].good(), *merged})) if merged else self._numbers["delta"].good()

    def bases(self) -> tuple[int, ...]:
        """The versions whose full state is kept, ascending."""
        return self._numbers["base"].good()

    def recents(self) -> tuple[int, ...]:
        """The versions that can be followed but not rolled back to, ascending; some of them are durable too."""
        return self._numbers["recent"].good()

    def folder(self, kind: Kind, version: int, parent: int | None = None) -> Path:
        """The directory of a version that is kept as `kind`; for a merged one `parent` is part of the name."""
        name = f"{version:012d}-{parent or 0:012d}" if kind == "merged" else f"{version:012d}"
        return self.path / _FOLDERS[kind] / name

    def folder_of(self, part: Manifest) -> Path:
        """The directory of the files that a manifest names."""
        return self.folder(part.kind, part.version, part.parent)

    def next_number(self) -> int:
        """The number of the next version: numbers only grow, over all epochs and both lifetimes."""
        return 1 + max(numbers.last() for numbers in self._numbers.values())

    def _places(self, version: int, kind: Kind | None) -> list[Path]:
        """The directories of a version, the best first: a merged delta is read in one piece."""
        places = []
        parent = self._numbers["merged"].oldest_parent(version)
        if kind in (None, "delta", "merged") and parent is not None:
            places.append(self.folder("merged", version, parent))
        kinds: tuple[Kind, ...] = ("delta", "base") if kind is None else (kind,)
        return places + [
            self.folder(one, version) for one in kinds if one != "merged" and version in self._numbers[one]
        ]

    def _delta_folders(self, version: int) -> list[Path]:
        """All directories of a version's delta, the effective one first."""
        first = self._places(version, "delta")
        merged = (self.path / layout.MERGED).glob(f"{version:012d}-*")
        return first + sorted(folder for folder in merged if folder not in first and "." not in folder.name)

    def _not_kept(self, version: int) -> tuple[str, str]:
        """The message for a version that cannot be rolled back to, and the version to use instead."""
        if version in self._numbers["recent"]:
            said = f"version {version} can be followed and not gone back to: it is not durable, the log makes it again"
        else:
            said = f"version {version} is not kept in {self.path}"
        return said, self._nearest(version)

    def _nearest(self, version: int) -> str:
        kept = self.versions()
        nearest = [
            *[number for number in kept if number < version][-1:],
            *[number for number in kept if number > version][:1],
        ]
        return f"take {' or '.join(map(str, nearest))}" if nearest else "there is none yet"
