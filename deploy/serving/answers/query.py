"""The questions that serving answers; `springtide_client.answers` has the types of the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from springtide_client.answers import About

FIELDS = frozenset(("features", "vector", "attributes", "sources"))
"""Fields that an answer has only on request."""
NOBODY = "\0"
"""A user id that no user has: the unknown user."""
Exclusion = Literal["clicked", "shown"]
"""Which of the user's items a list leaves out: those that the user clicked, or those that were only shown."""
EXCLUSIONS: tuple[Exclusion, ...] = ("clicked", "shown")
LATEST_MS = 253_402_300_799_000  # the end of the year 9999
MOST_ITEMS = 1000
"""The maximum number of items to rank."""
STEEPEST_LOGIT = 60.0
"""Logits are clipped to this magnitude; beyond it a float64 probability is 0 or 1, and `exp` may overflow."""


class Query(NamedTuple):
    """A query about one user; `user`, the raw id, is returned but never stored.

    Attributes:
        item: An item to score the engagement for.
        category: The item's category; by default the one the item was last seen in.
        at_ms: The time to answer for; by default the current time of the configured clock.
        top: The maximum number of interests in the answer; None for all.
    """

    user: str
    item: str | None = None
    category: str | None = None
    context: Mapping[str, str] = MappingProxyType({})
    at_ms: int | None = None
    fields: frozenset[str] = FIELDS
    top: int | None = None


class Cap(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The maximum number of times that a user may have seen an item."""

    count: Annotated[int, Meta(ge=1, description="The item is left out once it was seen this many times.")]
    within_s: Annotated[float, Meta(gt=0, description="Events count in so many seconds before the time of the query.")]


class NamedItem(NamedTuple):
    """An item to rank.

    Attributes:
        category: The raw id of its category; by default the one it was last seen in.
        bid: The value of an engagement; None to rank items by probability.
        cap: How often the user may see the item; None for no limit.
    """

    item: str
    category: str | None = None
    bid: float | None = None
    cap: Cap | None = None


class WantedItems(NamedTuple):
    """Which recommended or similar items are requested.

    Attributes:
        category: Only items of the category with this raw id.
        exclude: Which of the user's items to leave out.
        per_category: The maximum number of recommended items of one category, unless `category` is given; 0 for no limit.
    """

    most: int
    category: str | None = None
    exclude: frozenset[Exclusion] = frozenset()
    per_category: int = 0


Kind = TypeVar("Kind", bound=About)


def about_same(kind: type[Kind], answer: About, **fields: Any) -> Kind:
    """Returns an answer of another kind about the same user, time and version."""
    return kind(**{name: getattr(answer, name) for name in About.__struct_fields__}, **fields)


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


def probability(logit: float) -> float:
    """The logistic function.

    >>> probability(0.0), probability(-1e9) < 1e-25
    (0.5, True)
    """
    return 1.0 / (1.0 + math.exp(-min(max(logit, -STEEPEST_LOGIT), STEEPEST_LOGIT)))
