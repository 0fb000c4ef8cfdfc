"""Claims about events: what becomes a row, what a dead letter and why, and that every position is accounted for."""

from __future__ import annotations

import json
import logging
import math
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.config.sections import Events
from state.errors import DecodeError, MissingSalt, SettingsError
from state.events.dead_letters import DeadLetter, Reason
from state.events.decoding import load_decoder, parse_time
from state.events.event_batch import EventBatch
from state.events.identity import Salt, context_id, load_salt, public_id, user_id
from state.events.parser import Parser
from state.log import PartitionBatch
from state.positions import Source

SALT = Salt(b"a salt for the tests")
TOPIC = "ab" * 16
NOW_MS = 1_700_000_000_000
GOOD: dict[str, Any] = {"user": "ann", "item": "lamp", "category": "home", "action": "cart", "time": NOW_MS}


def records(
    values: list[bytes | None], first: int = 0, partition: int = 0, timestamp_ms: int = NOW_MS
) -> PartitionBatch:
    count = len(values)
    return PartitionBatch(
        TOPIC,
        partition,
        first,
        first + count,
        np.arange(first, first + count),
        np.full(count, timestamp_ms),
        [b"ann"] * count,
        values,
    )


def parse(*values: Any, settings: Events | None = None) -> EventBatch:
    encoded = [value if isinstance(value, bytes | None) else json.dumps(value).encode() for value in values]
    return Parser(settings or Events(), SALT).parse([records(encoded)])


def reason(value: Any, settings: Events | None = None) -> str:
    batch = parse(value, settings=settings)
    assert len(batch) == 0 and batch.ranges[0].dead == 1
    return str(batch.dead[0].reason)


def test_a_good_record_becomes_one_row() -> None:
    batch = parse(GOOD, settings=Events(action_weights=(1.0, 2.0, 3.0, 4.0), label="liked", context=("device", "page")))
    assert batch.user.tolist() == [user_id(SALT, "ann")]
    assert (batch.item.tolist(), batch.category.tolist()) == ([public_id("lamp")], [public_id("home")])
    assert (batch.action.tolist(), batch.weight.tolist(), batch.at_ms.tolist()) == ([2], [3.0], [NOW_MS])
    assert np.isnan(batch.label).all() and batch.context.tolist() == [[0, 0]]
    assert batch.names == {public_id("home"): "home"}
    assert [column.dtype.str for column in (batch.user, batch.action, batch.at_ms, batch.label, batch.source)] == [
        "<u8",
        "|u1",
        "<i8",
        "<f4",
        "<u2",
    ]


def test_names_of_fields_are_those_of_the_settings() -> None:
    value = {"uid": 7, "sku": 8, "dep": 9, "kind": "buy", "ts": NOW_MS, "rating": 0.25, "dev": True, "user": [1]}
    names = Events(
        user="uid",
        item="sku",
        category="dep",
        action="kind",
        time="ts",
        label="rating",
        context=("dev",),
        actions=("see", "buy"),
        action_weights=(1.0, 5.0),
    )
    batch = parse(value, settings=names)
    assert batch.user.tolist() == [user_id(SALT, "7")] and batch.item.tolist() == [public_id("8")]
    assert (batch.label.tolist(), batch.weight.tolist()) == ([0.25], [5.0])
    assert batch.context.tolist() == [[context_id("dev", "true")]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"user": None}, "missing_field"),
        ({"item": None}, "missing_field"),
        ({"category": None}, "missing_field"),
        ({"action": None}, "missing_field"),
        ({"time": None}, "missing_field"),
        ({"user": ""}, "empty_id"),
        ({"item": ""}, "empty_id"),
        ({"category": ""}, "empty_id"),
        ({"user": [1]}, "wrong_type"),
        ({"user": True}, "wrong_type"),
        ({"item": 1.5}, "wrong_type"),
        ({"time": "yesterday"}, "wrong_type"),
        ({"time": True}, "wrong_type"),
        ({"time": {}}, "wrong_type"),
        ({"action": "stare"}, "unknown_action"),
        ({"action": 7}, "unknown_action"),
        ({"time": NOW_MS + 300_001}, "implausible_time"),
        ({"time": NOW_MS - 2_592_000_001}, "implausible_time"),
        ({"time": -5}, "implausible_time"),
        ({"time": 1e300}, "implausible_time"),
        ({"label": 1.01}, "wrong_type"),
        ({"label": -0.1}, "wrong_type"),
        ({"label": "yes"}, "wrong_type"),
        ({"device": [1]}, "wrong_type"),
        ({"label": math.nan}, "not_finite"),
        ({"time": math.inf}, "not_finite"),
    ],
)
def test_a_bad_field_is_a_dead_letter_with_its_reason(change: dict[str, Any], why: str) -> None:
    assert reason({**GOOD, **change}, Events(label="label", context=("device",))) == why


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "undecodable"),
        (b"{", "undecodable"),
        (b'{"user":"\xff"}', "undecodable"),
        (b'{"user":"\\ud800"}', "undecodable"),
        (json.dumps(GOOD).encode() + b"{}", "undecodable"),
        (b'{"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "undecodable"),
        (b"[1, 2]", "wrong_type"),
        (b"null", "wrong_type"),
        (json.dumps(GOOD).replace(str(NOW_MS), "1e999").encode(), "not_finite"),
        (json.dumps(GOOD).replace('"ann"', "9" * 5000).encode(), "undecodable"),
        (json.dumps({**GOOD, "more": "x" * 1_000_000}).encode(), "too_large"),
    ],
)
def test_bad_bytes_are_a_dead_letter_with_their_reason(value: bytes, why: str) -> None:
    assert reason(value) == why


def test_an_action_may_be_missing_where_there_is_only_one() -> None:
    single = Events(actions=("view",), action_weights=(1.0,))
    assert parse({**GOOD, "action": None}, settings=single).action.tolist() == [0]
    assert reason({**GOOD, "action": "cart"}, single) == "unknown_action"


def test_unconfigured_fields_are_none() -> None:
    bare = {name: value for name, value in GOOD.items() if name not in ("category", "item", "time")}
    batch = parse(bare, settings=Events(category="", item="", time=""))
    assert (batch.category.tolist(), batch.item.tolist(), batch.at_ms.tolist()) == ([0], [0], [NOW_MS])


@pytest.mark.parametrize(("label", "want"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.5, 0.5)])
def test_a_label_may_be_a_truth_or_a_number(label: Any, want: float) -> None:
    assert parse({**GOOD, "label": label}, settings=Events(label="label")).label.tolist() == [want]


@pytest.mark.parametrize(
    ("value", "unit", "want"),
    [
        (NOW_MS, "auto", NOW_MS),
        (NOW_MS // 1000, "auto", NOW_MS),
        (NOW_MS / 1000 + 0.123, "auto", NOW_MS + 123),
        (str(NOW_MS), "auto", NOW_MS),
        ("2023-11-14T22:13:20+00:00", "auto", NOW_MS),
        ("2023-11-14T22:13:20", "auto", NOW_MS),
        ("2023-11-15T00:13:20.250+02:00", "iso", NOW_MS + 250),
        (5, "ms", 5),
        (5, "s", 5000),
        ("5", "s", 5000),
    ],
)
def test_times_are_read_in_their_unit(value: Any, unit: str, want: int) -> None:
    assert parse_time(value, unit) == want


@pytest.mark.parametrize(
    ("value", "unit"), [(5, "iso"), ("2023-11-14", "ms"), ("x", "auto"), (None, "auto"), (True, "s")]
)
def test_a_time_of_another_unit_is_refused(value: Any, unit: str) -> None:
    with pytest.raises(DecodeError, match="wrong_type"):
        parse_time(value, unit)


def test_a_text_and_an_integer_id_are_the_same() -> None:
    batch = parse({**GOOD, "user": 7, "item": 7}, {**GOOD, "user": "7", "item": "7"})
    assert batch.user[0] == batch.user[1] and batch.item[0] == batch.item[1] != batch.user[0]


def test_one_field_may_be_several_of_ours() -> None:
    batch = parse(GOOD, settings=Events(category="item", context=("item", "action")))
    assert batch.category.tolist() == batch.item.tolist() == [public_id("lamp")]
    assert batch.context.tolist() == [[context_id("item", "lamp"), context_id("action", "cart")]]
    assert reason({**GOOD, "item": 1.5}, Events(category="item")) == "wrong_type"


def test_a_record_is_compared_with_its_own_timestamp() -> None:
    value = json.dumps({**GOOD, "time": 5_000}).encode()
    parser = Parser(Events(time_unit="ms"), SALT)
    assert len(parser.parse([records([value], timestamp_ms=6_000)])) == 1
    assert len(parser.parse([records([value], timestamp_ms=NOW_MS)])) == 0
    # Without a Kafka timestamp there is nothing to compare with.
    assert len(parser.parse([records([value], timestamp_ms=-1)])) == 1


def test_every_position_has_one_outcome() -> None:
    good = json.dumps(GOOD).encode()
    batch = PartitionBatch(
        TOPIC,
        3,
        100,
        112,
        np.array([100, 101, 104, 105]),
        np.full(4, NOW_MS),
        [None, b"k", None, None],
        [good, b"{", None, good],
        corrupt=((107, 110, "crc"),),
    )
    out = Parser(Events(), SALT).parse([records([good], 5, 1), batch, PartitionBatch(TOPIC, 2, 7, 9, *_nothing())])
    assert [part.outcomes for part in out.ranges] == [
        {"rows": 1, "dead": 0, "filtered": 0, "absent": 0},
        {"rows": 2, "dead": 4, "filtered": 1, "absent": 5},
        {"rows": 0, "dead": 0, "filtered": 0, "absent": 2},
    ]
    assert (out.source.tolist(), out.offset.tolist()) == ([0, 1, 1], [5, 100, 105])
    source = Source(TOPIC, 3)
    assert out.dead[0] == DeadLetter(source, 101, Reason.UNDECODABLE, b"k", b"{")
    assert [(letter.offset, letter.reason) for letter in out.dead[1:]] == [
        (lost, Reason.CORRUPT_RECORD) for lost in (107, 108, 109)
    ]


def _nothing() -> tuple[Any, ...]:
    return np.empty(0, np.int64), np.empty(0, np.int64), [], []


def test_nothing_read_is_an_empty_batch() -> None:
    batch = Parser(Events(), SALT).parse([])
    assert (len(batch), batch.ranges, batch.context.shape, bool(batch)) == (0, (), (0, 0), True)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.none(),
            st.fixed_dictionaries(
                {},
                optional={
                    name: st.one_of(st.just(value), st.none(), st.integers(), st.floats(), st.text())
                    for name, value in GOOD.items()
                },
            ).map(lambda fields: json.dumps({**GOOD, **fields}).encode()),
        ),
        max_size=20,
    ),
    cuts=st.sets(st.integers(0, 20)),
)
def test_any_cut_of_any_bytes_gives_the_same_events(values: list[bytes | None], cuts: set[int]) -> None:
    options = Events(context=("action", "nowhere"))
    whole = Parser(options, SALT).parse([records(values)])
    parser = Parser(options, SALT)
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    parts = [parser.parse([records(values[a:b], a)]) for a, b in pairwise(edges)]
    for name in ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "offset"):
        joined = np.concatenate([getattr(part, name) for part in parts] or [getattr(whole, name)])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    assert [letter for part in parts for letter in part.dead] == list(whole.dead)


def test_a_name_is_announced_once_in_ten_minutes_of_event_time() -> None:
    parser = Parser(Events(max_age_s=1e9, max_future_s=1e9), SALT)

    def news(minute: int, *categories: str) -> list[str]:
        values = [
            json.dumps({**GOOD, "category": one, "time": NOW_MS + 60_000 * minute}).encode() for one in categories
        ]
        return sorted(parser.parse([records(list(values))]).names.values())

    assert news(0, "a", "b", "a") == ["a", "b"]
    assert news(9, "a", "c") == ["c"]
    assert news(10, "a", "c") == ["a"]
    assert news(5, "a", "b") == []


def test_no_raw_user_id_leaves_the_parser() -> None:
    batch = parse({**GOOD, "user": "secret-user"}, {**GOOD, "user": "secret-user", "action": "stare"})
    assert "secret-user" not in repr(batch)
    assert "secret-user" not in repr(batch.dead)


def own_decoder(settings: Events) -> Callable[[bytes], Any]:
    """A decoder as a user would write it: ids separated by bars."""
    names = ("user", "item", "category", "action", "time")

    def read(value: bytes) -> Any:
        parts = value.decode().split("|")
        if parts == ["late"]:
            raise DecodeError("implausible_time")
        if parts == ["odd"]:
            raise DecodeError("no such reason")
        fields = dict(zip(names, parts, strict=True))
        return SimpleNamespace(**fields, label=float("nan") if parts[0] == "nan" else None)

    return read


def test_a_decoder_of_the_users_own_plugs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.events.parser.own_decoder", own_decoder, raising=False)
    options = Events(decoder="state.events.parser:own_decoder")
    values = [f"ann|lamp|home|view|{NOW_MS}".encode(), b"late", b"a|b", b"odd", f"nan|a|b|view|{NOW_MS}".encode()]
    batch = Parser(options, SALT).parse([records(list(values))])
    assert batch.user.tolist() == [user_id(SALT, "ann")]
    assert [str(letter.reason) for letter in batch.dead] == [
        "implausible_time",
        "undecodable",
        "undecodable",
        "not_finite",
    ]


@pytest.mark.parametrize("path", ["no.such.module:f", "state.events.parser:nothing", "state.events.parser", ":f"])
def test_a_decoder_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(SettingsError, match=r"events\.decoder"):
        load_decoder(Events(decoder=path))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 weights for 4 actions"):
        Parser(Events(action_weights=(1.0, 2.0, 3.0)), SALT)


def test_a_salt_is_made_once_for_its_owner_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state" / "salt"
    with pytest.raises(MissingSalt, match="no salt at"):
        load_salt(path, create=False)
    with caplog.at_level(logging.WARNING):
        salt = load_salt(path)
    assert str(path) in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_salt(path) == salt and len(salt.key) == 32 and len(salt.fingerprint) == 16
    assert salt.key.hex() not in repr(salt) and [one.name for one in path.parent.iterdir()] == ["salt"]


def test_a_salt_of_the_users_own_is_taken_and_a_short_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    path.write_bytes(b"correct horse battery staple\n")
    assert load_salt(path).key == b"correct horse battery staple"
    path.write_bytes(b"short")
    with pytest.raises(SettingsError, match="5 bytes"):
        load_salt(path)


def test_ids_are_pinned() -> None:
    # Rows, histories and micro-batches are stored under these ids.
    assert user_id(SALT, "ann") == int("9acc554cb733d961", 16)
    assert public_id("home") == int("4ea140588150773c", 16)
    assert context_id("device", "phone") == int("033a2ca1b1ab7891", 16)
