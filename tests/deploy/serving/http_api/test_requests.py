"""What a request asks: times in both forms, and what is none."""

from __future__ import annotations

import pytest

from deploy.serving.requests.parameters import time_ms
from state.errors import BadRequest


@pytest.mark.parametrize("text", ["1500", "1970-01-01T00:00:01.5", "1970-01-01T01:00:01.5+01:00", 1500])
def test_times_are_read_in_both_forms(text: str | int) -> None:
    """Milliseconds or ISO 8601, UTC where nothing else is said."""
    assert time_ms(text) == 1500


@pytest.mark.parametrize(
    "text", ["", "yesterday", "nan", "1e3", "2026-13-01", "-1", "300000000000000", "１５００", "9" * 5000, 10**400]
)
def test_what_is_no_time_is_refused(text: str | int) -> None:
    """With an example of what is one."""
    with pytest.raises(BadRequest, match="no time"):
        time_ms(text)
