"""Histories are opened in memory where there is room; who finds none says why, and a host begins them anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.settings import Settings
from state.disk import memory_place
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore
from state.history.store import HistoryStore, open_history_store, open_or_replace
from state.layout import HISTORIES
from state.storage.measuring import used_bytes
from state.storage.shares import SERVING, STREAM, store_bytes
from streaming import histories
from tests.disks import Disk, crash, small_disk
from tests.state.disk.held_histories import MIB, commit, told


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(memory_place, "LEAST_BYTES", MIB)
    with small_disk(tmp_path / "memory", "8m") as disk:
        yield disk


@pytest.fixture
def settings(tmp_path: Path, memory: Disk) -> Settings:
    return load(["--paths.state", str(tmp_path / "state"), "--storage.memory_dir", str(memory.path)], env={})


def test_histories_in_memory_take_nothing_of_the_disk_and_are_limited_by_its_share(settings: Settings) -> None:
    store = open_history_store(settings, STREAM, settings.stream_dir)
    commit(store, 500, new=True)
    assert memory_place.size(store.path) > MIB > used_bytes([settings.stream_dir])
    # What comes back at a clean stop has room there.
    assert store.bytes_limit() <= store_bytes(settings, STREAM, HISTORIES)
    store.close()
    assert used_bytes([settings.stream_dir]) > MIB


@pytest.mark.parametrize("wanted", [True, False])
def test_on_the_disk_the_log_says_why_where_nobody_asked_for_it(
    settings: Settings, memory: Disk, wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if wanted:
        memory.fill()
    else:
        settings = load(["--paths.state", settings.paths.state, "--storage.memory_dir", ""], env={})
    store = open_history_store(settings, STREAM, settings.stream_dir)
    assert not store.in_memory
    store.close()
    why = f"{memory.path} has room for 0 MB, and 1 MB are wanted. Each page that a click changes is written there"
    assert caplog.text.count(why) == wanted == bool(caplog.text)


def test_a_host_whose_histories_went_with_the_memory_begins_them_anew_and_a_stream_does_not(
    settings: Settings, memory: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    for part, folder in ((STREAM, settings.stream_dir), (SERVING, settings.serving_dir)):
        store = open_history_store(settings, part, folder)
        commit(store)
        crash(store)
    for one in memory.path.iterdir():
        shutil.rmtree(one)
    with pytest.raises(CorruptStore, match="rebuild-history"):
        open_history_store(settings, STREAM, settings.stream_dir)
    store = open_or_replace(settings, SERVING, settings.serving_dir)
    assert store.in_memory and store.users() == 0
    assert "are rebuilt from the micro-batch topic" in caplog.text
    store.close()


@pytest.mark.parametrize("lost", [True, False])
def test_a_rebuild_takes_the_place_of_histories_in_memory(settings: Settings, memory: Disk, lost: bool) -> None:
    folder = settings.stream_dir
    store = open_history_store(settings, STREAM, folder)
    commit(store, 2)
    before = told(store)
    crash(store)
    if lost:
        for one in memory.path.iterdir():
            shutil.rmtree(one)
    with DirectoryLock(folder):
        made = HistoryStore(histories.begin(folder), 32, 1 << 24)
        commit(made, 5)
        rebuilt = told(made)
        made.close()
        histories.promise(folder)
        aside = histories.finish(folder)
    assert (aside is None) == lost
    if aside is not None:
        kept = HistoryStore(aside, settings.features.history, readonly=True)
        assert told(kept) == before
        kept.close()
    store = open_history_store(settings, STREAM, folder)
    assert store.in_memory and told(store) == rebuilt
    store.close()


def test_what_a_removed_state_directory_left_in_memory_goes_at_the_next_start(
    settings: Settings, memory: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    crash(open_history_store(settings, STREAM, settings.stream_dir))
    shutil.rmtree(settings.stream_dir)
    monkeypatch.setattr(memory_place, "FORGOTTEN_S", -1.0)
    open_history_store(settings, SERVING, settings.serving_dir).close()
    assert "is removed: its state directory is gone" in caplog.text and list(memory.path.iterdir()) == []
