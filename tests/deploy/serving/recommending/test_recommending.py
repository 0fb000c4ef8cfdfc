"""Recommendations without a learned item score: where each candidate comes from, in the order of engagement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import recommend, visits_of
from deploy.serving.answers.query import Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.following.remembered import Remembered
from state.events.identity import public_id, user_id
from state.features.spec import Mask
from state.history.appends import Appends
from tests.deploy.serving.recommending.test_shelves import news
from tests.deploy.serving.stocked import NOW_MS, SALT, Stores, clicks, predictor

HOUR_MS = 3_600_000


def name(item: str) -> str:
    return f"{public_id(item):016x}"


def click(stores: Stores, *rows: tuple[str, str, int], log_ms: int = NOW_MS) -> None:
    """Clicks of users of whom nobody asks, as the applier takes them: (category, item, age)."""
    events = clicks(list(rows), first_offset=1000)
    extra = news(Remembered(stores.histories, 90, 1000), stores.histories, events, log_ms)
    stores.histories.commit(Appends.of(np.arange(1, 1 + len(events), dtype=np.uint64), events), (), extra)


def recommended(stores: Stores, user: str, wanted: WantedItems, sources: ItemSources | None = None) -> Any:
    sources = sources or ItemSources(stores.histories, stores.rows)
    while sources.read_more():
        pass
    return finished(recommend(predictor(stores), sources, Query(user), wanted))


def test_items_come_from_categories_and_clicks_by_the_models_scores(stores: Stores) -> None:
    click(
        stores,
        *((category, f"{category}-{n}", 10_000) for category in ("shoes", "tea", "salt") for n in range(5)),
        log_ms=NOW_MS - 30 * 24 * HOUR_MS,
    )
    found = recommended(stores, "ann", WantedItems(100))
    reasons = {one.id: one.reason for one in found.items}
    assert reasons[name("i1")] == reasons[name("i2")] == "again"
    assert reasons[name("shoes-3")] == "category" and reasons[name("tea-0")] == "popular"
    assert name("salt-0") not in reasons
    given = [one.probability for one in found.items if one.reason != "again"]
    assert given == sorted(given, reverse=True)
    # What the user clicked comes first, the later one before.
    assert [one.id for one in found.items[:2]] == [name("i2"), name("i1")]
    alone = predictor(stores).profile("ann", item="tea-0", category="tea").engagement
    assert alone is not None
    (tea,) = [one for one in found.items if one.id == name("tea-0")]
    assert tea.probability == pytest.approx(alone.probability, rel=1e-5)


def test_what_the_user_clicked_is_left_out_where_asked_and_a_category_is_all_there_is(stores: Stores) -> None:
    click(stores, ("hats", "hat-1", 10_000), ("hats", "i1", 10_000), ("shoes", "shoe-1", 10_000))
    found = recommended(stores, "ann", WantedItems(100, exclude_seen=True))
    assert {one.id for one in found.items} == {name("hat-1"), name("shoe-1")}
    assert {one.id for one in recommended(stores, "ann", WantedItems(9, "hats")).items} == {
        name("hat-1"),
        name("i1"),
    }
    assert [one.id for one in recommended(stores, "ann", WantedItems(9, "hats", True)).items] == [name("hat-1")]
    assert not recommended(stores, "ann", WantedItems(9, "no such category")).items


def test_what_the_user_clicks_often_and_late_comes_first(stores: Stores) -> None:
    events = clicks([("hats", "i4", 4_000), ("hats", "i1", 3_000), ("hats", "i4", 2_000), ("hats", "i5", 1_000)], 2000)
    stores.histories.commit(Appends.of(np.full(4, user_id(SALT, "ann"), np.uint64), events), (), {})
    answers = predictor(stores)
    with answers.reading() as reader:
        asked = answers.prepare([Query("ann")], reader).asked[0]
    wanted = {public_id("i4"): 2**-0.5 + 4**-0.5, public_id("i5"): 1.0, public_id("i1"): 3**-0.5 + 6**-0.5}
    wanted[public_id("i2")] = 5**-0.5
    visits = visits_of(answers.events_by(asked, Mask.NONE)["item"])
    assert visits == pytest.approx(wanted) and list(visits) == list(wanted)
    found = recommended(stores, "ann", WantedItems(10)).items
    assert {one.id for one in found[:3]} == {name(item) for item in ("i4", "i5", "i1")}
    assert found[3].id == name("i2") and {one.reason for one in found[:4]} == {"again"}


def test_somebody_unknown_gets_what_is_popular(stores: Stores) -> None:
    click(stores, ("tea", "tea-1", 10_000), log_ms=NOW_MS - 30 * 24 * HOUR_MS)
    found = recommended(stores, "nobody", WantedItems(10))
    assert found.cold_start and {(one.id, one.reason) for one in found.items} >= {(name("tea-1"), "popular")}
