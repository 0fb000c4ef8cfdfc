"""An update that the trainer's guard holds: the rule, its numbers and the offsets, and their JSON form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

MOST_RELEASED = 32
"""How many released updates, the newest, are remembered. They are not held again when the log is read again."""


@dataclass(frozen=True, slots=True)
class SuspectClicks:
    """The offsets `[first, next)` of one partition of clicks that a held update contains.

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
    """The update that the guard holds, stored for serving, operators and a restarted trainer.

    Attributes:
        rule: Name of the rule.
        meaning: The quantity that the rule checks, in words.
        signal: Its value in the suspect window.
        usual: Its usual value.
        version: The newest durable version before the suspect window; 0 if there is none.
        first: Offset of the training log where the window begins.
        next: Offset of the training log after the record at which the update was held. Training pauses there.
        first_ms: Log time where the window begins.
        next_ms: Log time where training pauses.
        clicks: The update's clicks by partition.
        followed: Whether serving followed the newest version, so that a release lets it follow again.
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
        """Rule, numbers and offsets in one line.

        >>> HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),)).in_words()
        'user: share of one user is 30, usually 1, from partition 2 offset 5 on (training log 40 to 89)'
        """
        numbers = f"{self.meaning} is {self.signal:.3g}, usually {self.usual:.3g}"
        places = ", ".join(f"partition {one.partition} offset {one.first}" for one in self.clicks)
        since = f", from {places} on" if places else ""
        return f"{self.rule}: {numbers}{since} (training log {self.first} to {self.next - 1})"


def to_json(held: HeldUpdate) -> dict[str, Any]:
    """Converts to JSON values."""
    return asdict(held)


def from_json(document: Mapping[str, Any]) -> HeldUpdate:
    """Reads what `to_json` returned; fields of later releases are ignored.

    >>> held = HeldUpdate("user", "share", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),))
    >>> from_json(to_json(held)) == held
    True

    Raises:
        ValueError: A field is missing or has another type.
    """
    try:
        return msgspec.convert(document, HeldUpdate)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
