"""What is asked of a user, and what is answered; the fields of an answer are those of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

FIELDS = frozenset(("features", "vector", "attributes", "sources"))
"""What an answer has on request only."""


class Query(NamedTuple):
    """A question.

    Attributes:
        user: The raw id; it is used for the pseudonym and returned, and never stored.
        item: An item to score the engagement for.
        category: The item's category; by default the one it was last seen in.
        context: Values of context fields.
        at_ms: The time to answer for; by default now by the configured clock.
        fields: Of `FIELDS`, those that the answer has.
        top: The most interests that it has; None for all.
    """

    user: str
    item: str | None = None
    category: str | None = None
    context: Mapping[str, str] = MappingProxyType({})
    at_ms: int | None = None
    fields: frozenset[str] = FIELDS
    top: int | None = None


class Version(TypedDict):
    """Which version an answer is from; `age_s` since it was published, `sources` as far as it was trained."""

    number: int
    epoch: int
    age_s: float
    mask_generation: int
    sources: NotRequired[Mapping[str, int]]


class Interest(TypedDict):
    """A candidate: the category's name (or id where it has none), its id, its probability."""

    label: str
    id: str
    probability: float


class Engagement(TypedDict):
    """How probable it is that the user engages with the item, whose attributes are named as the user's are."""

    item: str
    probability: float
    attributes: Mapping[str, str | None]


@dataclass(slots=True)
class About:
    """Whom and which moment an answer is about.

    Attributes:
        user_id: As it was asked for.
        known: Whether the user has a visible click or a row.
        cold_start: Whether the answer is the one for unknown users.
        version: Which version it is from.
        at: The time the windows speak of, ISO 8601.
        at_ms: The same in milliseconds.
        clock: Where it comes from: `event`, `wall` or `request`.
    """

    user_id: str
    known: bool
    cold_start: bool
    version: Version
    at: str
    at_ms: int
    clock: str


@dataclass(slots=True)
class Answer(About):
    """What is known of one user at one moment.

    Attributes:
        interests: Candidates, best first; the probabilities of all sum to 1.
        engagement: For the item asked for; else None.
        vector: `[width]` float32; None where it is not asked for.
        features: The windows by name, likewise.
        attributes: Of the user, by name, likewise; None where the record has no such value. Empty without a record.
        churn: That the user has no event in the next `churn.days`; None where that is off or not known.
    """

    interests: list[Interest]
    engagement: Engagement | None
    vector: NDArray[np.float32] | None
    features: dict[str, int] | None
    attributes: Mapping[str, str | None] | None
    churn: float | None = None

    def document(self) -> dict[str, Any]:
        """The fields that there are, by name."""
        document: dict[str, Any] = {
            "user_id": self.user_id,
            "known": self.known,
            "cold_start": self.cold_start,
            "version": self.version,
            "at": self.at,
            "at_ms": self.at_ms,
            "clock": self.clock,
            "interests": self.interests,
        }
        asked = {name: getattr(self, name) for name in ("churn", "engagement", "vector", "features", "attributes")}
        return document | {name: value for name, value in asked.items() if value is not None}


def iso(at_ms: int) -> str:
    """ISO 8601 of milliseconds since 1970.

    >>> iso(1_500)
    '1970-01-01T00:00:01.500Z'
    """
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{_to_seconds(seconds)}.{milliseconds:03}Z"


@lru_cache(1024)
def _to_seconds(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")
