"""Each user's last N events and the next offset of each source, committed together in LMDB.

    chunks   user u64 BE, ~chunk u32 BE -> up to 16 EVENTs, in append order
    waiting  the rows that wait for their label, as `state.history.waiting` writes them
    meta     p:<source> -> next offset and outcome counts; x:<name> -> bytes of the
             owner; boot, clean, users, format

The chunk's number is stored inverted, so that one seek finds a user's newest
chunk; its number and length say how many events the user ever had. An append
rewrites that one small value. Chunks below the last N events are deleted.

After kill -9 the store is trusted, since the kernel still writes its pages.
After a power cut LMDB without a sync may have lost pages in any order: a
store that was open under another boot id and not closed is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import lmdb
import numpy as np

from state.disk.lmdb_errors import DAMAGED, written
from state.errors import CorruptStore, PositionConflict, SpecMismatch, StoreError, StoreFull
from state.features.spec import EVENT, Events
from state.history.appends import Appends as Appends
from state.positions import RARE, Range, Source

CHUNK = 16
FORMAT = 1
MAX_READERS = 512
REBUILD = "it is not used: `springtide rebuild-history` makes the stream's histories anew from Kafka"
OUTCOMES = ("rows", "dead", "filtered", "absent")
_EVENT_BYTES = EVENT.itemsize
_CHUNK_BYTES = CHUNK * _EVENT_BYTES
_INVERT = (1 << 32) - 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _prefix(user: int) -> bytes:
    return user.to_bytes(8, "big")


def _key(prefix: bytes, chunk: int) -> bytes:
    return prefix + (_INVERT - chunk).to_bytes(4, "big")


def _chunk(key: bytes) -> int:
    """Gives the chunk's number.

    >>> _chunk(_key(_prefix(258), 3))
    3
    """
    return _INVERT - int.from_bytes(key[8:12], "big")


class HistoryStore:
    """The histories of one process. One thread commits; any thread of any process may read.

    Args:
        path: The store's directory.
        history: N, events kept of a user.
        map_bytes: The most the store may grow to.
        readonly: For readers; the writer must have made it.
        boot_id: Which start of the machine this is; by default the kernel's.

    Raises:
        CorruptStore: A power cut may have damaged it.
        SpecMismatch: It keeps another number of events.
        StoreError: It cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        history: int = 256,
        map_bytes: int = 16 << 30,
        readonly: bool = False,
        boot_id: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.history = history
        self.readonly = readonly
        boot = (boot_id or _BOOT_ID.read_text().strip()).encode()
        try:
            if not readonly:
                self.path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(
                str(self.path),
                map_size=map_bytes,
                max_dbs=3,
                max_readers=MAX_READERS,
                readonly=readonly,
                create=not readonly,
                sync=False,
                metasync=False,
                writemap=False,
                readahead=False,
            )
        except DAMAGED as error:
            raise CorruptStore(f"the histories at {self.path} are damaged ({error}); {REBUILD}") from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"the histories at {self.path} cannot be opened ({error}); "
                + ("is its writer running?" if readonly else "free space or correct the directory's access rights")
            ) from error
        try:
            self._meta = self._env.open_db(b"meta", create=not readonly)
            self._chunks = self._env.open_db(b"chunks", create=not readonly)
            self._waiting = self._open_waiting()
            self._check(boot)
            if not readonly:
                with self._write() as transaction:
                    transaction.put(b"boot", boot, db=self._meta)
                    transaction.put(b"clean", b"0", db=self._meta)
                    transaction.put(
                        b"format", json.dumps({"format": FORMAT, "history": history}).encode(), db=self._meta
                    )
                # The mark must be on disk before anything that it warns of.
                self.sync()
        except DAMAGED as error:
            self._env.close()
            raise CorruptStore(f"the histories at {self.path} are damaged ({error}); {REBUILD}") from error
        except lmdb.Error as error:
            self._env.close()
            raise StoreError(
                f"the histories at {self.path} cannot be read ({error}); is its writer running?"
            ) from error
        except (StoreError, SpecMismatch):
            self._env.close()
            raise

    def _open_waiting(self) -> Any:
        """The database of waiting rows; None where a store of before they were kept is only read."""
        try:
            return self._env.open_db(b"waiting", create=not self.readonly)
        except lmdb.NotFoundError:
            return None

    def _check(self, boot: bytes) -> None:
        with self._env.begin(db=self._meta) as transaction:
            stored = transaction.get(b"format")
            if stored is None:
                return
            made = json.loads(bytes(stored))
            if made["format"] != FORMAT:
                raise CorruptStore(f"{self.path} has format {made['format']}, this release reads {FORMAT}; {REBUILD}")
            if made["history"] != self.history:
                raise SpecMismatch(
                    f"{self.path} keeps {made['history']} events of a user and features.history is {self.history}; "
                    "put the setting back, or start a new state directory"
                )
            if transaction.get(b"clean") != b"1" and transaction.get(b"boot") != boot and not self.readonly:
                raise CorruptStore(
                    f"{self.path} was open when the machine went down, so that pages may be missing; {REBUILD}"
                )

    def read(self, user: int) -> Events:
        """Gives `[m <= N]` EVENT of `user` in append order: one consistent moment; empty where unknown."""
        prefix = _prefix(user)
        with self._env.begin(db=self._chunks) as transaction:
            return self._read(transaction.cursor(), prefix)[0]

    def read_many(self, users: Sequence[int]) -> list[Events]:
        """Gives the histories of several users as of one moment."""
        with self._env.begin(db=self._chunks) as transaction:
            cursor = transaction.cursor()
            return [self._read(cursor, _prefix(user))[0] for user in users]

    def _read(self, cursor: lmdb.Cursor, prefix: bytes) -> tuple[Events, int]:
        """Gives the last N events from the cursor's snapshot, and how many the user ever had."""
        values: list[bytes] = []
        total = 0
        found = cursor.set_range(prefix)
        while found:
            key, value = bytes(cursor.key()), bytes(cursor.value())
            if key[:8] != prefix:
                break
            if not values:
                total = _chunk(key) * CHUNK + len(value) // _EVENT_BYTES
            elif (_chunk(key) + 1) * CHUNK <= total - self.history:
                break
            values.append(value)
            found = cursor.next()
        values.reverse()
        joined = b"".join(values)
        if len(joined) % _EVENT_BYTES:
            raise CorruptStore(
                f"{self.path} holds a history of {len(joined)} bytes, which is no whole number of events; {REBUILD}"
            )
        return np.frombuffer(joined, EVENT)[-self.history :], total

    def total(self, user: int) -> int:
        """How many events `user` ever had since it last was unknown."""
        with self._env.begin(db=self._chunks) as transaction:
            return self._read(transaction.cursor(), _prefix(user))[1]

    def users(self) -> int:
        """How many users have a history."""
        with self._env.begin(db=self._meta) as transaction:
            return int(transaction.get(b"users") or 0)

    def counts(self) -> dict[Source, dict[str, int]]:
        """By source: `first` and `next` offset, and the offsets between them by outcome; those of `RARE` where there are any."""
        return self.cut()[0]

    def cut(self) -> tuple[dict[Source, dict[str, int]], int]:
        """The counts, and how many rows wait, as of one moment."""
        found = {}
        with self._env.begin(db=self._meta) as transaction:
            waiting = 0 if self._waiting is None else int(transaction.stat(self._waiting)["entries"])
            cursor = transaction.cursor()
            if cursor.set_range(b"p:"):
                for key, value in cursor:
                    if not key.startswith(b"p:"):
                        break
                    found[Source.parse(bytes(key[2:]).decode())] = json.loads(bytes(value))
        return found, waiting

    def positions(self) -> dict[Source, int]:
        """The next offset of each source."""
        return {source: counts["next"] for source, counts in self.counts().items()}

    @property
    def totals(self) -> dict[str, int]:
        """Outcomes over all sources, with `positions`, their sum as offsets passed."""
        counts = list(self.counts().values())
        sums = {name: sum(count[name] for count in counts) for name in OUTCOMES}
        sums |= {name: total for name in RARE if (total := sum(count.get(name, 0) for count in counts))}
        return {"positions": sum(count["next"] - count["first"] for count in counts), **sums}

    def extra(self, name: str) -> bytes | None:
        """What the last commit with extra `name` stored."""
        with self._env.begin(db=self._meta) as transaction:
            value = transaction.get(b"x:" + name.encode())
            return None if value is None else bytes(value)

    def waiting_rows(self) -> int:
        """How many rows wait for their label."""
        return self.cut()[1]

    def waiting(self) -> Iterator[tuple[bytes, bytes]]:
        """The rows that wait, in the order of their keys, as of one moment."""
        if self._waiting is not None:
            with self._env.begin(db=self._waiting) as transaction:
                for key, value in transaction.cursor():
                    yield bytes(key), bytes(value)

    def waiting_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The rows that wait under `keys`; None for one that does not."""
        with self._env.begin(db=self._waiting) as transaction:
            found = [transaction.get(key) for key in keys]
            return [None if value is None else bytes(value) for value in found]

    def commit(
        self,
        appends: Appends,
        ranges: Sequence[Range] = (),
        extra: Mapping[str, bytes] | None = None,
        waiting: Mapping[bytes, bytes | None] | None = None,
    ) -> None:
        """Appends events, moves positions and counts outcomes, all or nothing.

        Visible to every reader when it returns; durable against a kill at
        once, against a power cut at the next `sync`.

        Args:
            appends: Events by user.
            ranges: What they came from; ranges of one source in order.
            extra: Other values of the owner's, replaced.
            waiting: Rows that begin to wait, by key; None for one that ends.

        Raises:
            PositionConflict: A range does not begin at its source's next offset.
            StoreFull: The map or the disk is full; nothing was changed.
        """
        with self._write() as transaction:
            # 1. Positions first: a conflict must not cost the appends.
            self._move(transaction, ranges)
            # 2. Histories.
            new = self._append(transaction, appends)
            if new:
                known = int(transaction.get(b"users", db=self._meta) or 0)
                transaction.put(b"users", str(known + new).encode(), db=self._meta)
            # 3. The owner's values.
            for name, value in (extra or {}).items():
                transaction.put(b"x:" + name.encode(), value, db=self._meta)
            # 4. Rows that wait.
            for key, row in (waiting or {}).items():
                if row is None:
                    transaction.delete(key, db=self._waiting)
                else:
                    transaction.put(key, row, db=self._waiting)

    def _move(self, transaction: lmdb.Transaction, ranges: Sequence[Range]) -> None:
        for part in ranges:
            key = b"p:" + str(part.source).encode()
            stored = transaction.get(key, db=self._meta)
            counts = {"first": part.first, "next": part.first, **dict.fromkeys(OUTCOMES, 0)}
            if stored is not None:
                counts = json.loads(bytes(stored))
            if counts["next"] != part.first:
                raise PositionConflict(
                    f"{self.path} has read {part.source} up to {counts['next']}, and the batch begins at {part.first}; "
                    "stop the second writer and start again: reading goes on from the stored position"
                )
            counts["next"] = part.next
            for name, count in part.outcomes.items():
                counts[name] = counts.get(name, 0) + count
            transaction.put(key, json.dumps(counts).encode(), db=self._meta)

    def _append(self, transaction: lmdb.Transaction, appends: Appends) -> int:
        """Writes the chunks that changed; returns how many users are new."""
        data = appends.events.tobytes()
        prefixes = appends.users.astype(">u8").tobytes()
        cursor = transaction.cursor(db=self._chunks)
        written: list[tuple[bytes, bytes]] = []
        passed: list[bytes] = []
        new = 0
        starts = (appends.starts * _EVENT_BYTES).tolist()
        lengths = (appends.lengths * _EVENT_BYTES).tolist()
        seek, item = cursor.set_range, cursor.item
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            prefix = prefixes[8 * index : 8 * index + 8]
            gained = data[start : start + length]
            chunk = before = 0
            if seek(prefix):
                key, tail = cast(tuple[bytes, bytes], item())
                if key.startswith(prefix):
                    # The common case, kept short: the newest chunk has room.
                    if len(tail) + length <= _CHUNK_BYTES:
                        written.append((key, tail + gained))
                        continue
                    chunk = _chunk(key)
                    before = chunk * CHUNK + len(tail) // _EVENT_BYTES
                    if len(tail) == _CHUNK_BYTES:
                        chunk += 1
                    else:
                        gained = tail + gained
            new += before == 0
            floor = max(0, before + length // _EVENT_BYTES - self.history) // CHUNK
            for place in range(0, len(gained), _CHUNK_BYTES):
                if chunk >= floor:
                    written.append((_key(prefix, chunk), gained[place : place + _CHUNK_BYTES]))
                chunk += 1
            # A chunk may have passed out of the last N while its newest one filled up.
            for gone in range(max(0, before - CHUNK - self.history) // CHUNK, floor):
                passed.append(_key(prefix, gone))
        cursor.putmulti(written)
        for key in passed:
            transaction.delete(key, db=self._chunks)
        return new

    def sweep(self, horizon_ms: int, start: int = 0, limit: int = 1000) -> tuple[int, int | None]:
        """Deletes the leading chunks whose events all lie at or before `horizon_ms`.

        No answer changes as long as no row is asked for whose longest window
        reaches back over the horizon: the caller takes log time, less the
        longest window, less `events.max_age_s`.

        Args:
            horizon_ms: Event time.
            start: The first user to look at.
            limit: The most users to look at.

        Returns:
            How many events were deleted, and the user to go on with; None at the end.
        """
        deleted = looked = 0
        resume: int | None = None
        with self._write() as transaction:
            cursor = transaction.cursor(db=self._chunks)
            gone: list[bytes] = []
            known = int(transaction.get(b"users", db=self._meta) or 0)
            for prefix, chunks in _by_user(cursor, _prefix(start)):
                if looked == limit:
                    resume = int.from_bytes(prefix, "big")
                    break
                looked += 1
                for key, value in reversed(chunks):
                    events = np.frombuffer(value, EVENT)
                    if int(events["at_ms"].max()) > horizon_ms:
                        break
                    gone.append(key)
                    deleted += len(events)
                else:
                    known -= 1
            for key in gone:
                transaction.delete(key, db=self._chunks)
            transaction.put(b"users", str(known).encode(), db=self._meta)
        return deleted, resume

    def digest(self) -> str:
        """SHA-256 over the last N events of every user, by user: equal histories, equal digests."""
        sha = hashlib.sha256()
        with self._env.begin(db=self._chunks) as transaction:
            reader = transaction.cursor()
            for prefix, _ in _by_user(transaction.cursor(), _prefix(0)):
                events, _ = self._read(reader, prefix)
                sha.update(prefix + len(events).to_bytes(4, "big") + events.tobytes())
        return sha.hexdigest()

    def users_below(self, events: int) -> int:
        """How many users had fewer than `events` events in all, since they were unknown."""
        found = 0
        with self._env.begin() as transaction:
            for _, chunks in _by_user(transaction.cursor(db=self._chunks), _prefix(0)):
                key, newest = chunks[0]
                found += _chunk(key) * CHUNK + len(newest) // _EVENT_BYTES < events
        return found

    def copy_to(self, path: Path) -> None:
        """Writes the store as of this moment to the directory `path`, synced and marked as closed in order.

        Commits go on meanwhile; for as long as it takes, pages they free are not used again.

        Raises:
            StoreFull: The disk refused; what is at `path` is worthless.
        """
        try:
            path.mkdir(parents=True)
            self._env.copy(str(path), compact=True)
        except (lmdb.Error, OSError) as error:
            raise StoreFull(f"{self.path} cannot be copied to {path} ({error}); free space and try again") from error
        HistoryStore(path, self.history, int(self._env.info()["map_size"])).close()

    @classmethod
    def copied(cls, source: Path, path: Path, history: int, map_bytes: int) -> None:
        """Copies a store that was closed in order to `path`; the one at `source` stays as it is.

        Raises:
            CorruptStore: It was not closed in order, so that pages may be missing.
            StoreError: It cannot be read or copied.
        """
        store = cls(source, history, map_bytes, readonly=True)
        try:
            with store._env.begin(db=store._meta) as transaction:
                if transaction.get(b"clean") != b"1":
                    raise CorruptStore(
                        f"{source} was not closed in order, so that pages may be missing; it is not used: "
                        "name another copy, or rebuild without one"
                    )
            store.copy_to(path)
        finally:
            store.close()

    def clear_readers(self) -> int:
        """Frees the reader slots of dead processes, which would keep old pages alive."""
        return int(self._env.reader_check())

    def bytes_used(self) -> int:
        """The size of the part of the map that holds data."""
        info, stat = self._env.info(), self._env.stat()
        return int((info["last_pgno"] + 1) * stat["psize"])

    def sync(self) -> None:
        """Makes all commits durable against a power cut.

        Raises:
            StoreFull: The disk refused; nothing is lost as long as the machine runs.
        """
        try:
            self._env.sync(True)
        except (lmdb.Error, OSError) as error:
            raise StoreFull(
                f"{self.path} could not be synced ({error}); free space on its disk and look after it, then start again"
            ) from error

    def close(self) -> None:
        """Syncs, marks the store as closed in order, and closes it.

        Raises:
            StoreFull: The disk refused; the store is closed without the mark, as after a kill.
        """
        try:
            if not self.readonly:
                self.sync()
                with self._write() as transaction:
                    transaction.put(b"clean", b"1", db=self._meta)
                self.sync()
        finally:
            self._env.close()

    def _write(self) -> AbstractContextManager[lmdb.Transaction]:
        return written(self._env, self.path, REBUILD)


def _by_user(cursor: lmdb.Cursor, start: bytes) -> Iterator[tuple[bytes, list[tuple[bytes, bytes]]]]:
    """Walks users in order, each with its chunks, newest first."""
    prefix, chunks = b"", list[tuple[bytes, bytes]]()
    if not cursor.set_range(start):
        return
    for key, value in cursor:
        if key[:8] != prefix:
            if chunks:
                yield prefix, chunks
            prefix, chunks = bytes(key[:8]), []
        chunks.append((bytes(key), bytes(value)))
    if chunks:
        yield prefix, chunks
