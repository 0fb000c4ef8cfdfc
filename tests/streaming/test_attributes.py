"""Attributes joined in the stream: as of the row, newest first, and the same for all readers of the log."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from state.attributes.values import AttributeStore, AttributeTable, TopicPosition, pack
from state.config.sections import Attributes, Kafka
from state.config.settings import Settings
from state.config.sources import fields_of
from state.events.identity import load_salt, public_id, user_id
from state.events.parser import ANNOUNCE_MS
from state.log import Topics, Writer
from state.microbatch.batch import MicroBatch
from streaming.attributes import Recent
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    FOREVER,
    StreamProcess,
    click,
    deduplicated,
    following,
    headers_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

CRM = AttributeTable("user", fields_of(["age", "level"]))
PLACE = TopicPosition("identity", "ab" * 16, {0: 1})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttributeStore]:
    made = AttributeStore(tmp_path / "store", 1 << 24)
    yield made
    made.close()


def put(store: AttributeStore, user: int, age: str | None) -> None:
    store.commit("user", {user: pack(CRM.ids([age, "1"]), [age, "1"])}, PLACE)


def ages(recent: Recent, *users: int) -> list[int]:
    found: list[int] = recent.take(np.array(users, np.uint64))[:, 0].tolist()
    return found


def age(text: str | None) -> int:
    return CRM.ids([text, None])[0]


def test_a_value_null_and_a_missing_record_are_three_things(store: AttributeStore) -> None:
    put(store, 7, "25-34")
    put(store, 8, None)
    assert ages(Recent(store, CRM), 7, 8, 9, 0) == [age("25-34"), CRM.none_id("age"), CRM.unknown_id("age"), 0]


def test_a_change_counts_from_when_it_is_told(store: AttributeStore) -> None:
    recent = Recent(store, CRM)
    put(store, 7, "18-24")
    assert ages(recent, 7, 8) == [age("18-24"), CRM.unknown_id("age")]
    put(store, 7, "25-34")
    put(store, 8, "65+")
    recent.forget([7, 8])
    assert ages(recent, 7, 8) == [age("25-34"), age("65+")]


def test_more_ids_than_are_held_change_no_answer(store: AttributeStore) -> None:
    recent = Recent(store, CRM, remembered=8)
    for user in range(1, 50):
        put(store, user, str(user))
    for first in range(1, 44):
        assert ages(recent, *range(first, first + 6)) == [age(str(user)) for user in range(first, first + 6)]


def test_values_of_a_slice_are_announced_once_in_ten_minutes(store: AttributeStore) -> None:
    recent = Recent(store, CRM, slices=["age"])
    put(store, 7, "25-34")
    values = recent.take(np.array([7, 7, 8], np.uint64))
    assert recent.announce(values, 1_000) == {age("25-34"): "25-34"}
    assert recent.announce(values, ANNOUNCE_MS) == {}
    assert recent.announce(values, 1_000 + ANNOUNCE_MS) == {age("25-34"): "25-34"}
    assert Recent(store, CRM).announce(values, 1_000) == {}


def test_ids_without_a_record_take_no_memory_for_ever(store: AttributeStore) -> None:
    recent = Recent(store, CRM, remembered=100)
    for start in range(1, 10_000, 50):
        assert set(ages(recent, *range(start, start + 50))) == {CRM.unknown_id("age")}
    assert len(recent._slots) <= 103


GOODS = AttributeTable("item", fields_of(["brand"]))


def tell(kafka: Kafka, topic: str, *records: tuple[str, object]) -> None:
    with Writer(kafka) as writer:
        for key, value in records:
            encoded = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
            writer.send(topic, 0, key.encode(), encoded)
        writer.flush()


def attribute_topics(kafka: Kafka) -> Attributes:
    """Topics of clicks, and of attributes of users and items, which are made."""
    crm, goods = f"crm-{kafka.clicks_topic}", f"goods-{kafka.clicks_topic}"
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
        for topic in (crm, goods):
            topics.ensure(topic, 1, {"cleanup.policy": "compact"})
    return Attributes(crm, goods, ("age", "level"), ("brand",), slices=("age",))


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """Settings with both topics, which are made; a stream that cuts small batches."""
    kafka = kafka_settings()
    wanted = attribute_topics(kafka)
    return replace(settings_for(kafka, tmp_path / "state", tmp_path / "salt"), attributes=wanted)


def joined(batches: list[MicroBatch], settings: Settings) -> dict[str, set[tuple[int, ...]]]:
    """By user of the clicks, the attributes that the rows of that user have."""
    salt = load_salt(settings.salt_path)
    names = {user_id(salt, f"user-{number}"): f"user-{number}" for number in range(17)}
    found: dict[str, set[tuple[int, ...]]] = {}
    for batch in batches:
        for user, values in zip(batch.user.tolist(), batch.user_attributes.tolist(), strict=True):
            found.setdefault(names[user], set()).add(tuple(values))
    return found


def sent(settings: Settings, stream: StreamProcess, first: int, count: int) -> list[bytes]:
    """Sends clicks and waits until all are in the log; its values."""
    kafka = settings.kafka
    with following(kafka, kafka.microbatches_topic) as log:
        send(kafka, [click(number) for number in range(first, first + count)], first)
        half = (first + count) // 2
        until(lambda: next_offsets(log.poll()) == {0: half, 1: half}, f"clicks to {first + count}: {stream.lines[-3:]}")
        return log.poll()


def test_each_row_has_what_was_known_when_it_was_made(shop: Settings, tmp_path: Path) -> None:
    crm, goods = shop.attributes.user_topic, shop.attributes.item_topic
    tell(shop.kafka, crm, ("user-1", {"age": "18-24"}), ("user-1", {"age": "25-34", "level": 2}), ("user-2", {}))
    tell(shop.kafka, goods, ("item-3", {"brand": "acme"}))
    with running(shop, tmp_path / "log") as stream:
        before = sent(shop, stream, 0, 200)
        tell(shop.kafka, crm, ("user-2", {"age": "65+"}), ("user-1", None), ("user-5", b"no json"))
        dead = shop.kafka.dead_letters_topic
        with following(shop.kafka, dead) as letters:
            until(lambda: letters.poll(), "the dead letter of the last record")
            # It comes before the record's neighbours count; the next one comes behind them.
            tell(shop.kafka, crm, ("user-5", b"no json"))
            until(lambda: len(letters.poll()) == 2, "the next dead letter, so that all before it count")
        values = sent(shop, stream, 200, 200)
        assert stream.stop() == 0, stream.lines
    found = [(one["reason"], one["partition"], one["offset"]) for one in headers_of(shop.kafka, dead)]
    assert found == [("undecodable", "0", "5"), ("undecodable", "0", "6")]

    early, _ = deduplicated(before)
    late, _ = deduplicated(values[len(before) :])
    unknown, none = tuple(CRM.unknown.tolist()), tuple(CRM.ids([None, None]))
    now, then = joined(early, shop), joined(late, shop)
    assert now["user-1"] == {tuple(CRM.ids(["25-34", "2"]))}
    assert now["user-2"] == {none}
    assert now["user-3"] == {unknown}
    assert then["user-1"] == {unknown}
    assert then["user-2"] == {tuple(CRM.ids(["65+", None]))}
    for batch in (*early, *late):
        assert batch.header.attributes == (("age", "level"), ("brand",))
        acme = batch.item == public_id("item-3")
        assert set(batch.item_attributes[acme, 0].tolist()) <= set(GOODS.ids(["acme"]))
        assert set(batch.item_attributes[~acme, 0].tolist()) <= {GOODS.unknown_id("brand")}
    names = {key: name for batch in (*early, *late) for key, name in batch.header.names.items()}
    assert [names[age(text)] for text in ("25-34", "65+")] == ["25-34", "65+"]


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("attributes.reported", marks=pytest.mark.nightly),
        pytest.param("attributes.committed", marks=pytest.mark.nightly),
        "stream.acknowledged",
    ],
)
def test_after_a_kill_the_rows_written_first_count(shop: Settings, tmp_path: Path, point: str) -> None:
    kafka, crm = shop.kafka, shop.attributes.user_topic
    tell(kafka, crm, ("user-1", {"age": "18-24"}), ("user-1", b"broken"))
    send(kafka, [click(number) for number in range(100)])
    with running(shop, tmp_path / "log", kill_at=point) as stream:
        assert stream.wait() == -signal.SIGKILL, stream.lines
    tell(kafka, crm, ("user-1", {"age": "65+"}))
    with running(shop, tmp_path / "log") as stream, following(kafka, kafka.microbatches_topic) as log:
        until(lambda: next_offsets(log.poll()) == {0: 50, 1: 50}, f"all clicks: {stream.lines[-3:]}")
        assert stream.stop() == 0, stream.lines
        batches, _ = deduplicated(log.poll())
    assert sum(map(len, batches)) == 100
    # The first micro-batch was acknowledged or not; its rows have the attributes from before the change or from after it.
    first, after = age("18-24"), age("65+")
    found = [one[0] for one in joined(batches, shop)["user-1"]]
    assert set(found) <= {first, after}
    assert (first in found) == (point == "stream.acknowledged")
    letters = {(one["reason"], one["offset"]) for one in headers_of(kafka, kafka.dead_letters_topic)}
    assert letters == {("undecodable", "1")}
