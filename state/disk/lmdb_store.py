"""A store in LMDB: one process writes it, any number of processes read it; what histories, rows and attributes have in common.

    mark.json   whether it was closed in order (`state/disk/clean_mark.py`)
    data.mdb    the databases that the class names, and `meta`:
                format -> {"format": its number, and what else it was made with}, JSON

A commit is visible to every reader at once, and durable against a kill; it is
durable against a power cut at the next `sync`. So after kill -9 the store is
trusted, and after a power cut a store that was open is refused.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import lmdb

from state import layout
from state.disk import clean_mark
from state.disk.clean_mark import CleanMark
from state.disk.lmdb_values import OpenDatabases
from state.errors import CorruptStore, StoreError, StoreFull, UnusableDisk

MAX_READERS = 512
FORMAT = b"format"
_DAMAGED = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
_logger = logging.getLogger(__name__)


class LmdbStore:
    """A store that is open. One thread writes; any thread of any process may read.

    Subclasses say what they are:

    Attributes:
        noun: What it holds, for messages.
        databases: The names of its databases, besides `meta`.
        later: Those of `databases` that a store of an older release may lack.
        number: Of its format.
        map_setting: The setting that limits its size.
        writer: The process that makes it.
        remedy: What to do where it cannot be trusted.
        origin: What `open_anew` fills an empty one from.

    Args:
        path: Its directory; a writer makes it.
        map_bytes: The most it may grow to; address space, not memory.
        readonly: For readers; the writer must have made it.
        boot_id: Which start of the machine this is; by default the kernel's.

    Raises:
        CorruptStore: It is damaged, of another format, or a power cut may have damaged it.
        StoreError: It cannot be opened.
    """

    noun: ClassVar[str]
    databases: ClassVar[tuple[str, ...]]
    later: ClassVar[frozenset[str]] = frozenset()
    number: ClassVar[int] = 1
    map_setting: ClassVar[str]
    writer: ClassVar[str]
    remedy: ClassVar[str]
    origin: ClassVar[str]

    def __init__(self, path: Path, map_bytes: int, readonly: bool = False, boot_id: str | None = None) -> None:
        self.path, self.readonly = Path(path), readonly
        self._boot_id = boot_id or clean_mark.boot_id()
        self._open(map_bytes)

    def _open(self, map_bytes: int) -> None:
        try:
            if not (readonly := self.readonly):
                self.path.mkdir(parents=True, exist_ok=True)
                self._require_trust(clean_mark.read(self._mark_path))
            self._env = lmdb.open(
                str(self.path),
                map_size=map_bytes,
                max_dbs=len(self.databases) + 1,
                max_readers=MAX_READERS,
                readonly=readonly,
                create=not readonly,
                sync=False,
                metasync=False,
                writemap=False,
                readahead=False,
            )
        except (lmdb.Error, OSError) as error:
            raise self._unopened(error) from error
        try:
            self._check_made()
            if not readonly:
                # The mark must be on disk before the first page that it warns of.
                clean_mark.write(self._mark_path, CleanMark(False, self._boot_id))
            self._databases = {
                name: self._env.open_db(name.encode(), create=not readonly)
                for name in ("meta", *self.databases)
                if not readonly or name not in self.later or self._has(name)
            }
            self._meta = self._databases["meta"]
            self._opened = OpenDatabases(self._env, self._databases)
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
        """Where a subclass takes its databases, each time the store is opened."""

    @classmethod
    def open_anew(cls, path: Path, *arguments: Any) -> Self:
        """The store for its writer, where it is a copy of something: an empty one in place of one that cannot be used.

        Args:
            path: Its directory.
            *arguments: As the class takes them.

        Raises:
            StoreError: It cannot be opened.
        """
        try:
            return cls(path, *arguments)
        except CorruptStore as error:
            _logger.warning("the %s at %s are begun anew from %s: %s", cls.noun, path, cls.origin, error.what)
            shutil.rmtree(path)
            return cls(path, *arguments)

    def bytes_used(self) -> int:
        """The size of the part of the map that holds data, or once did."""
        info, stat = self._env.info(), self._env.stat()
        return int((info["last_pgno"] + 1) * stat["psize"])

    def bytes_limit(self) -> int:
        """The most that the store may grow to."""
        return int(self._env.info()["map_size"])

    def clear_stale_readers(self) -> int:
        """Frees the slots of readers whose process died, which would keep old pages alive; returns how many."""
        return int(self._env.reader_check())

    def closed_in_order(self) -> bool:
        """Whether its last writer closed it."""
        mark = clean_mark.read(self._mark_path) or self._older_mark()
        return mark is not None and mark.clean

    def sync(self) -> None:
        """Makes all commits durable against a power cut.

        Raises:
            StoreFull: The disk is full; nothing is lost as long as the machine runs.
            UnusableDisk: It refused for another reason; likewise.
        """
        try:
            self._env.sync(True)
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "synced") from error

    def close(self) -> None:
        """Syncs what a writer wrote, marks it as closed in order, and closes it.

        Raises:
            StoreFull: The disk is full; the store is closed without the mark, as after a kill.
            UnusableDisk: It refused for another reason; likewise.
        """
        try:
            if not self.readonly:
                self.sync()
        finally:
            self._env.close()
        if not self.readonly:
            try:
                clean_mark.write(self._mark_path, CleanMark(True, self._boot_id))
            except OSError as error:
                raise self._refused(error, "marked as closed in order") from error

    def copy_as_is(self, handle: int) -> None:
        """Writes the store as of this moment to an open file or pipe, each page where it is: what did not change stays equal.

        Commits go on meanwhile; for as long as it takes, pages they free are not used again.

        Raises:
            StoreFull: The disk is full.
            UnusableDisk: It refused for another reason.
        """
        try:
            self._env.copyfd(handle)
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "copied") from error

    @contextmanager
    def _write(self) -> Iterator[lmdb.Transaction]:
        """A write transaction, committed where the block ends; an exception leaves the store as it was.

        Raises:
            StoreFull: The map or the disk is full; nothing was changed.
            CorruptStore: The store is damaged.
            UnusableDisk: The disk refused; nothing was changed.
        """
        try:
            with self._env.begin(write=True) as transaction:
                yield transaction
        except lmdb.MapFullError as error:
            raise StoreFull(
                f"{self.path} has reached its map of {self.bytes_limit()} bytes; nothing was changed",
                f"raise storage.budget_gb (or {self.map_setting}) and start again",
            ) from error
        except _DAMAGED as error:
            raise CorruptStore(f"{self.path} is damaged ({error})", self.remedy) from error
        except (lmdb.Error, OSError) as error:
            raise self._refused(error, "written") from error

    def _made_with(self) -> dict[str, int]:
        """What the store is made with, kept beside the number of its format."""
        return {}

    def _older_mark(self) -> CleanMark | None:
        """The mark as a release kept it that had no `mark.json` for this store."""
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
        """Refuses another format, other settings, and an older release's store from before a power cut."""
        stored = self._stored(FORMAT)
        made = {"format": self.number, **self._made_with()} if stored is None else json.loads(stored)
        if made["format"] != self.number:
            raise CorruptStore(
                f"{self.path} has format {made['format']}, this release reads {self.number}; it is not used",
                self.remedy,
            )
        if not self.readonly and not self._mark_path.exists():
            self._require_trust(self._older_mark())

    def _write_made(self) -> None:
        made = json.dumps({"format": self.number, **self._made_with()}).encode()
        if self._stored(FORMAT) != made:
            with self._write() as transaction:
                transaction.put(FORMAT, made, db=self._meta)

    def _has(self, name: str) -> bool:
        try:
            self._env.open_db(name.encode(), create=False)
        except (lmdb.NotFoundError, lmdb.ReadonlyError):
            return False
        return True

    def _stored(self, key: bytes) -> bytes | None:
        """What `meta` has under `key`; None also where there is no `meta` yet."""
        if not self._has("meta"):
            return None
        with self._env.begin(db=self._env.open_db(b"meta", create=False)) as transaction:
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

    def _refused(self, error: Exception, done: str, where: Path | None = None) -> StoreError:
        what = f"{self.path} could not be {done} ({error}); nothing was changed"
        if _is_full(error, where or self.path):
            return StoreFull(what, "free space on its disk")
        return UnusableDisk(what, "look after its disk and its access rights, and start again")


def _is_full(error: Exception, path: Path) -> bool:
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", None)
    if code == errno.EIO:
        # LMDB tells a page of which only a part had room as an I/O error.
        return path.exists() and shutil.disk_usage(path).free < 1 << 20
    return code in (errno.ENOSPC, errno.EDQUOT)
