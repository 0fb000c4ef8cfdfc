"""The operator's ways to write a time and a place, and plans that count what they say."""

from __future__ import annotations

import pytest

from deploy.operate import masking, times
from state.errors import SettingsError
from tests.deploy.operating import NOW_MS, TOPIC


@pytest.mark.parametrize("text", ["yesterday", "", "-5", "-5y", "12:00"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="ISO 8601"):
        times.parse_time(text, NOW_MS)


@pytest.mark.parametrize("text", ["now", "now..10m", "5..5"])
def test_a_range_of_times_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--skip-time"):
        times.parse_times(text, NOW_MS)


def test_a_place_needs_one_clear_topic() -> None:
    other = "0000002b" + "0" * 24
    assert masking.parse_place(f"{other}:3:5-5", [TOPIC, other]) == (43, 3, 5, 6)
    for text, topics in (("3:5-5", [TOPIC, other]), ("3:5-5", []), ("3:6-5", [TOPIC]), ("5-6", [TOPIC])):
        with pytest.raises(SettingsError, match="--skip"):
            masking.parse_place(text, topics)
