"""Dead letters, the records that cannot become events, and their reason codes."""

from __future__ import annotations

import enum
from typing import NamedTuple

from state.positions import Source

MOST_EVENT_BYTES = 1_000_000
"""Maximum size of a record of clicks or attributes; a larger one is a dead letter."""


class Reason(enum.StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "undecodable"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_ID = "empty_id"
    NOT_FINITE = "not_finite"
    IMPLAUSIBLE_TIME = "implausible_time"
    TOO_LARGE = "too_large"
    UNKNOWN_ACTION = "unknown_action"
    CORRUPT_RECORD = "corrupt_record"


def reason_of(error: Exception) -> Reason:
    """The reason code of an error raised by a decoder or the parser; an unknown code counts as undecodable."""
    code = getattr(error, "reason", Reason.UNDECODABLE)
    return Reason(code) if code in set(Reason) else Reason.UNDECODABLE


class DeadLetter(NamedTuple):
    """A record that cannot become an event: its position and the reason, without its key and value."""

    source: Source
    offset: int
    reason: Reason
