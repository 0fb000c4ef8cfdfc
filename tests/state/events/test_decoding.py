"""What JSON's decoder refuses and why, and times in their units."""

from __future__ import annotations

import json
from typing import Any

import pytest

from state.config.sections import Events
from state.errors import DecodeError, SettingsError
from state.events.decoding import decode_json, load_decoder, parse_time

NOW_MS = 1_700_000_000_000
GOOD: dict[str, Any] = {"user": "ann", "item": "lamp", "category": "home", "action": "cart", "time": NOW_MS}


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
