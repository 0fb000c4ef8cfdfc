"""A store that lives in memory while its writer runs, and is saved to the disk on close.

    histories           the store on the disk while no writer runs; else a link to the store in memory
    histories.link      replaces it at a start; after the exchange it is the copy on the disk, which is removed
    histories.saving    replaces it at a clean stop; after the exchange it is the link, which is removed

So after kill -9 the store in memory is used. After a power cut the link is dangling, and the store is refused like any
store that was open at that time. There is no older copy that could be mistaken for it.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import lmdb

from state import layout
from state.disk import clean_mark, memory_place
from state.disk import files as durable
from state.disk.clean_mark import CleanMark
from state.disk.lmdb_store import LmdbStore
from state.disk.memory_place import Place
from state.errors import CorruptStore, StoreError, reason_of
from state.process import killpoints

_ARRIVING, _SAVING = "link", "saving"


class MemoryStore(LmdbStore):
    """An `LmdbStore`, with the same arguments, that may be in memory. Call `enter` before its writer opens it."""

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
            land(self.path, copy)
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
            clean_mark.write(copy / layout.MARK, CleanMark(True, self._boot_id))
        except (lmdb.Error, OSError) as error:
            refused = self._refused(error, "saved on the disk", copy)
            _clear(copy)
            raise refused from error
        killpoints.reach("memory.saved")
        return copy


def enter(link: Path, memory: str, boot_id: str | None = None) -> Place:
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
    _recover(link)
    # 2.
    before = memory_place.target_of(link)
    if before is not None and not before.exists():
        return Place(before, True)
    own = memory_place.home(Path(memory), link) if memory else None
    if before is not None and before == own and not memory_place.lack(link, memory):
        return Place(before, True)
    mark = clean_mark.read(link / layout.MARK)
    if mark is not None and not mark.trusts(boot_id or clean_mark.boot_id()):
        return Place(link, False)
    if before is not None and memory_place.is_open(before):
        raise StoreError(
            f"{link} leads to {before}, which another process writes: its state directory was copied while it ran",
            "make a copy with `springtide backup` and `springtide restore`, or stop the other one first",
        )
    # 3.
    location = memory_place.choose(link, memory)
    why = _load(link, location) if location.in_memory else location.why
    if not location.in_memory or why:
        try:
            bring_back(link)
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


def _load(link: Path, location: Place) -> str:
    """Copies the link's store, if any, into memory; returns why that failed, or an empty string."""
    shutil.rmtree(location.path, ignore_errors=True)
    try:
        location.path.mkdir(mode=0o700)
        memory_place.note(location.path, link)
        if link.exists():
            _copy(link, location.path)
    except OSError as error:
        shutil.rmtree(location.path.parent, ignore_errors=True)
        return reason_of(error)
    return ""


def land(link: Path, copy: Path) -> None:
    """Replaces a link by a directory next to it, and removes the store in memory, which open readers can still read."""
    before = memory_place.target_of(link)
    _exchange(copy, link)
    killpoints.reach("memory.landed")
    _clear(copy)
    if before is not None:
        memory_place.remove(before, link)


def bring_back(link: Path) -> None:
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
        _copy(before, copy)
        durable.sync_tree(copy)
    except OSError:
        _clear(copy)
        raise
    land(link, copy)


def _copy(store: Path, target: Path) -> None:
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


def _recover(link: Path) -> None:
    """Completes or undoes an interrupted exchange. An exchange in several steps leaves no link after its first step."""
    for store in (_beside(link, _ARRIVING), _beside(link, _SAVING)):
        between = _beside(store, "between")
        if os.path.lexists(between) and not os.path.lexists(link):
            between.rename(link)
        _clear(between)
        _clear(store)
