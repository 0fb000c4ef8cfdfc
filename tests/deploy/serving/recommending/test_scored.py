"""Recommendations by the item lists and the item score of a version: what the trainer would rank, in its order."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import recommend
from deploy.serving.answers.query import Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.following.remembered import Remembered
from state.config.settings import Settings
from state.events.identity import public_id, user_id
from state.features.spec import LABELLED, FeatureSpec
from state.history.appends import Appends
from state.ranking import item_scores
from state.ranking.item_lists import CLICKED, EVERYTHING, FOLLOWED, VISITED
from state.ranking.item_scores import ALL, COLUMNS, UNSEEN, WEIGHTS, Reads, Workspace, first_weights, sources_of
from tests.bench.recorded import micro_batches, plain
from tests.deploy.serving.recommending.test_shelves import news
from tests.deploy.serving.stocked import NOW_MS, SALT, Stores, clicks, digest_of, manifest, predictor
from tests.trainer.engine.test_item_ranking import count
from trainer.engine.item_ranking import ItemRanking


def name(item: str) -> str:
    return f"{public_id(item):016x}"


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


def recommended(stores: Stores, user: str, wanted: WantedItems) -> list[Any]:
    sources = ItemSources(stores.histories, stores.rows)
    return finished(recommend(predictor(stores), sources, Query(user, at_ms=NOW_MS), wanted)).items


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
        found = [one.id for one in recommended(stores, "ann", WantedItems(100, exclude_seen=kind == UNSEEN))]
        assert len(wanted) > 6 and found == wanted
    item_scores.clear(size, work)


def test_each_item_has_its_reason_and_what_was_seen_can_be_left_out(stores: Stores) -> None:
    serve(stores, learned(stores), first_weights())
    reasons = {one.id: one.reason for one in recommended(stores, "ann", WantedItems(100))}
    assert reasons[name("i1")] == reasons[name("i2")] == "again" and reasons[name("after-i2")] == "next"
    unseen = {one.id for one in recommended(stores, "ann", WantedItems(100, exclude_seen=True))}
    assert unseen == {*reasons} - {name("i1"), name("i2")}
    of_tea = {one.id for one in recommended(stores, "ann", WantedItems(3, "tea"))}
    assert len(of_tea) == 3 and of_tea <= {name(f"tea-{n}") for n in range(5)}
    assert recommended(stores, "nobody", WantedItems(5))
    listed = [one.category for one in recommended(stores, "ann", WantedItems(4, per_category=2))]
    assert len(listed) == 4 and max(map(listed.count, listed)) == 2


def test_impressions_without_a_click_are_not_own_items(stores: Stores) -> None:
    serve(stores, learned(stores), first_weights())
    ann = np.array([user_id(SALT, "ann")], np.uint64)
    shown = clicks([("tea", "tea-0", 3_000)], 3000)
    shown["flags"] = LABELLED
    stores.histories.commit(Appends.of(ann, shown), (), {})
    reasons = {one.id: one.reason for one in recommended(stores, "ann", WantedItems(100))}
    assert reasons[name("tea-0")] != "again" and reasons[name("i2")] == "again"


def test_a_version_without_weights_is_ranked_as_before(stores: Stores) -> None:
    ranking = learned(stores)
    serve(stores, ranking, first_weights()[ALL])
    assert {one.reason for one in recommended(stores, "ann", WantedItems(20))} >= {"again"}
