"""Similar items are the nearest by the rows of the version that answers, and recommendations have some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import recommend, similar
from deploy.serving.answers.query import Query, WantedItems
from deploy.serving.answers.queue import finished
from state.events.identity import public_id
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, predictor, row_of, tensors

ITEMS = [f"item-{number}" for number in range(300)]


def sources_of(stores: Stores) -> ItemSources:
    """All that is to be read is read."""
    found = ItemSources(stores.histories, stores.rows)
    found.near.nearest(np.zeros(1, np.float32), 1)
    while found.read_more():
        pass
    return found


def learn(stores: Stores, version: int) -> None:
    """Rows of the items, other ones in each version."""
    made = tensors(stores.lowered, version, {"item": [*ITEMS, "i1"]}, [])
    stores.rows.apply(manifest(version, digest_of(stores.lowered), version - 1), made, NOW_MS, follow=True)


def query_of(stores: Stores, user: str) -> Any:
    answers = predictor(stores)
    with answers.reading() as reader:
        prepared = answers.prepare([Query(user)], reader)
        return prepared.version.program.predict(prepared.inputs)["item_query"][0].copy()


def test_the_nearest_come_first_with_their_products_by_the_version_that_answers(stores: Stores) -> None:
    learn(stores, 2)
    sources, query = sources_of(stores), query_of(stores, "ann")
    for version in (2, 3):
        if version == 3:
            learn(stores, version)
        found = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
        given = {one.id: one.similarity for one in found.items}
        products = {f"{public_id(one):016x}": float(row_of("item", one, version) @ query) for one in [*ITEMS, "i1"]}
        assert given == {one: pytest.approx(products[one], rel=1e-4, abs=1e-5) for one in given}
        assert list(given.values()) == sorted(given.values(), reverse=True) and found.version.number == version
        best = sorted(products, key=lambda one: -products[one])
        assert len({*best[:20]} & {*list(given)[:20]}) >= 19 or version == 3
    assert found.user_id == "ann" and found.known and found.items[0].category is None


def test_what_the_user_clicked_is_left_out_where_that_is_asked_for(stores: Stores) -> None:
    learn(stores, 2)
    sources = sources_of(stores)
    every = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    seen = f"{public_id('i1'):016x}"
    without = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100, exclude_seen=True))
    assert len(every.items) == len(without.items) == 100 and seen not in {one.id for one in without.items}


def test_near_items_are_recommended_with_that_reason(stores: Stores) -> None:
    learn(stores, 2)
    sources = sources_of(stores)
    found = finished(recommend(predictor(stores), sources, Query("ann"), WantedItems(50)))
    near = [one for one in found.items if one.reason == "similar"]
    assert len(near) > 20
    nearest = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    assert {one.id for one in near} <= {one.id for one in nearest.items}
    assert not finished(recommend(predictor(stores), sources, Query("ann"), WantedItems(50, "tea"))).items


def test_items_that_the_version_has_no_row_of_are_not_near(stores: Stores) -> None:
    learn(stores, 2)
    sources = sources_of(stores)
    stores.rows.serve(1)
    found = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    assert {one.id for one in found.items} <= {f"{public_id('i1'):016x}"} and found.version.number == 1
