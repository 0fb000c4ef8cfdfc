"""A store in LMDB that can be written anew without a byte of what was deleted: those on free pages, and keys that inner pages keep."""

from __future__ import annotations

import shutil
import threading
from itertools import islice
from pathlib import Path

import lmdb

from state import layout
from state.disk import clean_mark
from state.disk import files as durable
from state.disk.clean_mark import CleanMark
from state.disk.lmdb_store import LmdbStore
from state.process import killpoints

AT_ONCE = 4096
"""Entries in a transaction: LMDB keeps the memory of as many pages as its largest one changed."""


class CompactStore(LmdbStore):
    """As `LmdbStore`, which says what the arguments are."""

    def __init__(self, path: Path, map_bytes: int, readonly: bool = False, boot_id: str | None = None) -> None:
        self.path = Path(path)
        self._swapping = threading.Lock()
        if not readonly:
            # What a crash in the middle of `compact` left has old pages.
            shutil.rmtree(self._aside, ignore_errors=True)
        super().__init__(path, map_bytes, readonly, boot_id)

    @property
    def _aside(self) -> Path:
        home = self.path.resolve()
        return home.with_name(f"{home.name}.compacting")

    def clear_stale_readers(self) -> int:
        """As of any store; waits while it is written anew."""
        with self._swapping:
            return super().clear_stale_readers()

    def bytes_used(self) -> int:
        """As of any store; waits while it is written anew."""
        with self._swapping:
            return super().bytes_used()

    def compact(self) -> None:
        """Writes the store anew from what is alive, entry by entry, and opens that.

        LMDB's own copy leaves free pages out and takes inner pages as they are. Those name the first key that a page below
        them had when it was made, also where that was deleted since. A million entries of 600 bytes take 1.2 s of a core, four
        times what that copy takes.

        Its writer calls it, while no other thread reads the store here. Readers in other processes have the old file
        until they open the store again, as they do when the file is another one.

        Raises:
            StoreFull: The disk has no room for both; nothing was changed.
            UnusableDisk: It refused for another reason; likewise.
        """
        with self._swapping:
            try:
                # 1. A copy of what is alive.
                shutil.rmtree(self._aside, ignore_errors=True)
                self._copy_alive(self._aside)
                clean_mark.write(self._aside / layout.MARK, CleanMark(False, self._boot_id))
            except (lmdb.Error, OSError) as error:
                refused = self._refused(error, "written anew")
                shutil.rmtree(self._aside, ignore_errors=True)
                raise refused from error
            killpoints.reach("compact.copied")
            # 2. It takes the place of the old one; both have a lock file of their own.
            most = int(self._env.info()["map_size"])
            self._env.close()
            durable.exchange(self._aside, self.path.resolve())
            killpoints.reach("compact.exchanged")
            # 3. The old one goes.
            shutil.rmtree(self._aside, ignore_errors=True)
            self._open(most)

    def _copy_alive(self, folder: Path) -> None:
        """Writes all entries of all databases, in their order, to a file in `folder`."""
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
            with self._env.begin() as ours:
                for name, database in self._databases.items():
                    # A generator ends once: the cursor itself would begin again.
                    entries, other = (one for one in ours.cursor(database)), copy.open_db(name.encode())
                    while some := list(islice(entries, AT_ONCE)):
                        with copy.begin(write=True, db=other) as transaction:
                            transaction.cursor().putmulti(some, append=True)
        finally:
            copy.close()
