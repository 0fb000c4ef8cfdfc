"""Histories in memory, as their writer opens them, and what ends them: for tests of where a store lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from state.disk.lmdb_store import enter_memory
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.positions import Range, Source
from tests.disks import Disk

MIB = 1 << 20
SOURCE = Source("ab" * 16, 0)
USERS = 40


def opened(link: Path, memory: Disk | None, boot_id: str | None = None) -> HistoryStore:
    """The store as its writer opens it; without `memory` as an older release did."""
    if memory is not None:
        enter_memory(link, str(memory.path), boot_id)
    return HistoryStore(link, 32, 64 * MIB, boot_id=boot_id)


def commit(store: HistoryStore, count: int = 1, new: bool = False) -> None:
    """Appends one event of each user `count` times, of `new` users each time."""
    for _ in range(count):
        at = store.positions().get(SOURCE, 0)
        events = np.zeros(USERS, EVENT)
        events["at_ms"] = at + np.arange(USERS)
        users = np.arange(USERS, dtype=np.uint64) + np.uint64(at * new)
        appends = Appends(users, np.arange(USERS), np.ones(USERS, np.int64), events)
        store.commit(appends, [Range(SOURCE, at, at + USERS, rows=USERS)], {"at": str(at).encode()})


def power_cut(memory: Disk) -> None:
    """What lies in memory is gone."""
    for folder in memory.path.iterdir():
        shutil.rmtree(folder)


def held(memory: Disk) -> list[Path]:
    """The stores that lie in memory."""
    return [one for one in memory.path.glob("*/*") if one.is_dir()]


def told(store: HistoryStore) -> tuple[str, int]:
    """All events, and how far the store has come."""
    return store.digest(), store.positions().get(SOURCE, 0)
