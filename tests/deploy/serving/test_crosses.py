"""Serving adds what a pair's crosses say, named as the trainer names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.query import Query as Q
from state.events.identity import Salt, context_id, public_id, user_id
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.ranking.crosses import Crosses, Values
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, digest_of, manifest, predictor, tensors
from tests.vectors import vectorise

SPEC = FeatureSpec()


def ids_of(
    stores: Stores, user: str, item: str, category: str, tab: str | None, spec: FeatureSpec = SPEC
) -> np.ndarray[Any, Any]:
    one = user_id(Salt(SALT_KEY), user)
    vector = vectorise(stores.histories.read(one), NOW_MS, None, Mask.NONE, spec)
    none, context = np.zeros((1, 0), np.uint64), 0 if tab is None else context_id("tab", tab)
    user_, item_, category_ = (np.array([name], np.uint64) for name in (one, public_id(item), public_id(category)))
    values = Values(
        user_,
        item_,
        category_,
        np.array([[context]], np.uint64),
        none,
        none,
        vector.features[None],
        vector.sequence_items[None],
    )
    found: np.ndarray[Any, Any] = Crosses(spec, ("tab",)).ids(values)[0]
    return found


def learn(stores: Stores, version: int, ids: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """Serves a version that has these rows of crosses."""
    made = tensors(stores.lowered, version, {}, ["tea", "shoes"])
    made |= {"cross.ids": ids, "cross.rows": rows, "cross.removed": np.empty(0, np.uint64)}
    stores.rows.apply(manifest(version, digest_of(stores.lowered), parent=version - 1), made, NOW_MS, follow=True)


def logit(stores: Stores, user: str, **asked: Any) -> float:
    answer = predictor(stores, context=("tab",)).profile(user, **asked).engagement
    assert answer is not None
    chance = answer.probability
    return float(np.log(chance / (1 - chance)))


def numbers(count: int) -> np.ndarray[Any, Any]:
    """Weights and margins."""
    return np.stack([np.linspace(-0.3, 0.4, count), np.linspace(0.2, -0.1, count) ** 2], 1).astype(np.float32)


def test_a_pairs_weights_count_half_at_first(stores: Stores) -> None:
    asked = {"item": "i1", "context": {"tab": "3"}}
    before = logit(stores, "ann", **asked)
    ids = ids_of(stores, "ann", "i1", "hats", "3")
    assert (ids != 0).all()
    rows = numbers(len(ids))
    learn(stores, 2, ids, rows)
    expected = pytest.approx(before + 0.5 * float(rows[:, 0].sum()), abs=1e-4)
    assert logit(stores, "ann", **asked) == expected
    many = predictor(stores, context=("tab",)).profiles(
        [Q("bob", None), Q("ann", "i1", context={"tab": "3"}), Q("bob", "i1")]
    )
    assert many[1].engagement is not None and many[0].engagement is None
    chance = many[1].engagement.probability
    assert float(np.log(chance / (1 - chance))) == expected


def test_weights_and_margins_count_by_the_shares_of_the_version(stores: Stores) -> None:
    asked = {"item": "i1", "context": {"tab": "3"}}
    before = logit(stores, "ann", **asked)
    ids, shares = ids_of(stores, "ann", "i1", "hats", "3"), Crosses(SPEC, ("tab",)).shares
    rows, added = numbers(len(ids)), numbers(len(ids) + 1)[::-1] * 2
    learn(stores, 2, np.concatenate([ids, shares]), np.concatenate([rows, added]))
    expected = ((0.5 + added[:-1, 0]) * rows[:, 0] + added[:-1, 1] * rows[:, 1]).sum()
    # The last share is of the network, which is the rest of the logit.
    share = 1.0 + float(added[-1, 0])
    assert logit(stores, "ann", **asked) == pytest.approx(share * before + float(expected), abs=1e-4)
    assert abs(expected - 0.5 * rows[:, 0].sum()) > 0.1 and abs((share - 1.0) * before) > 0.01


def test_a_context_that_is_not_given_takes_its_crosses_out(stores: Stores) -> None:
    before = logit(stores, "ann", item="i1")
    ids = ids_of(stores, "ann", "i1", "hats", "3")
    weights = np.where(ids_of(stores, "ann", "i1", "hats", None) == 0, 5.0, 0.0).astype(np.float32)
    assert weights.any()
    learn(stores, 2, ids, np.stack([weights, weights], 1))
    assert logit(stores, "ann", item="i1") == pytest.approx(before, abs=1e-5)


def test_a_version_that_has_learned_no_cross_is_answered_without(stores: Stores) -> None:
    before = logit(stores, "ann", item="i1")
    learn(stores, 2, np.empty(0, np.uint64), np.empty((0, 2), np.float32))
    assert logit(stores, "ann", item="i1") == pytest.approx(before, abs=1e-6)


def test_latest_items_count_in_answers_about_one_item_and_about_many(stores: Stores) -> None:
    spec = replace(SPEC, sequence=2)
    ids = ids_of(stores, "ann", "i1", "hats", "3", spec)
    names = Crosses(spec, ("tab",)).names
    latest = [names.index(f"latest item.{place}") for place in (1, 2)]
    assert (ids[latest] != 0).all()
    made = tensors(stores.lowered, 2, {}, ["tea", "shoes"])
    made |= {"cross.ids": ids[latest], "cross.removed": np.empty(0, np.uint64)}
    made["cross.rows"] = np.array([[0.8, 0.0], [-0.2, 0.0]], np.float32)
    features = replace(stores.settings.features, sequence=2)

    def asked() -> list[float]:
        answering = predictor(stores, context=("tab",), features=features)
        answers = answering.profiles([Q("bob", "i1"), Q("ann", "i1", context={"tab": "3"})])
        found = [one.engagement.probability for one in answers if one.engagement is not None]
        return [float(np.log(chance / (1 - chance))) for chance in found]

    digest = digest_of(stores.lowered)
    stores.rows.apply(replace(manifest(2, digest, parent=1), spec=spec.digest), made, NOW_MS, follow=True)
    after = asked()
    made["cross.rows"] = np.zeros((2, 2), np.float32)
    stores.rows.apply(replace(manifest(3, digest, parent=2), spec=spec.digest), made, NOW_MS, follow=True)
    before = asked()
    assert after == pytest.approx([before[0], before[1] + 0.3], abs=1e-4)
