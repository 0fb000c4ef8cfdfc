"""The base of all LMDB stores (histories, rows, attributes, segments): one process writes, any number of them read.

    mark.json   whether the store was closed cleanly (`CleanMark` in `state/disk/files.py`)
    data.mdb    the databases that the class names, and `meta`:
                format -> {"format": its number, and the parameters of the store}, JSON; `shares` if it holds only the
                users of some shares

A commit is visible to every reader at once and survives a kill. It survives a power cut only after the next `sync`. So
a store is trusted after kill -9, and refused if it was open at a power cut.

In memory (tmpfs), LMDB writes pages in place, so that a commit does not copy each changed page to the file again.
`data.mdb` is then sparse, with the size of the map. A `MemoryStore` lives in memory while its writer runs, and is saved
to the disk on close:

    histories           the store on the disk while no writer runs; else a link to the store in memory
    histories.link      replaces it at a start; after the exchange it is the copy on the disk, which is removed
    histories.saving    replaces it at a clean stop; after the exchange it is the link, which is removed

So after kill -9 the store in memory is used. After a power cut the link is dangling, and the store is refused like any
store that was open at that time. There is no older copy that could be mistaken for it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import lmdb

from state import layout
from state.disk import files as durable
from state.disk import memory_place
from state.disk.files import CleanMark
from state.disk.memory_place import Place
from state.errors import CorruptStore, StoreError, StoreFull, UnusableDisk, reason_of
from state.process import killpoints
from state.user_shares import UserShares

MAP_BYTES = 1 << 36
"""Maximum size of a store without a share of the disk: a reader, or a store in memory."""

RESERVE_BYTES = 64 << 20
"""Allocated memory beyond the last page of a store in memory, more than its largest transaction writes."""

MAX_READERS = 512
AT_ONCE = 4096
"""Entries per transaction of `compact`. LMDB keeps memory for as many pages as its largest transaction changed."""

PAGES_MS = 600_000
"""Minimum time between compactions of a store after erasures. LMDB keeps deleted data on free pages of its file."""

FORMAT = b"format"
_DAMAGED = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
_logger = logging.getLogger(__name__)


class LmdbStore:
    """An open store. One thread writes; any thread of any process may read.

    Attributes:
        noun: The content of the store, for messages. Subclasses set this and the following attributes.
        databases: The names of its databases, except `meta`.
        number: The number of its format.
        writer: The process that creates it.
        remedy: The advice for a store that cannot be trusted.
        origin: The source from which `open_or_rebuild` rebuilds it.
        shares: The shares of users that it holds; only subclasses with data of users read it.

    Args:
        map_bytes: Its maximum size if it is written; address space, not memory.
        readonly: True for readers; the writer must have created the store.
        boot_id: The boot id of this machine; by default the kernel's.
        shares: The shares of users that the store holds; None for those with which it was created.

    Raises:
        CorruptStore: The store is damaged, has another format, lacks users, or was open at a power cut.
        StoreError: The store cannot be opened.
    """

    noun: ClassVar[str]
    databases: ClassVar[tuple[str, ...]]
    number: ClassVar[int] = 1
    writer: ClassVar[str]
    remedy: ClassVar[str]
    origin: ClassVar[str]

    def __init__(
        self,
        path: Path,
        map_bytes: int = MAP_BYTES,
        readonly: bool = False,
        boot_id: str | None = None,
        shares: UserShares | None = None,
    ) -> None:
        self.path, self.readonly, self._wanted = Path(path), readonly, shares
        self._boot_id = boot_id or durable.boot_id()
        self._swapping = threading.Lock()
        if not readonly:
            # A crash during `compact` leaves a copy with old pages.
            shutil.rmtree(self._aside, ignore_errors=True)
        self._open(map_bytes)

    def _open(self, map_bytes: int) -> None:
        try:
            if not (readonly := self.readonly):
                self.path.mkdir(parents=True, exist_ok=True)
                self._require_trust(durable.read_clean_mark(self._mark_path))
            self._in_place = not readonly and memory_place.is_in_memory(self.path)
            self._reserved_bytes = 0
            self._env = lmdb.open(
                str(self.path),
                map_size=map_bytes,
                max_dbs=len(self.databases) + 1,
                max_readers=MAX_READERS,
                readonly=readonly,
                create=not readonly,
                sync=False,
                metasync=False,
                writemap=self._in_place,
                readahead=False,
            )
        except (lmdb.Error, OSError) as error:
            raise self._unopened(error) from error
        try:
            self._page_bytes = int(self._env.stat()["psize"])
            self._reserve()
            self._check_made()
            if not readonly:
                # Writes the marker before the first page of this session.
                durable.write_clean_mark(self._mark_path, CleanMark(False, self._boot_id))
            self._databases = {
                name: self._env.open_db(name.encode(), create=not readonly) for name in ("meta", *self.databases)
            }
            self._meta = self._databases["meta"]
            if not readonly:
                self._write_made()
        except (lmdb.Error, OSError) as error:
            self._env.close()
            raise self._unopened(error) from error
        except StoreError:
            self._env.close()
            raise
        self._bind()

    def _bind(self) -> None:
        """Hook for subclasses, called each time the store is opened."""

    @classmethod
    def open_or_rebuild(cls, path: Path, *arguments: Any, **named: Any) -> Self:
        """Opens a derived store for its writer; a store that cannot be trusted is replaced by an empty one."""
        try:
            return cls(path, *arguments, **named)
        except CorruptStore as error:
            _logger.warning("the %s at %s are rebuilt from %s: %s", cls.noun, path, cls.origin, error.what)
            shutil.rmtree(path)
            return cls(path, *arguments, **named)

    def bytes_limit(self) -> int:
        """The maximum size of the store."""
        return int(self._env.info()["map_size"])

    def clear_stale_readers(self) -> int:
        """Frees the slots of readers whose process died, which would keep old pages alive; returns their number.

        Waits for a running `compact`.
        """
        with self._swapping:
            return int(self._env.reader_check())

    def closed_in_order(self) -> bool:
        """Whether the last writer closed the store cleanly."""
        mark = durable.read_clean_mark(self._mark_path) or self._older_mark()
        return mark is not None and mark.clean

    def sync(self) -> None:
        """Makes all commits durable against a power cut.

        After `StoreFull` or `UnusableDisk`, no commit is lost as long as the machine runs.
        """
        try:
            self._env.sync(True)
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "synced") from error

    def close(self) -> None:
        """Syncs a writer's commits, closes the store and marks it as closed cleanly; no mark if the disk refuses."""
        try:
            if not self.readonly:
                self.sync()
        finally:
            self._env.close()
        if not self.readonly:
            try:
                durable.write_clean_mark(self._mark_path, CleanMark(True, self._boot_id))
            except OSError as error:
                raise self._refused(error, "marked as closed cleanly") from error

    def copy_as_is(self, handle: int) -> None:
        """Writes a snapshot of the store to an open file or pipe. Unchanged pages keep their position and content.

        Commits continue meanwhile, but pages that they free are not reused until the copy ends.
        """
        try:
            self._env.copyfd(handle)
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "copied") from error

    def compact(self) -> None:
        """Copies the live entries one by one to a new store, and replaces the old one with it; no deleted data remains.

        LMDB's own compacting copy would keep inner pages, which name keys that were deleted since. The writer calls
        this while no other thread of this process reads the store. Readers in other processes use the old file until
        they notice the replacement and open the store again.

        Raises:
            StoreFull: The disk has no space for both; nothing was changed.
            UnusableDisk: The disk refused for another reason; nothing was changed.
        """
        with self._swapping:
            try:
                # 1. Copy the live entries.
                shutil.rmtree(self._aside, ignore_errors=True)
                self._copy_alive(self._aside)
                durable.write_clean_mark(self._aside / layout.MARK, CleanMark(False, self._boot_id))
            except (lmdb.Error, OSError) as error:
                refused = self._refused(error, "rewritten")
                shutil.rmtree(self._aside, ignore_errors=True)
                raise refused from error
            killpoints.reach("compact.copied")
            # 2. Exchange the two directories; each has its own lock file.
            most = int(self._env.info()["map_size"])
            self._env.close()
            durable.exchange(self._aside, self.path.resolve())
            killpoints.reach("compact.exchanged")
            # 3. Remove the old store.
            shutil.rmtree(self._aside, ignore_errors=True)
            self._open(most)

    def _copy_alive(self, folder: Path) -> None:
        folder.mkdir()
        copy = lmdb.open(
            str(folder),
            map_size=int(self._env.info()["map_size"]),
            max_dbs=len(self._databases),
            sync=False,
            metasync=False,
            readahead=False,
        )
        try:
            with self._env.begin() as snapshot:
                for name, database in self._databases.items():
                    # A generator ends once; an LMDB cursor would start again.
                    entries, target = (entry for entry in snapshot.cursor(database)), copy.open_db(name.encode())
                    while batch := list(islice(entries, AT_ONCE)):
                        with copy.begin(write=True, db=target) as transaction:
                            transaction.cursor().putmulti(batch, append=True)
        finally:
            copy.close()

    @property
    def _aside(self) -> Path:
        home = self.path.resolve()
        return home.with_name(f"{home.name}.compacting")

    def _begin(self, name: str) -> Any:
        """Begins a read `lmdb.Transaction` with this default database; it may read the others by their handles."""
        return self._env.begin(db=self._databases[name])

    @contextmanager
    def _write(self) -> Iterator[lmdb.Transaction]:
        """A write transaction, committed at the end of the block; an exception leaves the store unchanged."""
        try:
            self._reserve()
            with self._env.begin(write=True) as transaction:
                yield transaction
        except lmdb.MapFullError as error:
            raise StoreFull(
                f"{self.path} has reached its map of {self.bytes_limit()} bytes; nothing was changed",
                "raise storage.budget_gb and start again",
            ) from error
        except _DAMAGED as error:
            raise CorruptStore(f"{self.path} is damaged ({error})", self.remedy) from error
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "written") from error

    def _reserve(self) -> None:
        """Allocates memory for the next transaction: where none is left, writing a page in place raises SIGBUS."""
        if not self._in_place:
            return
        info = self._env.info()
        used_bytes = (info["last_pgno"] + 1) * self._page_bytes
        if min(used_bytes + RESERVE_BYTES, info["map_size"]) > self._reserved_bytes:
            end = min(used_bytes + 2 * RESERVE_BYTES, info["map_size"])
            with (self.path / layout.DATA).open("r+b") as data:
                os.posix_fallocate(data.fileno(), self._reserved_bytes, end - self._reserved_bytes)
            self._reserved_bytes = end

    def _made_with(self) -> dict[str, int]:
        """Parameters with which the store is created, stored together with the number of its format."""
        return {}

    def _fits(self, stored_shares: UserShares, wanted: UserShares) -> bool:
        """Whether a store with the users of `stored_shares` can be used for those of `wanted`."""
        return stored_shares.covers(wanted) if self.readonly else stored_shares == wanted

    def _older_mark(self) -> CleanMark | None:
        """The marker in the form of older releases, which had no `mark.json` for this store."""
        return None

    @property
    def _mark_path(self) -> Path:
        return self.path / layout.MARK

    def _require_trust(self, mark: CleanMark | None) -> None:
        if mark is not None and not mark.trusts(self._boot_id):
            raise CorruptStore(
                f"{self.path} was open when the machine went down, so that pages may be missing; it is not used",
                self.remedy,
            )

    def _check_made(self) -> None:
        stored = self._stored(FORMAT)
        document = {"format": self.number, **self._made_with()} if stored is None else json.loads(stored)
        if document["format"] != self.number:
            raise CorruptStore(
                f"{self.path} has format {document['format']}, this release reads {self.number}; it is not used",
                self.remedy,
            )
        stored_shares = UserShares.parse(str(document.get("shares", "")))
        self.shares = stored_shares if self._wanted is None else self._wanted
        if stored is not None and not self._fits(stored_shares, self.shares):
            raise CorruptStore(
                f"{self.path} holds the users of the shares {stored_shares}, and serving.shares is {self.shares}; it is not used",
                self.remedy,
            )
        if not self.readonly and not self._mark_path.exists():
            self._require_trust(self._older_mark())

    def _write_made(self) -> None:
        shares = {} if self.shares.is_all else {"shares": str(self.shares)}
        document = json.dumps({"format": self.number, **self._made_with(), **shares}).encode()
        if self._stored(FORMAT) != document:
            with self._write() as transaction:
                transaction.put(FORMAT, document, db=self._meta)

    def _stored(self, key: bytes) -> bytes | None:
        """The value of `key` in `meta`; None if there is no key or no `meta`."""
        try:
            meta = self._env.open_db(b"meta", create=False)
        except (lmdb.NotFoundError, lmdb.ReadonlyError):
            return None
        with self._env.begin(db=meta) as transaction:
            value = transaction.get(key)
            return None if value is None else bytes(value)

    def _unopened(self, error: Exception) -> StoreError:
        if isinstance(error, _DAMAGED):
            return CorruptStore(f"the {self.noun} at {self.path} are damaged ({error}); they are not used", self.remedy)
        do = (
            f"start {self.writer}, which makes them"
            if self.readonly
            else "free space or correct the directory's access rights"
        )
        return StoreError(f"the {self.noun} at {self.path} cannot be opened ({error})", do)

    def _refused(self, error: Exception, action: str, where: Path | None = None) -> StoreError:
        problem = f"{self.path} could not be {action} ({error}); nothing was changed"
        if _is_full(error, where or self.path):
            if where is None and memory_place.is_in_memory(self.path):
                do = f"free space in memory, or start {self.writer} again: the store is on the disk if memory is too small"
                return StoreFull(f"{problem}: memory is full", do)
            return StoreFull(problem, "free space on its disk")
        return UnusableDisk(problem, "check its disk and its access rights, and start again")


def _is_full(error: Exception, path: Path) -> bool:
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", None)
    if code == errno.EIO:
        # LMDB reports a page that fitted only in part as an I/O error.
        return path.exists() and shutil.disk_usage(path).free < 1 << 20
    return code in (errno.ENOSPC, errno.EDQUOT)


def put_all(transaction: lmdb.Transaction, database: Any, values: Mapping[bytes, bytes | None]) -> None:
    """Writes values by key; None deletes the key."""
    for key, value in values.items():
        if value is None:
            transaction.delete(key, db=database)
        else:
            transaction.put(key, value, db=database)


def keys_with(cursor: lmdb.Cursor, prefix: bytes, start: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]:
    """The first `limit` entries, or all, from key `start` on whose key begins with `prefix`, as (key, value)."""
    entries: list[tuple[bytes, bytes]] = []
    if cursor.set_range(start):
        for key, value in cursor:
            if len(entries) == limit or not bytes(key).startswith(prefix):
                break
            entries.append((bytes(key), bytes(value)))
    return entries


def pages_bytes(stat: Mapping[str, Any]) -> int:
    """The size of the pages that a database uses, from LMDB's statistics."""
    return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))


_ARRIVING, _SAVING = "link", "saving"


class MemoryStore(LmdbStore):
    """An `LmdbStore`, with the same arguments, that may be in memory. Call `enter_memory` before its writer opens it."""

    @property
    def in_memory(self) -> bool:
        """Whether the store is in memory, and is saved to the disk on close."""
        return self.path.is_symlink()

    def _open(self, map_bytes: int) -> None:
        if not self.readonly and self.in_memory and not self.path.exists():
            raise CorruptStore(
                f"{self.path} was in memory, {self.path.readlink()}, which is gone: the machine or its container went down",
                self.remedy,
            )
        super()._open(map_bytes)

    def close(self) -> None:
        """Closes the store. When this returns, a store in memory is on the disk, durable and marked as closed cleanly.

        If the disk refuses, it stays in memory, as after a kill.
        """
        if self.readonly or not self.in_memory:
            super().close()
            return
        try:
            copy = self._saved()
        finally:
            self._env.close()
        try:
            _land(self.path, copy)
        except OSError as error:
            raise self._refused(error, "saved") from error

    def _saved(self) -> Path:
        """Copies the store next to the link, syncs the copy and marks it.

        It copies page by page, so that the next backup finds most pages unchanged.
        """
        copy = _beside(self.path, _SAVING)
        try:
            _clear(copy)
            copy.mkdir()
            if shutil.disk_usage(copy).free < memory_place.size(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._env.copy(str(copy))
            durable.sync_tree(copy)
            durable.write_clean_mark(copy / layout.MARK, CleanMark(True, self._boot_id))
        except (lmdb.Error, OSError) as error:
            refused = self._refused(error, "saved on the disk", copy)
            _clear(copy)
            raise refused from error
        killpoints.reach("memory.saved")
        return copy


def enter_memory(link: Path, memory: str, boot_id: str | None = None) -> Place:
    """Moves a link's store into memory if there is space, before its writer opens it; else it stays on the disk.

    The caller holds the lock of the link's directory.

    1. Remove files that a crash left next to the link.
    2. A store already in memory stays there if it has space to grow. A store that a power cut removed, or may have
       damaged, is left unchanged: opening it reports the error.
    3. Copy a store on the disk into memory. Move a store in memory without space to the disk, if that has space.
    4. Replace the store by the link, durably before the first commit, and remove the source of the copy.

    Raises:
        StoreError: The store belongs to another state directory that is in use.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    # 1.
    _recover_exchange(link)
    # 2.
    before = memory_place.target_of(link)
    if before is not None and not before.exists():
        return Place(before, True)
    own = memory_place.home(Path(memory), link) if memory else None
    if before is not None and before == own and not memory_place.lack(link, memory):
        return Place(before, True)
    mark = durable.read_clean_mark(link / layout.MARK)
    if mark is not None and not mark.trusts(boot_id or durable.boot_id()):
        return Place(link, False)
    if before is not None and memory_place.is_open(before):
        raise StoreError(
            f"{link} leads to {before}, which another process writes: its state directory was copied while it ran",
            "make a copy with `springtide backup` and `springtide restore`, or stop the other one first",
        )
    # 3.
    location = memory_place.choose(link, memory)
    why = _load_into_memory(link, location) if location.in_memory else location.why
    if not location.in_memory or why:
        try:
            leave_memory(link)
        except OSError as error:
            if before is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return Place(before, True)
        if own is not None:
            memory_place.remove(own, link)
        return Place(link, False, why)
    killpoints.reach("memory.loaded")
    # 4.
    arriving = _beside(link, _ARRIVING)
    arriving.symlink_to(location.path)
    _exchange(arriving, link)
    killpoints.reach("memory.linked")
    _clear(arriving)
    if before is not None:
        memory_place.remove(before, link)
    return location


def _load_into_memory(link: Path, location: Place) -> str:
    """Copies the link's store, if any, into memory; returns why that failed, or an empty string."""
    shutil.rmtree(location.path, ignore_errors=True)
    try:
        location.path.mkdir(mode=0o700)
        memory_place.note(location.path, link)
        if link.exists():
            _copy_pages(link, location.path)
    except OSError as error:
        shutil.rmtree(location.path.parent, ignore_errors=True)
        return reason_of(error)
    return ""


def _land(link: Path, copy: Path) -> None:
    """Replaces a link by a directory next to it, and removes the store in memory, which open readers can still read."""
    before = memory_place.target_of(link)
    _exchange(copy, link)
    killpoints.reach("memory.landed")
    _clear(copy)
    if before is not None:
        memory_place.remove(before, link)


def leave_memory(link: Path) -> None:
    """Moves a link's store, which no process writes, from memory to the disk; removes a dangling link."""
    before = memory_place.target_of(link)
    if before is None:
        return
    if not before.exists():
        link.unlink()
        return
    copy = _beside(link, _SAVING)
    _clear(copy)
    try:
        copy.mkdir()
        _copy_pages(before, copy)
        durable.sync_tree(copy)
    except OSError:
        _clear(copy)
        raise
    _land(link, copy)


def _copy_pages(store: Path, target: Path) -> None:
    """Copies the used pages of a store that no process writes, and its mark."""
    try:
        with lmdb.open(str(store), readonly=True, lock=False, create=False) as pages:
            pages.copy(str(target))
    except lmdb.Error as error:
        raise OSError(getattr(error, "code", errno.EIO), str(error), str(store)) from error
    # A store that release 0.1.0 left has no mark.
    with suppress(FileNotFoundError):
        shutil.copyfile(store / layout.MARK, target / layout.MARK)


def _beside(link: Path, suffix: str) -> Path:
    return link.with_name(f"{link.name}.{suffix}")


def _exchange(store: Path, link: Path) -> None:
    """Exchanges `store` with the link, or renames `store` if there is no link; durable when this returns."""
    if os.path.lexists(link):
        durable.exchange(store, link)
    else:
        store.rename(link)
    durable.sync_directory(link.parent)


def _clear(path: Path) -> None:
    """Removes a directory or a link, but not the target of the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _recover_exchange(link: Path) -> None:
    """Completes or undoes an interrupted exchange. An exchange in several steps leaves no link after its first step."""
    for store in (_beside(link, _ARRIVING), _beside(link, _SAVING)):
        between = _beside(store, "between")
        if os.path.lexists(between) and not os.path.lexists(link):
            between.rename(link)
        _clear(between)
        _clear(store)
