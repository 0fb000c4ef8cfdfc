"""Serving's rows lie in memory where there is room, and one link always says where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from state import layout
from state.errors import UnusableDisk
from state.rows import place
from state.rows.place import Place, choose, current, forget, remove_forgotten, settle
from state.rows.store import RowStore
from tests.disks import ROOT, Disk, as_nobody, open_folder, small_disk

MIB = 1 << 20


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "serving"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "memory", "32m") as disk:
        yield disk


def stored(at: Place) -> Path:
    """A store there, closed in order."""
    RowStore(at.path, 16 * MIB).close()
    return at.path / layout.DATA


def test_the_rows_lie_in_memory_of_their_owner_alone_and_the_link_leads_there(serving: Path, memory: Disk) -> None:
    found = choose(serving, "", memory.path, MIB)
    settle(serving, found)
    assert found.in_memory and found.path.parent.parent == memory.path
    assert found.path.parent.stat().st_mode & 0o777 == 0o700
    file = stored(found)
    assert (serving / layout.ROWS / layout.DATA).samefile(file)
    assert current(serving) == found
    # The next start finds it again.
    again = choose(serving, "", memory.path, MIB)
    settle(serving, again)
    assert again == found and file.exists()


def test_two_serving_directories_and_one_made_again_have_rows_of_their_own(
    tmp_path: Path, serving: Path, memory: Disk
) -> None:
    first = choose(serving, "", memory.path, MIB)
    assert choose(tmp_path / "other" / "serving", "", memory.path, MIB).path != first.path
    serving.rename(tmp_path / "before")
    assert choose(serving, "", memory.path, MIB).path != first.path


def test_without_memory_or_with_too_little_the_rows_lie_on_the_disk_and_say_why(
    tmp_path: Path, serving: Path, memory: Disk
) -> None:
    missing = choose(serving, "", tmp_path / "missing", MIB)
    assert "No such file" in missing.why
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    kind = place.disk_kind(ordinary)
    if kind not in place.IN_MEMORY:
        assert choose(serving, "", ordinary, MIB).why == f"{ordinary} is not in memory"
    small = choose(serving, "", memory.path)
    assert small.why == f"{memory.path} has room for 34 MB, and 268 MB are wanted"
    memory.fill()
    assert "has room for 0 MB" in choose(serving, "", memory.path, MIB).why
    settle(serving, small)
    stored(small)
    assert not small.in_memory or kind in place.IN_MEMORY
    assert (serving / layout.ROWS).readlink() == Path("rows.disk")
    assert (serving / layout.ROWS / layout.DATA).exists()


def test_a_store_that_outgrew_its_memory_goes_to_the_disk_at_the_next_start(serving: Path, memory: Disk) -> None:
    settle(serving, in_memory := choose(serving, "", memory.path, MIB))
    stored(in_memory).write_bytes(bytes(30 * MIB))
    moved = choose(serving, "", memory.path, MIB)
    settle(serving, moved)
    assert moved.path == serving / layout.ROWS_DISK
    assert moved.why == f"{memory.path} has room for 34 MB, and 39 MB are wanted"
    assert not in_memory.path.parent.exists()


def test_a_store_of_an_earlier_release_gives_way_to_memory_and_stays_where_there_is_none(
    serving: Path, memory: Disk
) -> None:
    older = stored(Place(serving / layout.ROWS, False))
    on_disk = choose(serving, "", memory.path)
    settle(serving, on_disk)
    assert on_disk.path == serving / layout.ROWS and older.exists()
    settle(serving, found := choose(serving, "", memory.path, MIB))
    assert (serving / layout.ROWS).is_symlink() and not found.path.exists()


def test_removing_the_link_begins_the_rows_anew(serving: Path, memory: Disk) -> None:
    for least in (MIB, 1 << 40):
        settle(serving, found := choose(serving, "", memory.path, least))
        file = stored(found)
        # As an operator types it: `rm -r STATE/serving/rows`.
        (serving / layout.ROWS).unlink()
        settle(serving, choose(serving, "", memory.path, least))
        assert not file.exists() and (serving / layout.ROWS).is_symlink()


def test_after_a_power_cut_the_link_leads_to_a_new_store(serving: Path, memory: Disk) -> None:
    settle(serving, found := choose(serving, "", memory.path, MIB))
    stored(found)
    shutil.rmtree(found.path.parent)
    assert current(serving) is None
    settle(serving, again := choose(serving, "", memory.path, MIB))
    stored(again)
    assert current(serving) == found


def test_a_copied_state_directory_leaves_the_rows_of_the_original_alone(
    tmp_path: Path, serving: Path, memory: Disk
) -> None:
    settle(serving, found := choose(serving, "", memory.path, MIB))
    file = stored(found)
    copy = tmp_path / "copy" / "serving"
    shutil.copytree(serving, copy, symlinks=True)
    settle(copy, own := choose(copy, "", memory.path, MIB))
    assert own.path != found.path and file.exists()
    assert (serving / layout.ROWS).readlink() == found.path


def test_the_directory_of_somebody_else_is_not_used(serving: Path, memory: Disk) -> None:
    found = choose(serving, "", memory.path, MIB)
    if os.geteuid() != 0:
        pytest.skip("giving a directory away needs root")
    os.chown(found.path.parent, 65534, 65534)
    assert "is somebody else's" in choose(serving, "", memory.path, MIB).why
    found.path.parent.rmdir()
    found.path.parent.symlink_to(memory.path)
    assert "is somebody else's" in choose(serving, "", memory.path, MIB).why
    with pytest.raises(UnusableDisk, match=r"serving.rows_dir: .* is somebody else's"):
        choose(serving, str(memory.path))


def test_the_setting_names_any_directory_and_moving_from_there_leaves_nothing(
    tmp_path: Path, serving: Path, memory: Disk
) -> None:
    settle(serving, asked := choose(serving, str(tmp_path / "asked")))
    assert asked.path.is_relative_to(tmp_path / "asked") and not asked.why
    stored(asked)
    settle(serving, choose(serving, "", memory.path, MIB))
    assert list((tmp_path / "asked").iterdir()) == []


def test_a_directory_that_cannot_be_used_is_refused_with_the_setting() -> None:
    with open_folder() as folder:
        (folder / "serving").mkdir()
        (folder / "serving").chmod(0o777)
        done = as_nobody(
            "import sys\nfrom pathlib import Path\nfrom state.rows.place import choose",
            "choose(Path(sys.argv[1]), sys.argv[2])", folder / "serving", folder / "closed",
        )  # fmt: skip
    assert "UnusableDisk: serving.rows_dir: " in done.stderr and "Permission denied" in done.stderr


def test_what_a_removed_state_directory_left_in_memory_is_removed_and_nothing_else(
    tmp_path: Path, serving: Path, memory: Disk
) -> None:
    later_s = time.time() + 2 * place.FORGOTTEN_S
    settle(serving, found := choose(serving, "", memory.path, MIB))
    stored(found)
    (memory.path / "springtide-of-somebody").write_text("")
    assert remove_forgotten(memory.path, later_s) == []
    shutil.rmtree(serving)
    # One that was made a moment ago may not have its link yet.
    assert remove_forgotten(memory.path) == []
    assert remove_forgotten(memory.path, later_s) == [found.path.parent]
    assert not found.path.parent.exists()


def test_rows_that_another_process_has_open_are_not_removed(serving: Path, memory: Disk) -> None:
    settle(serving, found := choose(serving, "", memory.path, MIB))
    stored(found)
    (serving / layout.ROWS).unlink()
    holds = "import sys; from pathlib import Path; from state.rows.store import RowStore; "
    holds += "store = RowStore(Path(sys.argv[1]), readonly=True); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(found.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        assert remove_forgotten(memory.path, time.time() + 2 * place.FORGOTTEN_S) == []
        holder.communicate()
    assert remove_forgotten(memory.path, time.time() + 2 * place.FORGOTTEN_S) == [found.path.parent]


def test_rows_are_forgotten_wherever_they_lie(serving: Path, memory: Disk) -> None:
    for least in (MIB, 1 << 40):
        settle(serving, found := choose(serving, "", memory.path, least))
        stored(found)
        forget(serving)
        assert not found.path.exists() and not (serving / layout.ROWS).is_symlink()
    stored(Place(serving / layout.ROWS, False))
    forget(serving)
    assert not (serving / layout.ROWS).exists()
    forget(serving)
