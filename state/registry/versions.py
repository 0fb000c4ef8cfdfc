"""Durable versions of a registry directory: what a version consists of, and how it is added and removed.

A version is complete or absent. It is written under `tmp/`, synced, and appears
with one rename; it is removed with one rename too. Every read checks the digest
and never returns data that fails it. Deltas may be merged while somebody reads
them. The merged delta appears before the others are removed, so a reader that
misses a file finds it on its next read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from state.disk import files as durable
from state.errors import UnknownVersion
from state.process import killpoints
from state.registry import manifest
from state.registry.brought_files import MANIFEST, BroughtFiles, fits
from state.registry.directory import file_bytes, usable
from state.registry.folders import BadPart, appears
from state.registry.manifest import Kind, Manifest, Visible, sees

_REMEMBERED = 64
"""Manifests kept in memory, some 33 kB each: the most recently used. Reading one again takes 0.1 ms."""

_log = logging.getLogger(__name__)


class Chain(NamedTuple):
    """The parts of one version: a full state, and the changes since, oldest first."""

    base: Manifest
    deltas: list[Manifest]


class Versions(BroughtFiles):
    """The versions of one registry directory. Use one object per thread; only `read` may run in any thread."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders)
        self._manifests: dict[Path, Manifest] = {}

    def manifest(self, version: int, kind: Kind | None = None) -> Manifest:
        """The manifest of a version: of its delta, else of its base, or of the given `kind`.

        Raises:
            UnknownVersion: The version is not kept.
            CorruptVersion: Its manifest fails its digest.
        """
        for folder in self._places(version, kind):
            if found := self._manifests.pop(folder, None):
                # Moves it to the end: the least recently used are dropped first.
                self._manifests[folder] = found
                return found
            try:
                found = manifest.decode(self.manifest_bytes(folder))
            except FileNotFoundError:
                if folder.is_dir():
                    raise BadPart(folder, version, f"{folder / MANIFEST} is missing") from None
                continue
            except ValueError as error:
                raise BadPart(folder, version, f"{folder / MANIFEST} is damaged: {error}") from error
            self._remember(folder, found)
            return found
        raise UnknownVersion(*self._not_kept(version))

    def _remember(self, folder: Path, found: Manifest) -> None:
        while len(self._manifests) >= _REMEMBERED:
            self._manifests.pop(next(iter(self._manifests), folder), None)
        self._manifests[folder] = found

    def read(self, version: Manifest | int, name: str) -> bytes:
        """Reads a version's file and checks it against its manifest.

        Raises:
            UnknownVersion: The version is not kept.
            CorruptVersion: The file is missing or fails its digest; the message names it.
        """
        found = self.manifest(version) if isinstance(version, int) else version
        path = self.folder_of(found) / name
        entry = found.files.get(name)
        if entry is None:
            raise BadPart(path.parent, found.version, f"it never had a file {path}")
        data = self.file_here_or_brought(path, entry)
        if data is None:
            if not path.parent.is_dir():
                self._manifests.pop(path.parent, None)
                raise UnknownVersion(*self._not_kept(found.version))
            raise BadPart(path.parent, found.version, f"{path} is missing")
        if not fits(entry, data):
            if (again := self._rewritten(found)) is not None:
                return self.read(again, name)
            raise BadPart(path.parent, found.version, f"{path} fails its digest")
        return data

    def path_of(self, version: Manifest, name: str) -> Path:
        """The path of a version's file, fetched if it is missing here. The file may still be damaged or missing."""
        path = self.folder_of(version) / name
        if not path.exists() and name in version.files:
            self.file_here_or_brought(path, version.files[name])
        return path

    def _rewritten(self, found: Manifest) -> Manifest | None:
        """The manifest of a part to which `replace` gave other files meanwhile; None if it is unchanged."""
        folder = self.folder_of(found)
        self._manifests.pop(folder, None)
        try:
            now = manifest.decode(file_bytes(folder / MANIFEST))
        except (OSError, ValueError):
            return None
        return None if now.files == found.files else now

    def verify(self, version: Manifest) -> None:
        """Reads and checks every file of a delta or base.

        Raises:
            UnknownVersion: It is not kept.
            CorruptVersion: A file does not match the manifest.
        """
        for name in version.files:
            self.read(version, name)

    def newest(self, epoch: int | None) -> int | None:
        """The newest durable version of `epoch`, or of all epochs; None if there is none.

        Raises:
            CorruptVersion: Its manifest, or that of a newer version, fails its digest.
        """
        for version in reversed(self.versions()):
            if epoch in (None, self.manifest(version).epoch):
                return version
        return None

    def visible(self, version: int) -> Visible:
        """The versions that `version` descends from, including itself, as closed intervals, newest first."""
        return self.manifest(version).visible

    def chain(self, version: int) -> Chain:
        """The newest base that the durable `version` descends from (or is), and the deltas since.

        Raises:
            UnknownVersion: One of them is not kept.
            CorruptVersion: One of their manifests fails its digest.
        """
        line = self.manifest(version).visible
        base = max((number for number in self.bases() if number <= version and sees(line, number)), default=None)
        if base is None:
            raise UnknownVersion(f"version {version} descends from no base that is kept", self._nearest(version))
        deltas: list[Manifest] = []
        at = version
        while at != base:
            delta = self.manifest(at, "delta")
            if delta.parent is None or not base <= delta.parent < at:
                if base not in self.bases():
                    # The compactor has just merged deltas across the base.
                    return self.chain(version)
                raise BadPart(
                    self.folder_of(delta), at, f"its parent {delta.parent} does not lie between base {base} and itself"
                )
            deltas.append(delta)
            at = delta.parent
        return Chain(self.manifest(base, "base"), deltas[::-1])

    def newest_good(self, epoch: int) -> int | None:
        """The newest version of `epoch` with an intact chain: every file passes its check. None if there is none.

        A corrupt version is set aside and the reason is logged, and so is a version
        that needs one that is gone. So nothing loads them, and no fallback goes
        unnoticed. Only the process with the trainer's lock calls it.
        """
        doubted: object = None
        while True:
            version, here = None, (self.deltas(), self.bases())
            try:
                version = self.newest(epoch)
                if version is None:
                    return None
                base, deltas = self.chain(version)
                for part in (base, *deltas):
                    self.verify(part)
                return version
            except BadPart as error:
                self.set_aside(error.part, error.version, str(error))
            except UnknownVersion as error:
                if version is None:
                    raise
                # A compactor may have replaced what was being read, so try again first.
                if doubted != (version, here):
                    doubted = (version, here)
                    continue
                self.set_aside(self.folder_of(self.manifest(version)), version, f"a version it needs is gone: {error}")

    def set_aside(self, folder: Path, version: int, reason: str) -> Path:
        """Renames the directory of a version to `<name>.bad`, so that nothing loads it. Its number is not reused."""
        aside = next(
            path
            for count in range(1_000_000)
            if not (path := folder.with_name(f"{folder.name}.bad{count or ''}")).exists()
        )
        with usable(f"set aside version {version}, which is damaged"):
            folder.rename(aside)
            durable.sync_directory(folder.parent)
        self._manifests.pop(folder, None)
        _log.error("set aside %s of version %d as %s: %s", folder.parent.name, version, aside, reason)
        return aside

    def remove(self, kind: Kind, version: int, parent: int | None = None) -> None:
        """Deletes a version of the given `kind` (a merged one with `parent`) for good, with one rename."""
        self._remove(self.folder(kind, version, parent))

    def remove_delta(self, version: int) -> None:
        """Deletes a version's delta for good, merged or not."""
        for folder in self._delta_folders(version):
            self._remove(folder)

    def remove_superseded(self, version: int) -> None:
        """Deletes the deltas of a version that its merged delta contains."""
        for folder in self._delta_folders(version)[1:]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        self._manifests.pop(folder, None)
        self.give_up(folder)

    def replace(self, made: Manifest, files: Mapping[str, bytes]) -> None:
        """Replaces the files of a stored part; after a crash either the old or the new files are there.

        1. Files and manifest are written under `tmp/` and synced.
        2. Both directories exchange names; the directories are synced.
        3. The old files are removed.

        Raises:
            UnusableRegistry: The disk refused; the old files are unchanged.
        """
        final = self.folder_of(made)
        temporary = self.temporary(f"rewritten-{made.kind}-{final.name}")
        with usable(f"rewrite version {made.version}"):
            try:
                # 1.
                temporary.mkdir()
                for name, data in files.items():
                    durable.write(temporary / name, data)
                durable.write(temporary / MANIFEST, manifest.encode(made))
                durable.sync_directory(temporary)
                killpoints.reach("rewrite.written")
                # 2.
                durable.exchange(temporary, final)
                killpoints.reach("rewrite.exchanged")
                durable.sync_directory(final.parent)
                self._manifests.pop(final, None)
            finally:
                # 3.
                shutil.rmtree(temporary, ignore_errors=True)

    def add(self, made: Manifest, files: Mapping[str, bytes], last_check: Callable[[], None] = lambda: None) -> bool:
        """Adds a delta or base. It is complete and durable when this returns. False if the number is taken.

        1. Files and manifest are written under `tmp/` and synced.
        2. `last_check` may still refuse by raising an exception.
        3. One rename makes the version visible; the directory is synced.

        Raises:
            UnusableRegistry: The disk refused; nothing of the version is left.
        """
        with usable(f"take version {made.version}"):
            return self._add(made, files, last_check)

    def _add(self, made: Manifest, files: Mapping[str, bytes], last_check: Callable[[], None]) -> bool:
        final = self.folder_of(made)
        temporary = self.temporary(f"{made.kind}-{final.name}")
        temporary.mkdir()
        try:
            # 1.
            for name, data in files.items():
                durable.write(temporary / name, data)
                killpoints.reach("publish.file")
            durable.write(temporary / MANIFEST, manifest.encode(made))
            durable.sync_directory(temporary)
            killpoints.reach("publish.written")
            # 2.
            last_check()
            killpoints.reach("publish.checked")
            # 3.
            if not appears(temporary, final):
                return False
            killpoints.reach("publish.renamed")
            durable.sync_directory(final.parent)
            killpoints.reach("publish.synced")
            return True
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
