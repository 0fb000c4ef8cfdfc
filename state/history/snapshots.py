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

import json
import logging
import zlib
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
from state.errors import CorruptStore, StoreFull, UnusablePlace
from state.features.spec import EVENT, Events
from state.file_store import FileStore, open_store
from state.history.appends import ACTIONS, Appends
from state.history.chunks import EVENT_BYTES, Chunks, events_in
from state.history.rewinding import LINE
from state.history.store import FORGOTTEN, LOADING, ForgottenUsers, HistoryStore, StoreView
from state.history.sweeping import READ_TIMES
from state.log.follow import Position
from state.positions import Source, share_of
from state.process import killpoints
from state.registry.log_line import WHOLE, LogLine, from_json, parting, to_json
from state.storage import REGISTRY, kept_bytes
from state.user_shares import ALL, SHARES, UserShares

INDEX, FILES = f"{layout.SNAPSHOTS}/index", f"{layout.SNAPSHOTS}/files"
FORMAT = 1
DISK_SHARE = 0.5
LEFT_BEHIND_MS = 3_600_000
"""Files that no document names are removed at this age. No snapshot takes that long to write."""
SHARED_EXTRAS = frozenset({"salt", ACTIONS, LINE, FORGOTTEN, READ_TIMES})
"""Extras that stream and serving store under the same name with the same meaning."""
_DIGITS, _LEVEL, _AT_ONCE, _MOST_BYTES = 15, 1, 4096, 1 << 30
_READERS = 8
_INVERT = np.uint32((1 << 32) - 1)
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


# The writer

RANGE_BYTES, FILE_BYTES = 64 << 20, 1 << 20
"""The size of a range of users, and the minimum size of a file unless it holds all shares; before compression."""
REBASED, LEAST_GAIN = 2, 4
"""A snapshot rescans due ranges until these hold `REBASED` times the events of its delta. A range is due once the
deltas since its last scan have added a `LEAST_GAIN`th of its own events."""
MOST_DELTAS = 64
"""A range is also due after this many deltas since its last scan."""
MOST_GAINED = 8_000_000
"""The maximum number of events of a delta; a snapshot after more of them scans all users."""
_ENTRIES = 0xFFF
_USERS = 1 << 64


class Gained(NamedTuple):
    """Events added to a store, in order: `[m]` uint64 users and `[m]` EVENT, with the store's action numbers."""

    users: NDArray[np.uint64]
    events: Events

    @classmethod
    def joined(cls, parts: Sequence[Gained]) -> Gained:
        """Concatenates parts in order."""
        if not parts:
            return cls(np.empty(0, np.uint64), np.empty(0, EVENT))
        # As words, since concatenating structured arrays is slow.
        events = np.concatenate([part.events.view(np.int64) for part in parts]).view(EVENT)
        return cls(np.concatenate([part.users for part in parts]), events)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A consistent view of a store at one moment, from which a snapshot is written.

    Attributes:
        salt: Fingerprint of the salt of its users' pseudonyms.
        gained: The events added since `since`, in order; None to find them in the view.
        since: The snapshot on which this one builds; None to write all users.
    """

    view: StoreView
    position: Position
    salt: str
    gained: Sequence[Gained] | None
    since: HistorySnapshot | None


class SnapshotWriter:
    """Writes snapshots of one store. Not thread-safe.

    Args:
        name: The name of this process, as in `ErasureReport.part`.
        stopped: Polled between files; True aborts an incomplete snapshot.
    """

    def __init__(
        self,
        location: FileStore,
        name: str,
        history: int,
        shares: UserShares = ALL,
        most_bytes: int = 1 << 60,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._location, self._name, self._history, self._shares = location, name, history, shares
        self._most_bytes, self._stopped = most_bytes, stopped
        self._number, self._files = 0, list[SnapshotFile]()

    def write(self, cut: Cut, now_ms: int, after: int = 0) -> HistorySnapshot | None:
        """Writes a snapshot and closes the cut's view.

        It returns None if it was stopped or another process wrote a snapshot meanwhile. The snapshot's number is above
        `after` and above that of `cut.since`, even if the clock was set back.

        1. Write the gained events, the ranges that are due, and the extras.
        2. Create the document; the snapshot is then complete.

        Raises:
            StoreFull: The snapshot is larger than `most_bytes`.
            UnusablePlace: The location cannot be reached.
        """
        before, view, gained = cut.since, cut.view, cut.gained or ()
        self._number = max(now_ms, after + 1, before.number + 1 if before else 0)
        # 1.
        try:
            if before is not None and cut.gained is None:
                gained = self._gained_since(view, before.marks)
                if sum(len(part.users) for part in gained) > MOST_GAINED:
                    before, gained = None, ()
            self._files = [] if before is None else [file for file in before.files if file.kind != "extras"]
            due = [] if before is None else due_ranges(before, sum(len(part.users) for part in gained))
            if before is not None and len(due) < len(before.ranges):
                self._write_delta(Gained.joined(gained))
            ranges = self._write_ranges(view, before, due)
            known = {} if before is None else {file.sha256: file for file in before.files if file.kind == "extras"}
            self._write_extras(view, known)
            branch = view.extra(LINE)
            snapshot = HistorySnapshot(
                number=self._number,
                created_at_ms=now_ms,
                writer=self._name,
                history=self._history,
                held=str(self._shares),
                salt=cut.salt,
                topic_id=cut.position.topic_id,
                next=tuple(sorted(cut.position.next.items())),
                branch=to_json(WHOLE) if branch is None else json.loads(branch),
                sources={str(source): after for source, after in sorted(view.positions().items())},
                erased=ForgottenUsers.from_json(view.extra(FORGOTTEN)).through,
                users=view.users(),
                ranges=ranges,
                files=self._needed(ranges),
            )
        except _Stopped:
            return None
        finally:
            view.close()
        if snapshot.bytes > self._most_bytes:
            for file in self._files:
                if file.number == self._number:
                    self._location.remove(file.name)
            raise StoreFull(
                f"a snapshot of the histories takes {snapshot.bytes:,} bytes, and its share of the disk is {self._most_bytes:,}",
                "raise storage.budget_gb, or turn snapshots off with history.snapshot_every_s = 0",
            )
        killpoints.reach("snapshot.written")
        # 2.
        created = self._location.create(document_name(snapshot.number), documents.encode_sealed(snapshot))
        killpoints.reach("snapshot.named")
        return snapshot if created else None

    def _needed(self, ranges: Sequence[UserRange]) -> tuple[SnapshotFile, ...]:
        """The files that are still needed: neither bases of rescanned ranges, nor deltas that all bases contain."""
        bases, oldest = {(part.first_user, part.number) for part in ranges}, min(part.number for part in ranges)
        return tuple(
            file
            for file in self._files
            if file.kind == "extras"
            or (file.kind == "delta" and file.number > oldest)
            or (file.kind == "base" and (file.first_user, file.number) in bases)
        )

    def _gained_since(self, view: StoreView, marks: Mapping[Source, int]) -> list[Gained]:
        """The events that were appended at the offsets `marks` and later; incomplete beyond `MOST_GAINED`."""
        gained, count = list[Gained](), 0
        after = _by_partition(marks)
        for ends in view.ends():
            if self._stopped():
                raise _Stopped
            # Events are in append order, so a user without a new last event has no new event.
            users = np.array(ends.users, np.uint64)
            users = users[_are_since(after, users, ends.newest)]
            histories = [view.read_all(user) for user in users.tolist()]
            owners = np.repeat(users, [*map(len, histories)])
            events = np.concatenate([np.empty(0, EVENT), *histories]).astype(EVENT)
            new = _are_since(after, owners, events)
            gained.append(Gained(owners[new], events[new]))
            count += len(gained[-1].users)
            if count > MOST_GAINED:
                break
        return gained

    def _write_delta(self, gained: Gained) -> None:
        if not len(gained.users):
            return
        order = np.lexsort((gained.users, share_of(gained.users)))
        users = gained.users[order]
        # As words, since taking rows of a structured array is slow.
        events = gained.events.view(np.int64).reshape(len(users), -1)[order].view(EVENT).reshape(-1)
        starts = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
        ends = np.append(starts[1:], len(users))
        for first_share, last_share, low, high in _by_share(users[starts], np.diff(ends, prepend=0)):
            file_events = events[starts[low] if low < high else 0 : ends[high - 1] if low < high else 0]
            lengths = (ends - starts)[low:high].astype(np.uint32)
            columns: Mapping[str, NDArray[Any]] = {"users": users[starts[low:high]], "lengths": lengths}
            self._put("delta", (first_share, last_share), 0, columns, file_events)

    def _write_ranges(
        self, view: StoreView, before: HistorySnapshot | None, due: Sequence[UserRange]
    ) -> tuple[UserRange, ...]:
        if before is None:
            return tuple(self._scan(view, 0, _USERS))
        firsts = [part.first_user for part in before.ranges]
        ranges: list[UserRange] = []
        for part, end in zip(before.ranges, [*firsts[1:], _USERS], strict=True):
            ranges += self._scan(view, part.first_user, end) if part in due else [part]
        return tuple(ranges)

    def _scan(self, view: StoreView, first: int, end: int) -> Iterator[UserRange]:
        """Writes the bases of the users `[first, end)`; yields one or more ranges of them."""
        # Joins and counts slice by slice, because work on a long list would block other threads.
        names, lengths, values, size = list[bytes](), list[NDArray[np.uint32]](), list[bytes](), 0
        for some in view.chunks_from(first):
            if over := int.from_bytes(some[-1][0][:8], "big") >= end:
                limit = end.to_bytes(8, "big")
                some = [entry for entry in some if entry[0] < limit]
            names.append(b"".join([key for key, _ in some]))
            lengths.append(np.fromiter((len(value) for _, value in some), np.uint32, len(some)) // EVENT_BYTES)
            values += [value for _, value in some]
            size += EVENT_BYTES * int(lengths[-1].sum())
            if over:
                break
            if size >= RANGE_BYTES:
                # The last user may have more chunks.
                named, counts = np.frombuffer(b"".join(names), _KEY), np.concatenate(lengths)
                count = int(np.searchsorted(named["user"], named["user"][-1]))
                yield self._write_base(first, named[:count], counts[:count], values[:count])
                first = int(named["user"][-1])
                names, lengths, values = [named[count:].tobytes()], [counts[count:]], values[count:]
                size = EVENT_BYTES * int(lengths[0].sum())
        named = np.frombuffer(b"".join(names), _KEY)
        yield self._write_base(first, named, np.concatenate([np.empty(0, np.uint32), *lengths]), values)

    def _write_base(
        self, first_user: int, named: NDArray[Any], lengths: NDArray[np.uint32], values: Sequence[bytes]
    ) -> UserRange:
        users, chunks = named["user"].astype(np.uint64), _INVERT - named["chunk"].astype(np.uint32)
        order = np.argsort(share_of(users), kind="stable")
        for first_share, last_share, low, high in _by_share(users[order], lengths[order]):
            in_file = order[low:high]
            columns = {"users": users[in_file], "chunks": chunks[in_file], "lengths": lengths[in_file]}
            events = events_in(b"".join([values[at] for at in in_file.tolist()]))
            self._put("base", (first_share, last_share), first_user, columns, events)
        return UserRange(first_user, self._number, int(lengths.sum()))

    def _write_extras(self, view: StoreView, known: Mapping[str, SnapshotFile]) -> None:
        """Writes counts and extras. Checksums of names decide where files end, so equal names give equal files."""
        some: Chunks = []
        for entries in view.counts_and_extras():
            for name, value in entries:
                if name != b"x:" + LOADING.encode():
                    some.append((name, value))
                if zlib.crc32(name) & _ENTRIES == 0:
                    self._put_extras(some, known)
                    some = []
        if some:
            self._put_extras(some, known)

    def _put_extras(self, entries: Chunks, known: Mapping[str, SnapshotFile]) -> None:
        columns = {"names": [name for name, _ in entries], "values": [value for _, value in entries]}
        self._put_encoded("extras", (0, SHARES - 1), 0, len(entries), encode(columns), known)

    def _put(
        self, kind: Kind, shares: tuple[int, int], first_user: int, columns: Mapping[str, NDArray[Any]], events: Events
    ) -> None:
        parts = {name: column.tobytes() for name, column in columns.items()}
        parts |= {name: np.ascontiguousarray(events[name]).tobytes() for name in EVENT.names or ()}
        data = encode(parts)
        self._put_encoded(kind, shares, first_user, len(events), data)

    def _put_encoded(
        self,
        kind: Kind,
        shares: tuple[int, int],
        first_user: int,
        events: int,
        data: bytes,
        known: Mapping[str, SnapshotFile] = {},
    ) -> None:
        if self._stopped():
            raise _Stopped
        digest = durable.digest(data)
        file = known.get(digest) or SnapshotFile(kind, self._number, shares, first_user, events, digest, len(data))
        if file.number == self._number:
            self._location.write(file.name, data)
            killpoints.reach("snapshot.file")
        self._files.append(file)


class _Stopped(Exception):
    """The process is stopping."""


def _by_partition(marks: Mapping[Source, int]) -> dict[tuple[int, int], NDArray[np.int64]]:
    """(Topic number, partition) -> the next offset by share of users, `[SHARES]` int64."""
    shares, by_partition = np.arange(SHARES), dict[tuple[int, int], NDArray[np.int64]]()
    for source, after in marks.items():
        by_share = by_partition.setdefault((source.topic, source.partition), np.zeros(SHARES, np.int64))
        is_in_bucket = shares % source.buckets == source.bucket
        by_share[is_in_bucket] = np.maximum(by_share[is_in_bucket], after)
    return by_partition


def _are_since(
    after: Mapping[tuple[int, int], NDArray[np.int64]], users: NDArray[np.uint64], events: Events
) -> NDArray[np.bool_]:
    """Which events (`[m]` EVENT) of `users` (`[m]` uint64) are at the offsets `after` or later, `[m]` bool."""
    is_since, shares = np.ones(len(events), np.bool_), share_of(users)
    for (topic, partition), by_share in after.items():
        is_of_partition = (events["topic"] == topic) & (events["partition"] == partition)
        is_since[is_of_partition] = events["offset"][is_of_partition] >= by_share[shares[is_of_partition]]
    return is_since


def due_ranges(before: HistorySnapshot, gained: int) -> list[UserRange]:
    """The ranges that a snapshot with `gained` new events rescans, the most overdue first."""
    deltas = [(file.number, file.events) for file in before.files if file.kind == "delta"]
    due, left = list[UserRange](), REBASED * gained
    for part in sorted(before.ranges, key=lambda part: part.number):
        since = [(number, events) for number, events in deltas if number > part.number]
        gain = (gained + sum(events for _, events in since)) / len(before.ranges)
        if LEAST_GAIN * gain < part.events and len({number for number, _ in since}) < MOST_DELTAS:
            break
        if due and left < part.events:
            break
        due.append(part)
        left -= part.events
    return due


def _by_share(users: NDArray[np.uint64], lengths: NDArray[Any]) -> Iterator[tuple[int, int, int, int]]:
    """Divides entries, ordered by share, into files: first and last share, and the entries `[low, high)`."""
    bounds = np.searchsorted(share_of(users), np.arange(SHARES + 1))
    sizes = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[bounds] * EVENT_BYTES
    first = 0
    for share in range(SHARES):
        if share == SHARES - 1 or sizes[share + 1] - sizes[first] >= FILE_BYTES:
            if bounds[first] < bounds[share + 1]:
                yield first, share, int(bounds[first]), int(bounds[share + 1])
            first = share + 1
