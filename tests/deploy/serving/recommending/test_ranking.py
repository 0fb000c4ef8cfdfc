"""Items that a caller names: scored by one version as one by one, ordered by bids, and left out by caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.items import UserPairs, over_caps, rank
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Cap, NamedItem, Query
from deploy.serving.answers.queue import finished
from deploy.serving.host_files import CONTROL_NOTE, MASK_NOTE
from springtide_client.answers import LeftOutItem
from state.attributes.values import AttributeStore
from state.events.identity import Salt, public_id, user_id
from state.features.spec import EVENT, FeatureSpec, Mask
from state.history.appends import Appends
from state.ranking.crosses import Crosses
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, clicks, digest_of, manifest, predictor, tensors
from tests.deploy.serving.test_attributes import WANTED
from tests.deploy.serving.test_attributes import known as known
from tests.deploy.serving.test_crosses import ids_of, learn, numbers


def test_items_are_scored_as_one_by_one_and_come_best_first(stores: Stores) -> None:
    """Clicked or not, with a category or without; of equal ones the first one named comes first."""
    answers = predictor(stores)
    asked = [
        *(NamedItem(f"never-{n}", ("shoes", "hats", "books")[n % 3]) for n in range(300)),
        NamedItem("i1"),
        NamedItem("never"),
    ]
    found = finished(rank(answers, Query("ann"), asked))
    assert len(found.items) == len(asked)
    assert len(list(rank(answers, Query("ann"), asked))) == 2, "it stops after each batch"
    given = [one.probability for one in found.items]
    assert given == sorted(given, reverse=True)
    shown = {one.item: one for one in found.items}
    assert shown["i1"].category == "hats" and shown["never"].category is None
    for one in (asked[0], asked[299], *asked[300:]):
        alone = answers.profile("ann", item=one.item, category=one.category)
        assert alone.engagement is not None
        assert shown[one.item].probability == pytest.approx(alone.engagement.probability, rel=1e-5)
    shoes = [one.item for one in found.items if one.category == "shoes"]
    assert shoes == [f"never-{n}" for n in range(0, 300, 3)]
    assert (found.user_id, found.known, found.version.number) == ("ann", True, 1)


def test_all_items_are_scored_by_the_version_that_answered_first(stores: Stores) -> None:
    answers, items = predictor(stores), [NamedItem(f"n{n}", "shoes") for n in range(600)]
    wanted = finished(rank(answers, Query("ann"), items))
    steps = rank(answers, Query("ann"), items)
    next(steps)
    other = {name: value + 0.5 for name, value in stores.lowered.weights.items()}
    made = tensors(stores.lowered, 2, {"category": ["shoes"]}, [])
    made |= {f"dense.{name}": np.asarray(value, np.float32) for name, value in other.items()}
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), made, NOW_MS, follow=True)
    assert answers.profile("ann").version.number == 2
    found = finished(steps)
    assert found.version.number == 1 and found.items == wanted.items
    later = finished(rank(answers, Query("ann"), items))
    assert later.version.number == 2 and later.items != wanted.items


DAY = 86_400.0


def ranked(stores: Stores, items: Sequence[NamedItem], impressions: Sequence[int] = (), user: str = "ann") -> Any:
    return finished(rank(predictor(stores), Query(user, at_ms=NOW_MS), items, impressions))


def test_items_with_bids_come_by_probability_times_bid(stores: Stores) -> None:
    """Across batches; of equal values the first one named comes first, and probabilities are those without bids."""
    random = np.random.default_rng(1)
    named = [NamedItem(f"ad-{n}", ("shoes", "hats", "books")[n % 3]) for n in range(300)]
    bids = random.choice([0.0, 0.25, 1.0, 3.5], 300).tolist()
    plain = {one.item: one.probability for one in ranked(stores, named).items}
    found = ranked(stores, [one._replace(bid=bid) for one, bid in zip(named, bids, strict=True)]).items
    assert {one.item: one.probability for one in found} == plain
    assert {one.item: one.bid for one in found} == {one.item: bid for one, bid in zip(named, bids, strict=True)}
    assert all(one.expected_value == one.probability * one.bid for one in found)
    wanted = sorted(range(300), key=lambda n: (-plain[named[n].item] * bids[n], n))
    assert [one.item for one in found] == [named[n].item for n in wanted]
    assert wanted != sorted(range(300), key=lambda n: (-plain[named[n].item], n)), "bids decide something"


def test_what_was_seen_as_often_as_its_cap_is_left_out_and_named(stores: Stores) -> None:
    """`ann` saw i1 a minute ago, and i2 five seconds ago; what she saw before its time, or somebody else saw, does not count."""
    named = [
        NamedItem("i1", cap=Cap(1, 61.0)),
        NamedItem("i1", cap=Cap(1, 60.0)),
        NamedItem("i2", cap=Cap(2, DAY)),
        NamedItem("i3", cap=Cap(1, DAY)),
        NamedItem("i2", cap=Cap(1, DAY)),
        NamedItem("i9"),
    ]
    found = ranked(stores, named)
    assert found.left_out == [LeftOutItem("i1", "cap", 1), LeftOutItem("i2", "cap", 1)]
    assert sorted(one.item for one in found.items) == ["i1", "i2", "i3", "i9"]
    of_bob = ranked(stores, named, user="bob")
    assert [one.item for one in of_bob.left_out] == ["i3"] and len(of_bob.items) == 5
    assert ranked(stores, named, user="nobody").left_out == []


def test_all_items_may_be_left_out(stores: Stores) -> None:
    found = ranked(stores, [NamedItem("i1", bid=1.0, cap=Cap(1, DAY)), NamedItem("i2", bid=2.0, cap=Cap(1, DAY))])
    assert found.items == [] and [one.item for one in found.left_out] == ["i1", "i2"]
    assert found.known and found.version.number == 1


def test_impressions_alone_count_where_there_are_some(stores: Stores) -> None:
    """Three impressions (action 1) and a click (action 0) of one item: a cap of three counts the impressions."""
    ann = user_id(Salt(SALT_KEY), "ann")
    events = clicks([("hats", "ad", age) for age in (400, 300, 200, 100)], first_offset=10)
    events["action"] = (1, 1, 0, 1)
    stores.histories.commit(Appends.of(np.full(4, ann, np.uint64), events), (), {})
    three, four = NamedItem("ad", cap=Cap(3, DAY)), NamedItem("ad", cap=Cap(4, DAY))
    assert [one.seen for one in ranked(stores, [three, four], (1,)).left_out] == [3]
    assert [one.seen for one in ranked(stores, [three, four]).left_out] == [4, 4]
    assert ranked(stores, [three], (0,)).left_out == []


def test_masked_events_do_not_count(stores: Stores) -> None:
    named = [NamedItem("i1", cap=Cap(1, DAY)), NamedItem("i2", cap=Cap(1, DAY))]
    mask = Mask(2, times=((NOW_MS - 10_000, NOW_MS),))
    stores.rows.steer({CONTROL_NOTE: b'{"generation": 2}', MASK_NOTE: mask.to_bytes()})
    assert [one.item for one in ranked(stores, named).left_out] == ["i1"]


def test_caps_count_what_a_loop_over_the_events_counts() -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        events = np.zeros(random.integers(0, 40), EVENT)
        events["item"], events["action"] = random.integers(1, 5, len(events)), random.integers(0, 3, len(events))
        events["at_ms"] = random.integers(0, 10_000, len(events))
        items = random.integers(1, 6, 8).tolist()
        caps = [
            Cap(int(random.integers(1, 5)), float(random.integers(1, 10))) if random.random() < 0.8 else None
            for _ in items
        ]
        impressions, at_ms = ((), (0,), (0, 2))[random.integers(3)], int(random.integers(0, 12_000))
        wanted = {}
        for place, (item, cap) in enumerate(zip(items, caps, strict=True)):
            seen = sum(
                1
                for event in events
                if cap is not None
                and event["item"] == item
                and (not impressions or event["action"] in impressions)
                and at_ms - 1000 * cap.within_s < event["at_ms"] <= at_ms
            )
            if cap is not None and seen >= cap.count:
                wanted[place] = seen
        assert over_caps(items, caps, events, impressions, at_ms) == wanted


CATEGORIES = ("shoes", "hats", "books", "tea", "unheard of")
ITEMS = [(public_id(f"never-{n}"), public_id(CATEGORIES[n % 5])) for n in range(200)] + [(public_id("i1"), 0), (9, 0)]


def both(answers: Predictor, query: Query) -> list[tuple[np.ndarray[Any, Any], list[int]]]:
    """Logits and categories by products, and as of a program that has no query of items."""
    found = []
    with answers.reading() as reader:
        prepared = answers.prepare([query], reader)
        outputs = prepared.version.predict(prepared.inputs)
        for said in (outputs, {}):
            pairs = UserPairs(answers, prepared, said)
            found.append((np.concatenate([pairs.logits(ITEMS[:150]), pairs.logits(ITEMS[150:])]), pairs.categories))
    return found


def test_with_crosses(stores: Stores) -> None:
    ids = np.append(ids_of(stores, "ann", "i1", "hats", "3"), Crosses(FeatureSpec(), ("tab",)).shares[-1])
    learn(stores, 2, ids, numbers(len(ids)))
    for user in ("ann", "nobody"):
        (ours, kinds), (theirs, wanted) = both(predictor(stores, context=("tab",)), Query(user, context={"tab": "3"}))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert kinds == wanted and len({*ours.round(4).tolist()}) > 5


def test_with_attributes(stores: Stores, known: AttributeStore) -> None:
    (ours, _), (theirs, _) = both(predictor(stores, known=known, attributes=WANTED), Query("ann"))
    (without, _), _ = both(predictor(stores), Query("ann"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert abs(ours[200] - without[200]) > 1e-3
