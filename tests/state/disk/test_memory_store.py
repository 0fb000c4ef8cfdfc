"""Histories lie in memory while they are written: nothing that was kept on a disk is lost by it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from state import layout
from state.disk import memory_place
from state.disk.lmdb_store import enter_memory, leave_memory
from state.errors import CorruptStore, StoreError, StoreFull
from state.history.store import HistoryStore
from state.process import killpoints
from tests.disks import Disk, crash, small_disk
from tests.state.disk.held_histories import SOURCE, USERS, commit, held, opened, power_cut, told

CHILD = multiprocessing.get_context("fork")


def test_while_it_is_written_the_store_lies_in_memory_and_nothing_on_the_disk(link: Path, memory: Disk) -> None:
    store = opened(link, memory)
    commit(store, 5)
    assert store.in_memory and link.resolve().is_relative_to(memory.path)
    assert [one.name for one in link.parent.iterdir()] == [layout.HISTORIES]
    store.close()


def test_kill_9_keeps_what_lies_in_memory(link: Path, memory: Disk) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    crash(store)
    again = opened(link, memory)
    assert again.in_memory and told(again) == before
    commit(again)
    again.close()


def test_a_clean_stop_leaves_it_on_the_disk_and_the_next_start_of_the_machine_goes_on(link: Path, memory: Disk) -> None:
    store = opened(link, memory, "boot-1")
    commit(store, 5)
    before = told(store)
    store.close()
    assert not link.is_symlink() and held(memory) == []
    assert [one.name for one in link.parent.iterdir()] == [layout.HISTORIES]
    stopped = HistoryStore(link, 32, readonly=True)
    assert told(stopped) == before and stopped.closed_in_order()
    stopped.close()
    power_cut(memory)
    again = opened(link, memory, "boot-2")
    assert again.in_memory and told(again) == before
    commit(again)
    assert again.positions()[SOURCE] == 6 * USERS
    again.close()


def test_after_a_power_cut_no_saved_copy_is_taken_for_the_newest(link: Path, memory: Disk) -> None:
    store = opened(link, memory, "boot-1")
    commit(store)
    store.close()
    store = opened(link, memory, "boot-1")
    commit(store)
    crash(store)
    power_cut(memory)
    for _ in range(2):
        with pytest.raises(CorruptStore, match=r"was in memory, .* which is gone"):
            opened(link, memory, "boot-2")
    assert layout.streams(link.parent.parent) == [link]
    with pytest.raises(StoreError, match="start the stream"):
        HistoryStore(link, 32, readonly=True)
    # As where pages may be missing, though memory is still there.
    link.unlink()
    crash(opened(link, memory, "boot-1"))
    with pytest.raises(CorruptStore, match="was open when the machine went down"):
        opened(link, memory, "boot-2")


POINTS = {
    "memory.loaded": "start", "memory.linked": "start", "memory.saved": "stop", "memory.landed": "stop"
}  # fmt: skip


@pytest.mark.parametrize("cut", ["kill", "power cut"])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_on_the_way_into_memory_or_out_of_it_loses_nothing(
    link: Path, memory: Disk, point: str, cut: str
) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    store.close()
    if POINTS[point] == "stop":
        crash(opened(link, memory))

    def dies() -> None:
        killpoints.armed = killpoints.parse(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
        opened(link, memory).close()

    child = CHILD.Process(target=dies)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    if cut == "power cut":
        power_cut(memory)
    if cut == "power cut" and point in ("memory.linked", "memory.saved"):
        # The link is durable before the first commit, and what was saved counts only in its place.
        with pytest.raises(CorruptStore):
            opened(link, memory)
        return
    again = opened(link, memory)
    assert told(again) == before
    again.close()
    assert [one.name for one in link.parent.iterdir()] == [layout.HISTORIES] and held(memory) == []


@pytest.mark.parametrize("end", [HistoryStore.close, crash])
def test_a_store_that_an_earlier_release_left_is_taken_up(
    link: Path, memory: Disk, end: Callable[[HistoryStore], None]
) -> None:
    store = opened(link, None)
    commit(store, 5)
    before = told(store)
    end(store)
    store = opened(link, memory)
    assert store.in_memory and told(store) == before
    store.close()
    # One that was open in a power cut stays where it is, and is refused there.
    crash(HistoryStore(link, 32, boot_id="before the cut"))
    with pytest.raises(CorruptStore, match="was open when the machine went down"):
        opened(link, memory)
    assert not link.is_symlink() and held(memory) == []


def test_a_copy_of_a_state_directory_has_a_store_of_its_own_and_none_while_the_other_one_is_written(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    other = tmp_path / "copy" / layout.HISTORIES
    other.parent.mkdir()
    other.symlink_to(link.readlink())

    def refused() -> None:
        with pytest.raises(StoreError, match="its state directory was copied while it ran"):
            opened(other, memory)

    # LMDB's lock is of a process.
    child = CHILD.Process(target=refused)
    child.start()
    child.join()
    assert child.exitcode == 0
    crash(store)
    copied = opened(other, memory)
    commit(copied)
    again = opened(link, memory)
    assert told(again) == before != told(copied)
    copied.close()
    again.close()
    assert held(memory) == []


def test_another_directory_in_memory_takes_over_what_the_first_one_has(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    crash(store)
    with small_disk(tmp_path / "other", "8m") as other:
        store = opened(link, other)
        assert told(store) == before and held(memory) == [] and link.resolve().is_relative_to(other.path)
        store.close()


def test_histories_in_memory_can_be_set_aside_on_the_disk(link: Path, memory: Disk) -> None:
    store = opened(link, memory)
    commit(store, 5)
    before = told(store)
    crash(store)
    leave_memory(link)
    assert not link.is_symlink() and held(memory) == []
    store = opened(link, None)
    assert told(store) == before
    store.close()
    crash(opened(link, memory))
    power_cut(memory)
    leave_memory(link)
    assert not os.path.lexists(link)


def test_what_another_program_removes_from_memory_while_it_is_written_is_saved_all_the_same(
    link: Path, memory: Disk
) -> None:
    store = opened(link, memory)
    commit(store, 5)
    power_cut(memory)
    commit(store)
    before = told(store)
    store.close()
    store = opened(link, memory)
    assert told(store) == before and store.positions()[SOURCE] == 6 * USERS
    store.close()


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
    full = enter_memory(link, str(memory.path))
    assert full.why == f"{memory.path} has space for 0 MB, and 1 MB are wanted" and not full.in_memory
    filler.unlink()
    assert enter_memory(link, "") == memory_place.Place(link, False)
    assert held(memory) == []
    # One that a kill left in memory leaves it where nothing should lie there.
    crash(opened(link, memory))
    enter_memory(link, "")
    assert not link.is_symlink() and held(memory) == []
    store = opened(link, None)
    assert told(store) == before
    store.close()
