"""A store in LMDB that can be written anew without its free pages, whose bytes are those of what was deleted."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import lmdb

from state import layout
from state.disk import clean_mark
from state.disk import files as durable
from state.disk.clean_mark import CleanMark
from state.disk.lmdb_store import LmdbStore
from state.process import killpoints


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
        """Writes the store anew without its free pages, whose bytes are those of what was deleted, and opens that.

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
                self._aside.mkdir()
                self._env.copy(str(self._aside), compact=True)
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
