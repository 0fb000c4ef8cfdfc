"""An update that the trainer's guard holds: which rule, with what numbers, from which place, and how it is written. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

MOST_RELEASED = 32
"""Verdicts that an operator called false, the newest, which are not held again where the log is read again."""


@dataclass(frozen=True, slots=True)
class SuspectClicks:
    """The offsets `[first, next)` of one partition of the clicks that a held update has.

    Attributes:
        topic_id: The topic's id, 32 hexadecimal digits.
        partition: The partition.
        first: The first offset.
        next: The offset after the last one.
    """

    topic_id: str
    partition: int
    first: int
    next: int


@dataclass(frozen=True, slots=True)
class HeldUpdate:
    """What the guard holds, for answers, operators and the trainer that is started again.

    Attributes:
        rule: Name of the rule.
        meaning: What it looks at, in words.
        signal: Its number in the suspect window.
        usual: What it usually is.
        version: The newest durable version before the suspect window; 0 where there is none.
        first: Offset of the training log where that window begins.
        next: Offset of the training log after the record at which it was held: training rests there.
        first_ms: Log time where that window begins.
        next_ms: Log time where training rests.
        clicks: Its clicks by partition.
        followed: Whether answers followed the newest version, so that a release lets them follow again.
    """

    rule: str
    meaning: str
    signal: float
    usual: float
    version: int
    first: int
    next: int
    first_ms: int
    next_ms: int
    clicks: tuple[SuspectClicks, ...] = ()
    followed: bool = True

    def in_words(self) -> str:
        """Rule, numbers and place in one line.

        >>> HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),)).in_words()
        'user: share of one user is 30, usually 1, from partition 2 offset 5 on (training log 40 to 89)'
        """
        numbers = f"{self.meaning} is {self.signal:.3g}, usually {self.usual:.3g}"
        places = ", ".join(f"partition {one.partition} offset {one.first}" for one in self.clicks)
        since = f", from {places} on" if places else ""
        return f"{self.rule}: {numbers}{since} (training log {self.first} to {self.next - 1})"


def to_json(held: HeldUpdate) -> dict[str, Any]:
    """As JSON values."""
    return asdict(held)


def from_json(document: Mapping[str, Any]) -> HeldUpdate:
    """What `to_json` made; fields of later releases are left out.

    >>> held = HeldUpdate("user", "share", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),))
    >>> from_json(to_json(held)) == held
    True

    Raises:
        ValueError: A field is missing, or of another type.
    """
    try:
        return msgspec.convert(document, HeldUpdate)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
