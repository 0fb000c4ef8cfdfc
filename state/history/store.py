"""Each user's last N events and the next offset of each source, committed together in LMDB.

chunks   the events, as `state/history/chunks.py` writes them
waiting  the rows that wait for their label, as `state/history/waiting.py` writes them
meta     p:<source> -> next offset and outcome counts; x:<name> -> bytes of the owner; users; format and N
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lmdb
import msgspec
import numpy as np

from state.config.settings import Settings
from state.disk import documents, memory_place
from state.disk.files import CleanMark
from state.disk.lmdb_store import FORMAT, PAGES_MS, MemoryStore, enter_memory, keys_with, pages_bytes, put_all
from state.errors import CorruptStore
from state.features.erased import Erased
from state.features.spec import EVENT, Events
from state.history import chunks
from state.history.appends import Appends, Numbering
from state.history.chunks import (
    EVENT_BYTES,
    Chunks,
    Counts,
    Ends,
    IsOld,
    Removed,
    by_user,
    move_counts,
    prefix_of,
    remove,
    summed_counts,
)
from state.history.rewind import Rewind, Since, lacking, write_back
from state.history.waiting import WaitingRows, place_of
from state.layout import HISTORIES
from state.positions import Range, Source
from state.storage import SERVING, map_bytes
from state.user_shares import UserShares

FORGOTTEN = "erased"  # name of the store's extra
LOADING = "loading"  # name of the extra that marks a store into which a snapshot is being loaded
SLICE, SLICE_PAUSE_S = 512, 1e-4
"""Entries that `StoreView` reads between two pauses, in which other threads of the process run."""


@dataclass(frozen=True)
class ForgottenUsers:
    """The progress of a store in applying erasures.

    Attributes:
        through: The last erasure whose users' records are removed.
        pages: The last erasure whose users' records are also gone from free pages.
        paged_ms: When the store was last compacted, wall clock.
    """

    through: int = 0
    pages: int = 0
    paged_ms: int = 0

    def due_ms(self) -> int | None:
        """When the store is due for compaction; None if it is not needed."""
        return None if self.pages >= self.through else self.paged_ms + PAGES_MS

    def to_json(self) -> bytes:
        """Encodes it as the store keeps it."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, value: bytes | None) -> ForgottenUsers:
        """Decodes the output of `to_json`; None if nothing was erased yet."""
        return cls() if value is None else documents.decode(value, cls)


class StoreView:
    """A consistent view of a store at one moment; commits continue meanwhile.

    One thread at a time may use it, not necessarily the thread that created it. Pages that commits free are not reused
    until it is closed.
    """

    def __init__(self, transaction: lmdb.Transaction, chunks: Any, meta: Any) -> None:
        self._transaction, self._chunks, self._meta = transaction, chunks, meta

    def extra(self, name: str) -> bytes | None:
        """See `HistoryStore.extra`."""
        value = self._transaction.get(b"x:" + name.encode(), db=self._meta)
        return None if value is None else bytes(value)

    def users(self) -> int:
        """See `HistoryStore.users`."""
        return int(self._transaction.get(b"users", db=self._meta) or 0)

    def positions(self) -> dict[Source, int]:
        """See `HistoryStore.positions`."""
        entries = keys_with(self._transaction.cursor(db=self._meta), b"p:", b"p:")
        return {Source.parse(key[2:].decode()): json.loads(value)["next"] for key, value in entries}

    def chunks_from(self, user: int) -> Iterator[Chunks]:
        """The chunks of all users from `user` on, in slices that may divide a user."""
        yield from self._slices(self._chunks, prefix_of(user))

    def ends(self) -> Iterator[Ends]:
        """The newest and the oldest event of all users, in slices."""
        cursor, start = self._transaction.cursor(db=self._chunks), cast(int | None, 0)
        while start is not None:
            slice_ends = chunks.ends(cursor, start, SLICE)
            yield slice_ends
            start = slice_ends.following
            time.sleep(SLICE_PAUSE_S)

    def read_all(self, user: int) -> Events:
        """All stored events of `user`, `[m]` EVENT in append order, with the store's action numbers."""
        stored = chunks.all_of(self._transaction.cursor(db=self._chunks), user)
        return chunks.events_in(b"".join(value for _, value in reversed(stored)))

    def counts_and_extras(self) -> Iterator[Chunks]:
        """The entries of `counts` and the extras, as `HistoryStore.finish_loading` takes them."""
        for entries in self._slices(self._meta, b"p:"):
            yield [(key, value) for key, value in entries if key[:2] in (b"p:", b"x:")]

    def _slices(self, database: Any, start: bytes) -> Iterator[Chunks]:
        cursor = self._transaction.cursor(db=database)
        # A generator ends once; an LMDB cursor would start again.
        entries = (entry for entry in cursor) if cursor.set_range(start) else iter(())
        while batch := cast(Chunks, list(islice(entries, SLICE))):
            yield batch
            time.sleep(SLICE_PAUSE_S)

    def close(self) -> None:
        """Ends the read."""
        self._transaction.abort()


class HistoryStore(MemoryStore):
    """The histories of one process. One thread commits; any thread of any process may read.

    `history` is N, the events kept per user; histories stored under another N stay as they are. Other arguments and
    errors are those of `LmdbStore`. Events of users of other shares are not kept. A writer may open a store of more
    shares; the sweeper then removes the users of the other shares.
    """

    noun = "histories"
    databases = ("chunks", "waiting")
    writer = "the stream or the applier"
    remedy = "`springtide rebuild-history` rebuilds the stream's histories from Kafka"
    origin = "the micro-batch topic"

    def __init__(
        self,
        path: Path,
        history: int = 256,
        map_bytes: int = 16 << 30,
        readonly: bool = False,
        boot_id: str | None = None,
        shares: UserShares | None = None,
    ) -> None:
        self.history = history
        self.numbering = Numbering()
        super().__init__(path, map_bytes, readonly, boot_id, shares)
        if not readonly and self._stored(b"boot") is not None:
            with self._write() as transaction:
                for name in (b"boot", b"clean"):
                    transaction.delete(name, db=self._meta)

    def _bind(self) -> None:
        self._chunks, self._waiting = self._databases["chunks"], self._databases["waiting"]

    def _made_with(self) -> dict[str, int]:
        return {"history": self.history}

    def _fits(self, stored_shares: UserShares, wanted: UserShares) -> bool:
        return stored_shares.covers(wanted)

    def _older_mark(self) -> CleanMark | None:
        # Release 0.1.0 kept the marker of histories in `meta`, from which `__init__` removes it.
        boot = self._stored(b"boot")
        return None if boot is None else CleanMark(self._stored(b"clean") == b"1", boot.decode())

    def read(self, user: int) -> Events:
        """The last events of `user`, `[m <= N]` EVENT in append order, from one snapshot; empty if unknown."""
        with self._begin("chunks") as transaction:
            return self._read(transaction.cursor(), prefix_of(user))

    def read_many(self, users: Sequence[int]) -> list[Events]:
        """The histories of several users from one snapshot."""
        with self._begin("chunks") as transaction:
            cursor = transaction.cursor()
            return [self._read(cursor, prefix_of(user)) for user in users]

    def _read(self, cursor: lmdb.Cursor, prefix: bytes) -> Events:
        joined, _ = chunks.read(cursor, prefix, self.history)
        if len(joined) % EVENT_BYTES:
            raise CorruptStore(
                f"{self.path} holds a history of {len(joined)} bytes, which is no whole number of events; it is not used",
                self.remedy,
            )
        return self.numbering.outwards(np.frombuffer(joined, EVENT)[-self.history :])

    def users(self) -> int:
        """The number of users with a history."""
        with self._begin("meta") as transaction:
            return int(transaction.get(b"users") or 0)

    def counts(self) -> dict[Source, Counts]:
        """Per source: `first`, `next`, and the offsets between them by outcome. `RARE` outcomes occur only if not 0."""
        return self.cut()[0]

    def cut(self) -> tuple[dict[Source, Counts], int]:
        """The counts and the number of waiting rows, from one snapshot."""
        with self._begin("meta") as transaction:
            waits = int(transaction.stat(self._waiting)["entries"])
            entries = keys_with(transaction.cursor(), b"p:", b"p:")
        return {Source.parse(key[2:].decode()): json.loads(value) for key, value in entries}, waits

    def positions(self) -> dict[Source, int]:
        """The next offset of each source."""
        return {source: counts["next"] for source, counts in self.counts().items()}

    @property
    def totals(self) -> Counts:
        """Outcomes summed over all sources, with `positions`, the offsets passed."""
        return summed_counts(self.counts().values())

    def extra(self, name: str) -> bytes | None:
        """The value that the last commit stored for extra `name`; None if there is none."""
        return self.extra_of_each([name])[0]

    def extra_of_each(self, names: Sequence[str]) -> list[bytes | None]:
        """The values of n extras, from one snapshot; see `extra`."""
        with self._begin("meta") as transaction:
            return [None if (raw := transaction.get(b"x:" + name.encode())) is None else bytes(raw) for name in names]

    def extras(self, prefix: str, start: str, limit: int) -> list[tuple[str, bytes]]:
        """The first `limit` extras whose names begin with `prefix`, from the name `start` on."""
        with self._begin("meta") as transaction:
            entries = keys_with(transaction.cursor(), f"x:{prefix}".encode(), f"x:{start or prefix}".encode(), limit)
        return [(key[2:].decode(), value) for key, value in entries]

    def waiting_rows(self) -> int:
        """The number of rows that wait for their label."""
        return self.cut()[1]

    def waiting(self) -> Iterator[tuple[bytes, bytes]]:
        """The waiting rows in the order of their keys, from one snapshot."""
        with self._begin("waiting") as transaction:
            for key, value in transaction.cursor():
                yield bytes(key), bytes(value)

    def waiting_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The waiting rows under `keys`; None for a key without one."""
        with self._begin("waiting") as transaction:
            return [None if (value := transaction.get(key)) is None else bytes(value) for key in keys]

    def commit(
        self,
        appends: Appends,
        ranges: Sequence[Range] = (),
        extra: Mapping[str, bytes | None] | None = None,
        waiting: Mapping[bytes, bytes | None] | None = None,
    ) -> None:
        """Appends events, moves positions and counts outcomes in one transaction.

        The commit is visible to every reader when this returns. It survives a kill at once, and a power cut after the
        next `sync`.

        Args:
            appends: Events by user.
            ranges: Their source ranges; ranges of one source in order.
            extra: Extras to replace; None removes one.
            waiting: Rows that begin to wait, by key; None removes a row.

        Raises:
            PositionConflict: A range does not begin at its source's next offset.
            StoreFull, UnusableDisk: Nothing was changed.
        """
        appends = replace(appends, events=self.numbering.inwards(appends.events))
        if not self.shares.is_all:
            appends = appends.of_users(self.shares.has(appends.users))
        with self._write() as transaction:
            # 1. Positions first, so that a conflict is found before the appends.
            for part in ranges:
                move_counts(transaction.cursor(db=self._meta), part, str(self.path))
            # 2. Histories.
            new = chunks.append(transaction.cursor(db=self._chunks), appends, self.history)
            self._add_users(transaction, new)
            # 3. Extras.
            named = {b"x:" + name.encode(): value for name, value in (extra or {}).items()}
            put_all(transaction, self._meta, named)
            # 4. Waiting rows.
            put_all(transaction, self._waiting, waiting or {})

    def _add_users(self, transaction: lmdb.Transaction, count: int) -> None:
        if count:
            users = int(transaction.get(b"users", b"0", db=self._meta)) + count
            transaction.put(b"users", str(users).encode(), db=self._meta)

    def lacking(self, since: Since, marks: Mapping[Source, int]) -> dict[int, int]:
        """User -> how many events must be found again to rewind to `marks`; see `state.history.rewind`."""
        with self._env.begin() as transaction:
            missing = lacking(transaction, self._databases, since, marks, self.history)
        return {user: events for user, events in missing.items() if user in self.shares}

    def rewind(self, back: Rewind) -> None:
        """Rewinds events and positions in one transaction; visibility, durability and errors are those of `commit`."""
        rebuilt = {user: self.numbering.inwards(events) for user, events in back.rebuilt.items()}
        gained = {user: events for user, events in back.gained.items() if user in self.shares}
        back = replace(back, rebuilt=rebuilt, gained=gained)
        with self._write() as transaction:
            write_back(transaction, self._databases, back, self.history)

    @property
    def forgotten(self) -> ForgottenUsers:
        """How far erasures are applied."""
        return ForgottenUsers.from_json(self.extra(FORGOTTEN))

    def forget(self, erased: Erased) -> ForgottenUsers:
        """Removes the data of users erased since the last call, in one transaction like that of `commit`.

        Waiting rows are checked every time, since a rewind may have restored some; `CorruptStore` if one cannot be
        read.
        """
        before = self.forgotten
        waiting = WaitingRows(self).of_erased(erased) if erased else []
        now = replace(before, through=max(before.through, erased.last))
        if not waiting and now == before:
            return before
        dropped, at = Counter(place_of(key)[0] for key in waiting), self.positions()
        with self._write() as transaction:
            # 1. Histories: later events of the user stay, as those of a new user.
            cursor, newly_erased, gone = transaction.cursor(db=self._chunks), erased.after(before.through), 0
            for user in newly_erased.users:
                stored = chunks.events_in(chunks.read(cursor, prefix_of(user), self.history)[0])
                remaining = stored[~newly_erased.events(stored, user)]
                gone += len(stored) > 0 and len(remaining) == 0
                if len(remaining) < len(stored):
                    chunks.replace_all(cursor, prefix_of(user), remaining, len(remaining))
            self._add_users(transaction, -gone)
            # 2. Waiting rows and their counts.
            put_all(transaction, self._waiting, dict.fromkeys(waiting))
            for source, count in dropped.items():
                part = Range(source, at[source], at[source], dropped=count)
                move_counts(transaction.cursor(db=self._meta), part, str(self.path))
            # 3. The progress.
            transaction.put(b"x:" + FORGOTTEN.encode(), now.to_json(), db=self._meta)
        return now

    def compact_if_due(self, now_ms: int) -> ForgottenUsers:
        """Compacts the store if an erasure requires it, so that free pages contain no data of erased users."""
        forgotten = self.forgotten
        due_ms = forgotten.due_ms()
        if due_ms is None or now_ms < due_ms:
            return forgotten
        self.compact()
        forgotten = ForgottenUsers(forgotten.through, forgotten.through, now_ms)
        self.commit(Appends.none(), extra={FORGOTTEN: forgotten.to_json()})
        return forgotten

    def ends(self, start: int, limit: int) -> Ends:
        """The newest and the oldest event of up to `limit` users from user `start` on, from one snapshot."""
        with self._begin("chunks") as transaction:
            return chunks.ends(transaction.cursor(), start, limit)

    def chunk_bytes(self) -> tuple[int, int]:
        """The size of the pages in use by events, and of the pages in use by everything else, without free pages."""
        with self._env.begin() as transaction:
            sizes = {name: pages_bytes({**transaction.stat(database)}) for name, database in self._databases.items()}
        return sizes["chunks"], sum(sizes.values()) - sizes["chunks"]

    def sweep(self, aged: Sequence[int], is_old: IsOld, evicted: Sequence[int] = ()) -> Removed:
        """Removes old events of `aged` users, and all events of `evicted` users; writes only if something is removed.

        `state/history/sweeping.py` decides what to remove. Raises the errors of `commit`.
        """
        with self._write() as transaction:
            removed = remove(transaction.cursor(db=self._chunks), aged, is_old, evicted)
            self._add_users(transaction, -removed.aged - removed.evicted)
        return removed

    def view(self) -> StoreView:
        """Opens a view of the current store; close the view before the store, and before `compact`."""
        return StoreView(self._env.begin(), self._chunks, self._meta)

    def clear(self) -> None:
        """Removes everything, and marks the store as being loaded until `finish_loading`."""
        with self._write() as transaction:
            format_ = bytes(transaction.get(FORMAT, b"", db=self._meta))
            for database in self._databases.values():
                transaction.drop(database, delete=False)
            transaction.put(FORMAT, format_, db=self._meta)
            transaction.put(b"x:" + LOADING.encode(), b"1", db=self._meta)

    def load(self, entries: Chunks, appends: Appends) -> int:
        """Writes chunks of a snapshot and appends events to them; returns the number of new users of `appends`.

        Chunks and events have the store's action numbers.
        """
        with self._write() as transaction:
            cursor = transaction.cursor(db=self._chunks)
            cursor.putmulti(entries)
            return chunks.append(cursor, appends, self.history)

    def finish_loading(self, entries: Iterable[tuple[bytes, bytes]], users: int) -> None:
        """Writes counts and extras of a snapshot, and the number of users; the store is complete when this returns."""
        with self._write() as transaction:
            transaction.cursor(db=self._meta).putmulti(entries)
            transaction.put(b"users", str(users).encode(), db=self._meta)
            transaction.delete(b"x:" + LOADING.encode(), db=self._meta)

    @property
    def is_loading(self) -> bool:
        """Whether a load was started and not finished."""
        return self.extra(LOADING) is not None

    def digest(self) -> str:
        """SHA-256 over the last N events of every user, by user; equal histories have equal digests."""
        with self._begin("chunks") as transaction:
            reader = transaction.cursor()
            return chunks.digest((prefix, self._read(reader, prefix)) for prefix, _ in by_user(transaction.cursor()))

    def users_below(self, events: int) -> int:
        """How many users have a total of fewer than `events` events since they were last unknown."""
        with self._begin("chunks") as transaction:
            return sum(chunks.total_of(user_chunks) < events for _, user_chunks in by_user(transaction.cursor()))

    def copy_to(self, path: Path) -> None:
        """Writes a snapshot of the store to the directory `path`, synced and marked as closed cleanly.

        Commits continue meanwhile, but pages that they free are not reused until the copy ends. If the disk refuses,
        the content of `path` is unusable.
        """
        try:
            path.mkdir(parents=True)
            self._env.copy(str(path), compact=True)
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, f"copied to {path}", path) from error
        # Opening the copy marks it as open under this boot id; closing it marks it as clean.
        HistoryStore(path, self.history, self.bytes_limit()).close()

    @classmethod
    def copied(cls, source: Path, path: Path, history: int) -> None:
        """Copies a store that was closed cleanly, else `CorruptStore`, to `path`; the source is unchanged."""
        store = cls(source, history, readonly=True)
        try:
            if not store.closed_in_order():
                raise CorruptStore(
                    f"{source} was not closed cleanly, so that pages may be missing; it is not used",
                    "name another copy, or rebuild without one",
                )
            store.copy_to(path)
        finally:
            store.close()


logger = logging.getLogger(__name__)


def open_history_store(settings: Settings, part: str, folder: Path) -> HistoryStore:
    """Opens the histories in `folder`, whose lock this process holds; closing them saves them to the disk.

    Raises:
        CorruptStore: A power cut removed them or may have damaged them.
        StoreError: They cannot be opened.
    """
    link, memory = folder / HISTORIES, settings.storage.memory_dir
    for folder_removed in memory_place.remove_forgotten(memory):
        logger.info("%s is removed: its state directory is gone, or has its store elsewhere", folder_removed)
    location = enter_memory(link, memory)
    if location.why:
        logger.warning(
            "the histories are on the disk, %s: %s. Each page that a click changes is written there, at 5,000 clicks/s "
            "some 8 GB an hour",
            link,
            location.why,
        )
    shares = settings.serving.user_shares if part == SERVING else None
    return HistoryStore(link, settings.features.history, map_bytes(settings, part, HISTORIES, link), shares=shares)


def open_or_replace(settings: Settings, part: str, folder: Path) -> HistoryStore:
    """Like `open_history_store`, but replaces unusable histories by empty ones: they derive from the training log."""
    try:
        return open_history_store(settings, part, folder)
    except CorruptStore as error:
        logger.warning("the histories at %s are rebuilt from %s: %s", folder, HistoryStore.origin, error.what)
        memory_place.forget(folder / HISTORIES)
        return open_history_store(settings, part, folder)
