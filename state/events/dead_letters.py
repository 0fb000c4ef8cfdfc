"""Dead letters, the records that cannot become events: their reason codes, and their stored data."""

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
    """A record that cannot become an event.

    Key and value are only for the dead-letter writer, if writing bytes is enabled, because the key is a user's raw id.
    """

    source: Source
    offset: int
    reason: Reason
    key: bytes | None
    value: bytes | None

    def __repr__(self) -> str:
        """Shows only coordinates and reason, because the bytes may contain a raw user id."""
        return f"DeadLetter({self.source}@{self.offset}, {self.reason})"
