"""The host's rows where there is no room: they wait for it, and answers go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import sections
from deploy.serving.applier import HostRows
from state.config.settings import Settings
from state.disk import lmdb_store
from state.disk import memory_place as place
from state.errors import StoreFull
from state.layout import ROWS
from state.metrics import ApplierMetrics
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.deploy.serving.test_following import Clock, World
from tests.disks import Disk, small_disk

MIB = 1 << 20
MANY = dict.fromkeys(range(60000), 1.0)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Memory with room for some versions."""
    with small_disk(tmp_path / "memory", "16m") as disk:
        monkeypatch.setattr(place, "LEAST_BYTES", MIB)
        monkeypatch.setattr(lmdb_store, "RESERVE_BYTES", 2 * MIB)
        yield disk


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "elsewhere", Clock(), Registry(tmp_path / "state" / "registry"))
    yield made
    made.rows.close()


def opened(tmp_path: Path) -> tuple[HostRows, Settings]:
    settings = Settings()
    settings = replace(
        settings,
        paths=replace(settings.paths, state=str(tmp_path / "state")),
        storage=replace(settings.storage, memory_dir=str(tmp_path / "memory")),
    )
    return HostRows(settings, ApplierMetrics(CollectorRegistry()), Clock()), settings


def served(settings: Settings) -> int:
    """The version that a reader finds who opens the rows now."""
    store = RowStore(settings.serving_dir / ROWS, readonly=True)
    try:
        with store.reader() as reader:
            found = reader.served()
            assert found is not None
            return found.version
    finally:
        store.close()


def followed(rows: HostRows) -> None:
    while rows.step():
        pass


def test_rows_wait_while_memory_is_full_and_answers_go_on(tmp_path: Path, world: World, memory: Disk) -> None:
    rows, settings = opened(tmp_path)
    first = world.publish({1: 1.0}).version
    followed(rows)
    filler = memory.fill()
    second = world.publish(MANY).version
    with pytest.raises(StoreFull, match="memory is full"):
        rows.step()
    assert rows.versions.served is not None and rows.versions.served.version == first
    filler.unlink()
    followed(rows)
    rows.close()
    assert served(settings) == second


def test_rows_for_which_memory_has_become_too_small_are_on_the_disk_after_the_next_start(
    tmp_path: Path, world: World, memory: Disk
) -> None:
    rows, settings = opened(tmp_path)
    world.publish({1: 1.0})
    followed(rows)
    rows.close()
    memory.fill()
    second = world.publish(MANY).version
    again, _ = opened(tmp_path)
    followed(again)
    again.close()
    assert (settings.serving_dir / ROWS).readlink() == Path("rows.disk")
    assert served(settings) == second and not [*memory.path.glob("*/rows")]


def test_where_memory_is_too_small_at_the_start_log_and_status_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As Docker gives it.
    with small_disk(tmp_path / "memory", "64m") as disk:
        rows, settings = opened(tmp_path)
        why = f"{disk.path} has space for 67 MB, and 268 MB are wanted"
        assert caplog.text.count(why) == 1
        shown = sections.row_store(settings)
        assert shown is not None and shown["why"] == why
        assert shown["path"] == str(settings.serving_dir / "rows.disk")
        rows.close()
