"""Recommendations: their candidates, the nearest items, and scores that are those of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import ranked, recommend, similar, visits_of
from deploy.serving.answers.query import EXCLUSIONS, Exclusion, Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.answers.version import LoadedVersion
from deploy.serving.following.clicks import Remembered
from state.config.settings import Settings
from state.events.identity import public_id, user_id
from state.features.spec import LABELLED, FeatureSpec, Mask
from state.history.appends import Appends
from state.ranking import item_scores
from state.ranking.item_lists import CLICKED, EVERYTHING, FOLLOWED, VISITED
from state.ranking.item_scores import ALL, COLUMNS, UNSEEN, WEIGHTS, Reads, Workspace, first_weights, sources_of
from tests.bench.recorded import micro_batches, plain
from tests.deploy.serving.recommending.test_shelves import news
from tests.deploy.serving.stocked import NOW_MS, SALT, Stores, clicks, digest_of, manifest, predictor, row_of, tensors
from tests.trainer.engine.test_item_ranking import count
from trainer.engine.item_ranking import ItemRanking

HOUR_MS = 3_600_000
CLICKED_ONES, SHOWN_ONES = frozenset[Exclusion](["clicked"]), frozenset[Exclusion](["shown"])
BOTH = frozenset(EXCLUSIONS)
CLICK, SHOW = 0, 1
"""Numbers of the actions of events; the second is an impression."""


def name(item: str) -> str:
    return f"{public_id(item):016x}"


def click(stores: Stores, *rows: tuple[str, str, int], log_ms: int = NOW_MS) -> None:
    """Clicks of users of whom nobody asks, as the applier takes them: (category, item, age)."""
    events = clicks(list(rows), first_offset=1000)
    extra = news(Remembered(stores.histories, 90, 1000), stores.histories, events, log_ms)
    stores.histories.commit(Appends.of(np.arange(1, 1 + len(events), dtype=np.uint64), events), (), extra)


def show(stores: Stores, user: str, *items: str) -> None:
    """Impressions of items, one each, newer than the user's clicks."""
    events = clicks([("tea", item, 3_000 - number) for number, item in enumerate(items)], first_offset=3000)
    events["action"] = SHOW
    stores.histories.commit(Appends.of(np.full(len(items), user_id(SALT, user), np.uint64), events), (), {})


def recommended(stores: Stores, user: str, wanted: WantedItems, sources: ItemSources | None = None) -> Any:
    sources = sources or ItemSources(stores.histories, stores.rows)
    while sources.read_more():
        pass
    return finished(recommend(predictor(stores), sources, Query(user), wanted, [SHOW]))


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
    found = recommended(stores, "ann", WantedItems(100, exclude=CLICKED_ONES))
    assert {one.id for one in found.items} == {name("hat-1"), name("shoe-1")}
    assert {one.id for one in recommended(stores, "ann", WantedItems(9, "hats")).items} == {
        name("hat-1"),
        name("i1"),
    }
    assert [one.id for one in recommended(stores, "ann", WantedItems(9, "hats", CLICKED_ONES)).items] == [name("hat-1")]
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


def test_a_user_without_events_gets_the_most_clicked_items_in_the_order_of_their_clicks(stores: Stores) -> None:
    click(stores, *[("salt", "salt-1", 10_000)] * 4, ("tea", "tea-2", 10_000), *[("tea", "tea-1", 10_000)] * 3)
    found = recommended(stores, "nobody", WantedItems(2))
    assert found.cold_start and [one.id for one in found.items] == [name("salt-1"), name("tea-1")]
    assert {one.reason for one in found.items} == {"popular"}
    assert [one.id for one in recommended(stores, "nobody", WantedItems(9, "tea")).items] == [
        name("tea-1"),
        name("tea-2"),
    ]


ITEMS = [f"item-{number}" for number in range(300)]


def item_sources(stores: Stores) -> ItemSources:
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
    sources, query = item_sources(stores), query_of(stores, "ann")
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
    sources = item_sources(stores)
    every = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    seen = f"{public_id('i1'):016x}"
    without = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100, exclude=CLICKED_ONES))
    assert len(every.items) == len(without.items) == 100 and seen not in {one.id for one in without.items}


def test_near_items_are_recommended_with_that_reason(stores: Stores) -> None:
    learn(stores, 2)
    sources = item_sources(stores)
    found = finished(recommend(predictor(stores), sources, Query("ann"), WantedItems(50)))
    near = [one for one in found.items if one.reason == "similar"]
    assert len(near) > 20
    nearest = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    assert {one.id for one in near} <= {one.id for one in nearest.items}
    assert not finished(recommend(predictor(stores), sources, Query("ann"), WantedItems(50, "tea"))).items


def test_items_that_the_version_has_no_row_of_are_not_near(stores: Stores) -> None:
    learn(stores, 2)
    sources = item_sources(stores)
    stores.rows.serve(1)
    found = similar(predictor(stores), sources.near, Query("ann"), WantedItems(100))
    assert {one.id for one in found.items} <= {f"{public_id('i1'):016x}"} and found.version.number == 1


def learned(stores: Stores) -> ItemRanking:
    """What the clicks of ann and of others teach; all of them reach the host too."""
    rows = [("hats", "i1", 60_000), ("shoes", "i2", 5_000)]
    others = [
        (category, f"{category}-{n % (4 + k)}", 70_000 - 100 * n)
        for n in range(60)
        for k, category in enumerate(("hats", "tea"))
    ]
    others += [("shoes", "i2", 50_000), ("shoes", "after-i2", 45_000)] * 3
    events = np.sort(np.concatenate([clicks(rows), clicks(others, first_offset=1000)]), order=["at_ms", "offset"])
    ann, mine = np.uint64(user_id(SALT, "ann")), events["offset"] < 1000
    users = np.where(mine, ann, 1 + events["offset"].astype(np.uint64) % np.uint64(7))
    after = np.isin(events["item"], [public_id("i2"), public_id("after-i2")]) & ~mine
    users[after] = 99
    ranking = ItemRanking(Settings())
    for batch in micro_batches(plain(users, events), FeatureSpec(), (1.0,) * 4):
        count(ranking, batch)
    extra = news(Remembered(stores.histories, 90, 1000), stores.histories, events[~mine], NOW_MS)
    stores.histories.commit(Appends.of(users[~mine], events[~mine]), (), extra)
    return ranking


def serve(stores: Stores, ranking: ItemRanking, weights: Any) -> None:
    tensors: dict[str, Any] = {WEIGHTS: weights}
    for table in (CLICKED, FOLLOWED):
        tensors |= {f"{table}.{field}": value for field, value in ranking.tables[table].take_served().items()}
    tensors |= {f"dense.{name}": value for name, value in stores.lowered.weights.items()}
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), tensors, NOW_MS, follow=True)


def recommended_items(stores: Stores, user: str, wanted: WantedItems) -> list[Any]:
    sources = ItemSources(stores.histories, stores.rows)
    return finished(recommend(predictor(stores), sources, Query(user, at_ms=NOW_MS), wanted, [SHOW])).items


def test_serving_scores_what_the_trainer_scores(stores: Stores) -> None:
    ranking = learned(stores)
    weights = first_weights() + np.random.default_rng(1).normal(0, 0.1, first_weights().shape)
    # Interests are the model's; without them both sides read the same lists.
    interests = 3 * item_scores.INTERESTS_AT
    weights[:, interests : interests + 3] = 0.0
    serve(stores, ranking, weights)
    lists, followed, visited = (ranking.tables[table] for table in (CLICKED, FOLLOWED, VISITED))
    row = int(visited.find(np.array([user_id(SALT, "ann")], np.uint64))[0])
    keys = np.array([*EVERYTHING, public_id("shoes"), *[0] * item_scores.INTERESTS], np.uint64)
    reads = Reads(lists.find(keys), sources_of(0), np.ones(len(keys), np.float32))
    work, phi = Workspace.empty(), np.zeros(COLUMNS, np.float32)
    after = followed.find(visited.held.ids[row, :2].copy())
    size = item_scores.gather(lists.held, followed.held, visited.held, reads, after, row, NOW_MS // 1000, phi, work)
    for kind in (ALL, UNSEEN):
        item_scores.score(weights[kind], phi, size, work)
        order = np.argsort(-work.scores[:size], kind="stable")
        order = order[(work.own[order] == 0) | (kind == ALL)]
        wanted = [f"{item:016x}" for item in work.items[order].tolist()]
        wanted_items = WantedItems(100, exclude=CLICKED_ONES if kind == UNSEEN else frozenset())
        found = [one.id for one in recommended_items(stores, "ann", wanted_items)]
        assert len(wanted) > 6 and found == wanted
    item_scores.clear(size, work)


def test_each_item_has_its_reason_and_what_was_seen_can_be_left_out(stores: Stores) -> None:
    serve(stores, learned(stores), first_weights())
    reasons = {one.id: one.reason for one in recommended_items(stores, "ann", WantedItems(100))}
    assert reasons[name("i1")] == reasons[name("i2")] == "again" and reasons[name("after-i2")] == "next"
    unseen = {one.id for one in recommended_items(stores, "ann", WantedItems(100, exclude=CLICKED_ONES))}
    assert unseen == {*reasons} - {name("i1"), name("i2")}
    of_tea = {one.id for one in recommended_items(stores, "ann", WantedItems(3, "tea"))}
    assert len(of_tea) == 3 and of_tea <= {name(f"tea-{n}") for n in range(5)}
    assert recommended_items(stores, "nobody", WantedItems(5))
    listed = [one.category for one in recommended_items(stores, "ann", WantedItems(4, per_category=2))]
    assert len(listed) == 4 and max(map(listed.count, listed)) == 2


def test_ranked_items_are_those_of_the_answer_and_take_one_run_of_the_program_for_all_categories(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(stores, learned(stores), first_weights())
    runs, run = list[int](), LoadedVersion.predict

    def counted(self: LoadedVersion, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        runs.append(1)
        return run(self, inputs)

    monkeypatch.setattr(LoadedVersion, "predict", counted)
    sources = ItemSources(stores.histories, stores.rows)
    for wanted in (WantedItems(100), WantedItems(100, exclude=BOTH), WantedItems(4, per_category=2)):
        about = predictor(stores), sources, Query("ann", at_ms=NOW_MS), wanted, [SHOW]
        answer = finished(recommend(*about)).items
        assert len({one.category for one in answer}) > 1
        runs.clear()
        found = ranked(*about)
        assert len(runs) == 1
        assert found == [(int(one.id, 16), one.reason) for one in answer]


def test_impressions_without_a_click_are_not_own_items(stores: Stores) -> None:
    serve(stores, learned(stores), first_weights())
    ann = np.array([user_id(SALT, "ann")], np.uint64)
    shown = clicks([("tea", "tea-0", 3_000)], 3000)
    shown["flags"] = LABELLED
    stores.histories.commit(Appends.of(ann, shown), (), {})
    reasons = {one.id: one.reason for one in recommended_items(stores, "ann", WantedItems(100))}
    assert reasons[name("tea-0")] != "again" and reasons[name("i2")] == "again"


@pytest.mark.parametrize("scored", [True, False])
def test_impressions_are_left_out_only_where_that_is_asked_for(stores: Stores, scored: bool) -> None:
    """Nearly every item of the list was shown to the user, who clicked two; one of these was shown as well."""
    serve(stores, learned(stores), first_weights() if scored else first_weights()[ALL])
    all_of_them = {one.id for one in recommended(stores, "ann", WantedItems(100)).items}
    own = {name("i1"), name("i2")}
    new = "tea-4"
    shown = [f"{category}-{n}" for category in ("hats", "tea") for n in range(4)]
    assert all_of_them >= own | {name(item) for item in (*shown, new)}
    show(stores, "ann", *shown, "i2")
    shown_only = {name(item) for item in shown}
    for exclude, left_out in ((CLICKED_ONES, own), (SHOWN_ONES, shown_only), (BOTH, own | shown_only)):
        found = {one.id: one.reason for one in recommended(stores, "ann", WantedItems(100, exclude=exclude)).items}
        assert found.keys() == all_of_them - left_out
        assert {item for item, reason in found.items() if reason == "again"} == own - left_out
    in_category = recommended(stores, "ann", WantedItems(100, "tea", SHOWN_ONES)).items
    assert name(new) in {one.id for one in in_category} and not shown_only & {one.id for one in in_category}


def test_a_user_of_impressions_alone_gets_the_most_clicked_items_that_were_not_shown(stores: Stores) -> None:
    click(stores, *[("salt", "salt-1", 10_000)] * 4, ("tea", "tea-2", 10_000), *[("tea", "tea-1", 10_000)] * 3)
    show(stores, "carl", "salt-1")
    for exclude, first in ((CLICKED_ONES, "salt-1"), (SHOWN_ONES, "tea-1")):
        (found,) = recommended(stores, "carl", WantedItems(1, exclude=exclude)).items
        assert (found.id, found.reason) == (name(first), "popular")


def test_near_items_that_were_shown_are_left_out_only_where_that_is_asked_for(stores: Stores) -> None:
    learn(stores, 2)
    sources = item_sources(stores)

    def near(exclude: frozenset[Exclusion]) -> list[str]:
        answer = similar(predictor(stores), sources.near, Query("ann"), WantedItems(50, exclude=exclude), [SHOW])
        return [one.id for one in answer.items]

    by_id = {name(item): item for item in ITEMS}
    nearest = near(frozenset())
    clicked, shown = {*nearest[:5]}, {*nearest[5:]}
    events = clicks([("tea", by_id[item], 4_000) for item in clicked], first_offset=2000)
    stores.histories.commit(Appends.of(np.full(5, user_id(SALT, "ann"), np.uint64), events), (), {})
    show(stores, "ann", *(by_id[item] for item in (*nearest, *shown)))
    assert not clicked & {*near(CLICKED_ONES)} and len(shown & {*near(CLICKED_ONES)}) > 20
    assert not shown & {*near(SHOWN_ONES)} and clicked & {*near(SHOWN_ONES)}
    assert not (clicked | shown) & {*near(BOTH)} and len(near(BOTH)) == 50


def test_a_version_without_weights_is_ranked_as_before(stores: Stores) -> None:
    ranking = learned(stores)
    serve(stores, ranking, first_weights()[ALL])
    assert {one.reason for one in recommended_items(stores, "ann", WantedItems(20))} >= {"again"}
    sources = ItemSources(stores.histories, stores.rows)
    assert ranked(predictor(stores), sources, Query("ann", at_ms=NOW_MS), WantedItems(20)) is None
