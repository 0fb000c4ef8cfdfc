"""What every store in LMDB promises. A new subclass of `LmdbStore` is found unasked, and fails until `kept.py` can use it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import pytest

from state.disk.lmdb_store import LmdbStore
from state.errors import CorruptStore, SpringtideError, StoreError, StoreFull
from state.layout import DATA
from tests.conformance.kept import KEPT, Kept, kinds
from tests.disks import crash, small_disk
from tests.kills import killed_at

# A child is a copy of this process: no store is open when one is made.
CHILD = multiprocessing.get_context("fork")


@pytest.fixture(params=kinds(), ids=lambda kind: kind.__name__)
def kept(request: pytest.FixtureRequest) -> Kept[Any]:
    kind: type[LmdbStore] = request.param
    assert kind in KEPT, (
        f"{kind.__module__}.{kind.__name__} is a store: say in tests/conformance/kept.py how it is used"
    )
    return KEPT[kind]


def child(run: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """Runs `run` in another process; our end of its pipe."""
    ours, theirs = CHILD.Pipe()
    process = CHILD.Process(target=run, args=(theirs,), daemon=True)
    process.start()
    return process, ours


def spoil(path: Path, name: bytes, value: bytes) -> None:
    """Changes a value of a closed store's `meta`."""
    environment = lmdb.open(str(path), max_dbs=8, map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        transaction.put(name, value, db=environment.open_db(b"meta", transaction))
    environment.close()


# Together or not at all


def test_what_is_committed_is_there_after_a_close(kept: Kept[Any], tmp_path: Path) -> None:
    store = kept.open(tmp_path / "s")
    assert kept.seen(store) == 0
    for number in (1, 2, 3):
        kept.commit(store, number)
    assert not store.closed_in_order()
    store.close()
    again = kept.open(tmp_path / "s")
    assert kept.seen(again) == 3
    again.close()
    reader = kept.open(tmp_path / "s", readonly=True)
    assert (kept.seen(reader), reader.closed_in_order()) == (3, True)
    reader.close()


def test_a_block_that_fails_changes_nothing(kept: Kept[Any], tmp_path: Path) -> None:
    store = kept.open(tmp_path / "s")
    kept.commit(store, 1)
    with pytest.raises(ZeroDivisionError), store._write() as transaction:
        for database in store._databases.values():
            transaction.drop(database, delete=False)
        raise ZeroDivisionError
    assert kept.seen(store) == 1
    store.close()


def test_a_kill_at_any_moment_leaves_whole_commits(kept: Kept[Any], tmp_path: Path) -> None:
    def commit_on(pipe: Connection) -> None:
        store = kept.open(tmp_path / "s")
        number = kept.seen(store)
        while True:
            number += 1
            kept.commit(store, number, size=200)
            pipe.send(number)

    told = 0
    for commits in (1, 7, 30, 4):
        process, pipe = child(commit_on)
        for _ in range(commits):
            told = pipe.recv()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = kept.open(tmp_path / "s")
        assert kept.seen(store) >= told
        assert store.clear_stale_readers() >= 0
        store.close()
    assert told > 40


def test_readers_in_other_processes_see_whole_commits_in_order(kept: Kept[Any], tmp_path: Path) -> None:
    def read_on(pipe: Connection) -> None:
        store = kept.open(tmp_path / "s", readonly=True)
        last = reads = 0
        while last < 300:
            now = kept.seen(store)
            assert now >= last
            last, reads = now, reads + 1
            if reads == 1:
                pipe.send("reading")
        pipe.send(reads)

    store = kept.open(tmp_path / "s")
    kept.commit(store, 1)
    crash(store)
    process, pipe = child(read_on)
    assert pipe.recv() == "reading"
    store = kept.open(tmp_path / "s")
    for number in range(2, 301):
        kept.commit(store, number)
    assert pipe.poll(60), "the reader saw half a commit"
    assert pipe.recv() > 1
    process.join()
    store.close()


# Trust


@pytest.mark.parametrize(("closed", "boot_id", "trusted"), [(True, "b", True), (False, "a", True), (False, "b", False)])
def test_a_kill_is_trusted_and_a_power_cut_is_not(
    kept: Kept[Any], tmp_path: Path, closed: bool, boot_id: str, trusted: bool
) -> None:
    store = kept.open(tmp_path / "s", boot_id="a")
    kept.commit(store, 1)
    (store.close if closed else lambda: crash(store))()
    if trusted:
        again = kept.open(tmp_path / "s", boot_id=boot_id)
        assert kept.seen(again) == 1
        again.close()
        return
    for _ in range(2):
        with pytest.raises(CorruptStore, match="was open when the machine went down") as refused:
            kept.open(tmp_path / "s", boot_id=boot_id)
        assert refused.value.do == kept.kind.remedy
    # A reader goes by its writer, which has looked.
    reader = kept.open(tmp_path / "s", readonly=True, boot_id=boot_id)
    assert kept.seen(reader) == 1
    reader.close()


@pytest.mark.parametrize("mark", [b"", b'{"clean": tr', b"[]"])
def test_a_damaged_mark_is_not_trusted(kept: Kept[Any], tmp_path: Path, mark: bytes) -> None:
    kept.open(tmp_path / "s").close()
    (tmp_path / "s" / "mark.json").write_bytes(mark)
    with pytest.raises(CorruptStore, match="was open when the machine went down"):
        kept.open(tmp_path / "s")


@pytest.mark.parametrize("readonly", [False, True])
def test_a_damaged_file_is_said_to_be_damaged(kept: Kept[Any], tmp_path: Path, readonly: bool) -> None:
    kept.open(tmp_path / "s").close()
    (tmp_path / "s" / "data.mdb").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(CorruptStore, match="damaged") as refused:
        kept.open(tmp_path / "s", readonly=readonly)
    assert refused.value.do == kept.kind.remedy


def test_another_format_is_refused(kept: Kept[Any], tmp_path: Path) -> None:
    kept.open(tmp_path / "s").close()
    spoil(tmp_path / "s", b"format", json.dumps({"format": 99, "history": 32}).encode())
    for readonly in (False, True):
        with pytest.raises(CorruptStore, match=rf"has format 99, this release reads {kept.kind.number}"):
            kept.open(tmp_path / "s", readonly=readonly)


def test_what_cannot_be_used_is_begun_anew_aloud(
    kept: Kept[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = kept.open(tmp_path / "s", boot_id="before")
    kept.commit(store, 1)
    crash(store)
    with caplog.at_level(logging.WARNING):
        anew = kept.open_or_rebuild(tmp_path / "s")
    assert f"rebuilt from {kept.kind.origin}" in caplog.text
    assert kept.seen(anew) == 0
    kept.commit(anew, 1)
    anew.close()
    again = kept.open_or_rebuild(tmp_path / "s")
    assert (kept.seen(again), len(caplog.records)) == (1, 1)
    again.close()


# Room


def fill(kept: Kept[Any], store: LmdbStore) -> int:
    """Commits more and more until the store refuses; how many were taken."""
    for number in range(1, 100):
        try:
            kept.commit(store, number, 1000 * number)
        except StoreFull:
            return number - 1
    raise AssertionError("it was never full")


def test_a_full_map_changes_nothing_and_names_the_setting(kept: Kept[Any], tmp_path: Path) -> None:
    store = kept.open(tmp_path / "s", map_bytes=1 << 20)
    taken = fill(kept, store)
    assert kept.seen(store) == taken > 0
    with pytest.raises(StoreFull, match="has reached its map of 1048576 bytes") as full:
        kept.commit(store, taken + 1, 100_000)
    assert "storage.budget_gb" in full.value.do
    assert store.bytes_limit() // 4 < (store.path / DATA).stat().st_size <= store.bytes_limit() == 1 << 20
    store.close()
    larger = kept.open(tmp_path / "s", map_bytes=64 << 20)
    kept.commit(larger, taken + 1)
    assert kept.seen(larger) == taken + 1
    larger.close()


def test_a_full_disk_changes_nothing_and_is_gone_on_from_once_there_is_room(kept: Kept[Any], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        store = kept.open(disk.path / "s")
        taken = fill(kept, store)
        assert kept.seen(store) == taken > 0
        with pytest.raises(StoreFull, match=r"could not be written .*free space"):
            kept.commit(store, taken + 1, 100_000)
        disk.remount("size=32m")
        kept.commit(store, taken + 1)
        store.close()
        again = kept.open(disk.path / "s", boot_id="another")
        assert kept.seen(again) == taken + 1
        again.close()


def test_a_store_that_cannot_be_closed_in_order_is_not_marked_so(kept: Kept[Any], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        store = kept.open(disk.path / "s", boot_id="a")
        kept.commit(store, 1)
        full = disk.fill()
        with pytest.raises(StoreFull, match="free space"):
            store.close()
        full.unlink()
        with pytest.raises(CorruptStore):
            kept.open(disk.path / "s", boot_id="b")
        kept.open(disk.path / "s", boot_id="a").close()


def test_a_read_only_disk_is_read_and_nothing_else(kept: Kept[Any], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        store = kept.open(disk.path / "s")
        kept.commit(store, 1)
        store.close()
        disk.remount("ro")
        with pytest.raises(StoreError, match=r"cannot be opened \(.*correct the directory's access rights") as refused:
            kept.open(disk.path / "s")
        assert not isinstance(refused.value, StoreFull | CorruptStore)
        reader = kept.open(disk.path / "s", readonly=True)
        assert kept.seen(reader) == 1
        reader.close()


# Readers


def test_a_reader_needs_a_writer_first(kept: Kept[Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"start {kept.kind.writer}") as refused:
        kept.open(tmp_path / "s", readonly=True)
    assert not (tmp_path / "s").exists()
    assert isinstance(refused.value, SpringtideError)


def test_the_slots_of_killed_readers_are_freed(kept: Kept[Any], tmp_path: Path) -> None:
    def read_for_ever(pipe: Connection) -> None:
        store = kept.open(tmp_path / "s", readonly=True)
        with store._env.begin():
            pipe.send("reading")
            signal.pause()

    store = kept.open(tmp_path / "s")
    kept.commit(store, 1)
    crash(store)
    process, pipe = child(read_for_ever)
    assert pipe.recv() == "reading"
    store = kept.open(tmp_path / "s")
    assert store.clear_stale_readers() == 0
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.clear_stale_readers() == 1
    store.close()


# Written anew


def pages_with(path: Path, sought: bytes) -> bool:
    return sought in (path / "data.mdb").read_bytes()


def test_a_store_that_is_written_anew_has_all_that_is_alive_and_no_byte_of_what_was_deleted(
    kept: Kept[Any], tmp_path: Path
) -> None:
    path, sought = tmp_path / "store", b"\x11\x22\x33\x44erased bytes"
    store = kept.open(path)
    kept.commit(store, 1)
    for value in (sought * 20, None):
        with store._write() as transaction:
            if value is None:
                transaction.delete(b"secret", db=store._meta)
            else:
                transaction.put(b"secret", value, db=store._meta)
    assert pages_with(path, sought), "a deleted value stays on a page that is free"
    store.compact()
    assert not pages_with(path, sought) and kept.seen(store) == 1
    kept.commit(store, 2)
    assert (kept.seen(store), [one.name for one in tmp_path.iterdir()]) == (2, ["store"])
    store.close()
    store = kept.open(path)
    assert kept.seen(store) == 2
    store.close()


def test_no_inner_page_of_a_store_that_is_written_anew_names_a_key_that_was_deleted(
    kept: Kept[Any], tmp_path: Path
) -> None:
    """An inner page keeps the first key that a page below it had when it was made: one in some tens is such a key."""
    path, store = tmp_path / "store", kept.open(tmp_path / "store")
    keys = [b"%08x of somebody who is erased" % number for number in range(1000)]
    for gone in (False, True):
        with store._write() as transaction:
            for key in keys[1::2] if gone else keys:
                if gone:
                    transaction.delete(key, db=store._meta)
                else:
                    transaction.put(key, b"." * 100, db=store._meta)
    store.compact()
    data = (path / "data.mdb").read_bytes()
    assert [key for key in keys[1::2] if key in data] == [] and all(key in data for key in keys[::2])
    store.close()


@pytest.mark.parametrize("at", ["compact.copied", "compact.exchanged"])
def test_a_kill_while_a_store_is_written_anew_leaves_the_old_one_or_the_new_one_and_nothing_beside_it(
    kept: Kept[Any], tmp_path: Path, at: str
) -> None:
    path = tmp_path / "store"
    store = kept.open(path)
    kept.commit(store, 1)
    with killed_at(at):
        store.compact()
    crash(store)
    store = kept.open(path)
    assert (kept.seen(store), [one.name for one in tmp_path.iterdir()]) == (1, ["store"])
    store.close()
