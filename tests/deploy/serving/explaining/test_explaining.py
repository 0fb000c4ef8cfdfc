"""Explanations of interests and engagements."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from deploy.serving.answers.explaining import (
    EXACT,
    ORDERS,
    Coalitions,
    Group,
    Words,
    explain,
    groups_of,
)
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import NOBODY, Query
from deploy.serving.answers.queue import finished
from springtide_client.answers import BehindIt, Explanation
from state.errors import BadRequest
from state.events.identity import Salt, public_id, user_id
from state.features.spec import EVENT, LABELLED, POSITIVE, FeatureSpec
from state.history.appends import Appends
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, clicks
from tests.deploy.serving.stocked import predictor as predictor_of
from tests.deploy.serving.test_own_tables import looking_up as looking_up
from tests.deploy.serving.test_own_tables import predictor as predictor


def explained(answers: Predictor, query: Query, label: str | None = None) -> Explanation:
    return finished(explain(answers, query, label))


def busy(stores: Stores) -> Predictor:
    """Answers, once `ann` has viewed hats 14 times more, three minutes ago at last."""
    seen = clicks([("hats", f"i{n}", 180_000 + n * 60_000) for n in range(14)], first_offset=100)
    stores.histories.commit(Appends.of(np.full(14, user_id(Salt(SALT_KEY), "ann"), np.uint64), seen), (), {})
    return predictor_of(stores)


@pytest.mark.parametrize("label", ["hats", "shoes", "tea"])
def test_the_parts_of_an_interest_add_up_to_what_the_answers_differ_by(stores: Stores, label: str) -> None:
    """Of the user's own categories and of a popular one, which nobody's answer has too."""
    answers = busy(stores)
    found = explained(answers, Query("ann", at_ms=NOW_MS, top=1000), label)
    shown = {one.label: one.probability for one in answers.profile("ann", at_ms=NOW_MS).interests}
    nobody = {one.label: one.probability for one in answers.profile("nobody", at_ms=NOW_MS).interests}
    if label == "tea":
        # No click named it.
        shown[label], nobody[label] = (one[f"{public_id(label):016x}"] for one in (shown, nobody))
    assert found.probability == pytest.approx(shown[label], rel=1e-5)
    assert found.cold_start_probability == pytest.approx(nobody.get(label, 0.0), rel=1e-5)
    total = sum(one.share for one in found.reasons)
    assert abs(found.probability - found.cold_start_probability) > 0.001
    assert total == pytest.approx(found.probability - found.cold_start_probability, rel=0.01)
    assert total + found.rest == pytest.approx(found.probability - found.cold_start_probability, abs=1e-9)
    fewer = explained(answers, Query("ann", at_ms=NOW_MS, top=2), label)
    assert fewer.reasons == found.reasons[:2] and abs(fewer.rest) > 0


def test_the_parts_of_an_engagement_add_up_too(stores: Stores) -> None:
    answers = busy(stores)
    found = explained(answers, Query("ann", "i1", at_ms=NOW_MS, top=1000))
    engaged = [answers.profile(user, "i1", at_ms=NOW_MS).engagement for user in ("ann", "nobody")]
    wanted = [one.probability for one in engaged if one is not None]
    assert [found.probability, found.cold_start_probability] == pytest.approx(wanted, rel=1e-5)
    assert sum(one.share for one in found.reasons) == pytest.approx(wanted[0] - wanted[1], rel=0.01)
    kinds = {one.kind for one in found.reasons}
    assert kinds >= {"category", "action", "user"} and "pair" not in kinds


@pytest.mark.parametrize("label", ["hats", "shoes", "tea"])
def test_a_reason_is_what_removing_its_inputs_changes(stores: Stores, label: str) -> None:
    """Of a category that is the user's alone, one that is popular too, and one that is popular alone.

    From the user's question and from nobody's, the inputs of one reason are
    changed to the other's. The share lies between what that changes there.
    """
    answers = busy(stores)
    query = Query("ann", at_ms=NOW_MS, top=1000)
    reasons = explained(answers, query, label).reasons
    with answers.reading() as reader:
        prepared = answers.prepare([query, query._replace(user=NOBODY)], reader)
        spec, popular = prepared.version.features.spec, prepared.version.popular.tolist()
        own = [public_id("shoes"), public_id("hats")]
        groups, numbers = groups_of(
            spec, prepared.version.program.shapes, [own.index(one) if one in own else -1 for one in popular]
        )
        places = {None: 0, "shoes": 0, "hats": 1} | {name: place for place, name in enumerate(spec.actions)}

        def probability(of_nobody: set[int]) -> float:
            """Of the label, where the inputs of these groups are nobody's."""
            inputs = dict(prepared.inputs)
            for name, number in numbers.items():
                theirs = np.isin(number, list(of_nobody))
                inputs[name] = np.where(theirs, prepared.inputs[name][1], prepared.inputs[name])
            outputs = prepared.version.program.predict(inputs)
            kinds = ("recent", "popular", "successor")
            logits = np.concatenate([outputs[f"{kind}_logits"][0] for kind in kinds]).astype(np.float64)
            shares = np.exp(logits - logits.max()) * np.concatenate([inputs[f"{kind}_mask"][0] for kind in kinds])
            ids = [*prepared.vectors.recent_categories[0].tolist(), *popular, *prepared.successors[0].tolist()]
            return float(shares[[one == public_id(label) for one in ids]].sum() / shares.sum())

        everything = set(range(len(groups)))
        total = sum(abs(one.share) for one in reasons)
        for one in reasons:
            number = groups.index(Group(one.kind, places[one.about]))
            removed = probability(set()) - probability({number})
            added = probability(everything - {number}) - probability(everything)
            least, most = min(removed, added), max(removed, added)
            assert least - 0.05 * total <= one.share <= most + 0.05 * total, one
    assert len(reasons) > 5


def test_a_ranker_of_ones_own_is_explained_too(predictor: Predictor) -> None:
    """By the latest events, and rows of its own tables; of its interests nothing but its candidates counts."""
    best = predictor.profile("ann", at_ms=NOW_MS).interests[0].label
    cases: list[tuple[str | None, str | None, set[str]]] = [
        (None, best, {"category", "succession"}),
        ("i1", None, {"category", "succession", "user", "context", "sequence"}),
    ]
    for item, label, kinds in cases:
        found = explained(predictor, Query("ann", item, at_ms=NOW_MS, top=100), label)
        difference = found.probability - found.cold_start_probability
        assert abs(difference) > 0.001 and {one.kind for one in found.reasons} == kinds
        assert sum(one.share for one in found.reasons) == pytest.approx(difference, rel=0.01)


def test_a_reason_says_what_happened(stores: Stores) -> None:
    reasons = explained(busy(stores), Query("ann", at_ms=NOW_MS, top=1000), "hats").reasons
    hats = next(one for one in reasons if (one.kind, one.about) == ("category", "hats"))
    assert hats.words == "viewed hats 15 times in 7 days, last 1 min ago"
    assert [one.category for one in hats.events] == ["hats"] * 3
    assert hats.events[0] == BehindIt("2027-01-15T07:59:00.000Z", "view", "hats", f"{public_id('i1'):016x}")
    words = {one.kind: one.words for one in reasons if one.kind != "category"}
    assert words["action"] == "viewed 16 times in 7 days, last 5 s ago"
    assert words["user"] == "the weights learned from this user's clicks"


def test_events_tell_actions_and_outcomes() -> None:
    spec = FeatureSpec(actions=("view", "cart", "swipe"))
    events = np.zeros(4, EVENT)
    events["at_ms"], events["category"], events["action"] = NOW_MS - 86_400_000, 7, (255, 1, 0, 2)
    events["flags"] = (0, LABELLED | POSITIVE, LABELLED, 0)
    words = Words(events, NOW_MS, spec, lambda one: f"c{one}", [7], {"age": "30", "city": None})
    groups, _ = groups_of(
        spec, {"features": (-1, len(spec.names)), "context_row": (-1, 2), "category_windows": (-1, 1, 2)}, []
    )
    told = {group.kind: words.of(group, 0.0).words for group in groups if group.place == 0}
    assert told["category"] == (
        "viewed c7 once and put c7 into the cart once and did swipe with c7 once in 7 days, last 1 day ago"
    )
    assert told["outcomes"] == "engaged with 1 of 2 items whose outcome is known in 7 days"
    assert told["rhythm"] == "4 events on 1 day of the last 7 days, last 1 day ago"
    assert told["context"] == "attributes: age=30"


def test_of_nobody_there_is_nothing_to_explain(stores: Stores) -> None:
    found = explained(predictor_of(stores), Query("nobody", top=10), "tea")
    assert found.cold_start and found.reasons == [] and found.rest == pytest.approx(0, abs=1e-9)
    assert found.probability == found.cold_start_probability > 0


def test_what_is_no_candidate_is_refused_with_those_there_are(stores: Stores) -> None:
    answers = predictor_of(stores)
    with pytest.raises(BadRequest, match=r"not a candidate of this user; ask for one of .*hats"):
        explained(answers, Query("ann"), "tractors")
    for query, label in ((Query("ann", "i1"), "hats"), (Query("ann"), None)):
        with pytest.raises(BadRequest, match="either label or item"):
            explained(answers, query, label)


def exact(function: np.ndarray, groups: int) -> np.ndarray:
    """The values by their definition, of a function by the bits of its coalitions."""
    found = np.zeros(groups)
    for group in range(groups):
        others = [1 << one for one in range(groups) if one != group]
        for size in range(groups):
            for chosen in combinations(others, size):
                change = function[sum(chosen) + (1 << group)] - function[sum(chosen)]
                found[group] += change / (groups * comb(groups - 1, size))
    return found


@pytest.mark.parametrize("groups", [1, 2, EXACT, 10])
def test_shares_are_shapley_values(groups: int) -> None:
    """Exactly, of few groups; of more, those of a logistic function of a sum with some products, nearly."""
    rng = np.random.default_rng(groups)
    bits = (np.arange(1 << groups)[:, None] >> np.arange(groups)) & 1
    inner = bits @ rng.normal(size=groups) + (bits @ rng.normal(size=groups)) * bits[:, 0]
    function = 1 / (1 + np.exp(-inner))
    coalitions = Coalitions(groups)
    assert not coalitions.members[0].any() and coalitions.members[-1].all()
    assert len(coalitions.members) <= min(1 << groups, 2 + ORDERS * (groups - 1))
    found = coalitions.shares(function[coalitions.members @ (1 << np.arange(groups))])
    assert found.sum() == pytest.approx(function[-1] - function[0])
    wanted = exact(function, groups)
    apart = np.abs(found - wanted).max()
    assert apart < (1e-12 if groups <= EXACT else 0.05 * np.abs(wanted).sum())
