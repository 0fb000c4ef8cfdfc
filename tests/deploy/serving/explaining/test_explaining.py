"""An explanation adds up to the difference from nobody's answer, is the integral of the model's gradient, and tells what happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deploy.serving.answer import Query
from deploy.serving.explaining.explaining import NOBODY, explain
from deploy.serving.explaining.explanation import Explanation
from deploy.serving.explaining.groups import CANDIDATES, groups_of
from deploy.serving.explaining.target import candidate
from deploy.serving.explaining.words import Words
from deploy.serving.predictor import Predictor
from state.errors import BadRequest
from state.events.identity import Salt, public_id, user_id
from state.features.spec import EVENT, LABELLED, POSITIVE, FeatureSpec
from state.history.appends import Appends
from tests.deploy.serving.recommending.test_ranking import run
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, clicks
from tests.deploy.serving.test_own_tables import looking_up as looking_up
from tests.deploy.serving.test_own_tables import predictor as predictor
from tests.deploy.serving.test_predictor import predictor as predictor_of


def explained(answers: Predictor, query: Query, label: str | None = None) -> Explanation:
    """What the steps return in the end."""
    found: Explanation = run(explain(answers, query, label))[1]
    return found


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
    shown = {one["label"]: one["probability"] for one in answers.profile("ann", at_ms=NOW_MS).interests}
    nobody = {one["label"]: one["probability"] for one in answers.profile("nobody", at_ms=NOW_MS).interests}
    if label == "tea":
        # No click named it.
        shown[label], nobody[label] = (one[f"{public_id(label):016x}"] for one in (shown, nobody))
    assert found.probability == pytest.approx(shown[label], rel=1e-5)
    assert found.cold_start_probability == pytest.approx(nobody.get(label, 0.0), rel=1e-5)
    total = sum(one["share"] for one in found.reasons)
    assert abs(found.probability - found.cold_start_probability) > 0.001
    assert total == pytest.approx(found.probability - found.cold_start_probability, rel=0.01)
    assert total + found.rest == pytest.approx(found.probability - found.cold_start_probability, abs=1e-9)
    fewer = explained(answers, Query("ann", at_ms=NOW_MS, top=2), label)
    assert fewer.reasons == found.reasons[:2] and abs(fewer.rest) > 0


def test_the_parts_of_an_engagement_add_up_too(stores: Stores) -> None:
    """In which the model lets no gradient through from interest."""
    answers = busy(stores)
    found = explained(answers, Query("ann", "i1", at_ms=NOW_MS, top=1000))
    engaged = [answers.profile(user, "i1", at_ms=NOW_MS).engagement for user in ("ann", "nobody")]
    wanted = [one["probability"] for one in engaged if one is not None]
    assert [found.probability, found.cold_start_probability] == pytest.approx(wanted, rel=1e-5)
    assert sum(one["share"] for one in found.reasons) == pytest.approx(wanted[0] - wanted[1], rel=0.01)
    kinds = {one["kind"] for one in found.reasons}
    assert kinds >= {"candidates", "category", "action", "user"} and "pair" not in kinds


def test_the_parts_are_the_integral_of_the_models_own_gradient(stores: Stores) -> None:
    """By TensorFlow, at 2,000 points of the line."""
    answers, label = busy(stores), "hats"
    query = Query("ann", at_ms=NOW_MS, top=1000)
    with answers.reading() as reader:
        prepared = answers.prepare([query, query._replace(user=NOBODY)], reader)
        target = candidate(prepared, 0, label)
        assert target is not None and target.slot is not None
        groups, numbers = groups_of(prepared.version.features.spec, prepared.version.program.shapes)
        nearer = (np.arange(2000, dtype=np.float64) + 0.5) / 2000
        points: dict[str, Any] = {"popular_rows": tf.constant(prepared.inputs["popular_rows"])}
        moves: dict[str, Any] = {}
        for name, number in numbers.items():
            end, begin = (prepared.inputs[name][row] for row in (0, 1))
            begin = np.where(number == groups.index(CANDIDATES), end, begin)
            moves[name] = end - begin
            at = (nearer**2).reshape(-1, *[1] * end.ndim)
            points[name] = tf.constant((begin + at * moves[name]).astype(np.float32))
    model = stores.lowered.model
    with tf.GradientTape() as tape:
        tape.watch([points[name] for name in numbers])
        found = model.predict(points)
        logits = tf.concat([found[f"{kind}_logits"] for kind in ("recent", "popular", "successor")], 1)
        probability = tf.nn.softmax(logits)[:, target.slot]
    gradients = tape.gradient(probability, {name: points[name] for name in numbers}, unconnected_gradients="zero")
    # The points lie at the squares of even steps.
    wanted = np.zeros(len(groups))
    for name, number in numbers.items():
        steep = np.tensordot(2 * nearer / len(nearer), gradients[name].numpy().astype(np.float64), 1)
        np.add.at(wanted, number.reshape(-1), (steep * moves[name]).reshape(-1))
    given = {groups.index(CANDIDATES): 0.0}
    for one in explained(answers, query, label).reasons:
        place = ["shoes", "hats"].index(str(one["about"])) if one["kind"] == "category" else 0
        place = FeatureSpec().actions.index(str(one["about"])) if one["kind"] == "action" else place
        number = next(k for k, group in enumerate(groups) if group == (one["kind"], place))
        given[number] = 0.0 if one["kind"] == "candidates" else one["share"]
    assert len(given) > 5
    ours = np.array([given.get(number, 0.0) for number in range(len(groups))])
    assert np.abs(ours - wanted).max() < 0.01 * np.abs(wanted).sum()


def test_a_ranker_of_ones_own_is_explained_too(predictor: Predictor) -> None:
    """By the latest events, and rows of its own tables; of its interests nothing but the candidates counts."""
    best = predictor.profile("ann", at_ms=NOW_MS).interests[0]["label"]
    cases: list[tuple[str | None, str | None, set[str]]] = [
        (None, best, {"candidates"}),
        ("i1", None, {"candidates", "user", "context", "sequence"}),
    ]
    for item, label, kinds in cases:
        found = explained(predictor, Query("ann", item, at_ms=NOW_MS, top=100), label)
        difference = found.probability - found.cold_start_probability
        assert abs(difference) > 0.001 and {one["kind"] for one in found.reasons} == kinds
        assert sum(one["share"] for one in found.reasons) == pytest.approx(difference, rel=0.01)


def test_a_reason_says_what_happened(stores: Stores) -> None:
    """How often, in how long, when last, and the newest of the events themselves."""
    reasons = explained(busy(stores), Query("ann", at_ms=NOW_MS, top=1000), "hats").reasons
    hats = next(one for one in reasons if (one["kind"], one["about"]) == ("category", "hats"))
    assert hats["words"] == "viewed hats 15 times in 7 days, last 1 min ago"
    assert [one["category"] for one in hats["events"]] == ["hats"] * 3
    assert hats["events"][0] == {
        "at": "2027-01-15T07:59:00.000Z", "action": "view", "category": "hats", "item": f"{public_id('i1'):016x}",
    }  # fmt: skip
    words = {one["kind"]: one["words"] for one in reasons if one["kind"] != "category"}
    assert words["action"] == "viewed 16 times in 7 days, last 5 s ago"
    assert words["candidates"] == "the latest categories are shoes, hats"
    assert words["user"] == "what was learned from this user's clicks so far"


def test_events_tell_actions_and_outcomes() -> None:
    """Each action by its verb, one without by its name; what was engaged with."""
    spec = FeatureSpec(actions=("view", "cart", "swipe"))
    events = np.zeros(4, EVENT)
    events["at_ms"], events["category"], events["action"] = NOW_MS - 86_400_000, 7, (255, 1, 0, 2)
    events["flags"] = (0, LABELLED | POSITIVE, LABELLED, 0)
    words = Words(events, NOW_MS, spec, lambda one: f"c{one}", [7], [("age", "30"), ("city", None)])
    groups, _ = groups_of(spec, {"features": (-1,), "context_row": (-1,)})
    told = {group.kind: words.of(group).words for group in groups if group.place == 0}
    assert told["category"] == (
        "viewed c7 once and put c7 into the cart once and did swipe with c7 once in 7 days, last 1 day ago"
    )
    assert told["outcomes"] == "engaged with 1 of 2 items whose outcome is known in 7 days"
    assert told["rhythm"] == "4 events on 1 day of the last 7 days, last 1 day ago"
    assert told["context"] == "attributes: age=30"


def test_of_nobody_there_is_nothing_to_explain(stores: Stores) -> None:
    """Nor does it fail."""
    found = explained(predictor_of(stores), Query("nobody", top=10), "tea")
    assert found.cold_start and found.reasons == [] and found.rest == pytest.approx(0, abs=1e-9)
    assert found.probability == found.cold_start_probability > 0


def test_what_is_no_candidate_is_refused_with_those_there_are(stores: Stores) -> None:
    """So is a question about both, or about neither."""
    answers = predictor_of(stores)
    with pytest.raises(BadRequest, match=r"none of this user's candidates; ask for one of .*hats"):
        explained(answers, Query("ann"), "tractors")
    for query, label in ((Query("ann", "i1"), "hats"), (Query("ann"), None)):
        with pytest.raises(BadRequest, match="one of them only"):
            explained(answers, query, label)
