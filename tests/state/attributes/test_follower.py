"""Attributes: values of records, the follower of their topics, and its store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.attributes.follower import AttributeFollower, follow
from state.attributes.values import AttributeStore, AttributeTable, TopicPosition, band, ids_in, pack, texts_in
from state.config.loading import load
from state.config.sections import Kafka
from state.config.sources import LOG_EDGES, field_of, fields_of
from state.errors import DecodeError, SettingsError
from state.events.decoding import DeadLetter
from state.events.identity import Salt, user_id
from state.log import Topics, Writer
from tests.conftest import KafkaFactory
from tests.reading import eventually

SALT = Salt(b"a salt of the tests only")
MAP = 1 << 24
FIELDS = ("age_band", "level")
COMPACTED = {"cleanup.policy": "compact,delete"}


@dataclass
class Crm:
    """A topic of attributes, and what follows it."""

    kafka: Kafka
    topic: str
    path: Path
    bad: list[DeadLetter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = AttributeStore(self.path, MAP)
        self.follower = self.following()

    def following(self, side: str = "user", salt: Salt = SALT, fields: tuple[str, ...] = FIELDS) -> AttributeFollower:
        table = AttributeTable(side, fields_of(fields))
        return AttributeFollower(self.kafka, self.topic, table, salt, self.store, self.bad.extend)

    def send(self, *records: tuple[str | None, object], partition: int = 0) -> None:
        with Writer(self.kafka) as writer:
            for key, value in records:
                encoded = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
                writer.send(self.topic, partition, None if key is None else key.encode(), encoded)
            writer.flush()

    def read(self) -> None:
        """Reads to where the topic ends now."""
        self.follower.disconnect()
        self.follower.connect()
        while self.follower.unread:
            follow([self.follower], 0.2)

    def of(self, user: str) -> list[str | None] | None:
        (value,) = self.store.read_many(self.follower.side, [user_id(SALT, user)])
        return None if value is None else texts_in(value, len(FIELDS))

    def counts(self) -> Mapping[str, int]:
        return {name: count for name, count in self.follower.position.counts.items() if count}

    def reopen(self, **changes: Any) -> None:
        self.close()
        self.store = AttributeStore(self.path, MAP)
        self.follower = self.following(**changes)

    def close(self) -> None:
        self.follower.disconnect()
        self.store.close()


@pytest.fixture
def crm(kafka_settings: KafkaFactory, tmp_path: Path) -> Iterator[Crm]:
    kafka = kafka_settings()
    made = Crm(kafka, f"crm-{kafka.clicks_topic}", tmp_path / "store")
    with Topics(kafka) as topics:
        topics.ensure(made.topic, 2, COMPACTED)
    yield made
    made.close()


def test_the_last_record_of_a_user_wins_and_a_tombstone_makes_the_user_unknown(crm: Crm) -> None:
    crm.send(("ann", {"age_band": "18-24"}), ("bob", {"age_band": "35-44"}), ("ann", {"age_band": "25-34", "level": 2}))
    crm.read()
    assert (crm.of("ann"), crm.of("bob")) == (["25-34", "2"], ["35-44", None])
    crm.send(("ann", {"level": 3}), ("bob", None))
    crm.read()
    assert (crm.of("ann"), crm.of("bob")) == ([None, "3"], None)
    assert crm.counts() == {"value": 4, "removed": 1}


def test_a_bad_record_is_told_counted_and_changes_nothing(crm: Crm) -> None:
    bad = [("ann", b"{"), ("ann", {"level": []}), ("", {}), ("ann", {"age_band": "x" * 1_000_000})]
    crm.send(("ann", {"level": 1}), *bad, ("bob", {"level": 2}))
    crm.read()
    reasons = ["undecodable", "wrong_type", "empty_id", "too_large"]
    assert [(letter.offset, str(letter.reason)) for letter in crm.bad] == list(enumerate(reasons, 1))
    assert (crm.of("ann"), crm.of("bob")) == ([None, "1"], [None, "2"])
    assert crm.counts() == {"value": 2, "dead": 4}


def test_a_restart_goes_on_from_the_stored_offsets(crm: Crm) -> None:
    crm.send(("ann", {"level": 1}))
    crm.send(("bob", {"level": 1}), ("cid", {"level": 1}), partition=1)
    crm.read()
    crm.reopen()
    assert dict(crm.follower.position.next) == {0: 1, 1: 2}
    crm.send(("ann", {"level": 2}))
    crm.read()
    assert (crm.of("ann"), crm.of("cid")) == ([None, "2"], [None, "1"])
    assert crm.counts() == {"value": 4}


@pytest.mark.parametrize("change", [{"salt": Salt(b"another salt of the tests")}, {"fields": ("level",)}])
def test_another_salt_or_other_fields_read_the_topic_from_its_beginning(crm: Crm, change: dict[str, Any]) -> None:
    crm.send(("ann", {"level": 1}), ("bob", {"level": 1}))
    crm.read()
    crm.reopen(**change)
    crm.send(("bob", None))
    crm.read()
    assert crm.counts() == {"value": 2, "removed": 1}
    assert crm.store.count("user") == 1


@pytest.mark.parametrize("made_again", [True, False])
def test_a_topic_made_again_or_with_records_deleted_unread_is_read_from_its_beginning(
    crm: Crm, made_again: bool
) -> None:
    crm.send(("ann", {"level": 1}))
    crm.read()
    crm.follower.disconnect()
    with Topics(crm.kafka) as topics:
        if made_again:
            topics.delete(crm.topic)
            topics.ensure(crm.topic, 1, COMPACTED)
            crm.send(("bob", {"level": 2}))
        else:
            crm.send(("ann", None), ("bob", {"level": 2}))
            topics.delete_before(crm.topic, {0: 2})
    crm.read()
    assert (crm.of("ann"), crm.of("bob"), crm.counts()) == (None, [None, "2"], {"value": 1})


def test_positions_without_a_record_are_counted_as_absent(crm: Crm) -> None:
    with Writer(crm.kafka, transactional_id=f"tx-{crm.topic}") as writer, writer.transaction():
        writer.send(crm.topic, 0, b"ann", b'{"level": 1}')
    with Topics(crm.kafka) as topics:
        # The commit is acknowledged before its marker is written.
        assert eventually(lambda: topics.ends(crm.topic) == topics.ends(crm.topic, committed_only=True))
    crm.send(("bob", {"level": 1}))
    crm.read()
    assert crm.counts() == {"value": 2, "absent": 1}


PLACE = TopicPosition("identity", "ab" * 16, {0: 5, 1: 7})
VALUE = pack([3, 4], ["25-34", None])


def test_values_and_the_place_are_committed_together_and_survive(tmp_path: Path) -> None:
    store = AttributeStore(tmp_path / "s", MAP)
    store.commit("user", {1: VALUE, 2: VALUE}, PLACE)
    store.close()
    again = AttributeStore(tmp_path / "s", MAP)
    assert again.read_many("user", [2, 9]) == [VALUE, None]
    assert again.read_many("item", [2]) == [None]
    assert (again.position("user"), again.position("item")) == (PLACE, None)
    again.commit("user", {1: None, 5: None}, PLACE)
    assert (again.read_many("user", [1, 2]), again.count("user")) == ([None, VALUE], 1)
    assert (ids_in(VALUE, 2).tolist(), texts_in(VALUE, 2)) == ([3, 4], ["25-34", None])
    again.close()


def test_a_side_that_is_begun_anew_leaves_the_other(tmp_path: Path) -> None:
    store = AttributeStore(tmp_path / "s", MAP)
    store.commit("user", {1: VALUE}, PLACE)
    store.commit("item", {1: VALUE}, PLACE)
    store.restart_at("user", TopicPosition("other", "cd" * 16, {0: 0}))
    assert (store.count("user"), store.count("item")) == (0, 1)
    place = store.position("user")
    assert place is not None
    assert place.identity == "other"
    store.close()


CRM = AttributeTable("user", fields_of(["age_band", "level=memberLevel", "income:1000|5000"]))


def said(record: dict[str, Any]) -> list[str | None]:
    return CRM.read(json.dumps(record).encode())


def test_a_record_is_read_by_the_fields_that_settings_name() -> None:
    record = {"age_band": "25-34", "memberLevel": 3, "income": 1200.5, "level": "not this one", "more": {"deep": []}}
    assert said(record) == ["25-34", "3", "1000-5000"]


@pytest.mark.parametrize("record", [{}, {"age_band": None}, {"age_band": ""}])
def test_a_value_that_is_null_empty_or_left_out_is_none(record: dict[str, Any]) -> None:
    assert said(record)[0] is None


def test_none_and_unknown_and_each_value_are_different_ids() -> None:
    ids = [
        CRM.none_id("age_band"),
        CRM.unknown_id("age_band"),
        *(CRM.ids([text, None, None])[0] for text in ("", "?", "25-34")),
    ]
    assert len(set(ids)) == len(ids)
    assert CRM.ids([None, None, None])[0] == CRM.none_id("age_band")
    other = AttributeTable("item", CRM.fields)
    assert len({CRM.ids(["3", "3", None])[0], CRM.ids(["3", "3", None])[1], other.ids(["3", "3", None])[0]}) == 3
    assert CRM.unknown.tolist() == [CRM.unknown_id(name) for name in CRM.names]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{", "undecodable"),
        (b"[1]", "wrong_type"),
        (b"null", "wrong_type"),
        (b'{"age_band": ["25"]}', "wrong_type"),
        (b'{"age_band": NaN}', "not_finite"),
        (b'{"income": "much"}', "wrong_type"),
        (b'{"income": true}', "wrong_type"),
        (b'{"age_band": "\xff"}', "undecodable"),
    ],
)
def test_a_record_that_says_nothing_has_a_reason(value: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as refused:
        CRM.read(value)
    assert refused.value.reason == reason


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_lies_in_the_band_that_it_is_given(value: float) -> None:
    text = band(value, LOG_EDGES)
    if text.startswith("<"):
        assert value < LOG_EDGES[0]
    elif text.startswith(">="):
        assert value >= LOG_EDGES[-1]
    else:
        low = next(edge for edge in LOG_EDGES if text.startswith(f"{edge:g}-"))
        assert low <= value < LOG_EDGES[LOG_EDGES.index(low) + 1]


@pytest.mark.parametrize("written", ["", "two words", "a=", "a:", "a:3|2", "a:1|x", "a:nan", "a:1|1"])
def test_an_attribute_written_wrongly_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="has "):
        field_of(written)


@pytest.mark.parametrize("change", [["age_band=age", "level"], ["level", "age_band"], ["age_band", "level:1"]])
def test_tables_of_other_fields_are_told_apart(change: list[str]) -> None:
    assert (
        AttributeTable("user", fields_of(change)).digest
        != AttributeTable("user", fields_of(["age_band", "level"])).digest
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attributes.user_topic=crm"], "user_topic needs attributes.user_fields"),
        (["--attributes.user_fields=age:3|1"], r"user_fields has 'age:3\|1'"),
        (["--attributes.user_fields=a", "--attributes.item_fields=a"], "item_fields names 'a' again"),
        (["--attributes.slices=age"], "'age', which is no attribute"),
        (
            ["--attributes.user_fields=a", "--attributes.user_topic=springtide.clicks.v1"],
            "user_topic must be a topic of its own",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(flags, env={})
