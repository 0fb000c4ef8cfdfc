"""Attributes: how settings write them, what a record says, and what is none and what is unknown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.attributes.values import AttributeTable, band
from state.config.fields import LOG_EDGES, field_of, fields_of
from state.config.loading import load
from state.errors import DecodeError, SettingsError

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
