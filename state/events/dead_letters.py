"""Records that are no events: the reason codes of dead letters, and what is kept of one."""

from __future__ import annotations

import enum
from typing import NamedTuple

from state.positions import Source


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
    """The reason code of what a decoder or the parser raised; a code that is none counts as undecodable.

    >>> str(reason_of(ValueError("no JSON")))
    'undecodable'
    """
    code = getattr(error, "reason", Reason.UNDECODABLE)
    return Reason(code) if code in set(Reason) else Reason.UNDECODABLE


class DeadLetter(NamedTuple):
    """A record that is no event.

    Attributes:
        source: The partition it was in.
        offset: Its offset.
        reason: Why it is dead.
        key: Its key, which is a user's raw id: for the dead-letter writer only, where bytes are switched on.
        value: Its value, likewise.
    """

    source: Source
    offset: int
    reason: Reason
    key: bytes | None
    value: bytes | None

    def __repr__(self) -> str:
        """Coordinates and reason; the bytes may hold a raw user id."""
        return f"DeadLetter({self.source}@{self.offset}, {self.reason})"
