"""The versions in a registry directory: which there are, what makes one up, and how one comes and goes.

A version is complete or absent: it is written under `tmp/`, synced, and
appears by one rename; it goes by one rename likewise. Every read checks the
digest, and what fails is never returned.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from state import layout
from state.disk import files as durable
from state.errors import CorruptVersion, UnknownVersion
from state.process import killpoints
from state.registry import manifest
from state.registry.directory import Directory, file_bytes, usable
from state.registry.manifest import Kind, Manifest, Visible, sees
from state.registry.numbers import Numbers

MANIFEST = "manifest.json"
_FOLDERS: dict[Kind, str] = {"delta": layout.VERSIONS, "base": layout.BASES}
_REMEMBERED = 50_000
_log = logging.getLogger(__name__)


class Chain(NamedTuple):
    """What makes up one version: a full state, and the changes since, oldest first."""

    base: Manifest
    deltas: list[Manifest]


class _Corrupt(CorruptVersion):
    """A corrupt version, and which directory it is."""

    def __init__(self, kind: Kind, version: int, message: str) -> None:
        super().__init__(f"version {version}: {message}", "roll back to another version")
        self.kind = kind
        self.version = version


class Versions(Directory):
    """The versions of one registry directory. One object per thread, except that `read` may run in any."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, *_FOLDERS.values())
        self._numbers = {kind: Numbers(path / name) for kind, name in _FOLDERS.items()}
        self._manifests: dict[Path, Manifest] = {}

    def versions(self) -> list[int]:
        """The numbers of all complete versions, ascending; not all need be of control's epoch."""
        return sorted({*self.deltas(), *self.bases()})

    def deltas(self) -> tuple[int, ...]:
        """The versions of which the change since their parent is kept, ascending."""
        return self._numbers["delta"].good()

    def bases(self) -> tuple[int, ...]:
        """The versions of which the full state is kept, ascending."""
        return self._numbers["base"].good()

    def folder(self, kind: Kind, version: int) -> Path:
        """Where the files of a delta or base lie."""
        return self.path / _FOLDERS[kind] / f"{version:012d}"

    def manifest(self, version: int, kind: Kind | None = None) -> Manifest:
        """The manifest of a version's delta, or of its base where it has no delta; or of the `kind` asked for.

        Raises:
            UnknownVersion: It is not kept.
            CorruptVersion: Its manifest fails its digest.
        """
        kinds: tuple[Kind, ...] = (kind,) if kind else ("delta", "base")
        for wanted in kinds:
            folder = self.folder(wanted, version)
            if found := self._manifests.get(folder):
                return found
            try:
                found = manifest.decode(file_bytes(folder / MANIFEST))
            except FileNotFoundError:
                if folder.is_dir():
                    raise _Corrupt(wanted, version, f"{folder / MANIFEST} is missing") from None
                continue
            except (ValueError, msgspec.MsgspecError) as error:
                raise _Corrupt(wanted, version, f"{folder / MANIFEST} is damaged: {error}") from error
            if len(self._manifests) >= _REMEMBERED:
                self._manifests.clear()
            self._manifests[folder] = found
            return found
        raise UnknownVersion(f"version {version} is not kept in {self.path}", self._nearest(version))

    def read(self, version: Manifest | int, name: str) -> bytes:
        """The bytes of a version's file, checked against its manifest.

        Raises:
            UnknownVersion: The version is not kept.
            CorruptVersion: The file is missing or fails its digest; the message names it.
        """
        found = self.manifest(version) if isinstance(version, int) else version
        path = self.folder(found.kind, found.version) / name
        entry = found.files.get(name)
        if entry is None:
            raise _Corrupt(found.kind, found.version, f"it never had a file {path}")
        try:
            data = file_bytes(path)
        except FileNotFoundError:
            if not path.parent.is_dir():
                self._manifests.pop(path.parent, None)
                raise UnknownVersion(
                    f"version {found.version} is not kept any more", self._nearest(found.version)
                ) from None
            raise _Corrupt(found.kind, found.version, f"{path} is missing") from None
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _Corrupt(found.kind, found.version, f"{path} fails its digest")
        return data

    def verify(self, version: Manifest) -> None:
        """Reads every file of a delta or base.

        Raises:
            UnknownVersion: It is not kept.
            CorruptVersion: One of its files is not what the manifest says.
        """
        for name in version.files:
            self.read(version, name)

    def newest(self, epoch: int) -> int | None:
        """The newest complete version of `epoch`; None while it has none.

        Raises:
            CorruptVersion: The manifest of it, or of a newer one, fails its digest.
        """
        for version in reversed(self.versions()):
            if self.manifest(version).epoch == epoch:
                return version
        return None

    def next_after(self, version: int) -> int | None:
        """The next complete version with a higher number, of whatever epoch; cheap enough to poll."""
        with usable("be read"):
            if (self.folder("delta", version + 1) / MANIFEST).exists():
                return version + 1
        return next((found for found in self.versions() if found > version), None)

    def visible(self, version: int) -> Visible:
        """The versions that `version` descends from, itself included, as closed intervals, newest first."""
        return self.manifest(version).visible

    def chain(self, version: int) -> Chain:
        """The newest base that `version` descends from (or is), and the deltas since.

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
                raise _Corrupt("delta", at, f"its parent {delta.parent} does not lie between base {base} and itself")
            deltas.append(delta)
            at = delta.parent
        return Chain(self.manifest(base, "base"), deltas[::-1])

    def newest_good(self, epoch: int) -> int | None:
        """The newest version of `epoch` of whose whole chain every file is good; None where there is none.

        A corrupt version is set aside with a logged reason, and so is one that
        it alone led to: nobody loads them, nobody falls back unseen. Only for
        the process that holds the trainer's lock.
        """
        doubted = None
        while True:
            version = None
            try:
                version = self.newest(epoch)
                if version is None:
                    return None
                base, deltas = self.chain(version)
                for part in (base, *deltas):
                    self.verify(part)
                return version
            except _Corrupt as error:
                self.set_aside(error.kind, error.version, str(error))
            except UnknownVersion as error:
                if version is None:
                    raise
                # A compactor may have put a base in place of what was being read: look again first.
                if doubted != version:
                    doubted = version
                    continue
                self.set_aside(self.manifest(version).kind, version, f"a version it needs is gone: {error}")

    def set_aside(self, kind: Kind, version: int, reason: str) -> Path:
        """Renames a delta or base to `<number>.bad`, where nothing loads it; its number is not used again."""
        folder = self.folder(kind, version)
        aside = next(
            path
            for count in range(1_000_000)
            if not (path := folder.with_name(f"{folder.name}.bad{count or ''}")).exists()
        )
        with usable(f"set aside version {version}, which is damaged"):
            folder.rename(aside)
            durable.sync_directory(folder.parent)
        self._manifests.pop(folder, None)
        _log.error("set aside %s of version %d as %s: %s", kind, version, aside, reason)
        return aside

    def remove(self, kind: Kind, version: int) -> None:
        """Takes a delta or base away for good; it vanishes by one rename."""
        folder = self.folder(kind, version)
        grave = self.temporary(f"removed-{kind}-{version}")
        with usable(f"give up version {version}"):
            folder.rename(grave)
            self._manifests.pop(folder, None)
            shutil.rmtree(grave)

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
        final = self.folder(made.kind, made.version)
        temporary = self.temporary(f"{made.kind}-{made.version}")
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
            try:
                temporary.rename(final)
            except OSError:
                if final.is_dir():
                    return False
                raise
            killpoints.reach("publish.renamed")
            durable.sync_directory(final.parent)
            killpoints.reach("publish.synced")
            return True
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def next_number(self) -> int:
        """The number that the next version takes: numbers only grow, over all epochs."""
        return 1 + max(numbers.last() for numbers in self._numbers.values())

    def _nearest(self, version: int) -> str:
        kept = self.versions()
        nearest = [
            *[number for number in kept if number < version][-1:],
            *[number for number in kept if number > version][:1],
        ]
        return f"take {' or '.join(map(str, nearest))}" if nearest else "there is none yet"
