"""Requests about items: the types of bodies and parameters, and their conversion to queries."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from deploy.serving.answer import Query
from deploy.serving.http_api.requests import LEAN, At, AtText, Context, ContextTexts, Id, time_ms
from deploy.serving.recommending.advertising import Cap
from deploy.serving.recommending.ranking import MOST_ITEMS, NamedItem
from deploy.serving.recommending.recommending import WantedItems
from deploy.serving.recommending.similar import NearWanted

RANK_EXAMPLE = '{"user_id": "ann", "items": ["i1", {"item": "i2", "category": "hats"}]}'
RECOMMENDED = 20
MOST_RECOMMENDED = 100
BID = "What an engagement is worth: items are ranked by probability × bid. All items have one, or none."


class FrequencyCap(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The maximum number of times that the user may have seen an item."""

    count: Annotated[int, Meta(ge=1, description="From so many on the item is left out.")]
    within_s: Annotated[float, Meta(gt=0, description="In so many seconds before the time to answer for.")]


class ItemToRank(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An item with an optional category, bid (items are then ranked by bid) and frequency cap."""

    item: Id
    category: Id | None = None
    bid: Annotated[float, Meta(ge=0, description=BID)] | None = None
    cap: FrequencyCap | None = None


class RankQuestion(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Items to rank for a user."""

    user_id: Annotated[Id, Meta(description="The raw id.", examples=["ann", 7])]
    items: Annotated[list[str | int | ItemToRank], Meta(min_length=1, max_length=MOST_ITEMS)]
    context: Context | None = None
    at: At | None = None


class NearParameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of similar items."""

    n: Annotated[int, Meta(ge=1, le=MOST_RECOMMENDED, description="How many items at most.")] = RECOMMENDED
    exclude_seen: Annotated[bool, Meta(description="Whether items that the user clicked are left out.")] = False
    at: AtText | None = None
    context: ContextTexts = {}


class RecommendationParameters(NearParameters, forbid_unknown_fields=True, frozen=True):
    """The parameters of recommendations."""

    category: Annotated[str, Meta(description="Items of this category only.")] | None = None


def rank_question(given: RankQuestion) -> tuple[Query, list[NamedItem]]:
    """Converts the body of `POST /v1/rank` to a query and the items to rank.

    >>> rank_question(RankQuestion(7, ["i1", ItemToRank(2, "hats")]))[1]
    [NamedItem(item='i1', category=None, bid=None, cap=None), NamedItem(item='2', category='hats', bid=None, cap=None)]

    Raises:
        BadRequest: `at` is not a time.
    """
    query = Query(
        str(given.user_id),
        context={name: str(value) for name, value in (given.context or {}).items()},
        at_ms=None if given.at is None else time_ms(given.at, "/at"),
        fields=LEAN,
        top=0,
    )
    return query, [_item(one) for one in given.items]


def _item(one: str | int | ItemToRank) -> NamedItem:
    if isinstance(one, ItemToRank):
        cap = None if one.cap is None else Cap(one.cap.count, one.cap.within_s)
        return NamedItem(str(one.item), None if one.category is None else str(one.category), one.bid, cap)
    return NamedItem(str(one))


def recommendation(user: str, given: RecommendationParameters) -> tuple[Query, WantedItems]:
    """Converts the parameters of `GET /v1/recommendations/{user_id}` to a query and the wanted items.

    >>> recommendation("ann", RecommendationParameters(n=3, exclude_seen=True))[1]
    WantedItems(most=3, category=None, exclude_seen=True)

    Raises:
        BadRequest: `at` is not a time.
    """
    query, wanted = near_question(user, given)
    return query._replace(top=None), WantedItems(wanted.most, given.category, wanted.exclude_seen)


def near_question(user: str, given: NearParameters) -> tuple[Query, NearWanted]:
    """Converts the parameters of `GET /v1/similar/{user_id}` to a query and the wanted items.

    >>> near_question("ann", NearParameters(n=3))[1]
    NearWanted(most=3, exclude_seen=False)

    Raises:
        BadRequest: `at` is not a time.
    """
    at_ms = None if given.at is None else time_ms(given.at)
    return Query(user, context=given.context, at_ms=at_ms, fields=LEAN, top=0), NearWanted(given.n, given.exclude_seen)
