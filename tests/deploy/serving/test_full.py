"""A serving host without room on its disk or in its memory: what waits, what moves, and what status reports."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import sections
from deploy.serving.applier import CLICKS, Applier, HostRows
from deploy.serving.host_files import item_extra
from state.config.sections import Attributes
from state.config.settings import Settings
from state.disk import lmdb_store
from state.disk import memory_place as place
from state.errors import StoreFull
from state.events.identity import Salt
from state.layout import ROWS
from state.log import Topics, Writer
from state.metrics import ApplierMetrics
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.conftest import KafkaFactory
from tests.deploy.serving.stocked import SALT_KEY
from tests.deploy.serving.test_clicks import SOURCE, record
from tests.deploy.serving.test_following import Clock, World
from tests.deploy.serving.test_rest import until
from tests.disks import Disk, small_disk

NEW_USERS = 2000
ATTRIBUTES = Attributes(user_fields=("age",), item_fields=("brand",))


def settings_of(kafka_settings: KafkaFactory, tmp_path: Path, state: Path) -> Settings:
    kafka = kafka_settings()
    settings = Settings(kafka=kafka)
    salt = tmp_path / "salt"
    salt.write_bytes(SALT_KEY)
    salt.chmod(0o600)
    return replace(
        settings,
        paths=replace(settings.paths, state=str(state), registry=str(tmp_path / "registry"), salt_file=str(salt)),
        storage=replace(settings.storage, memory_dir=""),
        attributes=replace(ATTRIBUTES, user_topic=f"crm-{kafka.group}", item_topic=f"goods-{kafka.group}"),
    )


def sender(settings: Settings) -> Callable[..., None]:
    """Makes the topics; what it returns sends values to one of them."""
    attributes, log = settings.attributes, settings.kafka.microbatches_topic
    with Topics(settings.kafka) as topics:
        topics.ensure(log, 1)
        for topic in (attributes.user_topic, attributes.item_topic):
            topics.ensure(topic, 1, {"cleanup.policy": "compact"})

    def send(topic: str, *records: tuple[bytes | None, bytes]) -> None:
        with Writer(settings.kafka) as writer:
            for key, value in records:
                writer.send(topic, 0, key, value)
            writer.flush()

    return send


def test_clicks_and_attributes_wait_for_space_and_then_nothing_is_missing(
    kafka_settings: KafkaFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "disk", "24m") as disk:
        settings = settings_of(kafka_settings, tmp_path, disk.path / "state")
        log, users = settings.kafka.microbatches_topic, settings.attributes.user_topic
        send = sender(settings)
        world = World(tmp_path / "unused", Clock(), Registry(settings.registry_dir))
        salt = Salt(SALT_KEY).fingerprint
        send(log, (None, record(0, 10, salt)))
        world.publish({1: 1.0})
        collected, stop = CollectorRegistry(), threading.Event()
        applier = Applier(settings, collected, stop)
        store, attributes = applier._histories, applier._attributes
        assert attributes is not None

        def metric(name: str, part: str = "serving") -> float:
            return collected.get_sample_value(f"springtide_storage_{name}", {"part": part}) or 0.0

        def answers(version: int) -> bool:
            return collected.get_sample_value("springtide_serving_version") == version

        thread = threading.Thread(target=applier.run)
        thread.start()
        try:
            until(lambda: answers(1) and store.positions() == {SOURCE: 10})
            filler = disk.fill()
            # Enough that pages which were given back do not do.
            send(log, (None, record(10, 10 + NEW_USERS, salt, users=NEW_USERS)))
            send(users, *((b"user-%d" % one, json.dumps({"age": "x" * 60}).encode()) for one in range(3000)))
            until(lambda: metric("waiting") == 2)
            assert store.positions() == {SOURCE: 10} and attributes.store.count("user") < 3000
            # It is tried again and again, and said and counted once.
            tries = caplog.text.count(f"following {log}")
            until(lambda: caplog.text.count(f"following {log}") > tries)
            assert metric("waits_total") == 2
            assert caplog.text.count(f"{CLICKS} waits for space") == 1
            filler.unlink()
            second = world.publish({2: 2.0}).version
            until(lambda: answers(second))
            until(lambda: store.positions() == {SOURCE: 10 + NEW_USERS} and attributes.store.count("user") == 3000)
            until(lambda: metric("waiting") == 0)
            # What was learned of items on the way is stored as well.
            assert all(store.extra(item_extra(item)) is not None for item in range(100, 105))
        finally:
            stop.set()
            thread.join()
            world.rows.close()


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
