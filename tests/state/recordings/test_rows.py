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
from state.recordings.rows import NO_TIME, EncodedRows, Encoder, RecordedRows, RecordedTimes, Span

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
TIMES = st.lists(st.one_of(st.integers(0, 100 * DAY_MS), st.just(NO_TIME)), min_size=1, max_size=120)


def span(at_ms: list[int], far_ms: int = AGE_MS) -> Span:
    times = RecordedTimes()
    times.add(np.array(at_ms, np.int64), 0, np.arange(2, 2 + len(at_ms)))
    return times.span(far_ms)


def test_strays_are_found_wherever_they_stand_and_however_far_they_are() -> None:
    days = [(1000 * 20 + number) * DAY_MS // 20 for number in range(200)]  # ten days
    for strays in ([1050], [1400], [0], [0, 900], [0, 1080, 1900], [1045, 1045, 1045]):
        at_ms = [*days[:50], *(day * DAY_MS for day in strays), *days[50:]]
        found = span(at_ms)
        assert (found.oldest_ms, found.newest_ms, found.rows) == (days[0], days[-1], len(at_ms))
        assert (found.strays, found.first) == (len(strays), (0, 52))
        assert found.stray_ms == (min(strays) * DAY_MS, max(strays) * DAY_MS)
        assert found.is_stray(np.array([*at_ms, NO_TIME])).sum() == len(strays)


def test_a_long_recording_has_no_strays_nor_has_one_with_a_pause() -> None:
    year = [number * DAY_MS // 10 for number in range(3650)]
    fading = [round(365 * DAY_MS * (number / 1000) ** 2) for number in range(1000)]
    pause = [number * DAY_MS // 10 + (200 * DAY_MS if number > 50 else 0) for number in range(1000)]
    for at_ms in (year, fading, pause):
        found = span(at_ms)
        assert (found.oldest_ms, found.newest_ms, found.strays) == (at_ms[0], at_ms[-1], 0)


@given(TIMES)
def test_few_rows_are_strays_and_a_wide_gap_separates_them(at_ms: list[int]) -> None:
    found = span(at_ms)
    timed = [at for at in at_ms if at != NO_TIME]
    if not timed:
        assert found == Span()
        return
    early, late = [at for at in timed if at < found.oldest_ms], [at for at in timed if at > found.newest_ms]
    assert found.strays == len(early) + len(late) == found.is_stray(np.array(at_ms)).sum()
    assert max(len(early), len(late)) <= len(timed) / 25
    assert {found.oldest_ms, found.newest_ms} <= {*timed}
    assert all(found.oldest_ms - at > AGE_MS for at in early)
    assert all(at - found.newest_ms > AGE_MS for at in late)


@given(TIMES, st.booleans())
def test_the_parser_takes_recorded_times_but_not_those_of_strays(at_ms: list[int], is_long: bool) -> None:
    """The times of a recording are 200 days, or 27 years and 200 days, after 1970."""
    at_ms = [at if at == NO_TIME else at + 200 * DAY_MS + is_long * 10_000 * DAY_MS for at in at_ms]
    columns: dict[str, list[Any]] = {name: [value] * len(at_ms) for name, value in CLICK.items()}
    columns["time"] = [None if at == NO_TIME else at / 1000 for at in at_ms]
    encoder = Encoder(DEFAULT, {}, LATEST)
    encoded = encoder.encode(rows(columns), 0)
    assert encoded.at_ms.tolist() == at_ms
    found = span(at_ms)
    piece = Piece(encoded.keys, encoder.values(encoded, encoded.at_ms), found.kept_stamps(encoded.at_ms, LATEST))
    refused = {row for row, at in enumerate(at_ms) if at == NO_TIME or not found.oldest_ms <= at <= found.newest_ms}
    assert {*Judge(DEFAULT).judge(piece)} == refused


@given(TIMES, st.data())
def test_rows_counted_in_pieces_are_those_counted_at_once(at_ms: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(at_ms)))
    times, lines = RecordedTimes(), np.arange(2, 2 + len(at_ms))
    for part in (slice(cut), slice(cut, None)):
        times.add(np.array(at_ms[part], np.int64), 0, lines[part])
    assert times.span(AGE_MS) == span(at_ms)
