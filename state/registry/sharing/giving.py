"""Pushes the versions of a shared registry's trainer to the object store: recent ones in packs, durable ones by file.

Recent versions are sent as soon as they exist and the pack before is sent. A pack
has several versions, and there is at most one pack per `share_s`. A durable
version is sent with its program: its files, its manifest, the catalogue. So it is
visible completely or not at all. A version that is deleted leaves the catalogue first.

If a request fails, the version stays here, durable, and is sent once the store
can be reached again. Training and publishing on this host never wait for it.

Before anything takes effect in the store, the claim is checked. A newer claim of
another trainer ends this one (`claims.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from state import layout
from state.errors import CorruptVersion, UnknownVersion
from state.places.place import FilePlace
from state.process import killpoints
from state.registry import manifest
from state.registry.brought_files import MANIFEST, VERSIONED
from state.registry.directory import file_bytes, usable
from state.registry.registry import Registry
from state.registry.sharing import catalog as catalogs
from state.registry.sharing import claims
from state.registry.sharing import pack as packs
from state.registry.sharing.catalog import Catalog

KEPT_PACKS_S = 60.0
"""How long a pack is kept in the store; the newest one stays until there is another."""
FENCE_S = 5.0
MOST_IN_PACK = 64
TICK_NS = 100_000_000
"""A directory that changes twice within one tick of the file system's clock keeps its modification time."""


class RecentSender:
    """Pushes recent versions. Use it from one thread only.

    Args:
        path: The registry's directory; the caller holds the trainer's lock.
        place: The object store.
        claim: The claim number under which this trainer owns the versions.
        serial: Returns the serial number of the newest catalogue.
        elapsed: Monotonic seconds.
    """

    def __init__(
        self,
        path: Path,
        place: FilePlace,
        claim: int,
        serial: Callable[[], int],
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._place, self._claim = Registry(path), place, claim
        self._serial, self._elapsed = serial, elapsed
        self._last = self._registry.next_number() - 1
        self._fenced_s = float("-inf")
        self._packs: deque[tuple[float, str]] = deque()
        self._old: list[str] | None = None

    def send(self) -> int:
        """Sends the versions that are new since the last call; returns how many.

        Raises:
            UnusablePlace: The object store cannot be reached. The next call sends them if they still exist here.
            LockHeld: Another trainer owns the versions.
        """
        if self._old is None:
            self._old = [f"{packs.FOLDER}/{name}" for name in self._place.names(packs.FOLDER)]
        numbers = [number for number in self._registry.recents() if number > self._last]
        versions = list(self._whole(numbers[-MOST_IN_PACK:]))
        if not versions:
            return 0
        if self._elapsed() - self._fenced_s >= FENCE_S:
            claims.require_newest(self._place, self._claim)
            self._fenced_s = self._elapsed()
        name = packs.name_of(versions[0][0])
        self._place.write(name, packs.encode(packs.Pack(self._serial(), versions)))
        killpoints.reach("share.pack")
        self._last = versions[-1][0]
        self._packs.append((self._elapsed(), name))
        self._remove_old()
        return len(versions)

    def _whole(self, numbers: list[int]) -> Iterator[tuple[int, Mapping[str, bytes]]]:
        """The files of recent versions that still exist here; the manifest is the last file of each."""
        for number in numbers:
            folder = self._registry.folder("recent", number)
            try:
                found = manifest.decode(file_bytes(folder / MANIFEST))
                files = {name: file_bytes(folder / name) for name in found.files}
            except (FileNotFoundError, ValueError):
                continue
            yield number, files | {MANIFEST: manifest.encode(found)}

    def _remove_old(self) -> None:
        """Removes old packs, and those of a previous trainer once there is something newer."""
        while self._old:
            self._place.remove(self._old[-1])
            self._old.pop()
        while len(self._packs) > 1 and self._elapsed() - self._packs[0][0] > KEPT_PACKS_S:
            self._place.remove(self._packs[0][1])
            self._packs.popleft()


class DurableSender:
    """Pushes durable versions, and deletes those that were deleted here. Use it from one thread only.

    Args:
        path: The registry's directory; the caller holds the trainer's lock.
        place: The object store.
        claim: The claim number under which this trainer owns the versions.
    """

    def __init__(self, path: Path, place: FilePlace, claim: int) -> None:
        self._registry, self._place, self._claim = Registry(path), place, claim
        self._registry.shared = place
        self._path = path
        self._catalog: Catalog | None = None
        self._marks: dict[str, tuple[int, str]] = {}
        self._damaged: set[tuple[str, str]] = set()
        self._settled_ns: tuple[int, ...] | None = None

    @property
    def serial(self) -> int:
        """Serial number of the newest catalogue."""
        return 0 if self._catalog is None else self._catalog.serial

    def send(self) -> bool:
        """Sends the oldest version that the store lacks, or deletes what was deleted here; returns whether it did so.

        Raises:
            UnusablePlace: The object store cannot be reached. Everything that its catalogue names is complete.
            LockHeld: Another trainer owns the versions.
        """
        if self._catalog is None:
            self._catalog = self._begin()
        changed_ns = self._changed_ns()
        if changed_ns == self._settled_ns:
            return False
        there = self._catalog.folders
        here = self._here(there)
        unsent = [one for one in here.items() if there.get(one[0]) != one[1] and one not in self._damaged]
        missing = sorted((folder for folder, _ in unsent), key=_age)
        gone = [folder for folder in there if folder not in here]
        if missing:
            self._send(missing[0])
        elif gone:
            self._take_away(gone)
        elif time.time_ns() - max(changed_ns) > TICK_NS:
            self._settled_ns = changed_ns
        return bool(missing or gone)

    def _changed_ns(self) -> tuple[int, ...]:
        """When the folders of durable versions last changed."""
        with usable("be listed"):
            return tuple((self._path / folder).stat().st_mtime_ns for folder in VERSIONED)

    def _begin(self) -> Catalog:
        """Reads the catalogue, and removes files that a killed trainer left outside it."""
        found = catalogs.at_place(self._place)
        here = self._here(found.folders)
        for folder in VERSIONED:
            for name in self._place.names(folder):
                whole = f"{folder}/{name.partition('/')[0]}"
                if whole not in found.folders and whole not in here:
                    self._place.remove(f"{folder}/{name}")
        return found

    def _here(self, known: Mapping[str, str]) -> dict[str, str]:
        """Folder -> mark of its manifest, for all durable versions here; `known` marks for those not fetched yet."""
        found = {}
        with usable("be listed"):
            for folder in VERSIONED:
                for path in (self._path / folder).iterdir():
                    name = f"{folder}/{path.name}"
                    mark = (self._mark(path) or known.get(name)) if path.name.replace("-", "").isdecimal() else None
                    if mark is not None and path.is_dir():
                        found[name] = mark
        self._marks = {name: mark for name, mark in self._marks.items() if name in found}
        return found

    def _mark(self, path: Path) -> str | None:
        name = f"{path.parent.name}/{path.name}"
        try:
            changed_ns = (path / MANIFEST).stat().st_mtime_ns
            if self._marks.get(name, (0, ""))[0] != changed_ns:
                self._marks[name] = (changed_ns, catalogs.mark_of(file_bytes(path / MANIFEST)))
        except FileNotFoundError:
            return None
        return self._marks[name][1]

    def _send(self, folder: str) -> None:
        """1. Its program. 2. Its files. 3. Its manifest. 4. The catalogue."""
        assert self._catalog is not None
        try:
            data = file_bytes(self._path / folder / MANIFEST)
            found = manifest.decode(data)
            files = {name: self._registry.read(found, name) for name in found.files}
            program = self._program(found.program)
        except (FileNotFoundError, UnknownVersion):
            # The compactor removed it meanwhile.
            return
        except (ValueError, CorruptVersion):
            # The code that loads it here sets it aside; it is not sent to anyone.
            self._damaged.add((folder, catalogs.mark_of(data)))
            return
        claims.require_newest(self._place, self._claim)
        # 1.
        if program is not None:
            self._place.write(f"{layout.PROGRAMS}/{found.program}.tflite", program)
        # 2.
        for name, content in files.items():
            self._place.write(f"{folder}/{name}", content)
            killpoints.reach("share.file")
        # 3.
        self._place.write(f"{folder}/{MANIFEST}", data)
        killpoints.reach("share.manifest")
        # 4.
        programs = {*self._catalog.programs} | ({found.program} if program is not None else set())
        self._write({**self._catalog.folders, folder: catalogs.mark_of(data)}, programs)
        killpoints.reach("share.named")

    def _program(self, digest: str) -> bytes | None:
        """A program that the store lacks; None if the store has it or it does not exist."""
        assert self._catalog is not None
        if digest in self._catalog.programs:
            return None
        try:
            return self._registry.program(digest)
        except CorruptVersion:
            return None

    def _take_away(self, gone: list[str]) -> None:
        """1. The catalogue. 2. Manifests. 3. Files. 4. Programs that no longer exist here."""
        assert self._catalog is not None
        folders = {name: mark for name, mark in self._catalog.folders.items() if name not in gone}
        kept = {path.stem for path in (self._path / layout.PROGRAMS).glob("*.tflite")}
        programs = {one for one in self._catalog.programs if one in kept}
        left = {*self._catalog.programs} - programs
        # 1.
        self._write(folders, programs)
        killpoints.reach("share.unnamed")
        for folder in gone:
            # 2.
            self._place.remove(f"{folder}/{MANIFEST}")
            # 3.
            for name in self._place.names(folder):
                self._place.remove(f"{folder}/{name}")
        # 4.
        for digest in sorted(left):
            self._place.remove(f"{layout.PROGRAMS}/{digest}.tflite")

    def _write(self, folders: Mapping[str, str], programs: set[str]) -> None:
        """Writes the catalogue, unless another trainer owns the versions by now."""
        claims.require_newest(self._place, self._claim)
        last = self._registry.next_number() - 1
        made = Catalog(self.serial + 1, self._claim, last, dict(folders), tuple(sorted(programs)))
        self._place.write(catalogs.NAME, catalogs.encode(made))
        self._catalog = made


def _age(folder: str) -> tuple[int, bool]:
    """Sort key: by number, a base before a delta of the same number, so that followers find the base first.

    >>> sorted(["versions/000000000002", "bases/000000000002", "versions/000000000001"], key=_age)
    ['versions/000000000001', 'bases/000000000002', 'versions/000000000002']
    """
    return catalogs.version_of(folder), not folder.startswith(layout.BASES)
