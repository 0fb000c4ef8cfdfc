"""Requests for profiles: parameters of a single profile, bodies of a batch, and their conversion to queries."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from deploy.serving.answer import FIELDS, Query
from state.errors import BadRequest

MOST_PROFILES = 1000
LATEST_MS = 253_402_300_799_000  # the end of the year 9999
EXAMPLE = '{"profiles": [{"user_id": "ann", "item": "i1"}]} or {"users": ["ann"]}'
TOP = 10
"""The default number of interests in an answer."""
MOST_TOP = 10_000
LEAN: frozenset[str] = frozenset()
_SHOWN = 100

Id = str | int
"""An id; a number means its decimal digits."""

AT = "The time to answer for: milliseconds since 1970, or ISO 8601 (UTC unless it says otherwise); by default now."
CONTEXT = "Values of the fields of `events.context`."
ITEM = "An item; how probable it is that the user engages with it is also said."
CATEGORY = "The item's category; by default the one that it was last seen in."
At = Annotated[str | int, Meta(description=AT, examples=["2026-01-31T12:00:00Z", 1769860800000])]
AtText = Annotated[str, Meta(description=AT, examples=["2026-01-31T12:00:00Z", "1769860800000"])]
ContextTexts = Annotated[dict[str, str], Meta(description=CONTEXT)]
Context = Annotated[dict[str, str | int | float], Meta(description=CONTEXT)]
_ONE = f"({'|'.join(sorted(FIELDS))})"
_LISTED = f"^({_ONE}(,{_ONE})*)?$"
Field = Literal["attributes", "features", "sources", "vector"]
Fields = Annotated[tuple[Field, ...], Meta(description="What the answers have beside what every answer has.")]
Top = Annotated[int, Meta(ge=1, le=MOST_TOP, description="The most interests of an answer.")]
Item = Annotated[Id, Meta(description=ITEM)]
Category = Annotated[Id, Meta(description=CATEGORY)]


class ProfileParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of one profile."""

    item: Annotated[str, Meta(description=ITEM)] | None = None
    category: Annotated[str, Meta(description=CATEGORY)] | None = None
    at: AtText | None = None
    context: ContextTexts = {}
    fields: (
        Annotated[
            str,
            Meta(
                description="What the answer has beside what every answer has, separated by commas.",
                extra_json_schema={"pattern": _LISTED},
            ),
        ]
        | None
    ) = None
    top: Top = TOP


class ExplanationParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of an explanation."""

    label: Annotated[str, Meta(description="The category to explain, as a profile shows it.")] | None = None
    item: Annotated[str, Meta(description="The item whose engagement is to be explained.")] | None = None
    category: Annotated[str, Meta(description="As in a batch.")] | None = None
    at: Annotated[str, Meta(description="As in a batch.")] | None = None
    context: dict[str, str] = {}
    top: Annotated[int, Meta(ge=1, le=MOST_TOP, description="The most reasons.")] = TOP


class ProfileQuestion(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The query for one user's profile."""

    user_id: Annotated[Id, Meta(description="The raw id.", examples=["ann", 7])]
    item: Item | None = None
    category: Category | None = None
    at: At | None = None
    context: Context | None = None


class ProfilesQuestion(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A batch of profiles, each with its own query."""

    profiles: Annotated[list[ProfileQuestion], Meta(min_length=1, max_length=MOST_PROFILES)]
    fields: Fields = ()
    top: Top = TOP


class UsersQuestion(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A batch of profiles by user id only."""

    users: Annotated[list[Id], Meta(min_length=1, max_length=MOST_PROFILES)]
    fields: Fields = ()
    top: Top = TOP


BATCH = (ProfilesQuestion, UsersQuestion)


def time_ms(given: str | int, where: str = "at") -> int:
    """Parses a time given as milliseconds since 1970 or as ISO 8601 (UTC without an offset).

    >>> time_ms("1500"), time_ms("1970-01-01T00:00:01.5Z")
    (1500, 1500)

    Raises:
        BadRequest: It is neither, or is outside the years 1970 to 9999.
    """
    try:
        if isinstance(given, int) or (given.isascii() and given.isdigit()):
            at_ms = int(given)
        else:
            moment = datetime.fromisoformat(given)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            at_ms = round(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        at_ms = -1
    if not 0 <= at_ms <= LATEST_MS:
        raise BadRequest(
            f"at={str(given)[:_SHOWN]!r} is no time",
            "give ISO 8601 such as 2026-01-31T12:00:00Z, or milliseconds since 1970",
            where,
        )
    return at_ms


def question(user: str, given: ProfileParameters) -> Query:
    """Converts the parameters of a GET request to a query.

    >>> question("ann", ProfileParameters(item="i1", context={"device": "tv"}))
    Query(user='ann', item='i1', category=None, context={'device': 'tv'}, at_ms=None, fields=frozenset(), top=10)

    Raises:
        BadRequest: `at` is not a time, or `fields` names an unknown field.
    """
    at_ms = None if given.at is None else time_ms(given.at)
    fields = LEAN if given.fields is None else fields_of(given.fields.split(","))
    return Query(user, given.item, given.category, given.context, at_ms, fields, given.top)


def explained(user: str, given: ExplanationParameters) -> Query:
    """Converts the parameters of an explanation to a query.

    >>> explained("ann", ExplanationParameters(item="i1", top=3))
    Query(user='ann', item='i1', category=None, context={}, at_ms=None, fields=frozenset(), top=3)

    Raises:
        BadRequest: `at` is not a time.
    """
    at_ms = None if given.at is None else time_ms(given.at)
    return Query(user, given.item, given.category, given.context, at_ms, LEAN, given.top)


def fields_of(names: list[str]) -> frozenset[str]:
    """Returns the requested optional fields.

    >>> fields_of(["vector"])
    frozenset({'vector'})

    Raises:
        BadRequest: A field is unknown.
    """
    for name in names:
        if name not in FIELDS:
            listed = ", ".join(sorted(FIELDS))
            raise BadRequest(f"there is no field {name[:_SHOWN]!r}", f"ask for some of {listed}", "fields")
    return frozenset(names)


def whole(name: str, given: int, least: int, most: int) -> int:
    """Checks that an integer in a request is within bounds, and returns it.

    >>> whole("top", 5, 1, 10)
    5

    Raises:
        BadRequest: It is out of bounds.
    """
    if not least <= given <= most:
        raise BadRequest(f"{name}={given} is out of bounds", f"give a whole number from {least} to {most}", name)
    return given


def questions(given: ProfilesQuestion | UsersQuestion) -> list[Query]:
    """Converts the body of a batch to queries.

    >>> questions(ProfilesQuestion([ProfileQuestion("ann", item=7)]))
    [Query(user='ann', item='7', category=None, context={}, at_ms=None, fields=frozenset(), top=10)]

    Raises:
        BadRequest: An `at` is not a time.
    """
    fields = frozenset[str](given.fields)
    if isinstance(given, UsersQuestion):
        return [Query(str(user), fields=fields, top=given.top) for user in given.users]
    return [
        Query(
            str(one.user_id),
            None if one.item is None else str(one.item),
            None if one.category is None else str(one.category),
            {name: str(value) for name, value in (one.context or {}).items()},
            None if one.at is None else time_ms(one.at, f"/profiles/{place}/at"),
            fields,
            given.top,
        )
        for place, one in enumerate(given.profiles)
    ]
