"""Rows of recordings become records, and strays in time are told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.replaying.recording import Judge
from deploy.replaying.sender import Piece
from state.config.loading import load
from state.config.sections import Events
from state.errors import SettingsError
from state.events.decoding import decode_json
from state.recordings.rows import NO_TIME, Crowd, EncodedRows, Encoder, RecordedRows, RecordedTimes

LATEST = 1_800_000_000_000
DEFAULT = Events()
AT_MS = 1_700_000_000_000


def rows(columns: Mapping[str, list[Any]], broken: frozenset[int] = frozenset()) -> RecordedRows:
    count = len(next(iter(columns.values())))
    return RecordedRows(columns, np.arange(1, count + 1), broken, lambda row: f"text of {row}".encode())


def one(events: Events = DEFAULT, constants: dict[str, str] | None = None, **fields: Any) -> tuple[EncodedRows, bytes]:
    encoder = Encoder(events, constants or {}, LATEST)
    encoded = encoder.encode(rows({name: [value] for name, value in fields.items()}), 0)
    return encoded, encoder.values(encoded, encoded.at_ms)[0]


CLICK: dict[str, Any] = {"user": "ada", "item": 7, "category": "c", "action": "view", "time": "1700000000"}


def test_a_record_is_what_the_decoder_reads_keyed_by_user() -> None:
    encoded, value = one(**CLICK)
    assert encoded.keys == [b"ada"]
    assert encoded.at_ms.tolist() == [AT_MS]
    event = decode_json(Events())(value)
    assert (event.user, event.item, event.category, event.action, event.time) == ("ada", 7, "c", "view", AT_MS)


@given(
    user=st.one_of(st.text(min_size=1), st.integers(0, 2**63 - 1)),
    category=st.text(min_size=1),
    at_ms=st.integers(0, LATEST),
    moved_ms=st.integers(10**12, LATEST),
    unit=st.sampled_from(["auto", "ms", "iso", "s"]),
)
def test_any_click_survives_the_way_with_its_new_time(
    user: str | int, category: str, at_ms: int, moved_ms: int, unit: str
) -> None:
    events = Events(time_unit=unit, max_age_s=1e12, time="when it was")
    encoder = Encoder(events, {"action": "cart"}, LATEST)
    written = str(np.datetime64(at_ms, "ms")) if unit == "iso" else at_ms / 1000 if unit == "s" else at_ms + 10**12
    encoded = encoder.encode(rows({"user": [user], "item": [1], "category": [category], "when it was": [written]}), 0)
    if encoded.at_ms[0] == NO_TIME:
        assert unit in ("auto", "ms")  # beyond the latest
        return
    value = encoder.values(encoded, np.array([moved_ms]))[0]
    event = decode_json(events)(value)
    assert (event.user, event.category, event.action) == (user, category, "cart")
    piece = Piece(encoded.keys, [value], np.array([moved_ms]))
    assert Judge(events).judge(piece) == {}
    assert encoded.keys == [str(user).encode()]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"time": "soon"}, "wrong_type"),
        ({"time": None}, "missing_field"),
        ({"time": math.inf}, "missing_field"),
        ({"time": "inf"}, "not_finite"),
        ({"time": LATEST + 1}, "implausible_time by events.max_future_s"),
        ({"user": None}, "missing_field"),
        ({"user": ""}, "empty_id"),
        ({"user": 1.5}, "wrong_type"),
        ({"item": [1, 2]}, "wrong_type"),
        ({"item": 10**30}, "undecodable"),
        ({"category": ""}, "empty_id"),
        ({"action": "stare"}, "unknown_action"),
    ],
)
def test_a_row_that_is_no_click_is_sent_for_the_parser_to_refuse(fields: dict[str, Any], reason: str) -> None:
    encoded, value = one(**(CLICK | fields))
    piece = Piece(encoded.keys, [value], np.array([AT_MS]))
    assert Judge(Events()).judge(piece) == {0: reason}


def test_a_row_that_cannot_be_split_is_sent_as_its_text() -> None:
    encoder = Encoder(Events(), {}, LATEST)
    columns = {name: [value, None] for name, value in CLICK.items()}
    encoded = encoder.encode(rows(columns, frozenset({1})), 3)
    assert encoder.values(encoded, encoded.at_ms)[1] == b"text of 1"
    assert (encoded.keys[1], encoded.at_ms[1], encoded.file.tolist()) == (b"", NO_TIME, [3, 3])


def test_labels_written_as_text_are_numbers_and_context_goes_along() -> None:
    events = Events(label="liked", context=("tab", "category"))
    _, value = one(events, **CLICK, liked="1", tab=3)
    assert json.loads(value) == {**CLICK, "time": AT_MS, "liked": 1, "tab": 3}
    _, value = one(events, {"liked": "0.5"}, **CLICK, tab=None)
    assert json.loads(value)["liked"] == 0.5


@pytest.mark.parametrize("field", ["context", "item", "category", "action", "user"])
def test_an_outcome_is_no_feature(field: str) -> None:
    flags = [f"--events.{field}=is_like", "--events.outcomes=play_time_ms,is_like"]
    with pytest.raises(SettingsError, match=rf"flag --events.{field}: .*'is_like', an outcome.*events\.outcomes"):
        load(flags, env={})


def test_the_label_is_an_outcome_without_being_listed() -> None:
    with pytest.raises(SettingsError, match="'is_click', an outcome"):
        load(["--events.label=is_click", "--events.context=tab,is_click"], env={})
    assert replace(Events(), label="is_click").outcomes == ()


DAY_MS = 86_400_000
AGE_MS = 30 * DAY_MS
TIMES = st.lists(st.one_of(st.integers(0, 100 * DAY_MS), st.just(NO_TIME)), min_size=1, max_size=60)


def crowd(at_ms: list[int], max_age_ms: int = AGE_MS) -> Crowd:
    times = RecordedTimes()
    times.add(np.array(at_ms, np.int64), 0, np.arange(2, 2 + len(at_ms)))
    return times.crowd(max_age_ms)


def refused(at_ms: list[int], newest_ms: int) -> int:
    """Rows that are too old, or after the newest."""
    return sum(at != NO_TIME and not newest_ms - AGE_MS <= at <= newest_ms for at in at_ms)


def test_strays_are_described_wherever_they_stand_and_however_late_they_are() -> None:
    days = [number * DAY_MS // 20 for number in range(200)]  # ten days
    for late in ([35], [60], [400], [35, 80, 900]):
        at_ms = [*days[:50], *(day * DAY_MS for day in late), *days[50:]]
        found = crowd(at_ms)
        assert (found.newest_ms, found.strays, found.first) == (days[-1], len(late), (0, 52))
        assert found.latest_ms == max(late) * DAY_MS
        assert found.spared > 0


def test_the_end_of_a_long_recording_is_no_stray() -> None:
    """Half of it is too old either way; its last day is not given up for an older one with more clicks."""
    even = [number * DAY_MS // 10 for number in range(600)]
    fading = [round(60 * DAY_MS * (number / 1000) ** 2) for number in range(1000)]
    for at_ms in (even, fading):
        assert crowd(at_ms).strays == 0


@given(TIMES)
def test_telling_apart_never_refuses_more_rows_and_needs_a_reason(at_ms: list[int]) -> None:
    found = crowd(at_ms)
    timed = [at for at in at_ms if at != NO_TIME]
    if not timed:
        assert found == Crowd(NO_TIME)
        return
    newest_ms = max(timed)
    assert found.latest_ms == newest_ms
    assert found.strays == sum(at > found.newest_ms for at in timed)
    assert refused(at_ms, found.newest_ms) <= refused(at_ms, newest_ms)
    if newest_ms - min(timed) <= AGE_MS:
        assert found.strays == 0


@given(TIMES, st.data())
def test_rows_counted_in_pieces_are_those_counted_at_once(at_ms: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(at_ms)))
    times, lines = RecordedTimes(), np.arange(2, 2 + len(at_ms))
    for part in (slice(cut), slice(cut, None)):
        times.add(np.array(at_ms[part], np.int64), 0, lines[part])
    assert times.crowd(AGE_MS) == crowd(at_ms)
