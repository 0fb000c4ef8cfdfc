"""The host's rows where there is no room: they wait, or move from memory to the disk, and answers go on in any case."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import sections
from deploy.serving.applier import FULL_S, HostRows
from state.config.settings import Settings
from state.disk import memory_place as place
from state.errors import StoreFull
from state.layout import ROWS, ROWS_DISK
from state.metrics import ApplierMetrics
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.deploy.serving.test_following import Clock, World
from tests.disks import Disk, small_disk

MIB = 1 << 20
MANY = dict.fromkeys(range(60000), 1.0)


@dataclass
class Seconds:
    """A clock that tests move."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Memory with room for some versions."""
    with small_disk(tmp_path / "memory", "8m") as disk:
        monkeypatch.setattr(place, "LEAST_BYTES", MIB)
        yield disk


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "elsewhere", Clock(), Registry(tmp_path / "state" / "registry"))
    yield made
    made.rows.close()


def opened(
    tmp_path: Path, clock: Callable[[], float], rows_dir: str = ""
) -> tuple[HostRows, Settings, CollectorRegistry]:
    settings = Settings()
    settings = replace(
        settings,
        paths=replace(settings.paths, state=str(tmp_path / "state")),
        serving=replace(settings.serving, rows_dir=rows_dir),
        storage=replace(settings.storage, memory_dir=str(tmp_path / "memory")),
    )
    collected = CollectorRegistry()
    return HostRows(settings, ApplierMetrics(collected), Clock(), clock), settings, collected


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


def test_rows_wait_while_there_is_no_room_where_the_setting_wants_them(
    tmp_path: Path, world: World, memory: Disk
) -> None:
    rows, settings, _ = opened(tmp_path, clock := Seconds(), str(memory.path))
    first = world.publish({1: 1.0}).version
    followed(rows)
    filler = memory.fill()
    second = world.publish(MANY).version
    for clock.now_s in (0.0, 2 * FULL_S):
        with pytest.raises(StoreFull):
            rows.step()
    assert rows.versions.served is not None and rows.versions.served.version == first
    filler.unlink()
    followed(rows)
    assert rows.versions.served.version == second
    rows.close()
    assert place.current(settings.serving_dir / ROWS) is not None


def test_rows_that_memory_has_no_room_for_move_to_the_disk_while_answers_go_on(
    tmp_path: Path, world: World, memory: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows, settings, collected = opened(tmp_path, clock := Seconds())
    first = world.publish({1: 1.0}).version
    followed(rows)
    in_memory = place.current(settings.serving_dir / ROWS)
    assert in_memory is not None and in_memory.path.is_relative_to(memory.path)
    memory.fill()
    second = world.publish(MANY).version
    # Others may make room.
    with pytest.raises(StoreFull):
        rows.step()
    clock.now_s = FULL_S
    assert rows.step()
    # Until the new store is filled, whoever opens the rows finds the old one.
    assert place.current(settings.serving_dir / ROWS) == in_memory
    assert rows.versions.served is not None and rows.versions.served.version == first
    followed(rows)
    assert rows.versions.served.version == second
    assert (settings.serving_dir / ROWS).readlink() == Path(ROWS_DISK)
    assert not in_memory.path.exists()
    rows.keep_house()
    assert (collected.get_sample_value("springtide_serving_rows_bytes", {"place": "disk"}) or 0) > MIB
    assert collected.get_sample_value("springtide_serving_rows_bytes", {"place": "memory"}) == 0
    said = [record.getMessage() for record in caplog.records if "rows" in record.getMessage()]
    assert len(said) == 2 and "the rows move to the disk" in said[0] and "lie on the disk now" in said[1]
    rows.close()
    assert served(settings) == second


def test_where_memory_is_too_small_at_the_start_log_and_status_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As Docker gives it.
    with small_disk(tmp_path / "memory", "64m") as disk:
        rows, settings, _ = opened(tmp_path, Seconds())
        why = f"{disk.path} has room for 67 MB, and 268 MB are wanted"
        assert caplog.text.count(why) == 1
        shown = sections.row_store(settings)
        assert shown is not None and shown["why"] == why
        assert shown["path"] == str(settings.serving_dir / ROWS_DISK)
        rows.close()


def test_an_interrupted_move_is_begun_again(tmp_path: Path, world: World, memory: Disk) -> None:
    rows, settings, _ = opened(tmp_path, clock := Seconds())
    first = world.publish({1: 1.0}).version
    followed(rows)
    filler = memory.fill()
    second = world.publish(MANY).version
    with pytest.raises(StoreFull):
        rows.step()
    clock.now_s = FULL_S
    rows.step()
    filler.unlink()
    rows.close()
    assert served(settings) == first
    again, _, _ = opened(tmp_path, Seconds())
    assert not (settings.serving_dir / ROWS_DISK).exists()
    followed(again)
    again.close()
    assert served(settings) == second
