"""A backup location: what it holds, its lock, and how backups in it are listed, read, verified and pruned.

Files are stored in pieces of at most 4 MiB, each an object named by the SHA-256 of its uncompressed bytes, which every
read verifies. A piece that exists is not sent again. Only one piece is in memory at a time.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import BinaryIO, NamedTuple

import msgspec
import zstandard

from state import file_store
from state.disk import documents
from state.disk import files as durable
from state.errors import BackupError, DamagedBackup, LockHeld
from state.file_store import FileStore
from state.process import killpoints
from state.registry.manifest import LogRange

OBJECTS, BACKUPS, LOCK = "objects", "backups", "lock.json"
FORMAT = 1
PIECE_BYTES = 4 << 20
REFRESH_S, STALE_S = 60.0, 3600.0
_LEVEL = 3
_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z")
_DIGEST = re.compile(r"[0-9a-f]{64}")

usable = partial(file_store.usable, failed=BackupError)
"""`state.file_store.usable` that raises a `BackupError` for an error of the operating system."""


# Documents


class KeptFile(msgspec.Struct, frozen=True):
    """A file in a backup.

    Attributes:
        path: Its path in a restored system: under `registry/`, `stream-<shard>/`, or `salt`.
        bytes: Its size.
        pieces: The digests of its pieces, in order; each piece is an object.
    """

    path: str
    bytes: int
    sha256: str
    pieces: tuple[str, ...]


class Backup(msgspec.Struct, frozen=True):
    """The contents of one backup.

    Attributes:
        id: When the backup started, in UTC; ids ascend.
        created_at_ms: When the backup started, wall clock.
        salt: Fingerprint of the users' salt.
        spec: Digest of the feature spec of `version`; empty if there is none.
        generation: The newest control generation in the backup.
        version: The newest version of that epoch, from which the trainer continues; None if there was none yet.
        log: The position in the training log from which the trainer continues.
        positions: By shard, the next offset of each source; the shard's histories are at least that far.
        left_out: Damaged parts that are not in the backup, with the reason.
        sent_bytes: How many bytes this backup added to the object store, after compression.
    """

    id: str
    created_at_ms: int
    release: str
    salt: str
    spec: str
    generation: int
    epoch: int
    version: int | None
    log: LogRange | None
    positions: Mapping[str, Mapping[str, int]]
    versions: int
    files: tuple[KeptFile, ...]
    left_out: tuple[str, ...] = ()
    sent_bytes: int = 0
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """The total size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def with_salt(self) -> bool:
        """Whether the backup contains the salt."""
        return any(file.path == "salt" for file in self.files)


def id_at(now_ms: int) -> str:
    """The id of a backup that starts now.

    >>> id_at(1_795_719_672_345)
    '20261126T190112.345Z'
    """
    at = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    return f"{at:%Y%m%dT%H%M%S}.{now_ms % 1000:03d}Z"


def _is_inside(path: str) -> bool:
    """Whether a relative path stays below its base directory.

    >>> _is_inside("registry/control/00000001.json"), _is_inside("registry/../x"), _is_inside("/etc/passwd"), _is_inside("")
    (True, False, False, False)
    """
    return all(part not in ("", ".", "..") and "\0" not in part for part in path.split("/"))


def _decoded(data: bytes) -> Backup:
    backup = documents.decode_sealed(data, Backup)
    if backup.format != FORMAT:
        raise ValueError(f"it is of format {backup.format}; this release reads {FORMAT}")
    for file in backup.files:
        if not _is_inside(file.path) or not all(map(_DIGEST.fullmatch, (file.sha256, *file.pieces))):
            raise ValueError(f"it names an impossible file {file.path!r}")
    return backup


def ids(store: FileStore) -> list[str]:
    """The ids of all backups of a location, oldest first."""
    names = [name.removesuffix(".json") for name in store.names(BACKUPS)]
    return [name for name in names if _ID.fullmatch(name)]


def read_backup(store: FileStore, wanted: str = "") -> Backup:
    """Reads the document of a backup; of the newest one if `wanted` is empty.

    Raises:
        BackupError: There is no backup, or none with this id.
        DamagedBackup: The document fails its digest.
    """
    backup_ids = ids(store)
    if not backup_ids:
        raise BackupError(f"{store.name} has no backup", "check the location: `springtide backup TO --list`")
    wanted = wanted or backup_ids[-1]
    if wanted not in backup_ids:
        raise BackupError(f"{store.name} has no backup {wanted}", f"use one of {', '.join(backup_ids[-5:])}")
    name = f"{BACKUPS}/{wanted}.json"
    try:
        return _decoded(store.read(name))
    except FileNotFoundError:
        raise _damaged(name, store, " is missing") from None
    except ValueError as error:
        raise _damaged(name, store, f" is damaged ({error})") from error


def newest_backup(store: FileStore) -> Backup | None:
    """The newest backup of a location whose document can be read; None if there is none."""
    for wanted in reversed(ids(store)):
        try:
            return read_backup(store, wanted)
        except DamagedBackup:
            continue
    return None


class Pruned(NamedTuple):
    """How many backups `prune` removed, and how many objects that no remaining backup uses."""

    backups: int
    objects: int


def prune(store: FileStore, keep: int) -> Pruned:
    """Removes all but the newest `keep` backups, and the objects that no remaining backup uses.

    1. Removes the documents, oldest first. A backup without its document no longer counts.
    2. Removes the objects. After a crash before this step, unused objects remain until the next prune.

    Raises:
        LockHeld: Another process writes to the location.
        DamagedBackup: A remaining backup cannot be read, so that its objects are unknown; no object was removed.
    """
    with Lease(store) as lease:
        backup_ids = ids(store)
        remaining = [read_backup(store, backup_id) for backup_id in backup_ids[-keep:]]
        # 1.
        for backup_id in backup_ids[:-keep]:
            store.remove(f"{BACKUPS}/{backup_id}.json")
        killpoints.reach("prune.documents")
        # 2.
        used = {piece for backup in remaining for file in backup.files for piece in file.pieces}
        unused = [digest for digest in _digests(store) if digest not in used]
        for digest in unused:
            lease.refresh()
            store.remove(_object_name(digest))
    return Pruned(len(backup_ids[:-keep]), len(unused))


def verify(store: FileStore, backup: Backup, progress: Callable[[int], None]) -> None:
    """Reads a whole backup and verifies every digest; calls `progress` with the size of each piece.

    Raises:
        DamagedBackup: Something is missing or fails its digest; the message names it.
    """
    objects = Objects(store, listed=False)
    for file in backup.files:
        for piece in objects.read(file):
            progress(len(piece))


# Objects


class Objects:
    """The objects of a backup location, as used by one backup or one restore.

    A backup must list the existing objects first (`listed`), because it adds to them. `sent_bytes` are the bytes added,
    after compression.
    """

    def __init__(self, store: FileStore, listed: bool = True) -> None:
        self._store = store
        self._stored = set(_digests(store)) if listed else set()
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()
        self.sent_bytes = 0

    def has(self, file: KeptFile) -> bool:
        """Whether all pieces of a file are stored."""
        return self._stored.issuperset(file.pieces)

    def keep(self, path: str, source: BinaryIO, progress: Callable[[int], None]) -> KeptFile:
        """Stores the content of `source`, to its end; returns its entry in the backup.

        Args:
            path: Path of the file in a restored system.
            source: The content; it may be a pipe with short reads.
            progress: Called with the size of each piece.
        """
        digest, size, pieces = hashlib.sha256(), 0, []
        while piece := _next_piece(source):
            digest.update(piece)
            size += len(piece)
            pieces.append(self._keep(piece))
            progress(len(piece))
        return KeptFile(path, size, digest.hexdigest(), tuple(pieces))

    def _keep(self, piece: bytes) -> str:
        digest = durable.digest(piece)
        if digest not in self._stored:
            compressed = self._compressor.compress(piece)
            self._store.write(_object_name(digest), compressed)
            killpoints.reach("backup.object")
            self._stored.add(digest)
            self.sent_bytes += len(compressed)
        return digest

    def read(self, file: KeptFile) -> Iterator[bytes]:
        """Yields a file piece by piece; the last piece comes only after the whole file is verified.

        Raises:
            DamagedBackup: An object is missing or fails its digest; the message names it.
            UnusablePlace: The backup location cannot be reached.
        """
        file_digest, size, piece = hashlib.sha256(), 0, b""
        for digest in file.pieces:
            if piece:
                yield piece
            piece = self._read(digest, file.path)
            file_digest.update(piece)
            size += len(piece)
        if (size, file_digest.hexdigest()) != (file.bytes, file.sha256):
            raise _damaged(f"{file.path}, made of its pieces", self._store)
        if piece:
            yield piece

    def _read(self, digest: str, path: str) -> bytes:
        name = _object_name(digest)
        try:
            compressed = self._store.read(name)
        except FileNotFoundError:
            raise _damaged(f"{name}, a piece of {path}", self._store, " is missing") from None
        try:
            fits = 0 <= zstandard.frame_content_size(compressed) <= PIECE_BYTES
            piece = self._decompressor.decompress(compressed) if fits else b""
        except zstandard.ZstdError:
            piece = b""
        if durable.digest(piece) != digest:
            raise _damaged(f"{name}, a piece of {path}", self._store)
        return piece


def _next_piece(source: BinaryIO) -> bytes:
    """Reads the next piece. Every piece but the last has full size, even if `source` is a pipe with short reads."""
    parts, remaining = [], PIECE_BYTES
    while remaining and (part := source.read(remaining)):
        parts.append(part)
        remaining -= len(part)
    return b"".join(parts)


def _object_name(digest: str) -> str:
    return f"{OBJECTS}/{digest[:2]}/{digest}"


def _digests(store: FileStore) -> list[str]:
    return [name.rpartition("/")[2] for name in store.names(OBJECTS)]


def _damaged(subject: str, store: FileStore, how: str = " fails its digest") -> DamagedBackup:
    return DamagedBackup(
        f"{subject} at {store.name}{how}",
        "restore another backup; if you remove that file, the next backup sends it again if it still has it",
    )


# The lock


class _Lock(msgspec.Struct):
    owner: str
    at_ms: int


class Lease:
    """Context manager that holds the lock of a backup location: only one process makes a backup there or prunes.

    The lock is a file that is replaced only if it is unchanged since it was read. A dead holder on this machine is
    recognised by its process id, one on another machine by its silence. Before a backup becomes valid, its writer
    renews its lock.

    Args:
        owner: Identity of the holder: host, pid and start time.

    Raises:
        LockHeld: Another process writes there.
    """

    def __init__(self, store: FileStore, clock: Callable[[], float] = time.time, owner: str = "") -> None:
        self._store, self._clock = store, clock
        self._owner = owner or durable.owner_mark()
        self._tag = ""
        self._renewed_s = 0.0

    def __enter__(self) -> Lease:
        data, self._tag = self._store.tagged(LOCK)
        if (data and self._lives(data)) or not self._replace():
            raise LockHeld(
                f"{self._store.name} is in use: {self._holder()}",
                f"wait for it; if it is gone for good, remove {LOCK} there",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store.tagged(LOCK)[1] == self._tag:
            self._store.remove(LOCK)

    def refresh(self) -> None:
        """Renews the lock if `REFRESH_S` has passed; cheap enough to call often."""
        if self._clock() - self._renewed_s >= REFRESH_S:
            self.renew()

    def renew(self) -> None:
        """Renews the lock.

        Raises:
            BackupError: Another process took it over.
        """
        if not self._replace():
            raise BackupError(
                f"{self._store.name} was taken over by another process while this one was suspended",
                "run it again; files that were sent are not sent again",
            )

    def _replace(self) -> bool:
        now_s = self._clock()
        tag = self._store.swap(LOCK, msgspec.json.encode(_Lock(self._owner, int(now_s * 1000))), self._tag)
        if tag:
            self._tag, self._renewed_s = tag, now_s
        return bool(tag)

    def _lives(self, data: bytes) -> bool:
        lock = documents.decode(data, _Lock)
        return self._clock() - lock.at_ms / 1000 <= STALE_S and not durable.is_dead(lock.owner)

    def _holder(self) -> str:
        data, _ = self._store.tagged(LOCK)
        if not data:
            return "another process has just begun or ended"
        host, pid, _ = documents.decode(data, _Lock).owner.rsplit("@", 2)
        return f"process {pid} on {host} writes there"
