"""What a request about items asks: a body or a query string, read or refused with what to do."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import orjson

from deploy.serving.answer import Query
from deploy.serving.http_api.requests import CONTEXT, LEAN, time_ms, whole
from deploy.serving.recommending.ranking import MOST_ITEMS, NamedItem
from deploy.serving.recommending.recommending import WantedItems
from state.errors import BadRequest

RANK_FORM = 'send {"user_id": "ann", "items": ["i1", {"item": "i2", "category": "hats"}]}'
RECOMMENDED = 20
MOST_RECOMMENDED = 100
_FIELDS = {"user_id", "items", "context", "at"}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def rank_question(body: bytes) -> tuple[Query, list[NamedItem]]:
    """The user and the items of `POST /v1/rank`.

    >>> rank_question(b'{"user_id": 7, "items": ["i1", {"item": 2, "category": "hats"}]}')[1]
    [NamedItem(item='i1', category=None), NamedItem(item='2', category='hats')]

    Raises:
        BadRequest: The body is not of the documented form.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON: {error}", RANK_FORM) from None
    if not isinstance(document, dict) or not isinstance(document.get("user_id"), str | int):
        raise BadRequest("the body names no user_id", RANK_FORM)
    if odd := sorted(document.keys() - _FIELDS):
        raise BadRequest(f"the body has {odd[0][:100]!r}, which means nothing", RANK_FORM)
    items, context, at = document.get("items"), document.get("context") or {}, document.get("at")
    if not isinstance(items, list) or not items:
        raise BadRequest("the body names no items", RANK_FORM)
    if len(items) > MOST_ITEMS:
        raise BadRequest(f"the body names {len(items)} items", f"name at most {MOST_ITEMS} at once")
    if not isinstance(context, dict):
        raise BadRequest("the body has a context that is no object", RANK_FORM)
    query = Query(
        str(document["user_id"]),
        context={str(name): str(value) for name, value in context.items()},
        at_ms=None if at is None else time_ms(at),
        fields=LEAN,
        top=0,
    )
    return query, [_item(place, one) for place, one in enumerate(items)]


def _item(place: int, one: Any) -> NamedItem:
    """An item of a body: its id, or an object with the id and the category."""
    if isinstance(one, str | int) and not isinstance(one, bool):
        return NamedItem(str(one))
    if not isinstance(one, dict) or not isinstance(one.get("item"), str | int) or not set(one) <= {"item", "category"}:
        raise BadRequest(f"item {place} of the body is not of the documented form", RANK_FORM)
    category = one.get("category")
    return NamedItem(str(one["item"]), None if category is None else str(category))


def recommendation(user: str, query_string: bytes) -> tuple[Query, WantedItems]:
    """What `GET /v1/recommendations/{user_id}` asks.

    >>> recommendation("ann", b"n=3&exclude_seen=true")[1]
    WantedItems(most=3, category=None, exclude_seen=True)

    Raises:
        BadRequest: `at` is no time, `n` no number of items, or `exclude_seen` neither true nor false.
    """
    given = dict(parse_qsl(query_string.decode("latin-1")))
    at, excluded = given.get("at"), given.get("exclude_seen", "false")
    if excluded not in _FLAGS:
        raise BadRequest(f"exclude_seen={excluded[:100]!r} is neither true nor false", "give true or false")
    query = Query(
        user,
        context={name.removeprefix(CONTEXT): value for name, value in given.items() if name.startswith(CONTEXT)},
        at_ms=None if at is None else time_ms(at),
        fields=LEAN,
    )
    count = whole("n", given.get("n", RECOMMENDED), 1, MOST_RECOMMENDED)
    return query, WantedItems(count, given.get("category"), _FLAGS[excluded])
