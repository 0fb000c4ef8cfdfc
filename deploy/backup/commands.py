"""The commands `springtide backup` and `springtide restore`, and the code that makes a backup.

`springtide backup TO` backs up a running system:

1. Lock the backup location, so that nobody prunes it meanwhile.
2. Copy the histories of each shard with their positions, each from one moment; then the files next
   to them.
3. Copy control, and the versions that exist under it.
4. If this machine serves, copy serving's notes next to its histories. Upload the pieces that the
   location lacks.
5. Write the backup document, which makes the backup valid. After a crash before this step there is
   no backup, but the pieces already uploaded are not sent again.

Histories come before control. After an outage, a stream also meets control that is newer than its
histories, and it rolls back where it must. The trainer's position in its log and the stream's
position in the clicks come from different moments. Both continue from those positions in Kafka, and
repeated rows are trimmed by position.

`snapshot` streams a live store as it is at one moment, without a second copy on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deploy.backup import documents, erasures, listing, restoring, serving_start
from deploy.backup.cut import RegistryCut, cut, newest_whole
from deploy.backup.documents import Backup, KeptFile
from deploy.backup.lease import Lease
from deploy.backup.listing import ids, newest
from deploy.backup.objects import Objects
from deploy.backup.places import BACKUPS, usable
from deploy.operate.commands import Say
from deploy.operate.times import age, iso
from deploy.operate.versions import table
from state import layout
from state.config.settings import Settings
from state.disk import clean_mark
from state.disk.lmdb_store import LmdbStore
from state.errors import BackupError, CorruptStore, DamagedBackup, SaltMismatch, StoreError
from state.events.identity import load_salt
from state.features.erased import Erased
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.places.opening import open_place
from state.places.place import FilePlace
from state.process import killpoints
from state.process.actor import actor
from state.process.progress_line import ProgressLine
from state.registry.brought_files import MANIFEST
from state.registry.manifest import FileEntry
from state.registry.registry import Registry

SALT_OF = "salt"  # an extra of the stream's histories
BESIDE = (layout.WRITER, layout.LEADERS)
TRIES = 50
LINE_EVERY_S = 10.0
SALT_IN = (
    "the salt is in this backup: whoever reads it can tell which pseudonym is whose; keep it where only you can read it"
)
SALT_OUT = "the salt is not in it: keep a copy of {path} elsewhere, without it nothing can be restored"


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

    # The copy is made by native code, which waits where the pipe is full.
    writer = threading.Thread(target=write, name="snapshot")
    writer.start()
    try:
        with os.fdopen(reading, "rb", buffering=0) as stream:
            yield stream
    finally:
        # A closed pipe ends it.
        writer.join()
    if failed:
        raise failed[0]


class Scope(NamedTuple):
    """What is asked for.

    Attributes:
        with_salt: Also the secret of the pseudonyms.
        newest_only: Only the versions from which the trainer continues and those that control names.
    """

    with_salt: bool = False
    newest_only: bool = False


class Notes(NamedTuple):
    """What serving noted next to its histories.

    Attributes:
        files: What was kept of it; none where this machine does not serve.
        left_out: Why there are none although this machine serves.
    """

    files: tuple[KeptFile, ...] = ()
    left_out: tuple[str, ...] = ()


class Shard(NamedTuple):
    """The histories of one shard.

    Attributes:
        name: Of its directory.
        files: What was kept of it.
        positions: The next offset of each source, or further.
        salt: Fingerprint of the salt that its users have.
    """

    name: str
    files: list[KeptFile]
    positions: dict[str, int]
    salt: str


def make(settings: Settings, place: FilePlace, scope: Scope, now_ms: int, said: Callable[[int], None]) -> Backup:
    """Makes a backup.

    Args:
        settings: Of the system.
        place: Destination of the backup.
        scope: What of it.
        now_ms: Wall clock.
        said: Called repeatedly with the number of bytes copied.

    Raises:
        LockHeld: Another backup is made there.
        BackupError: There is nothing to back up yet, or the destination refused.
        SaltMismatch: The salt's file is not that of the histories.
        SpringtideError: The registry or a store cannot be read.
    """
    salt = load_salt(settings.salt_path, create=False)
    # 1.
    with Lease(place) as lease:
        if (last := ids(place)[-1:]) >= [made_id := documents.id_at(now_ms)]:
            raise BackupError(f"{place.told} has backup {last[0]}, and it is only {made_id} now", "put the clock right")
        making = _Making(settings, place, lease, said)
        # 2.
        shards = [making.shard(path) for path in layout.streams(settings.state_dir)]
        for shard in shards:
            if shard.salt != salt.fingerprint:
                raise SaltMismatch.between(shard.name, shard.salt, salt.fingerprint)
        killpoints.reach("backup.histories")
        # 3. and 4.
        found, kept = making.registry(scope.newest_only)
        notes = making.notes(shards)
        files = [*(one for shard in shards for one in shard.files), *kept, *notes.files]
        if scope.with_salt:
            files.append(making.whole("salt", settings.salt_path))
        newest = newest_whole(found.parts, found.control)
        made = Backup(
            id=made_id,
            created_at_ms=now_ms,
            release=release(),
            salt=salt.fingerprint,
            spec="" if newest is None else newest.spec,
            generation=found.control.generation,
            epoch=found.control.epoch,
            version=None if newest is None else newest.version,
            log=None if newest is None else newest.log,
            positions={shard.name: shard.positions for shard in shards},
            versions=len({one.version for one in found.parts.values()}),
            files=tuple(files),
            left_out=(
                *(f"registry/{name}: {reason}" for name, reason in sorted(found.damaged.items())),
                *notes.left_out,
            ),
            sent_bytes=making.sent_bytes,
        )
        # 5.
        lease.require_held()
        killpoints.reach("backup.sent")
        place.write(f"{BACKUPS}/{made.id}.json", documents.encode(made))
    return made


def release() -> str:
    """Of Springtide; empty where it runs from its source and is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("springtide")
    return ""


class _Making:
    """One backup on its way."""

    def __init__(self, settings: Settings, place: FilePlace, lease: Lease, said: Callable[[int], None]) -> None:
        self._settings, self._lease, self._said = settings, lease, said
        self._objects = Objects(place)
        earlier = newest(place)
        # Whole files by digest: those of versions never change, and are read once in their lives.
        self._known = {} if earlier is None else {one.sha256: one for one in earlier.files}

    @property
    def sent_bytes(self) -> int:
        return self._objects.sent_bytes

    def shard(self, path: Path) -> Shard:
        """Copies the histories at `path`, then the files next to them, which must not be older.

        Raises:
            CorruptStore: A power cut may have damaged them.
            StoreError: They cannot be read.
        """
        mark, folder = clean_mark.read(path / layout.MARK), path.parent
        if mark is not None and not mark.trusts(clean_mark.boot_id()):
            raise CorruptStore(
                f"{path} was open when the machine went down, so that pages may be missing; it is not copied",
                "start the stream first, which makes it anew",
            )
        map_bytes = self._settings.stream.map_gb << 30
        store = HistoryStore(path, self._settings.features.history, map_bytes, readonly=True)
        try:
            positions = {str(source): after for source, after in sorted(store.positions().items())}
            salt = store.extra(SALT_OF) or b""
            with snapshot(store) as pages:
                name = f"{folder.name}/{layout.HISTORIES}/{layout.DATA}"
                files = [self._through(self._objects.keep(name, pages))]
        finally:
            store.close()
        files += [self.whole(f"{folder.name}/{one}", folder / one) for one in BESIDE if (folder / one).exists()]
        return Shard(folder.name, files, positions, salt.decode())

    def notes(self, shards: Sequence[Shard]) -> Notes:
        """Copies serving's items and names, once serving has applied the clicks of the copied histories."""
        path = self._settings.serving_dir / layout.HISTORIES
        if not os.path.lexists(path):
            return Notes()
        try:
            store = HistoryStore(
                path, self._settings.features.history, self._settings.serving.map_gb << 30, readonly=True
            )
        except StoreError as error:
            return Notes(left_out=(f"{serving_start.NOTES_PATH}: {error.what}",))
        try:
            for shard in shards:
                serving_start.await_clicks(store, shard.positions)
            with tempfile.TemporaryFile() as file:
                serving_start.write_notes(store, file)
                file.seek(0)
                return Notes((self._through(self._objects.keep(serving_start.NOTES_PATH, file)),))
        finally:
            store.close()

    def registry(self, newest_only: bool) -> tuple[RegistryCut, list[KeptFile]]:
        """Copies one moment of the registry; files that the compactor removed meanwhile are looked up again.

        Raises:
            BackupError: It never holds still.
            RegistryError: It cannot be read.
        """
        registry = Registry(self._settings.registry_dir)
        for _ in range(TRIES):
            found = cut(registry, newest_only)
            try:
                damaged, kept = dict(found.damaged), []
                for folder, part in found.parts.items():
                    try:
                        kept += self._part(registry.path, folder, part.files)
                    except _Differs as error:
                        damaged[folder] = str(error)
                kept += [self.whole(f"{layout.REGISTRY}/{name}", registry.path / name) for name in found.files]
            except FileNotFoundError:
                continue
            good = {folder: part for folder, part in found.parts.items() if folder not in damaged}
            return replace(found, parts=good, damaged=damaged), kept
        raise BackupError(f"{registry.path} changed while it was copied, {TRIES} times", "repeat it")

    def _part(self, path: Path, folder: str, entries: dict[str, FileEntry]) -> list[KeptFile]:
        """The files of one version; files that the backup location already has are not read."""
        kept = []
        for name, entry in entries.items():
            known = self._known.get(entry.sha256)
            named = f"{layout.REGISTRY}/{folder}/{name}"
            if known is not None and self._objects.has(known):
                kept.append(replace(known, path=named))
                self._told(entry.bytes)
                continue
            made = self.whole(named, path / folder / name)
            if (made.sha256, made.bytes) != (entry.sha256, entry.bytes):
                raise _Differs(f"{name} fails its digest")
            kept.append(made)
        return [*kept, self.whole(f"{layout.REGISTRY}/{folder}/{MANIFEST}", path / folder / MANIFEST)]

    def whole(self, name: str, path: Path) -> KeptFile:
        """Keeps a file.

        Raises:
            FileNotFoundError: It is gone.
            BackupError: It cannot be read.
        """
        with usable(str(path), "be read"), path.open("rb", buffering=0) as source:
            made = self._through(self._objects.keep(name, source))
        self._known[made.sha256] = made
        return made

    def _through(self, keeping: Generator[int, None, KeptFile]) -> KeptFile:
        while True:
            try:
                self._told(next(keeping))
            except StopIteration as end:
                made: KeptFile = end.value
                return made

    def _told(self, taken: int) -> None:
        self._lease.refresh()
        self._said(taken)


class _Differs(Exception):
    """A file of a version does not match its manifest."""


def backup(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Makes a backup, lists those of a location, or verifies one.

    Raises:
        SpringtideError: See `make`.
    """
    place = open_place(asked.to)
    if asked.list:
        show(place, asked, now_ms, say)
        return
    progress = Amount("read")
    if asked.check:
        found = listing.backup(place, asked.at)
        listing.check(place, found, progress)
        tell(asked, {"checked": summary(found)}, f"backup {found.id} is whole: {size(found.bytes)} read", say)
        return
    scope = Scope(with_salt=asked.with_salt, newest_only=asked.versions == "newest")
    made = make(settings, place, scope, now_ms, progress)
    lines = [
        f"backup {made.id} at {place.told}: {described(made)}; {size(made.bytes)}, of which {size(made.sent_bytes)} were "
        f"sent, in {progress.took_s:.1f} s",
        SALT_IN if made.with_salt else SALT_OUT.format(path=settings.salt_path),
        *(
            ["no version in it can be trained on from: look at `springtide versions`"]
            if made.versions and made.version is None
            else []
        ),
        *(f"left out, it is damaged: {one}" for one in made.left_out),
    ]
    told: dict[str, Any] = {"made": summary(made) | {"seconds": round(progress.took_s, 3)}}
    if asked.keep:
        pruned = listing.prune(place, asked.keep)
        told["pruned"] = pruned._asdict()
        lines.append(f"removed {pruned.backups} older backups and {pruned.objects:,} objects that none needs any more")
    tell(asked, told, "\n".join(lines), say)


def restore(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Restores a backup.

    Raises:
        SpringtideError: See `deploy.backup.restoring.restore`.
    """
    place, progress = open_place(asked.source), Amount("written")
    found = listing.backup(place, asked.at)
    spec = FeatureSpec.from_settings(settings).digest
    by = restoring.By(actor(), now_ms)
    known, unknown = later_erasures(place, found, asked.erasures_from)
    done = restoring.restore(settings, place, found, by, progress, known, asked.kafka_lost)
    lines = [
        f"restored backup {found.id} of {iso(found.created_at_ms)}, {age((now_ms - found.created_at_ms) / 1000)} old: "
        f"{described(found)}, histories of {done.users:,} users; {size(found.bytes)} in {progress.took_s:.1f} s",
        f"control generation {done.generation} says so; versions go on from {done.first_number}",
        *([f"{done.erasures} erasures of after it count again"] if done.erasures else []),
        *unknown,
    ]
    if found.spec and found.spec != spec:
        lines.append(
            f"its version is of feature spec {found.spec[:12]}, the settings here make {spec[:12]}: use its settings, or upgrade"
        )
    if asked.kafka_lost:
        lines.append(f"the trainer goes on from version {done.version} in another training log, from its beginning")
    lines.append(
        "start it with `springtide up`: what Kafka has had since then is read again. The old one must not run any more."
    )
    told = {
        "restored": summary(found)
        | {
            "users": done.users,
            "positions": done.positions,
            "generation": done.generation,
            "first_number": done.first_number,
            "erasures_again": done.erasures,
            "goes_on_from": done.version,
            "fits": not found.spec or found.spec == spec,
        }
    }
    tell(asked, told, "\n".join(lines), say)


def later_erasures(place: FilePlace, found: Backup, registry: Path | None) -> tuple[Erased, list[str]]:
    """What is known of erasures after a backup: by the newest one there, and by a registry that was not lost.

    Returns:
        The larger of the two, and a message if the newest backup cannot be read.

    Raises:
        BackupError: `registry` is not a registry.
    """
    known, said = [Erased.NOBODY], []
    if registry is not None:
        known.append(erasures.in_registry(registry))
    try:
        newest = listing.backup(place)
        if newest.id != found.id:
            with tempfile.TemporaryDirectory() as folder:
                known.append(erasures.known_to(newest, Objects(place, listed=False), Path(folder)))
    except DamagedBackup as error:
        said.append(f"erasures that later backups know may be missing, give them again: {error.what}")
    return max(known, key=lambda one: one.last), said


def show(place: FilePlace, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lists the backups of a location, oldest first."""
    found = [listing.backup(place, one) for one in listing.ids(place)]
    head = ["backup", "age", "version", "versions", "size", "sent", "salt"]
    rows = [
        [
            one.id,
            age((now_ms - one.created_at_ms) / 1000),
            "none" if one.version is None else str(one.version),
            str(one.versions),
            size(one.bytes),
            size(one.sent_bytes),
            "in it" if one.with_salt else one.salt,
        ]
        for one in found
    ]
    text = table([head, *rows]) if rows else f"{place.told} has no backup"
    tell(asked, {"backups": [summary(one) for one in found]}, text, say)


def tell(asked: argparse.Namespace, document: dict[str, Any], text: str, say: Callable[[str], None]) -> None:
    """Prints what was done, as it was asked for."""
    say(json.dumps(document, indent=2) if asked.output == "json" else text)


def summary(backup: Backup) -> dict[str, Any]:
    """A backup as JSON values, without its files."""
    fields = {name: value for name, value in asdict(backup).items() if name != "files"}
    return {**fields, "bytes": backup.bytes, "with_salt": backup.with_salt}


def described(backup: Backup) -> str:
    """What is in a backup, in words."""
    newest = "no version yet" if backup.version is None else f"version {backup.version}"
    return f"{newest} of {backup.versions}, control generation {backup.generation}"


def size(bytes: int) -> str:
    """A number of bytes for people.

    >>> size(1_234_567), size(4_200_000_000)
    ('1.2 MB', '4.20 GB')
    """
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"


class Amount:
    """Says how many bytes were done, now and then.

    Args:
        verb: What was done with them.
    """

    def __init__(self, verb: str) -> None:
        self._verb, self._bytes, self._begun_s = verb, 0, time.monotonic()
        self._line = ProgressLine(sys.stderr, LINE_EVERY_S)

    @property
    def took_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun_s

    def __call__(self, more: int) -> None:
        """That many more."""
        self._bytes += more
        self._line.show(lambda: f"{size(self._bytes)} {self._verb} after {self.took_s:.0f} s")
