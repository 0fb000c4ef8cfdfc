"""What every decoder does with the parser behind it: a record becomes a row or a dead letter, and harms no other.

Each function `decode_...(settings: Events) -> Decoder` of `state.events` and of
the examples runs all of it, a new one unasked; `WRITES` says how a record of its
format is written.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deploy.examples
import state.events
from state.config.sections import Events
from state.errors import DecodeError
from state.events.decoding import Reason, load_decoder
from state.events.identity import Salt, context_id, public_id, user_id
from state.events.parser import EventBatch, Parser
from state.log import PartitionBatch

SALT = Salt(b"a salt for the tests")
NOW_MS = 1_700_000_000_000
GOOD: dict[str, Any] = {"user": "ann", "item": "lamp", "category": "home", "action": "cart", "time": NOW_MS}


def write_json(record: object) -> bytes:
    return json.dumps(record).encode()


WRITES: dict[str, Callable[[object], bytes]] = {
    "state.events.decoding:decode_json": write_json,
    "deploy.examples.own_decoder.messagepack:decode_messagepack": msgspec.msgpack.encode,
}


def implementations() -> list[str]:
    found = []
    for package in (state.events, deploy.examples):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            own = [one for one in vars(module).values() if getattr(one, "__module__", "") == info.name]
            found += [f"{info.name}:{one.__name__}" for one in own if _is_factory(one)]
    return sorted(found)


def _is_factory(one: object) -> bool:
    return getattr(one, "__name__", "").startswith("decode_") and one.__annotations__.get("return") == "Decoder"


class Format:
    """One decoder, and how records of its format are written."""

    def __init__(self, path: str) -> None:
        assert path in WRITES, f"say in WRITES how a record of {path} is written"
        self.path, self.write = path, WRITES[path]

    def parser(self, options: Events | None = None) -> Parser:
        return Parser(replace(options or Events(), decoder=self.path), SALT)

    def parse(self, *records: object, options: Events | None = None) -> EventBatch:
        """Bytes are taken as they are, everything else is written first."""
        values: list[bytes | None] = [record if isinstance(record, bytes) else self.write(record) for record in records]
        return self.parser(options).parse([polled(values)])

    def reason(self, record: object, options: Events | None = None) -> str:
        batch = self.parse(record, options=options)
        assert len(batch) == 0 and batch.ranges[0].dead == 1
        return str(batch.dead[0].reason)


def polled(values: list[bytes | None], first: int = 0) -> PartitionBatch:
    count = len(values)
    offsets = np.arange(first, first + count)
    return PartitionBatch("ab" * 16, 0, first, first + count, offsets, np.full(count, NOW_MS), [None] * count, values)


@pytest.fixture(params=implementations())
def form(request: pytest.FixtureRequest) -> Format:
    return Format(request.param)


def test_json_and_the_example_are_held_to_this() -> None:
    assert set(implementations()) >= set(WRITES)


# Fields


def test_a_good_record_becomes_one_row(form: Format) -> None:
    options = Events(action_weights=(1.0, 2.0, 3.0, 4.0), label="liked", context=("device", "page"))
    batch = form.parse(GOOD, options=options)
    assert batch.user.tolist() == [user_id(SALT, "ann")]
    assert (batch.item.tolist(), batch.category.tolist()) == ([public_id("lamp")], [public_id("home")])
    assert (batch.action.tolist(), batch.weight.tolist(), batch.at_ms.tolist()) == ([2], [3.0], [NOW_MS])
    assert np.isnan(batch.label).all() and batch.context.tolist() == [[0, 0]]
    assert batch.names == {public_id("home"): "home"}


def test_fields_have_the_names_of_the_settings_and_unknown_ones_are_left_alone(form: Format) -> None:
    options = Events(
        user="uid",
        item="sku",
        category="dep",
        action="kind",
        time="ts",
        label="rating",
        request="page",
        context=("dev",),
        actions=("see", "buy"),
        action_weights=(1.0, 5.0),
    )
    record = {"uid": 7, "sku": 8, "dep": 9, "kind": "buy", "ts": NOW_MS, "rating": 0.25, "page": "p1", "dev": True}
    batch = form.parse({**record, "user": [1], "more": {"deep": [None]}}, options=options)
    assert batch.user.tolist() == [user_id(SALT, "7")] and batch.item.tolist() == [public_id("8")]
    assert (batch.label.tolist(), batch.weight.tolist()) == ([0.25], [5.0])
    assert batch.context.tolist() == [[context_id("dev", "true")]]
    assert batch.request.tolist() == [public_id("p1")]


def test_unconfigured_fields_are_none(form: Format) -> None:
    bare = {"user": "ann", "action": "cart"}
    batch = form.parse(bare, options=Events(category="", item="", time=""))
    assert (batch.category.tolist(), batch.item.tolist(), batch.at_ms.tolist()) == ([0], [0], [NOW_MS])


def test_one_field_may_be_several_of_ours(form: Format) -> None:
    batch = form.parse(GOOD, options=Events(category="item", context=("item", "action")))
    assert batch.category.tolist() == batch.item.tolist() == [public_id("lamp")]
    assert batch.context.tolist() == [[context_id("item", "lamp"), context_id("action", "cart")]]
    assert form.reason({**GOOD, "item": 1.5}, Events(category="item")) == "wrong_type"


def test_a_text_and_an_integer_id_are_the_same(form: Format) -> None:
    batch = form.parse({**GOOD, "user": 7, "item": 7}, {**GOOD, "user": "7", "item": "7"})
    assert batch.user[0] == batch.user[1] and batch.item[0] == batch.item[1] != batch.user[0]


@pytest.mark.parametrize(("label", "want"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.5, 0.5)])
def test_a_label_may_be_a_truth_or_a_number(form: Format, label: object, want: float) -> None:
    assert form.parse({**GOOD, "label": label}, options=Events(label="label")).label.tolist() == [want]


@pytest.mark.parametrize(
    "time", [NOW_MS, NOW_MS // 1000, NOW_MS / 1000, str(NOW_MS), "2023-11-14T22:13:20Z", "2023-11-14T22:13:20"]
)
def test_a_time_may_be_seconds_milliseconds_or_text(form: Format, time: object) -> None:
    assert form.parse({**GOOD, "time": time}).at_ms.tolist() == [NOW_MS]


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
def test_a_bad_field_is_a_dead_letter_with_its_reason(form: Format, change: dict[str, object], why: str) -> None:
    assert form.reason({**GOOD, **change}, Events(label="label", context=("device",))) == why


# Bytes


def test_what_is_no_record_is_dead(form: Format) -> None:
    assert form.reason(b"") == "undecodable"
    for record in ([1, 2], None, "text", 7):
        assert form.reason(record) == "wrong_type"
    whole = form.write(GOOD)
    for end in range(len(whole)):
        assert form.reason(whole[:end]) == "undecodable", f"cut after {end} of {len(whole)} bytes"


def test_a_bad_record_leaves_the_others_alone(form: Format) -> None:
    batch = form.parse(GOOD, b"\xc1{", {**GOOD, "user": None}, {**GOOD, "user": "bob"})
    assert batch.user.tolist() == [user_id(SALT, "ann"), user_id(SALT, "bob")]
    assert batch.offset.tolist() == [0, 3]
    assert [(letter.offset, str(letter.reason)) for letter in batch.dead] == [(1, "undecodable"), (2, "missing_field")]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.fixed_dictionaries(
    {}, optional={name: st.just(value) | VALUES for name, value in {**GOOD, "label": 0.5, "page": "p1"}.items()}
)


@pytest.mark.parametrize("path", implementations())
@given(value=st.binary(max_size=60))
def test_any_bytes_are_a_record_or_a_decode_error(path: str, value: bytes) -> None:
    try:
        load_decoder(Events(decoder=path))(value)
    except DecodeError as error:
        assert error.reason in set(Reason)
    assert Format(path).parse(value).ranges[0].next == 1


@pytest.mark.parametrize("path", implementations())
@given(
    given_=st.lists(st.binary(max_size=30) | st.none() | RECORDS, max_size=20),
    cuts=st.sets(st.integers(0, 20)),
)
def test_any_cut_of_any_records_gives_the_same_events(
    path: str, given_: list[bytes | dict[str, object] | None], cuts: set[int]
) -> None:
    form, options = Format(path), Events(context=("action", "nowhere"), label="label", request="page")
    values = [form.write(one) if isinstance(one, dict) else one for one in given_]
    whole = form.parser(options).parse([polled(values)])
    parser = form.parser(options)
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    parts = [parser.parse([polled(values[a:b], a)]) for a, b in pairwise(edges)]
    for name in ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "offset", "request"):
        joined = np.concatenate([getattr(part, name) for part in parts] or [getattr(whole, name)])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    assert [letter for part in parts for letter in part.dead] == list(whole.dead)
    assert len(whole) + len(whole.dead) + values.count(None) == len(values)
