"""Types of request parameters and bodies, for HTTP and gRPC, and their conversion to queries."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deploy.serving.answers.query import (
    EXCLUSIONS,
    FIELDS,
    LATEST_MS,
    MOST_ITEMS,
    Cap,
    Exclusion,
    NamedItem,
    Query,
    WantedItems,
)
from state.errors import BadRequest

MOST_PROFILES = 1000
TOP = 10
MOST_TOP = 10_000
MOST_RECOMMENDED = 100
LEAN: frozenset[str] = frozenset()
BATCH_EXAMPLE = '{"profiles": [{"user_id": "ann", "item": "i1"}]} or {"users": ["ann"]}'
RANK_EXAMPLE = '{"user_id": "ann", "items": ["i1", {"item": "i2", "category": "hats"}]}'
_SHOWN = 100

Id = str | int
"""An id; a number means its decimal digits."""

_AT = "The time to answer for: milliseconds since 1970, or ISO 8601 (UTC unless it has an offset); by default now."
_CONTEXT = "Values of the fields of `events.context`."
_ITEM = "An item; the answer then has the probability that the user engages with it."
_CATEGORY = "The item's category; by default the one that it was last seen in."
_FIELD = f"({'|'.join(sorted(FIELDS))})"
At = Annotated[str | int, Meta(description=_AT, examples=["2026-01-31T12:00:00Z", 1769860800000])]
AtText = Annotated[str, Meta(description=_AT, examples=["2026-01-31T12:00:00Z", "1769860800000"])]
ContextTexts = Annotated[dict[str, str], Meta(description=_CONTEXT)]
Context = Annotated[dict[str, str | int | float], Meta(description=_CONTEXT)]
Fields = Annotated[
    tuple[Literal["attributes", "features", "sources", "vector"], ...],
    Meta(description="Optional parts of the answers."),
]
FieldsText = Annotated[
    str,
    Meta(
        description="Optional parts of the answer, separated by commas.",
        extra_json_schema={"pattern": f"^({_FIELD}(,{_FIELD})*)?$"},
    ),
]
_EXCLUSION = f"({'|'.join(EXCLUSIONS)})"
ExcludeText = Annotated[
    str,
    Meta(
        description="Which items are left out, separated by commas: those that the user clicked, those only shown.",
        extra_json_schema={"pattern": f"^({_EXCLUSION}(,{_EXCLUSION})*)?$"},
    ),
]
Top = Annotated[int, Meta(ge=1, le=MOST_TOP, description="The most interests of an answer.")]
Bid = Annotated[float, Meta(ge=0, description="The value of an engagement. All items have a bid, or none.")]
UserId = Annotated[Id, Meta(description="The raw id.", examples=["ann", 7])]


class _Given(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Base of all parameters and bodies: unknown names are refused."""


class ProfileParameters(_Given, frozen=True):
    """The parameters of one profile."""

    item: Annotated[str, Meta(description=_ITEM)] | None = None
    category: Annotated[str, Meta(description=_CATEGORY)] | None = None
    at: AtText | None = None
    context: ContextTexts = {}
    fields: FieldsText | None = None
    top: Top = TOP

    def query(self, user: str) -> Query:
        """Converts to a query; raises BadRequest if `at` is not a time, or `fields` names an unknown field.

        >>> ProfileParameters(item="i1", context={"device": "tv"}).query("ann")
        Query(user='ann', item='i1', category=None, context={'device': 'tv'}, at_ms=None, fields=frozenset(), top=10)
        """
        fields = LEAN if self.fields is None else fields_of(self.fields.split(","))
        return Query(user, self.item, self.category, self.context, _time_ms(self.at), fields, self.top)


class ExplanationParameters(_Given, frozen=True):
    """The parameters of an explanation."""

    label: Annotated[str, Meta(description="The category to explain, as a profile shows it.")] | None = None
    item: Annotated[str, Meta(description="The item whose engagement is to be explained.")] | None = None
    category: Annotated[str, Meta(description=_CATEGORY)] | None = None
    at: AtText | None = None
    context: ContextTexts = {}
    top: Annotated[int, Meta(ge=1, le=MOST_TOP, description="The most reasons.")] = TOP

    def query(self, user: str) -> Query:
        """Converts to a query; raises BadRequest if `at` is not a time."""
        return Query(user, self.item, self.category, self.context, _time_ms(self.at), LEAN, self.top)


class ProfileQuestion(_Given, frozen=True):
    """The query for one user's profile."""

    user_id: UserId
    item: Annotated[Id, Meta(description=_ITEM)] | None = None
    category: Annotated[Id, Meta(description=_CATEGORY)] | None = None
    at: At | None = None
    context: Context | None = None


class ProfilesQuestion(_Given, frozen=True):
    """A batch of profiles, each with its own query."""

    profiles: Annotated[list[ProfileQuestion], Meta(min_length=1, max_length=MOST_PROFILES)]
    fields: Fields = ()
    top: Top = TOP

    def queries(self) -> list[Query]:
        """Converts to queries; raises BadRequest if an `at` is not a time.

        >>> ProfilesQuestion([ProfileQuestion("ann", item=7)]).queries()
        [Query(user='ann', item='7', category=None, context={}, at_ms=None, fields=frozenset(), top=10)]
        """
        fields = frozenset[str](self.fields)
        return [
            Query(
                str(question.user_id),
                _id(question.item),
                _id(question.category),
                _texts(question.context),
                _time_ms(question.at, f"/profiles/{index}/at"),
                fields,
                self.top,
            )
            for index, question in enumerate(self.profiles)
        ]


class UsersQuestion(_Given, frozen=True):
    """A batch of profiles by user id only."""

    users: Annotated[list[Id], Meta(min_length=1, max_length=MOST_PROFILES)]
    fields: Fields = ()
    top: Top = TOP

    def queries(self) -> list[Query]:
        """Converts to queries."""
        fields = frozenset[str](self.fields)
        return [Query(str(user), fields=fields, top=self.top) for user in self.users]


class ItemToRank(_Given, frozen=True):
    """An item with an optional category, bid (items are then ranked by bid) and frequency cap."""

    item: Id
    category: Id | None = None
    bid: Bid | None = None
    cap: Cap | None = None


class RankQuestion(_Given, frozen=True):
    """Items to rank for a user."""

    user_id: UserId
    items: Annotated[list[str | int | ItemToRank], Meta(min_length=1, max_length=MOST_ITEMS)]
    context: Context | None = None
    at: At | None = None

    def query(self) -> Query:
        """Converts to a query about the user; raises BadRequest if `at` is not a time."""
        return Query(
            str(self.user_id), context=_texts(self.context), at_ms=_time_ms(self.at, "/at"), fields=LEAN, top=0
        )

    def named_items(self) -> list[NamedItem]:
        """Converts the items.

        >>> RankQuestion(7, ["i1", ItemToRank(2, "hats")]).named_items()
        [NamedItem(item='i1', category=None, bid=None, cap=None), NamedItem(item='2', category='hats', bid=None, cap=None)]
        """
        return [
            NamedItem(str(item.item), _id(item.category), item.bid, item.cap)
            if isinstance(item, ItemToRank)
            else NamedItem(str(item))
            for item in self.items
        ]


class NearParameters(_Given, frozen=True):
    """The parameters of similar items."""

    n: Annotated[int, Meta(ge=1, le=MOST_RECOMMENDED, description="How many items at most.")] = 20
    exclude: ExcludeText | None = None
    at: AtText | None = None
    context: ContextTexts = {}

    def query(self, user: str) -> Query:
        """Converts to a query about the user; raises BadRequest if `at` is not a time."""
        return Query(user, context=self.context, at_ms=_time_ms(self.at), fields=LEAN, top=0)

    def wanted(self) -> WantedItems:
        """Returns which items are requested; raises BadRequest if `exclude` names something unknown."""
        return WantedItems(self.n, None, exclusions_of(self.exclude))


class RecommendationParameters(NearParameters, frozen=True):
    """The parameters of recommendations."""

    category: Annotated[str, Meta(description="Items of this category only.")] | None = None

    def query(self, user: str) -> Query:
        """Converts to a query about the user, with all interests; raises BadRequest if `at` is not a time."""
        return NearParameters.query(self, user)._replace(top=None)

    def wanted(self) -> WantedItems:
        """Returns which items are requested; raises BadRequest if `exclude` names something unknown.

        >>> RecommendationParameters(n=3, exclude="clicked").wanted()
        WantedItems(most=3, category=None, exclude=frozenset({'clicked'}), per_category=0)
        """
        return NearParameters.wanted(self)._replace(category=self.category)


def time_ms(written: str | int, where: str = "at") -> int:
    """Parses a time given as milliseconds since 1970 or as ISO 8601 (UTC without an offset).

    >>> time_ms("1500"), time_ms("1970-01-01T00:00:01.5Z")
    (1500, 1500)

    Raises:
        BadRequest: It is neither, or is outside the years 1970 to 9999.
    """
    try:
        if isinstance(written, int) or (written.isascii() and written.isdigit()):
            at_ms = int(written)
        else:
            moment = datetime.fromisoformat(written)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            at_ms = round(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        at_ms = -1
    if not 0 <= at_ms <= LATEST_MS:
        raise BadRequest(
            f"at={str(written)[:_SHOWN]!r} is no time",
            "give ISO 8601 such as 2026-01-31T12:00:00Z, or milliseconds since 1970",
            where,
        )
    return at_ms


def fields_of(names: list[str]) -> frozenset[str]:
    """Returns the requested optional fields; raises BadRequest if one is unknown.

    >>> fields_of(["vector"])
    frozenset({'vector'})
    """
    for name in names:
        if name not in FIELDS:
            listed = ", ".join(sorted(FIELDS))
            raise BadRequest(f"there is no field {name[:_SHOWN]!r}", f"ask for some of {listed}", "fields")
    return frozenset(names)


def exclusions_of(text: str | None) -> frozenset[Exclusion]:
    """Returns which items to leave out; raises BadRequest if the text names something unknown.

    >>> sorted(exclusions_of("shown,clicked")), exclusions_of(None)
    (['clicked', 'shown'], frozenset())
    """
    names = text.split(",") if text else ()
    for name in names:
        if name not in EXCLUSIONS:
            do = f"exclude {' or '.join(EXCLUSIONS)}, or both: {','.join(EXCLUSIONS)}"
            raise BadRequest(f"{name[:_SHOWN]!r} cannot be excluded", do, "exclude")
    return frozenset(exclusion for exclusion in EXCLUSIONS if exclusion in names)


def _time_ms(written: str | int | None, where: str = "at") -> int | None:
    return None if written is None else time_ms(written, where)


def _id(identity: Id | None) -> str | None:
    return None if identity is None else str(identity)


def _texts(context: Mapping[str, Any] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (context or {}).items()}
