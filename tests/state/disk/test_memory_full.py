"""Histories where memory has too little room: on the disk from the start, or moved there without a loss."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from state import layout
from state.disk import memory_place
from state.disk.memory_store import enter
from state.errors import StoreError, StoreFull
from state.history.store import HistoryStore
from tests.disks import Disk, small_disk
from tests.state.disk.held_histories import MIB, SOURCE, USERS, commit, crash, held, opened, told


def fill_up(store: HistoryStore, memory: Disk) -> tuple[int, Path]:
    """Commits until memory is full; returns how far the store has come, and the file that takes the room."""
    filler = memory.fill()
    with pytest.raises(StoreFull):
        commit(store, 1000, new=True)
    return store.positions()[SOURCE], filler


def test_where_memory_is_full_the_store_moves_to_the_disk_and_loses_nothing(
    link: Path, memory: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(link, memory)
    commit(store)
    before, _ = fill_up(store, memory)
    file = (link / layout.DATA).stat()
    commit(store)
    assert not store.in_memory and store.positions()[SOURCE] == before + USERS
    moved = (link / layout.DATA).stat()
    assert (moved.st_dev, moved.st_ino) != (file.st_dev, file.st_ino), "workers open it again"
    assert caplog.text.count("memory is full: the histories lie on the disk now") == 1
    # What it took in memory is given back.
    assert held(memory) == [] and not [
        one for one in Path("/proc/self/maps").read_text().split() if "data.mdb" in one and str(memory.path) in one
    ]
    crash(store)
    again = opened(link, None)
    assert again.positions()[SOURCE] == before + USERS
    again.close()


def test_a_thread_that_reads_while_the_store_moves_sees_one_of_both(link: Path, memory: Disk) -> None:
    store, done, seen, failed = opened(link, memory), threading.Event(), list[int](), list[Exception]()
    commit(store)

    def read() -> None:
        try:
            while not done.is_set():
                histories = store.read_many(range(USERS))
                assert {len(one) for one in histories} == {len(histories[0])}
                seen.append(store.cut()[0][SOURCE]["next"])
        except Exception as error:  # noqa: BLE001 - the main thread tells it
            failed.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    before, _ = fill_up(store, memory)
    commit(store, 3)
    done.set()
    reading.join()
    assert not failed and seen == sorted(seen) and not store.in_memory
    assert store.positions()[SOURCE] == before + 3 * USERS
    store.close()


def test_where_the_disk_is_full_too_it_waits_and_loses_nothing(tmp_path: Path, memory: Disk) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        link = disk.path / layout.HISTORIES
        store = opened(link, memory)
        commit(store)
        before, in_memory = fill_up(store, memory)
        on_disk = disk.fill()
        for _ in range(2):
            with pytest.raises(StoreFull, match="could not be saved on the disk"):
                commit(store)
        assert store.in_memory and store.positions()[SOURCE] == before
        with pytest.raises(StoreFull):
            store.close()
        # Nor at the next start, which would rather have it on the disk.
        with pytest.raises(StoreError, match="free space"):
            opened(link, memory)
        in_memory.unlink()
        again = opened(link, memory)
        assert again.in_memory and again.positions()[SOURCE] == before
        on_disk.unlink()
        again.close()
        assert not link.is_symlink() and held(memory) == []


def test_a_store_that_outgrew_its_memory_goes_to_the_disk_at_the_next_start(link: Path, memory: Disk) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    crash(store)
    memory.fill()
    place = enter(link, str(memory.path))
    assert "has room for" in place.why and not link.is_symlink() and held(memory) == []
    store = opened(link, None)
    assert told(store) == before
    store.close()


def test_a_map_that_is_full_is_no_reason_to_move(link: Path, memory: Disk) -> None:
    enter(link, str(memory.path))
    store = HistoryStore(link, 32, MIB // 2)
    for _ in range(2):
        with pytest.raises(StoreFull, match="has reached its map"):
            commit(store, 1000, new=True)
    assert store.in_memory
    store.close()


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
