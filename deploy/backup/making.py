"""Makes a backup of a running system.

1. Lock the backup location against pruning.
2. Copy the histories of each shard with their positions, each from one moment; then the files next to them.
3. Copy control, and the versions that exist under it.
4. If this machine serves, copy serving's notes next to its histories. Only missing pieces are sent.
5. Write the backup document, which makes the backup valid.

Histories are copied before control, because a stream rolls back when control is newer than its histories. Trainer and
stream continue in Kafka from their own positions, and repeated rows are trimmed by position.

`cut` selects one consistent cut of the registry. Versions are immutable directories that appear and disappear by one
rename, and a version is removed only before the versions that it depends on. If every listed directory still exists
once the list is complete, they all existed at one moment: the cut.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from msgspec.structs import replace as changed

from deploy.backup import location, serving_start
from deploy.backup.location import Backup, KeptFile, Lease, Objects, usable
from state import layout
from state.config.settings import Settings
from state.disk import documents
from state.disk import files as durable
from state.disk.lmdb_store import LmdbStore
from state.errors import BackupError, CorruptStore, SaltMismatch, StoreError
from state.events.identity import load_salt
from state.file_store import FileStore
from state.history.store import HistoryStore
from state.process import killpoints
from state.registry import manifest
from state.registry.control import Control, named
from state.registry.manifest import Manifest, sees
from state.registry.registry import DURABLE, MANIFEST, Registry, durable_folders

SALT_OF = "salt"  # an extra of the stream's histories
NEXT_TO_HISTORIES = (layout.WRITER, layout.LEADERS)
TRIES = 100
_LEFT_ALONE = (
    *DURABLE,
    layout.RECENT,
    layout.TEMPORARY,
    layout.ERASURES,
    layout.SNAPSHOTS,
    layout.PREPARED,
)
"""Folders that are not copied as files. What processes report about their own copies, and caches, are not part of the state;
histories are copied from their stores."""


class Scope(NamedTuple):
    """The parts to back up.

    Attributes:
        with_salt: Include the secret of the pseudonyms.
        newest_only: Only the versions from which the trainer continues and those that control names.
    """

    with_salt: bool = False
    newest_only: bool = False


class Shard(NamedTuple):
    """The histories of one shard, as copied.

    Attributes:
        positions: The next offset of each source, or further.
        salt: Fingerprint of the salt that its users have.
    """

    name: str
    files: list[KeptFile]
    positions: dict[str, int]
    salt: str


def make(settings: Settings, store: FileStore, scope: Scope, now_ms: int, progress: Callable[[int], None]) -> Backup:
    """Makes a backup.

    Raises:
        LockHeld: Another backup is made there.
        BackupError: There is nothing to back up yet, or the destination cannot be written.
        SaltMismatch: The salt's file is not that of the histories.
        SpringtideError: The registry or a store cannot be read.
    """
    salt = load_salt(settings.salt_path, create=False)
    # 1.
    with Lease(store) as lease:
        if (last := location.ids(store)[-1:]) >= [made_id := location.id_at(now_ms)]:
            raise BackupError(f"{store.name} has backup {last[0]}, and it is only {made_id} now", "put the clock right")
        making = _Making(settings, store, lease, progress)
        # 2.
        shards = [making.shard(path) for path in layout.streams(settings.state_dir)]
        for shard in shards:
            if shard.salt != salt.fingerprint:
                raise SaltMismatch.between(shard.name, shard.salt, salt.fingerprint)
        killpoints.reach("backup.histories")
        # 3. and 4.
        registry_cut, registry_files = making.registry(scope.newest_only)
        notes, without_notes = making.notes(shards)
        files = [*(file for shard in shards for file in shard.files), *registry_files, *notes]
        if scope.with_salt:
            files.append(making.whole("salt", settings.salt_path))
        newest = newest_whole(registry_cut.parts, registry_cut.control)
        backup = Backup(
            id=made_id,
            created_at_ms=now_ms,
            release=release(),
            salt=salt.fingerprint,
            spec="" if newest is None else newest.spec,
            generation=registry_cut.control.generation,
            epoch=registry_cut.control.epoch,
            version=None if newest is None else newest.version,
            log=None if newest is None else newest.log,
            positions={shard.name: shard.positions for shard in shards},
            versions=len({part.version for part in registry_cut.parts.values()}),
            files=tuple(files),
            left_out=(
                *(f"registry/{name}: {reason}" for name, reason in sorted(registry_cut.damaged.items())),
                *without_notes,
            ),
            sent_bytes=making.sent_bytes,
        )
        # 5.
        lease.renew()
        killpoints.reach("backup.sent")
        store.write(f"{location.BACKUPS}/{backup.id}.json", documents.encode_sealed(backup))
    return backup


def release() -> str:
    """The release of Springtide; empty where it runs from its source and is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("springtide")
    return ""


class _Making:
    def __init__(self, settings: Settings, store: FileStore, lease: Lease, progress: Callable[[int], None]) -> None:
        self._settings, self._lease, self._report = settings, lease, progress
        self._objects = Objects(store)
        earlier = location.newest_backup(store)
        # Whole files by digest. Files of versions never change, so each is read only once.
        self._known = {} if earlier is None else {file.sha256: file for file in earlier.files}

    @property
    def sent_bytes(self) -> int:
        return self._objects.sent_bytes

    def shard(self, path: Path) -> Shard:
        """Copies the histories at `path`, then the files next to them, which must not be older.

        Raises:
            CorruptStore: A power cut may have damaged them.
        """
        mark, folder = durable.read_clean_mark(path / layout.MARK), path.parent
        if mark is not None and not mark.trusts(durable.boot_id()):
            raise CorruptStore(
                f"{path} was open when the machine went down, so that pages may be missing; it is not copied",
                "start the stream first, which rebuilds it",
            )
        store = HistoryStore(path, self._settings.features.history, readonly=True)
        try:
            positions = {str(source): after for source, after in sorted(store.positions().items())}
            salt = store.extra(SALT_OF) or b""
            with snapshot(store) as pages:
                name = f"{folder.name}/{layout.HISTORIES}/{layout.DATA}"
                files = [self._objects.keep(name, pages, self._progress)]
        finally:
            store.close()
        files += [
            self.whole(f"{folder.name}/{name}", folder / name) for name in NEXT_TO_HISTORIES if (folder / name).exists()
        ]
        return Shard(folder.name, files, positions, salt.decode())

    def notes(self, shards: Sequence[Shard]) -> tuple[list[KeptFile], list[str]]:
        """Copies serving's notes, once serving has applied the clicks of the copied histories.

        Returns:
            The file, none where this machine does not serve; and the reason if the notes cannot be read.
        """
        path = self._settings.serving_dir / layout.HISTORIES
        if not os.path.lexists(path):
            return [], []
        try:
            store = HistoryStore(path, self._settings.features.history, readonly=True)
        except StoreError as error:
            return [], [f"{serving_start.NOTES_PATH}: {error.what}"]
        try:
            for shard in shards:
                serving_start.await_clicks(store, shard.positions)
            with tempfile.TemporaryFile() as file:
                serving_start.write_notes(store, file)
                file.seek(0)
                return [self._objects.keep(serving_start.NOTES_PATH, file, self._progress)], []
        finally:
            store.close()

    def registry(self, newest_only: bool) -> tuple[RegistryCut, list[KeptFile]]:
        """Copies a consistent cut of the registry; starts again if the compactor removed a file meanwhile."""
        registry = Registry(self._settings.registry_dir)
        for _ in range(TRIES):
            registry_cut = cut(registry, newest_only)
            try:
                damaged, files = dict(registry_cut.damaged), []
                for folder, part in registry_cut.parts.items():
                    try:
                        files += self._part(registry, folder, part)
                    except _Differs as error:
                        damaged[folder] = str(error)
                files += [self.whole(f"{layout.REGISTRY}/{name}", registry.path / name) for name in registry_cut.files]
            except FileNotFoundError:
                continue
            good = {folder: part for folder, part in registry_cut.parts.items() if folder not in damaged}
            return replace(registry_cut, parts=good, damaged=damaged), files
        raise BackupError(f"{registry.path} changed while it was copied, {TRIES} times", "repeat it")

    def _part(self, registry: Registry, folder: str, part: Manifest) -> list[KeptFile]:
        """The files of one version; files that the backup location already has are not read."""
        files = []
        for name, entry in part.files.items():
            stored = self._known.get(entry.sha256)
            path_in_backup = f"{layout.REGISTRY}/{folder}/{name}"
            if stored is not None and self._objects.has(stored):
                files.append(changed(stored, path=path_in_backup))
                self._progress(entry.bytes)
                continue
            kept_file = self.whole(path_in_backup, registry.path_of(part, name))
            if (kept_file.sha256, kept_file.bytes) != (entry.sha256, entry.bytes):
                raise _Differs(f"{name} fails its digest")
            files.append(kept_file)
        return [*files, self.whole(f"{layout.REGISTRY}/{folder}/{MANIFEST}", registry.path / folder / MANIFEST)]

    def whole(self, name: str, path: Path) -> KeptFile:
        with usable(str(path), "be read"), path.open("rb", buffering=0) as source:
            kept_file = self._objects.keep(name, source, self._progress)
        self._known[kept_file.sha256] = kept_file
        return kept_file

    def _progress(self, count: int) -> None:
        self._lease.refresh()
        self._report(count)


class _Differs(Exception):
    """A file of a version does not match its manifest."""


@contextmanager
def snapshot(store: LmdbStore) -> Iterator[BinaryIO]:
    """Streams `data.mdb` of a copy of the store as it is now, to be read in the block; the writer continues meanwhile.

    Raises:
        StoreError: It cannot be read to its end.
    """
    reading, writing = os.pipe()
    failed: list[StoreError] = []

    def write() -> None:
        try:
            store.copy_as_is(writing)
        except StoreError as error:
            failed.append(error)
        finally:
            os.close(writing)

    # Native code makes the copy, and blocks while the pipe is full.
    writer = threading.Thread(target=write, name="snapshot")
    writer.start()
    try:
        with os.fdopen(reading, "rb", buffering=0) as stream:
            yield stream
    finally:
        # A closed pipe ends the copy.
        writer.join()
    if failed:
        raise failed[0]


@dataclass(frozen=True)
class RegistryCut:
    """One consistent cut of a registry.

    Attributes:
        parts: The directories of versions, relative to the registry, with their manifests.
        files: All other files in the backup: control, masks, outcomes, gaps, programs, specs.
        damaged: Directories of versions whose manifest cannot be read, with the reason.
    """

    control: Control
    parts: Mapping[str, Manifest]
    files: tuple[str, ...]
    damaged: Mapping[str, str]


def cut(registry: Registry, newest_only: bool = False) -> RegistryCut:
    """Takes one consistent cut of a live registry.

    With `newest_only`, it has only the versions that the trainer needs to continue and those that control names.

    Raises:
        BackupError: There is no control yet, or it never stops changing.
        CorruptVersion: Control is damaged.
    """
    for _ in range(TRIES):
        control = registry.control()
        if control is None:
            raise BackupError(f"{registry.path} has no control yet", "start the system once, then repeat it")
        try:
            folders = list_folders(registry.path)
            parts, damaged = _manifests(registry, folders, control)
            if newest_only:
                wanted = _needed(parts, control)
                parts = {name: parts[name] for name in parts if name in wanted}
            files = list_files(registry.path, control.generation)
        except FileNotFoundError:
            # The compactor has replaced a version by a merged one.
            continue
        if set(folders) <= set(list_folders(registry.path)) and registry.control() == control:
            return RegistryCut(control, parts, files, damaged)
    raise BackupError(f"{registry.path} changed while it was listed, {TRIES} times", "repeat it")


def list_folders(path: Path) -> list[str]:
    """The directories of durable versions, relative to the registry at `path`; quarantined ones are left out."""
    with usable(str(path), "be listed"):
        return durable_folders(path)


def list_files(path: Path, generation: int) -> tuple[str, ...]:
    """All other files, relative to the registry at `path`; control files only up to `generation`."""
    with usable(str(path), "be listed"):
        files = [
            file
            for folder in sorted(path.iterdir())
            if folder.is_dir() and folder.name not in _LEFT_ALONE
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
    control_files = {f"{number:08d}.json" for number in range(generation + 1)}
    excluded = {file for file in files if file.parent.name == layout.CONTROL and file.name not in control_files}
    return tuple(file.relative_to(path).as_posix() for file in files if file not in excluded)


def chain_of(parts: Mapping[str, Manifest], version: int) -> set[str] | None:
    """The directories in `parts` that make up a version, as a registry with only these parts would read it.

    None if one is missing.
    """
    bases = {part.version: name for name, part in parts.items() if part.kind == "base"}
    deltas: dict[int, str] = {}
    for name, part in parts.items():
        # A merged version takes precedence over the delta, and among merged ones the part with the oldest parent.
        if part.kind != "base" and (part.version not in deltas or _rank(part) < _rank(parts[deltas[part.version]])):
            deltas[part.version] = name
    newest = deltas.get(version) or bases.get(version)
    if newest is None:
        return None
    line = parts[newest].visible
    base = max((number for number in bases if number <= version and sees(line, number)), default=None)
    at: int | None = version
    chain = set()
    while base is not None and at != base:
        if at not in deltas or at < base:
            return None
        chain.add(deltas[at])
        at = parts[deltas[at]].parent
    return None if base is None else {*chain, bases[base]}


def newest_whole(parts: Mapping[str, Manifest], control: Control) -> Manifest | None:
    """Returns the newest complete version of control's epoch; the epoch's base if the epoch has none."""
    by_version = {
        part.version: part for part in parts.values() if part.epoch == control.epoch or part.version == control.base
    }
    return next((by_version[number] for number in sorted(by_version, reverse=True) if chain_of(parts, number)), None)


def _manifests(
    registry: Registry, folders: Collection[str], control: Control
) -> tuple[dict[str, Manifest], dict[str, str]]:
    parts: dict[str, Manifest] = {}
    damaged: dict[str, str] = {}
    for folder in folders:
        path = registry.path / folder
        try:
            part = manifest.decode(registry.manifest_bytes(path))
        except FileNotFoundError:
            if not path.is_dir():
                raise
            damaged[folder] = "its manifest is missing"
        except ValueError as error:
            damaged[folder] = f"its manifest is damaged: {error}"
        else:
            if part.epoch <= control.epoch:
                parts[folder] = part
    return parts, damaged


def _needed(parts: Mapping[str, Manifest], control: Control) -> set[str]:
    newest = newest_whole(parts, control)
    wanted = named(control) if newest is None else named(control) | {newest.version}
    return set().union(*(chain_of(parts, version) or () for version in wanted))


def _rank(part: Manifest) -> tuple[bool, int]:
    return part.kind != "merged", part.parent or 0
