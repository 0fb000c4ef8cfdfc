"""A store that changes all over lies in memory where there is room, and one link always says where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from state import layout
from state.disk import memory_place as place
from state.disk.memory_place import Place, choose, current, forget, remove_forgotten, settle
from state.rows.store import RowStore
from tests.disks import ROOT, Disk, small_disk

MIB = 1 << 20


@pytest.fixture
def link(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "serving"
    folder.mkdir(parents=True)
    return folder / layout.ROWS


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "memory", "32m") as disk:
        yield disk


def stored(at: Place) -> Path:
    """A store there, closed in order."""
    RowStore(at.path, 16 * MIB).close()
    return at.path / layout.DATA


def test_the_rows_lie_in_memory_of_their_owner_alone_and_the_link_leads_there(link: Path, memory: Disk) -> None:
    found = choose(link, str(memory.path), MIB)
    settle(link, found)
    assert found.in_memory and found.path.parent.parent == memory.path
    assert found.path.parent.stat().st_mode & 0o777 == 0o700
    file = stored(found)
    assert (link / layout.DATA).samefile(file)
    assert current(link) == found
    # The next start finds it again.
    again = choose(link, str(memory.path), MIB)
    settle(link, again)
    assert again == found and file.exists()


def test_two_serving_directories_and_one_made_again_have_rows_of_their_own(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    first = choose(link, str(memory.path), MIB)
    assert choose(tmp_path / "other" / "serving" / "rows", str(memory.path), MIB).path != first.path
    link.parent.rename(tmp_path / "before")
    assert choose(link, str(memory.path), MIB).path != first.path


def test_without_memory_or_with_too_little_the_rows_lie_on_the_disk_and_say_why(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    missing = choose(link, str(tmp_path / "missing"), MIB)
    assert "No such file" in missing.why
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    kind = place.disk_kind(ordinary)
    if kind not in place.IN_MEMORY:
        assert choose(link, str(ordinary), MIB).why == f"{ordinary} is not in memory"
    small = choose(link, str(memory.path))
    assert small.why == f"{memory.path} has space for 34 MB, and 268 MB are wanted"
    memory.fill()
    assert "has space for 0 MB" in choose(link, str(memory.path), MIB).why
    settle(link, small)
    stored(small)
    assert not small.in_memory or kind in place.IN_MEMORY
    assert (link).readlink() == Path("rows.disk")
    assert (link / layout.DATA).exists()


def test_a_store_that_outgrew_its_memory_goes_to_the_disk_at_the_next_start(link: Path, memory: Disk) -> None:
    settle(link, in_memory := choose(link, str(memory.path), MIB))
    stored(in_memory).write_bytes(bytes(30 * MIB))
    moved = choose(link, str(memory.path), MIB)
    settle(link, moved)
    assert moved.path == link.with_name("rows.disk")
    assert moved.why == f"{memory.path} has space for 34 MB, and 39 MB are wanted"
    assert not in_memory.path.parent.exists()


def test_a_store_of_an_earlier_release_gives_way_to_memory_and_stays_where_there_is_none(
    link: Path, memory: Disk
) -> None:
    older = stored(Place(link, False))
    on_disk = choose(link, str(memory.path))
    settle(link, on_disk)
    assert on_disk.path == link and older.exists()
    settle(link, found := choose(link, str(memory.path), MIB))
    assert (link).is_symlink() and not found.path.exists()


def test_removing_the_link_begins_the_rows_anew(link: Path, memory: Disk) -> None:
    for least in (MIB, 1 << 40):
        settle(link, found := choose(link, str(memory.path), least))
        file = stored(found)
        # As an operator types it: `rm -r STATE/serving/rows`.
        (link).unlink()
        settle(link, choose(link, str(memory.path), least))
        assert not file.exists() and (link).is_symlink()


def test_after_a_power_cut_the_link_leads_to_a_new_store(link: Path, memory: Disk) -> None:
    settle(link, found := choose(link, str(memory.path), MIB))
    stored(found)
    shutil.rmtree(found.path.parent)
    assert current(link) is None
    settle(link, again := choose(link, str(memory.path), MIB))
    stored(again)
    assert current(link) == found


def test_a_copied_state_directory_leaves_the_rows_of_the_original_alone(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    settle(link, found := choose(link, str(memory.path), MIB))
    file = stored(found)
    copy = tmp_path / "copy" / "serving" / "rows"
    shutil.copytree(link.parent, copy.parent, symlinks=True)
    settle(copy, own := choose(copy, str(memory.path), MIB))
    assert own.path != found.path and file.exists()
    assert (link).readlink() == found.path


def test_the_directory_of_somebody_else_is_not_used(link: Path, memory: Disk) -> None:
    found = choose(link, str(memory.path), MIB)
    if os.geteuid() != 0:
        pytest.skip("giving a directory away needs root")
    os.chown(found.path.parent, 65534, 65534)
    assert "is somebody else's" in choose(link, str(memory.path), MIB).why
    found.path.parent.rmdir()
    found.path.parent.symlink_to(memory.path)
    assert "is somebody else's" in choose(link, str(memory.path), MIB).why


def test_what_a_removed_state_directory_left_in_memory_is_removed_and_nothing_else(
    tmp_path: Path, link: Path, memory: Disk
) -> None:
    later_s = time.time() + 2 * place.FORGOTTEN_S
    settle(link, found := choose(link, str(memory.path), MIB))
    stored(found)
    (memory.path / "springtide_of-somebody").write_text("")
    assert remove_forgotten(str(memory.path), later_s) == []
    shutil.rmtree(link.parent)
    # One that was made a moment ago may not have its link yet.
    assert remove_forgotten(str(memory.path)) == []
    assert remove_forgotten(str(memory.path), later_s) == [found.path.parent]
    assert not found.path.parent.exists()


def test_rows_that_another_process_has_open_are_not_removed(link: Path, memory: Disk) -> None:
    settle(link, found := choose(link, str(memory.path), MIB))
    stored(found)
    (link).unlink()
    holds = "import sys; from pathlib import Path; from state.rows.store import RowStore; "
    holds += "store = RowStore(Path(sys.argv[1]), readonly=True); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(found.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        assert remove_forgotten(str(memory.path), time.time() + 2 * place.FORGOTTEN_S) == []
        holder.communicate()
    assert remove_forgotten(str(memory.path), time.time() + 2 * place.FORGOTTEN_S) == [found.path.parent]


def test_directories_that_others_remove_meanwhile_do_not_stop_a_removal(tmp_path: Path) -> None:
    """Each process of a host removes what is forgotten when it starts, all in one directory."""
    churn, over = [tmp_path / f"{place.NAME}{number}" for number in range(200)], threading.Event()

    def others() -> None:
        while not over.is_set():
            for folder in churn:
                folder.mkdir()
            for folder in churn:
                folder.rmdir()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(others)
        try:
            for _ in range(500):
                assert remove_forgotten(str(tmp_path)) == []
        finally:
            over.set()
        churning.result()


def test_rows_are_forgotten_wherever_they_lie(link: Path, memory: Disk) -> None:
    for least in (MIB, 1 << 40):
        settle(link, found := choose(link, str(memory.path), least))
        stored(found)
        forget(link)
        assert not found.path.exists() and not (link).is_symlink()
    stored(Place(link, False))
    forget(link)
    assert not (link).exists()
    forget(link)
