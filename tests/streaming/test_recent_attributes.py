"""Attributes in memory: as new as the store, in little memory, and announced now and then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from state.attributes.store import AttributeStore, TopicPosition, pack
from state.attributes.values import AttributeTable
from state.config.fields import fields_of
from state.events.parser import ANNOUNCE_MS
from streaming.attributes import Recent

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
    assert recent.news(values, 1_000) == {age("25-34"): "25-34"}
    assert recent.news(values, ANNOUNCE_MS) == {}
    assert recent.news(values, 1_000 + ANNOUNCE_MS) == {age("25-34"): "25-34"}
    assert Recent(store, CRM).news(values, 1_000) == {}


def test_ids_without_a_record_take_no_memory_for_ever(store: AttributeStore) -> None:
    recent = Recent(store, CRM, remembered=100)
    for start in range(1, 10_000, 50):
        assert set(ages(recent, *range(start, start + 50))) == {CRM.unknown_id("age")}
    assert len(recent._slots) <= 103
