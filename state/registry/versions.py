"""The durable versions in a registry directory: what makes one up, and how one comes and goes.

A version is complete or absent: it is written under `tmp/`, synced, and
appears by one rename; it goes by one rename likewise. Every read checks the
digest, and what fails is never returned. Several deltas may be merged into one
while somebody reads them: the merged one appears before the others go, and a
reader that lost a file finds it when it looks again.
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
"""Manifests kept in memory, some 33 kB each: the newest, and what leads to them. Reading one again takes 0.1 ms."""

_log = logging.getLogger(__name__)


class Chain(NamedTuple):
    """What makes up one version: a full state, and the changes since, oldest first."""

    base: Manifest
    deltas: list[Manifest]


class Versions(BroughtFiles):
    """The versions of one registry directory. One object per thread, except that `read` may run in any."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders)
        self._manifests: dict[Path, Manifest] = {}

    def manifest(self, version: int, kind: Kind | None = None) -> Manifest:
        """The manifest of a version's delta, or of its base where it has no delta; or of the `kind` asked for.

        Raises:
            UnknownVersion: It is not kept.
            CorruptVersion: Its manifest fails its digest.
        """
        for folder in self._places(version, kind):
            if found := self._manifests.pop(folder, None):
                # The ones used last stay.
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
        """The bytes of a version's file, checked against its manifest.

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
        """The path of a version's file, which is brought where it is not here; it may be damaged, or missing all the same."""
        path = self.folder_of(version) / name
        if not path.exists() and name in version.files:
            self.file_here_or_brought(path, version.files[name])
        return path

    def _rewritten(self, found: Manifest) -> Manifest | None:
        """The manifest of a part that `replace` gave other files meanwhile; None where it is as it was."""
        folder = self.folder_of(found)
        self._manifests.pop(folder, None)
        try:
            now = manifest.decode(file_bytes(folder / MANIFEST))
        except (OSError, ValueError):
            return None
        return None if now.files == found.files else now

    def verify(self, version: Manifest) -> None:
        """Reads every file of a delta or base.

        Raises:
            UnknownVersion: It is not kept.
            CorruptVersion: One of its files is not what the manifest says.
        """
        for name in version.files:
            self.read(version, name)

    def newest(self, epoch: int | None) -> int | None:
        """The newest durable version of `epoch`, or of all epochs; None while there is none.

        Raises:
            CorruptVersion: The manifest of it, or of a newer one, fails its digest.
        """
        for version in reversed(self.versions()):
            if epoch in (None, self.manifest(version).epoch):
                return version
        return None

    def visible(self, version: int) -> Visible:
        """The versions that `version` descends from, itself included, as closed intervals, newest first."""
        return self.manifest(version).visible

    def chain(self, version: int) -> Chain:
        """The newest base that the durable `version` descends from (or is), and the deltas since.

        Raises:
            UnknownVersion: One of them is not kept.
            CorruptVersion: A manifest of them fails its digest.
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
                    # The compactor has just merged deltas beyond it.
                    return self.chain(version)
                raise BadPart(
                    self.folder_of(delta), at, f"its parent {delta.parent} does not lie between base {base} and itself"
                )
            deltas.append(delta)
            at = delta.parent
        return Chain(self.manifest(base, "base"), deltas[::-1])

    def newest_good(self, epoch: int) -> int | None:
        """The newest version of `epoch` of whose whole chain every file is good; None where there is none.

        A corrupt version is set aside with a logged reason, and so is one that
        it alone led to: nobody loads them, nobody falls back unseen. Only for
        the process that holds the trainer's lock.
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
                # A compactor may have put something else in place of what was being read: look again first.
                if doubted != (version, here):
                    doubted = (version, here)
                    continue
                self.set_aside(self.folder_of(self.manifest(version)), version, f"a version it needs is gone: {error}")

    def set_aside(self, folder: Path, version: int, reason: str) -> Path:
        """Renames the directory of a version to `<name>.bad`, where nothing loads it; its number is not used again."""
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
        """Takes a version away for good, as it is kept as `kind` (a merged one with `parent`); it vanishes by one rename."""
        self._remove(self.folder(kind, version, parent))

    def remove_delta(self, version: int) -> None:
        """Takes a version's delta away for good, merged or not."""
        for folder in self._delta_folders(version):
            self._remove(folder)

    def remove_superseded(self, version: int) -> None:
        """Takes away what lies beside the merged delta of a version that holds it too."""
        for folder in self._delta_folders(version)[1:]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        self._manifests.pop(folder, None)
        self.give_up(folder)

    def replace(self, made: Manifest, files: Mapping[str, bytes]) -> None:
        """Gives a part that is kept other files; a crash leaves the old ones or the new ones.

        1. Files and manifest are written under `tmp/` and synced.
        2. Both directories change names; the directories are synced.
        3. The old files go.

        Raises:
            UnusableRegistry: The disk refused; the old ones are there.
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
        """Adds a delta or base; complete and durable when this returns. False where the number is taken.

        1. Files and manifest are written under `tmp/` and synced.
        2. `last_check` may still refuse by an exception.
        3. One rename makes it appear; the directory is synced.

        Raises:
            UnusableRegistry: The disk refused; nothing of it is left.
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
