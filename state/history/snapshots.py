"""Snapshots of histories in the registry's location: their format, and code to find, load and remove them.

    snapshots/index/<number>.json       a snapshot's document, sealed with its digest and written last
    snapshots/files/<number>/<name>     the files that this snapshot wrote; later snapshots may name them too

A file has one of three kinds:

    base     chunks of the users of one range, at the time of the snapshot that wrote the file
    delta    events added since the preceding snapshot, grouped by user
    extras   counts and extras of the store

Numbers ascend; a number is the time of the snapshot in milliseconds. Base and delta files hold consecutive shares of
users (`share_of`). A file is a zstd frame of MessagePack: columns by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from state import layout
from state.config.settings import Settings
from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptStore, UnusablePlace
from state.features.spec import EVENT, Events
from state.file_store import FileStore, open_store
from state.history.actions import ACTIONS
from state.history.appends import Appends
from state.history.chunks import Chunks
from state.history.rewinding import LINE
from state.history.store import FORGOTTEN, HistoryStore
from state.history.sweeping import READ_TIMES
from state.positions import Source, share_of
from state.process import killpoints
from state.registry.log_line import LogLine, from_json, parting
from state.storage.shares import REGISTRY, kept_bytes
from state.user_shares import ALL, UserShares

INDEX, FILES = f"{layout.SNAPSHOTS}/index", f"{layout.SNAPSHOTS}/files"
FORMAT = 1
DISK_SHARE = 0.5
LEFT_BEHIND_MS = 3_600_000
"""Files that no document names are removed at this age. No snapshot takes that long to write."""
SHARED_EXTRAS = frozenset({"salt", ACTIONS, LINE, FORGOTTEN, READ_TIMES})
"""Extras that stream and serving store under the same name with the same meaning."""
_DIGITS, _LEVEL, _AT_ONCE, _MOST_BYTES = 15, 1, 4096, 1 << 30
_READERS = 8
_INVERT = (1 << 32) - 1
_KEY = np.dtype([("user", ">u8"), ("chunk", ">u4")])
logger = logging.getLogger(__name__)

Kind = Literal["base", "delta", "extras"]


# The document


class SnapshotFile(msgspec.Struct, frozen=True):
    """A file of a snapshot.

    Attributes:
        number: The snapshot that wrote it.
        shares: The first and the last share of its users.
        first_user: The first user of its range; 0 except for a base.
        events: The number of its events; for extras, of its entries.
        sha256: Digest of its bytes, hexadecimal.
    """

    kind: Kind
    number: int
    shares: tuple[int, int]
    first_user: int
    events: int
    sha256: str
    bytes: int

    @property
    def name(self) -> str:
        """Its name in the location."""
        return f"{FILES}/{self.number:0{_DIGITS}d}/{self.kind}-{self.first_user:016x}-{self.sha256[:32]}"

    def has(self, share: int) -> bool:
        """Whether it holds users of a share."""
        return self.shares[0] <= share <= self.shares[1]


class UserRange(msgspec.Struct, frozen=True):
    """A range of users, which ends at the next range: first user, snapshot that wrote its bases, and their events."""

    first_user: int
    number: int
    events: int


class HistorySnapshot(msgspec.Struct, frozen=True):
    """The document of a snapshot.

    Attributes:
        created_at_ms: Wall clock of its cut.
        writer: The process that wrote it, as in `ErasureReport.part`.
        history: N, the events kept per user.
        held: The shares of users of the host that wrote it, in the text form of `UserShares`.
        salt: Fingerprint of the salt of the users' pseudonyms.
        topic_id: The id of the training log's topic.
        next: The partitions of the training log, each with the offset of its next record.
        branch: The branch of the training log, as `state.registry.log_line.to_json` writes it.
        sources: The next offset of each source of clicks.
    """

    number: int
    created_at_ms: int
    writer: str
    history: int
    held: str
    salt: str
    topic_id: str
    next: tuple[tuple[int, int], ...]
    branch: list[dict[str, Any]]
    sources: dict[str, int]
    erased: int
    users: int
    ranges: tuple[UserRange, ...]
    files: tuple[SnapshotFile, ...]
    format: int = FORMAT

    @property
    def user_shares(self) -> UserShares:
        """The shares of its users."""
        return UserShares.parse(self.held)

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def marks(self) -> dict[Source, int]:
        """The next offset of each source."""
        return {Source.parse(source): after for source, after in self.sources.items()}


def location_of(settings: Settings) -> FileStore:
    """The location of the registry: its shared location, or its directory.

    Raises:
        UnusablePlace: It cannot be opened.
    """
    return open_store(settings.paths.shared_registry or str(settings.registry_dir))


def most_bytes(settings: Settings) -> int:
    """The maximum size of all snapshots: a part of the registry's disk space; unlimited in a shared location."""
    return 1 << 60 if settings.paths.shared_registry else int(kept_bytes(settings, REGISTRY) * DISK_SHARE)


def document_name(number: int) -> str:
    """The name of a snapshot's document."""
    return f"{INDEX}/{number:0{_DIGITS}d}.json"


def numbers(location: FileStore) -> list[int]:
    """The numbers of all snapshots, ascending."""
    names = (name.removesuffix(".json") for name in location.names(INDEX))
    return sorted(int(name) for name in names if name.isdecimal())


def read(location: FileStore, number: int) -> HistorySnapshot:
    """Reads a document.

    Raises:
        CorruptStore: It is missing or damaged, or of a later format.
        UnusablePlace: The location cannot be reached.
    """
    name = document_name(number)
    try:
        snapshot = documents.decode_sealed(location.read(name), HistorySnapshot)
    except FileNotFoundError:
        raise _damaged(name, location, "is missing") from None
    except ValueError as error:
        raise _damaged(name, location, f"is damaged: {error}") from error
    if snapshot.format != FORMAT:
        raise _damaged(name, location, f"has format {snapshot.format}, this release reads {FORMAT}")
    return snapshot


def newest(location: FileStore, shares: UserShares = ALL) -> HistorySnapshot | None:
    """The newest snapshot of all users of these shares whose document can be read; None if there is none."""
    return next((snapshot for snapshot in _readable(location) if snapshot.user_shares.covers(shares)), None)


def _readable(location: FileStore) -> Iterator[HistorySnapshot]:
    for number in reversed(numbers(location)):
        try:
            yield read(location, number)
        except CorruptStore as error:
            logger.warning("%s", error)


def _damaged(name: str, location: FileStore, how: str) -> CorruptStore:
    return CorruptStore(
        f"{name} at {location.name} {how}", "the next older snapshot is used, or the training log alone"
    )


# Which one can be used


@dataclass(frozen=True)
class Wanted:
    """The conditions that a snapshot must meet so that a reader of the training log can load it.

    Attributes:
        salt: Fingerprint of the salt of the users' pseudonyms; None if it is unknown.
        branch: The branch of the training log that control names.
        ends: By partition, the first retained offset of the log and the offset of its next record.
    """

    history: int
    salt: str | None
    branch: LogLine
    topic_id: str
    ends: Mapping[int, tuple[int, int]]
    shares: UserShares = ALL

    def refuse(self, snapshot: HistorySnapshot) -> str:
        """Why a snapshot cannot be used; empty if it can."""
        if self.salt not in (None, snapshot.salt):
            return f"its salt is {snapshot.salt}, and ours {self.salt}"
        if not snapshot.user_shares.covers(self.shares):
            return f"it has the users of the shares {snapshot.held}, and ours are {self.shares}"
        if snapshot.history < self.history:
            return f"it keeps {snapshot.history} events per user, and features.history is {self.history}"
        if snapshot.topic_id != self.topic_id:
            return "it is of another topic than the training log is now"
        for partition, after in snapshot.next:
            begin, end = self.ends.get(partition, (0, -1))
            if not begin <= after <= end:
                return f"the training log now has the records {begin} to {end - 1}, and it needs the one at {after}"
        return self.refuse_branch(snapshot)

    def refuse_branch(self, snapshot: HistorySnapshot) -> str:
        """Why the branch of a snapshot is not the one that control names; empty if it is."""
        try:
            parted = parting(from_json(snapshot.branch), self.branch)
        except ValueError:
            return "its branch of the training log is unknown to control"
        if parted is not None and any(after > parted.offset for _, after in snapshot.next):
            return "its branch of the training log was abandoned"
        return ""


def usable(location: FileStore, wanted: Wanted) -> Iterator[HistorySnapshot]:
    """Yields the usable snapshots, newest first; logs why others are skipped.

    Raises:
        UnusablePlace: The location cannot be reached.
    """
    for snapshot in _readable(location):
        if reason := wanted.refuse(snapshot):
            logger.info("snapshot %d of histories is not used: %s", snapshot.number, reason)
            continue
        yield snapshot


# Files


def read_file(location: FileStore, file: SnapshotFile) -> bytes:
    """Reads a file. If it is damaged, it removes all snapshots that name it, so that no later one builds on them.

    Raises:
        CorruptStore: It is missing or does not match its digest.
        UnusablePlace: The location cannot be reached.
    """
    try:
        data = location.read(file.name)
    except FileNotFoundError:
        how = "is missing"
    else:
        if durable.digest(data) == file.sha256 and zstandard.frame_content_size(data) <= _MOST_BYTES:
            return data
        how = "fails its digest"
    for number in numbers(location):
        if file in _files_of(location, number):
            # A process that cannot remove it does without it, too.
            with suppress(UnusablePlace):
                location.remove(document_name(number))
    raise _damaged(file.name, location, how)


def encode(columns: Mapping[str, Any]) -> bytes:
    """Encodes the columns of a file, given as bytes by name."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(msgspec.msgpack.encode(columns))


class ShareHistories(NamedTuple):
    """The histories of one share: the chunks of its bases, and the events to append."""

    chunks: Chunks
    appends: Appends


class _Decoded(NamedTuple):
    """A base (with chunk numbers) or a delta (without); each entry is a user, or one of its chunks."""

    file: SnapshotFile
    users: NDArray[np.uint64]
    chunks: NDArray[np.uint32]
    ends: NDArray[np.int64]
    events: Events


class SnapshotReader:
    """Reads the files of a snapshot, several at once; must be closed.

    Every method raises `CorruptStore` if a file is missing or does not match its digest. It raises `UnusablePlace` if
    the location cannot be reached.
    """

    def __init__(self, location: FileStore, snapshot: HistorySnapshot) -> None:
        self._location, self._snapshot = location, snapshot
        self._threads = ThreadPoolExecutor(_READERS)
        self._decoded: dict[str, _Decoded] = {}
        self._firsts = np.array([part.first_user for part in snapshot.ranges], np.uint64)
        self._cuts = np.array([part.number for part in snapshot.ranges], np.int64)

    def share(self, share: int) -> ShareHistories:
        """The histories of a share. Request shares in ascending order, so that no file is read twice."""
        files = [file for file in self._snapshot.files if file.kind != "extras" and file.has(share)]
        self._decoded = {file.name: self._decoded[file.name] for file in files if file.name in self._decoded}
        missing = [file for file in files if file.name not in self._decoded]
        for decoded in self._threads.map(self._decode, missing):
            self._decoded[decoded.file.name] = decoded
        ordered = sorted(
            files, key=lambda file: (file.kind, file.number if file.kind == "delta" else 0, file.first_user)
        )
        chunks, users, events = Chunks(), [np.empty(0, np.uint64)], [np.empty(0, EVENT)]
        for file in ordered:
            part = self._decoded[file.name]
            low, high = np.searchsorted(share_of(part.users), (share, share + 1))
            first = int(part.ends[low - 1]) if low else 0
            if file.kind == "base":
                chunks += _as_chunks(part, int(low), int(high), first)
                continue
            owners = np.repeat(part.users[low:high], np.diff(part.ends[low:high], prepend=first))
            # A base that is at least as new as the delta already contains these events.
            new = self._cuts[np.searchsorted(self._firsts, owners, side="right") - 1] < file.number
            users.append(owners[new])
            events.append(part.events[first : first + len(owners)][new])
        return ShareHistories(chunks, Appends.of(np.concatenate(users), np.concatenate(events)))

    def extras(self) -> Iterator[tuple[bytes, bytes]]:
        """The counts and extras of the store, as `HistoryStore.finish_loading` takes them."""
        files = [file for file in self._snapshot.files if file.kind == "extras"]
        for columns in self._threads.map(self._read, files):
            yield from zip(columns["names"], columns["values"], strict=True)

    def _read(self, file: SnapshotFile) -> Any:
        data = read_file(self._location, file)
        return msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(data))

    def _decode(self, file: SnapshotFile) -> _Decoded:
        columns = self._read(file)
        users, lengths = np.frombuffer(columns["users"], np.uint64), np.frombuffer(columns["lengths"], np.uint32)
        chunks = np.frombuffer(columns.get("chunks", b""), np.uint32)
        events = np.empty(len(columns["action"]), EVENT)
        for name in EVENT.names or ():
            events[name] = np.frombuffer(columns[name], EVENT[name])
        return _Decoded(file, users, chunks, np.cumsum(lengths, dtype=np.int64), events)

    def close(self) -> None:
        """Stops its threads."""
        self._threads.shutdown(cancel_futures=True)


def _as_chunks(part: _Decoded, low: int, high: int, first: int) -> Chunks:
    keys = np.empty(high - low, _KEY)
    keys["user"], keys["chunk"] = part.users[low:high], _INVERT - part.chunks[low:high]
    names, ends = keys.tobytes(), part.ends[low:high].tolist()
    data, size = part.events[first : ends[-1] if ends else first].tobytes(), EVENT.itemsize
    starts = [first, *ends][:-1]
    return [
        (names[_KEY.itemsize * at : _KEY.itemsize * (at + 1)], data[size * (start - first) : size * (end - first)])
        for at, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


# Loading


def load(
    location: FileStore, snapshot: HistorySnapshot, store: HistoryStore, keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Replaces the content of a store, which only its writer may do, by a snapshot; `keep` selects extras by name.

    1. Clear the store and mark it as loading.
    2. Write the users of the shares that the store holds, share by share.
    3. Write counts and extras in the transaction that removes the mark.

    Raises:
        CorruptStore: A file is missing or damaged. The store is empty, or marked as loading.
        StoreFull: The store is too small; likewise.
        UnusablePlace: The location cannot be reached; likewise.
    """
    reader, users = SnapshotReader(location, snapshot), 0
    try:
        # 1.
        store.clear()
        killpoints.reach("snapshot.cleared")
        # 2.
        for share in store.shares:
            histories = reader.share(share)
            users += len({key[:8] for key, _ in histories.chunks})
            for first in range(0, len(histories.chunks), _AT_ONCE):
                store.load(histories.chunks[first : first + _AT_ONCE], Appends.none())
            users += sum(store.load([], some) for some in _divided(histories.appends))
            killpoints.reach("snapshot.share")
        # 3.
        store.finish_loading(
            [extra for extra in reader.extras() if extra[0][:2] == b"p:" or keep(extra[0][2:].decode())], users
        )
        killpoints.reach("snapshot.loaded")
    finally:
        reader.close()


def _divided(appends: Appends) -> Iterator[Appends]:
    for first in range(0, len(appends.users), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        starts, lengths = appends.starts[some], appends.lengths[some]
        events = appends.events[starts[0] : starts[-1] + lengths[-1]]
        yield Appends(appends.users[some], starts - starts[0], lengths, events)


def load_newest(
    location: FileStore, wanted: Wanted, store: HistoryStore, keep: Callable[[str], bool] = lambda name: True
) -> HistorySnapshot | None:
    """Loads the store's shares of the newest usable snapshot.

    If there is none, it returns None and the store is empty. Damaged snapshots are logged and skipped.

    Raises:
        UnusablePlace: The location cannot be reached. The store is unchanged, or marked as loading.
    """
    for snapshot in usable(location, wanted):
        try:
            load(location, snapshot, store, keep)
            return snapshot
        except CorruptStore as error:
            logger.error("snapshot %d of histories is damaged and not used: %s", snapshot.number, error)
    if store.is_loading:
        store.clear()
        store.finish_loading([], 0)
    return None


def newest_extras(location: FileStore, wanted: Wanted, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """The extras, selected by name, of the newest readable snapshot whose branch is not abandoned.

    Its histories need not be usable. The result is empty if there is no such snapshot.

    Raises:
        UnusablePlace: The location cannot be reached.
    """
    for snapshot in _readable(location):
        if wanted.refuse_branch(snapshot):
            continue
        reader = SnapshotReader(location, snapshot)
        try:
            named = ((key[2:].decode(), value) for key, value in reader.extras() if key[:2] == b"x:")
            return {name: value for name, value in named if keep(name)}
        except CorruptStore as error:
            logger.error("%s", error)
        finally:
            reader.close()
    return {}


# Removing


def remove(location: FileStore, gone: Sequence[int], now_ms: int) -> int:
    """Removes snapshots, and files that no remaining snapshot names; returns the number of removed files.

    1. Remove the documents, oldest first.
    2. Remove files that only they named, and files that a killed writer left.

    A snapshot that is being written names only its own files and those of the newest snapshot.

    Raises:
        CorruptStore: A remaining document cannot be read, so that its files are unknown; only documents were removed.
        UnusablePlace: The location cannot be reached.
    """
    before = numbers(location)
    removed = [number for number in before if number in gone]
    of_removed = {file.name for number in removed for file in _files_of(location, number)}
    # 1.
    for number in removed:
        location.remove(document_name(number))
        killpoints.reach("snapshot.unnamed")
    # 2.
    kept = [number for number in before if number not in gone]
    named = {file.name for number in kept for file in read(location, number).files}
    unnamed = [
        name
        for name in (f"{FILES}/{name}" for name in location.names(FILES))
        if name not in named and (name in of_removed or int(name.split("/")[2]) < now_ms - LEFT_BEHIND_MS)
    ]
    for name in unnamed:
        location.remove(name)
    return len(unnamed)


def _files_of(location: FileStore, number: int) -> Sequence[SnapshotFile]:
    try:
        return read(location, number).files
    except CorruptStore:
        return ()
