"""Clicks become events or dead letters, whatever bytes come."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from state.config.sections import Events
from state.errors import DecodeError, SettingsError
from state.events.decoding import DeadLetter, Reason, decode_json, load_decoder, parse_time
from state.events.identity import Salt, probe_user, user_id
from state.events.parser import EventBatch, Parser
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


def test_an_action_may_be_missing_where_there_is_only_one() -> None:
    single = Events(actions=("view",), action_weights=(1.0,))
    assert parse({**GOOD, "action": None}, settings=single).action.tolist() == [0]
    assert reason({**GOOD, "action": "cart"}, single) == "unknown_action"


def test_the_first_invalid_field_gives_the_reason_and_the_record_announces_no_name() -> None:
    late = {**GOOD, "time": 1 << 70, "item": "new", "category": "new", "action": "stare"}
    assert reason(late) == "implausible_time"
    assert reason({**GOOD, "label": 10**30}, Events(label="label")) == "wrong_type"
    batch = parse(GOOD, late)
    assert "new" not in {*batch.names.values(), *batch.item_names.values()}


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
    assert out.dead[0] == DeadLetter(source, 101, Reason.UNDECODABLE)
    assert [(letter.offset, letter.reason) for letter in out.dead[1:]] == [
        (lost, Reason.CORRUPT_RECORD) for lost in (107, 108, 109)
    ]


def _nothing() -> tuple[Any, ...]:
    return np.empty(0, np.int64), np.empty(0, np.int64), [], []


def test_names_are_announced_once_in_ten_minutes_of_event_time_and_items_whole_or_not_at_all() -> None:
    parser = Parser(Events(max_age_s=1e9, max_future_s=1e9), SALT)

    def news(minute: int, *names: str | int) -> tuple[list[str], list[str]]:
        clicks = [{**GOOD, "category": one, "item": one, "time": NOW_MS + 60_000 * minute} for one in names]
        batch = parser.parse([records([json.dumps(one).encode() for one in clicks])])
        return sorted(batch.names.values()), sorted(batch.item_names.values())

    assert news(0, "a", "b", 7, "a") == (["7", "a", "b"], ["7", "a", "b"])
    assert news(9, "a", "c") == (["c"], ["c"])
    assert news(10, "a", "c") == (["a"], ["a"])
    assert news(5, "a", "b") == ([], [])
    assert news(6, "x" * 200, "x" * 201) == (["x" * 200] * 2, ["x" * 200])


def test_no_raw_user_id_leaves_the_parser() -> None:
    batch = parse({**GOOD, "user": "secret-user"}, {**GOOD, "user": "secret-user", "action": "stare"})
    assert "secret-user" not in repr(batch)
    assert "secret-user" not in repr(batch.dead)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 weights for 4 actions"):
        Parser(Events(action_weights=(1.0, 2.0, 3.0)), SALT)


def test_a_record_beyond_the_limit_is_not_even_decoded() -> None:
    assert reason({**GOOD, "more": "x" * 1_000_000}) == "too_large"


def test_a_probe_users_click_may_name_nothing_and_nobody_elses() -> None:
    click = {"user": probe_user(7), "action": "view", "time": NOW_MS}
    batch = parse(click)
    assert (batch.item.tolist(), batch.category.tolist()) == ([0], [0])
    assert batch.user.tolist() == [user_id(SALT, probe_user(7))]
    assert not batch.names
    assert not batch.item_names
    assert reason(click | {"user": "ann"}) == reason(click | {"user": 7}) == "missing_field"
    assert reason(click | {"item": 1.5}) == "wrong_type"


def _some_value(rng: np.random.Generator) -> bytes:
    """A record with fields of many types, most of them good."""
    odd = rng.random() < 0.1

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    event = {
        "user": one("ann", 7, "7", "x" * 300) if not odd else one("", None, True, 1.0, [1]),
        "item": one("lamp", 9, "lamp 2", "y" * 300) if not odd or rng.random() < 0.5 else one("", None, False),
        "category": one("home", 3, "z" * 250, "z" * 300),
        "action": one("view", "cart") if not odd or rng.random() < 0.5 else one("steal", 1, None),
        "time": one(NOW_MS, NOW_MS / 1000, NOW_MS // 1000, str(NOW_MS), "2023-11-14T22:13:20Z")
        if not odd or rng.random() < 0.5
        else one(NOW_MS * 50, -1, True, 1 << 70, "yesterday"),
        "label": one(None, None, 0.1, 1, True) if not odd or rng.random() < 0.5 else one(2.0, -1, "yes"),
        "device": one("phone", 1, True, None, 0.5) if not odd or rng.random() < 0.7 else one([1], "w" * 300),
        "visit": one("a", 5, "", None),
    }
    return json.dumps(event).encode() if rng.random() < 0.98 else b"no JSON"


@pytest.mark.parametrize("seed", range(60))
def test_a_record_becomes_the_same_event_whatever_records_came_with_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = Events(context=("device",) if seed % 2 else (), request="visit" if seed % 3 else "")
    simple = seed % 4 == 0
    values: list[bytes | None] = [
        json.dumps(GOOD | {"user": int(rng.integers(5)), "label": None}).encode() if simple else _some_value(rng)
        for _ in range(int(rng.integers(1, 12)))
    ]
    # After a record that is no event, the parser reads the values record by record.
    together = Parser(settings, SALT).parse([records(values)])
    apart = Parser(settings, SALT).parse([records([*values, b"no JSON"])])
    assert len(apart.dead) == len(together.dead) + 1
    for name in ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "offset", "request"):
        left, right = getattr(together, name), getattr(apart, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert (together.names, together.item_names) == (apart.names, apart.item_names)
    # Each alone gives the same rows, too.
    alone = Parser(settings, SALT)
    singles = [alone.parse([records([value], first=index)]) for index, value in enumerate(values)]
    assert np.array_equal(together.user, np.concatenate([single.user for single in singles]))
    assert [letter.reason for letter in together.dead] == [
        letter.reason for single in singles for letter in single.dead
    ]


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
    ],
)
def test_bad_bytes_are_a_dead_letter_with_their_reason(value: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=f"^{why}$"):
        decode_json(Events())(value)


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


@pytest.mark.parametrize("path", ["no.such.module:f", "state.events.parser:nothing", "state.events.parser", ":f"])
def test_a_decoder_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(SettingsError, match=r"events\.decoder"):
        load_decoder(Events(decoder=path))
