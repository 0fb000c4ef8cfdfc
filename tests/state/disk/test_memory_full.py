"""Histories where memory has too little room: they wait, and are on the disk from the next start on."""

from __future__ import annotations

from pathlib import Path

import pytest

from state import layout
from state.disk import memory_place
from state.disk.memory_store import enter
from state.errors import StoreError, StoreFull
from tests.disks import Disk, small_disk
from tests.state.disk.held_histories import SOURCE, commit, crash, held, opened, told


def test_full_memory_refuses_commits_and_the_disk_takes_over_at_the_next_start(tmp_path: Path, memory: Disk) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        link = disk.path / layout.HISTORIES
        store = opened(link, memory)
        commit(store)
        in_memory = memory.fill()
        with pytest.raises(StoreFull, match=r"memory is full; free space in memory, or start the stream"):
            commit(store, 1000, new=True)
        before = store.positions()[SOURCE]
        # A full disk takes it neither at the stop nor at the next start.
        on_disk = disk.fill()
        with pytest.raises(StoreFull, match="could not be saved on the disk"):
            store.close()
        with pytest.raises(StoreError, match="free space"):
            opened(link, memory)
        in_memory.unlink()
        again = opened(link, memory)
        assert again.in_memory and again.positions()[SOURCE] == before
        commit(again)
        on_disk.unlink()
        again.close()
        assert not link.is_symlink() and held(memory) == []


def test_with_too_little_memory_or_none_wanted_it_stays_on_the_disk_and_says_why(link: Path, memory: Disk) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    store.close()
    filler = memory.fill()
    full = enter(link, str(memory.path))
    assert full.why == f"{memory.path} has room for 0 MB, and 1 MB are wanted" and not full.in_memory
    filler.unlink()
    assert enter(link, "") == memory_place.Place(link, False)
    assert held(memory) == []
    # One that a kill left in memory leaves it where nothing should lie there.
    crash(opened(link, memory))
    enter(link, "")
    assert not link.is_symlink() and held(memory) == []
    store = opened(link, None)
    assert told(store) == before
    store.close()
