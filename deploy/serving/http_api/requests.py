"""What a request asks: a query string or a body, read into questions or refused with what to do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

import orjson

from deploy.serving.answer import FIELDS, Query
from state.errors import BadRequest

MOST_PROFILES = 1000
LATEST_MS = 253_402_300_799_000  # the end of the year 9999
FORM = 'send {"profiles": [{"user_id": "ann", "item": "i1"}]} or {"users": ["ann"]}'
CONTEXT = "context."
TOP = 10
"""Interests of an answer where nobody says how many."""
MOST_TOP = 10_000
LEAN: frozenset[str] = frozenset()
_FIELDS = {"user_id", "item", "category", "at", "context"}


def time_ms(text: str | int) -> int:
    """A time given as milliseconds since 1970 or as ISO 8601 (UTC unless it says otherwise).

    >>> time_ms("1500"), time_ms("1970-01-01T00:00:01.5Z")
    (1500, 1500)

    Raises:
        BadRequest: It is neither, or lies outside of the years 1970 to 9999.
    """
    try:
        at_ms = int(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(str(text))
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            at_ms = round(moment.timestamp() * 1000)
        except (ValueError, OverflowError):
            at_ms = -1
    if not 0 <= at_ms <= LATEST_MS:
        raise BadRequest(
            f"at={text!r} is no time", "give ISO 8601 such as 2026-01-31T12:00:00Z, or milliseconds since 1970"
        )
    return at_ms


def question(user: str, query_string: bytes) -> Query:
    """What a GET asks.

    >>> question("ann", b"item=i1&context.device=tv")
    Query(user='ann', item='i1', category=None, context={'device': 'tv'}, at_ms=None, fields=frozenset(), top=10)

    Raises:
        BadRequest: `at` is no time, `fields` names one that there is not, or `top` is no number of interests.
    """
    if not query_string:
        return Query(user, fields=LEAN, top=TOP)
    given = dict(parse_qsl(query_string.decode("latin-1")))
    at = given.get("at")
    return Query(
        user,
        given.get("item"),
        given.get("category"),
        {name.removeprefix(CONTEXT): value for name, value in given.items() if name.startswith(CONTEXT)},
        None if at is None else time_ms(at),
        fields_of(given["fields"].split(",")) if "fields" in given else LEAN,
        whole("top", given.get("top", TOP), 1, MOST_TOP),
    )


def fields_of(names: list[Any]) -> frozenset[str]:
    """The fields that are asked for beside those of every answer.

    >>> fields_of(["vector"])
    frozenset({'vector'})

    Raises:
        BadRequest: There is none of that name.
    """
    for name in names:
        if name not in FIELDS:
            raise BadRequest(f"there is no field {str(name)[:100]!r}", f"ask for some of {', '.join(sorted(FIELDS))}")
    return frozenset(names)


def whole(name: str, given: Any, least: int, most: int) -> int:
    """A whole number out of a request.

    >>> whole("top", "5", 1, 10)
    5

    Raises:
        BadRequest: It is none, or out of bounds.
    """
    try:
        number = int(given) if isinstance(given, str | int) and not isinstance(given, bool) else least - 1
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise BadRequest(f"{name}={str(given)[:100]!r} is out of bounds", f"give a whole number from {least} to {most}")
    return number


def questions(body: bytes) -> list[Query]:
    """What a batch asks.

    >>> questions(b'{"profiles": [{"user_id": "ann", "item": 7}]}')
    [Query(user='ann', item='7', category=None, context={}, at_ms=None, fields=frozenset(), top=10)]

    Raises:
        BadRequest: The body is not of the documented form.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON: {error}", FORM) from None
    if not isinstance(document, dict):
        raise BadRequest("the body is no JSON object", FORM)
    wanted = document.get("profiles")
    if wanted is None and isinstance(document.get("users"), list):
        wanted = [{"user_id": user} for user in document["users"]]
    if not isinstance(wanted, list) or not wanted:
        raise BadRequest("the body asks for no profile", FORM)
    if len(wanted) > MOST_PROFILES:
        raise BadRequest(f"the body asks for {len(wanted)} profiles", f"ask for at most {MOST_PROFILES} at once")
    names = document.get("fields", [])
    if not isinstance(names, list):
        raise BadRequest("the body has fields that are no array", 'send "fields": ["vector"]')
    fields, top = fields_of(names), whole("top", document.get("top", TOP), 1, MOST_TOP)
    return [_one(place, one, fields, top) for place, one in enumerate(wanted)]


def _one(place: int, one: Any, fields: frozenset[str], top: int) -> Query:
    """The question of one profile of a body."""
    if not isinstance(one, dict) or not isinstance(one.get("user_id"), str | int) or not set(one) <= _FIELDS:
        raise BadRequest(f"profile {place} of the body is not of the documented form", FORM)
    context = one.get("context") or {}
    if not isinstance(context, dict):
        raise BadRequest(f"profile {place} of the body has a context that is no object", FORM)
    at, item, category = one.get("at"), one.get("item"), one.get("category")
    return Query(
        str(one["user_id"]),
        None if item is None else str(item),
        None if category is None else str(category),
        {str(name): str(value) for name, value in context.items()},
        None if at is None else time_ms(at),
        fields,
        top,
    )
