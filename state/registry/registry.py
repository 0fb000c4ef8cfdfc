"""The registry: versions, control generations that select the version in use, and the files that versions refer to.

Any number of processes may read. Only the trainer, under its lock, publishes versions. A version is complete or absent:
it is written under `tmp/` and appears with one rename, after a sync if it is durable; one rename removes it. Every read
checks the digest. In a copy of a shared registry, a version may be an empty folder, whose files are fetched when they
are first read.

Versions between two durable ones are recent. They are stored for some seconds, without sync, and no rollback to one is
possible. Numbers are never reused: after a reboot they continue beyond any number that may have been used.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from state import layout
from state.disk import files as durable
from state.disk.files import boot_id
from state.errors import CorruptVersion, UnknownVersion, WrongEpoch
from state.process import killpoints
from state.registry import manifest
from state.registry.control import Control
from state.registry.controls import Controls
from state.registry.directory import Directory, file_bytes, usable
from state.registry.manifest import Draft, Kind, Manifest, sees
from state.registry.specs import Specs

if TYPE_CHECKING:
    from state.registry.directory import Claim

MANIFEST = "manifest.json"
SERVING = "serving.safetensors"
TRAINING = "training.safetensors"
DURABLE = (layout.VERSIONS, layout.MERGED, layout.BASES)
"""The folders of durable versions."""
RECENT_S = 15.0
"""How long a version that is not durable is kept. After 25 s the operating system would write it to the disk."""

MOST_BETWEEN = 10_000
"""Upper limit of the number of versions between two durable ones."""

_FOLDERS: dict[Kind, str] = {
    "delta": layout.VERSIONS,
    "merged": layout.MERGED,
    "base": layout.BASES,
    "recent": layout.RECENT,
}
_CACHED = 64
"""Number of manifests kept in memory, about 33 kB each: the most recently used. Reading one again takes 0.1 ms."""
# A directory that changes again within one tick of the file system's clock, at most 10 ms, keeps its modification time.
_TICK_NS = 12_000_000

_log = logging.getLogger(__name__)


def durable_folders(path: Path) -> list[str]:
    """The folders of durable versions, relative to the registry at `path`, ascending; those set aside are left out."""
    return sorted(
        f"{folder}/{version.name}"
        for folder in DURABLE
        if (path / folder).is_dir()
        for version in (path / folder).iterdir()
        if version.name.replace("-", "").isdecimal()
    )


class Chain(NamedTuple):
    """The parts of one version: a full state, and the later changes, oldest first."""

    base: Manifest
    deltas: list[Manifest]


class _BadPart(CorruptVersion):
    """A corrupt version, and the corrupt one of its directories."""

    def __init__(self, part: Path, version: int, message: str) -> None:
        super().__init__(f"version {version}: {message}", "roll back to another version")
        self.part = part
        self.version = version


class Numbers:
    """The versions in one directory, whose entries are named `<number>` or `<number>-<parent>`.

    There are none if the directory does not exist. They are listed again only when the directory has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed_ns = -1
        self._last = 0
        self._parents: dict[int, int | None] = {}
        self._parsed: dict[str, tuple[int, int | None] | None] = {}

    def good(self) -> tuple[int, ...]:
        """The complete versions, ascending."""
        self._refresh()
        return tuple(self._parents)

    def __contains__(self, version: int) -> bool:
        self._refresh()
        return version in self._parents

    def oldest_parent(self, version: int) -> int | None:
        """The lowest parent in the names of a version's entries; None if no name has one."""
        self._refresh()
        return self._parents.get(version)

    def last(self) -> int:
        """The highest number ever seen in the directory, including damaged versions that were set aside."""
        self._refresh()
        return self._last

    def _refresh(self) -> None:
        with usable("be listed"):
            try:
                changed_ns = self.path.stat().st_mtime_ns
                if changed_ns == self._changed_ns:
                    return
                now_ns = time.time_ns()
                names = os.listdir(self.path)  # noqa: PTH208 - thousands of names, polled
            except FileNotFoundError:
                self._parents, self._parsed, self._changed_ns = {}, {}, -1
                return
        self._changed_ns = changed_ns if now_ns - changed_ns > _TICK_NS else -1
        known = self._parsed
        if known.keys() == {*names}:
            return
        # In this order the name with the oldest parent is the first of its version.
        self._parsed = {name: known[name] if name in known else self._parse(name) for name in sorted(names)}
        parents: dict[int, int | None] = {}
        for entry in self._parsed.values():
            if entry is not None:
                parents.setdefault(*entry)
        self._parents = parents

    def _parse(self, name: str) -> tuple[int, int | None] | None:
        """The version and the parent in the name of an entry; None if the entry is no complete version."""
        number, _, parent = name.partition("-")
        self._last = max(self._last, int(number.partition(".")[0]))
        is_version = number.isdecimal() and (parent.isdecimal() or not parent)
        return (int(number), int(parent) if parent else None) if is_version else None


class Registry:
    """One registry directory. Use one object per thread; only `read` may run in any thread.

    Args:
        claim: See `Directory`; only a trainer has one.

    Attributes:
        directory: Its files, and the object store in which it is shared.
        generations: Control, and outcomes of rollbacks.
        specs: Programs and feature specs.
    """

    def __init__(self, path: Path, claim: Claim | None = None) -> None:
        self.path = path
        self.directory = Directory(path, claim)
        self.directory.ensure(*_FOLDERS.values())
        self.generations = Controls(path, self.directory)
        self.specs = Specs(self.directory)
        self._numbers = {kind: Numbers(path / name) for kind, name in _FOLDERS.items()}
        self._manifests: dict[Path, Manifest] = {}

    # Control

    def control(self) -> Control | None:
        """See `Controls.control`."""
        return self.generations.control()

    def controls(self, last: int | None = None) -> list[Control]:
        """See `Controls.controls`."""
        return self.generations.controls(last)

    def propose(self, control: Control) -> Control:
        """See `Controls.propose`."""
        return self.generations.propose(control)

    def change(self, transition: Callable[[Control], Control]) -> Control:
        """See `Controls.change`."""
        return self.generations.change(transition)

    # Numbers and folders

    def versions(self) -> list[int]:
        """The numbers of all durable versions, ascending, of control's epoch and others."""
        return sorted({*self.deltas(), *self.bases()})

    def deltas(self) -> tuple[int, ...]:
        """The durable versions whose delta to an older version is kept, ascending."""
        merged = self._numbers["merged"].good()
        return tuple(sorted({*self._numbers["delta"].good(), *merged})) if merged else self._numbers["delta"].good()

    def bases(self) -> tuple[int, ...]:
        """The versions whose full state is kept, ascending."""
        return self._numbers["base"].good()

    def recents(self) -> tuple[int, ...]:
        """The versions in `recent/`, which can be followed but not rolled back to, ascending; some are also durable."""
        return self._numbers["recent"].good()

    def next_number(self) -> int:
        """The number of the next version: numbers only grow, over all epochs and both lifetimes."""
        return 1 + max(numbers.last() for numbers in self._numbers.values())

    def folder(self, kind: Kind, version: int, parent: int | None = None) -> Path:
        """The directory of a version that is kept as `kind`; for a merged one `parent` is part of the name."""
        name = f"{version:012d}-{parent or 0:012d}" if kind == "merged" else f"{version:012d}"
        return self.path / _FOLDERS[kind] / name

    def folder_of(self, part: Manifest) -> Path:
        """The directory of the files that a manifest names."""
        return self.folder(part.kind, part.version, part.parent)

    def _folders(self, version: int, kind: Kind | None) -> list[Path]:
        """The directories of a version, the preferred one first: a merged delta needs a single read."""
        folders = []
        parent = self._numbers["merged"].oldest_parent(version)
        if kind in (None, "delta", "merged") and parent is not None:
            folders.append(self.folder("merged", version, parent))
        kinds: tuple[Kind, ...] = ("delta", "base") if kind is None else (kind,)
        return folders + [
            self.folder(stored, version) for stored in kinds if stored != "merged" and version in self._numbers[stored]
        ]

    def _delta_folders(self, version: int) -> list[Path]:
        first = self._folders(version, "delta")
        merged = (self.path / layout.MERGED).glob(f"{version:012d}-*")
        return first + sorted(folder for folder in merged if folder not in first and "." not in folder.name)

    def _not_kept(self, version: int) -> UnknownVersion:
        versions = self.versions()
        nearest = [
            *[number for number in versions if number < version][-1:],
            *[number for number in versions if number > version][:1],
        ]
        message = f"version {version} is not kept in {self.path}"
        if version in self._numbers["recent"]:
            message = f"version {version} is recent: serving can follow it, but a rollback needs a durable version"
        return UnknownVersion(
            message, f"use {' or '.join(map(str, nearest))}" if nearest else "no version is published yet"
        )

    # Reading

    def manifest(self, version: int, kind: Kind | None = None) -> Manifest:
        """The manifest of a version: of its delta, else of its base, or of the given `kind`.

        Raises:
            UnknownVersion: The version is not kept.
            CorruptVersion: Its manifest fails its digest.
        """
        for folder in self._folders(version, kind):
            if cached := self._manifests.pop(folder, None):
                # Moves it to the end, because the least recently used are dropped first.
                self._manifests[folder] = cached
                return cached
            try:
                stored = manifest.decode(self.manifest_bytes(folder))
            except FileNotFoundError:
                if folder.is_dir():
                    raise _BadPart(folder, version, f"{folder / MANIFEST} is missing") from None
                continue
            except ValueError as error:
                raise _BadPart(folder, version, f"{folder / MANIFEST} is damaged: {error}") from error
            self._cache(folder, stored)
            return stored
        raise self._not_kept(version)

    def either(self, version: int) -> Manifest:
        """The manifest of a version; the recent one if both exist.

        Raises:
            UnknownVersion: The version is neither recent nor durable.
            CorruptVersion: Its manifest fails its digest.
        """
        try:
            return self.manifest(version, "recent")
        except (UnknownVersion, CorruptVersion):
            return self.manifest(version)

    def read(self, version: Manifest | int, name: str) -> bytes:
        """Reads a version's file and checks it against its manifest.

        Raises:
            UnknownVersion: The version is not kept.
            CorruptVersion: The file is missing or fails its digest; the message names it.
        """
        part = self.manifest(version) if isinstance(version, int) else version
        folder = self.folder_of(part)
        path, entry = folder / name, part.files.get(name)
        if entry is None:
            raise _BadPart(folder, part.version, f"it has no file {path}")
        try:
            return self.directory.content(path, entry.sha256)
        except FileNotFoundError:
            self.refresh(folder)
            if folder.is_dir():
                raise _BadPart(folder, part.version, f"{path} is missing") from None
            self._manifests.pop(folder, None)
            raise self._not_kept(part.version) from None
        except ValueError as error:
            if (rewritten := self._rewritten(part)) is not None:
                return self.read(rewritten, name)
            raise _BadPart(folder, part.version, str(error)) from None

    def path_of(self, version: Manifest, name: str) -> Path:
        """The path of a version's file, which is fetched if it is missing. It may still be damaged or missing."""
        path = self.folder_of(version) / name
        if not path.exists() and name in version.files:
            with suppress(FileNotFoundError, ValueError):
                self.directory.content(path, version.files[name].sha256)
        return path

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

    def latest(self, epoch: int | None) -> Manifest | None:
        """The newest version of `epoch`, or of all epochs, durable or recent; None if there is none.

        Skips recent versions that are removed meanwhile or that a power failure damaged.

        Raises:
            CorruptVersion: The manifest of the newest durable one fails its digest.
        """
        newest = self.newest(epoch)
        for version in reversed(self.recents()):
            if newest is not None and version <= newest:
                break
            try:
                recent = self.manifest(version, "recent")
            except (UnknownVersion, CorruptVersion):
                continue
            if epoch in (None, recent.epoch):
                return recent
        return None if newest is None else self.manifest(newest)

    def chain(self, version: int) -> Chain:
        """The newest base that the durable `version` descends from (or is), and the deltas after it.

        Raises:
            UnknownVersion: One of them is not kept.
            CorruptVersion: One of their manifests fails its digest.
        """
        visible = self.manifest(version).visible
        base = max((number for number in self.bases() if number <= version and sees(visible, number)), default=None)
        if base is None:
            raise UnknownVersion(f"version {version} descends from no base that is kept", self._not_kept(version).do)
        deltas: list[Manifest] = []
        at = version
        while at != base:
            delta = self.manifest(at, "delta")
            if delta.parent is None or not base <= delta.parent < at:
                if base not in self.bases():
                    # The compactor has just merged deltas across the base.
                    return self.chain(version)
                raise _BadPart(
                    self.folder_of(delta), at, f"its parent {delta.parent} does not lie between base {base} and itself"
                )
            deltas.append(delta)
            at = delta.parent
        return Chain(self.manifest(base, "base"), deltas[::-1])

    def _cache(self, folder: Path, part: Manifest) -> None:
        while len(self._manifests) >= _CACHED:
            self._manifests.pop(next(iter(self._manifests), folder), None)
        self._manifests[folder] = part

    def _rewritten(self, part: Manifest) -> Manifest | None:
        """The new manifest of a part whose files `replace` has changed meanwhile; None if they are unchanged."""
        folder = self.folder_of(part)
        self._manifests.pop(folder, None)
        self.refresh(folder)
        try:
            now = manifest.decode(file_bytes(folder / MANIFEST))
        except (OSError, ValueError):
            return None
        return None if now.files == part.files else now

    # Files of a copy, fetched from the object store

    def refresh(self, folder: Path, mark: str = "") -> bool:
        """Fetches a copy's manifest again, and removes the version's other files if it changed. No-op outside a copy.

        Args:
            folder: Folder of a version.
            mark: Digest of the manifest in the object store, or its first digits; empty if unknown.

        Returns:
            Whether the manifest changed or the folder was removed.
        """
        path = folder / MANIFEST
        if not (self.directory.is_copy and folder.parent.name in DURABLE):
            return False
        try:
            own = file_bytes(path)
        except FileNotFoundError:
            return False
        if mark and durable.digest(own).startswith(mark):
            return False
        data = self.directory.fetch(path)
        if data is None:
            self.directory.remove_folder(folder)
            return True
        if data == own:
            return False
        with usable("be refreshed"):
            for other in [other for other in folder.iterdir() if other.name != MANIFEST]:
                other.unlink(missing_ok=True)
        self.directory.keep(path, data)
        return True

    def manifest_bytes(self, folder: Path) -> bytes:
        """Reads the manifest in a version's folder, and fetches it if it is missing here.

        Raises:
            FileNotFoundError: It exists neither locally nor in the object store.
            UnusableRegistry: It cannot be read, or the object store cannot be reached.
        """
        path = folder / MANIFEST
        try:
            return file_bytes(path)
        except FileNotFoundError:
            # Files that are missing in the folders of durable versions may be in the object store.
            if folder.parent.name not in DURABLE or not folder.is_dir():
                raise
            data = self.directory.fetch(path)
            if data is None:
                if self.directory.is_copy:
                    self.directory.remove_folder(folder)
                raise
        self.directory.keep(path, data)
        return data

    # Publishing

    def publish(self, draft: Draft, files: Mapping[str, bytes], recent: Manifest | None = None) -> Manifest:
        """Publishes a version: complete and visible to all readers when this returns, and durable unless recent.

        Args:
            draft: The author's part of the manifest; its kind says whether the version is recent.
            files: Its files by name.
            recent: The manifest of the same version in `recent/`, if that exists.

        Raises:
            LockHeld: The trainer's claim was lost; nothing was added.
            WrongEpoch: Control is at another epoch; nothing was added.
            UnknownVersion: The parent is not kept.
            UnusableRegistry: The disk refused.
        """
        self._check_epoch(draft.epoch)
        ancestors = () if draft.parent is None else self.either(draft.parent).visible
        while True:
            if recent is None:
                part = manifest.complete(draft, self.next_number(), ancestors, files)
            else:
                # The same number and descent.
                entries = manifest.entries(files)
                part = replace(recent, kind=draft.kind, parent=draft.parent, log=draft.log, files=entries)
            if self.add(part, files, last_check=lambda: self._check_right(draft.epoch)):
                return part
            if recent is not None:
                raise RuntimeError(f"version {part.version} was published before")

    def add_base(self, version: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Stores the full state of `version`; does nothing if it exists."""
        base = replace(version, kind="base", files=manifest.entries(files))
        self.add(base, files)
        return base

    def add_merged(self, parts: Sequence[Manifest], files: Mapping[str, bytes]) -> Manifest:
        """Stores `parts`, which are consecutive deltas, merged into one delta of the last version."""
        first, last = parts[0], parts[-1]
        merged = replace(
            last,
            kind="merged",
            parent=first.parent,
            log=replace(last.log, first=first.log.first),
            files=manifest.entries(files),
            rewritten=max(part.rewritten for part in parts),
        )
        self.add(merged, files)
        return merged

    def add(self, part: Manifest, files: Mapping[str, bytes], last_check: Callable[[], None] = lambda: None) -> bool:
        """Adds a version, complete when this returns, and durable unless it is recent; False if the number is taken.

        1. Files and manifest are written under `tmp/`; those of a durable version are synced.
        2. `last_check` may still refuse by raising an exception.
        3. One rename makes the version visible; the directory of a durable version is synced.

        Raises:
            UnusableRegistry: The disk refused; the version was not added.
        """
        final = self.folder_of(part)
        # 1.
        with usable(f"store version {part.version}"), self._staged(part, files) as temporary:
            killpoints.reach("publish.written" if part.durable else "recent.written")
            # 2.
            last_check()
            killpoints.reach("publish.checked" if part.durable else "recent.checked")
            # 3.
            try:
                temporary.rename(final)
            except OSError:
                if final.is_dir():
                    return False
                raise
            killpoints.reach("publish.renamed" if part.durable else "recent.renamed")
            if part.durable:
                durable.sync_directory(final.parent)
                killpoints.reach("publish.synced")
            else:
                self._cache(final, part)
        return True

    @contextmanager
    def _staged(self, part: Manifest, files: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder under `tmp/` with a version's files, synced if it is durable; removed at the end if it exists."""
        write: Callable[[Path, bytes], object] = durable.write if part.durable else Path.write_bytes
        with self.directory.staged(f"{part.kind}-{part.version}") as temporary:
            for name, data in files.items():
                write(temporary / name, data)
                killpoints.reach("publish.file" if part.durable else "recent.file")
            write(temporary / MANIFEST, manifest.encode(part))
            if part.durable:
                durable.sync_directory(temporary)
            yield temporary

    def _check_right(self, epoch: int) -> None:
        if self.directory.claim is not None:
            self.directory.claim.confirm()
        self._check_epoch(epoch)

    def _check_epoch(self, epoch: int) -> None:
        control = self.control()
        if control is None or control.epoch != epoch:
            now = "there is no control yet" if control is None else f"control is at epoch {control.epoch}"
            raise WrongEpoch(f"a version of epoch {epoch} was refused: {now}")

    def replace(self, part: Manifest, files: Mapping[str, bytes]) -> None:
        """Replaces the files of a stored durable part; after a crash it has either the old or the new files.

        1. Files and manifest are written under `tmp/` and synced.
        2. Both directories exchange names, and the directory is synced. The old files are removed.

        Raises:
            UnusableRegistry: The disk refused; the old files are unchanged.
        """
        final = self.folder_of(part)
        # 1.
        with usable(f"rewrite version {part.version}"), self._staged(part, files) as temporary:
            killpoints.reach("rewrite.written")
            # 2.
            durable.exchange(temporary, final)
            killpoints.reach("rewrite.exchanged")
            durable.sync_directory(final.parent)
            self._manifests.pop(final, None)

    # Removing

    def newest_good(self, epoch: int) -> int | None:
        """The newest version of `epoch` with an intact chain, in which every file passes its check; None if none has.

        A corrupt version, or one that needs a missing version, is set aside, and the reason is logged. So no process
        loads it, and no fallback goes unnoticed. Only the process with the trainer's lock calls this.
        """
        doubted: object = None
        while True:
            version, stored = None, (self.deltas(), self.bases())
            try:
                version = self.newest(epoch)
                if version is None:
                    return None
                base, deltas = self.chain(version)
                for part in (base, *deltas):
                    self.verify(part)
                return version
            except _BadPart as error:
                self.set_aside(error.part, error.version, str(error))
            except UnknownVersion as error:
                if version is None:
                    raise
                # A compactor may have replaced the files during the read, so this tries again first.
                if doubted != (version, stored):
                    doubted = (version, stored)
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
        """Deletes a version of the given `kind` (a merged one with `parent`) permanently, with one rename."""
        self._remove(self.folder(kind, version, parent))

    def remove_delta(self, version: int) -> None:
        """Deletes a version's delta permanently, merged or not."""
        for folder in self._delta_folders(version):
            self._remove(folder)

    def remove_superseded(self, version: int) -> None:
        """Deletes the deltas of a version that its merged delta contains."""
        for folder in self._delta_folders(version)[1:]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        self._manifests.pop(folder, None)
        self.directory.remove_folder(folder)

    def sweep_recent(self, boot: str | None = None) -> int:
        """Removes everything in `recent/`; returns the number of removed versions.

        Only the process with the trainer's lock calls this.

        1. The highest number that may have been used is reserved.
        2. The boot id of the machine (`boot`, by default the kernel's) is stored; from here on numbers are taken under
           it.
        3. The versions are removed.

        Raises:
            UnusableRegistry: The disk refused.
        """
        boot = boot_id() if boot is None else boot
        mark = self.path / layout.RECENT_BOOT
        with usable("be swept"):
            # 1. The machine may have lost names in `recent/` when it restarted.
            before = mark.read_text() if mark.exists() else boot
            keeper = self.reserve_numbers(self.next_number() - 1 + (0 if before == boot else MOST_BETWEEN))
            leftovers = [path for path in keeper.parent.iterdir() if path != keeper]
            killpoints.reach("recent.numbered")
            # 2.
            if before != boot or not mark.exists():
                self.directory.replace(mark, boot.encode())
            # 3.
            for path in leftovers:
                # A trainer that lost its claim removes nothing, because its staging folder is gone.
                grave = self.directory.temporary(path.name)
                path.rename(grave)
                shutil.rmtree(grave) if grave.is_dir() else grave.unlink()
        self._manifests.clear()
        return sum(path.name.isdecimal() for path in leftovers)

    def reserve_numbers(self, last: int) -> Path:
        """Durably marks all numbers up to `last` as used, by a file in `recent/` with that name; returns its path.

        Raises:
            OSError: The disk refused.
        """
        keeper = self.path / layout.RECENT / f"{last:012d}.last"
        if not keeper.exists():
            self.directory.create(keeper, b"")
        return keeper
