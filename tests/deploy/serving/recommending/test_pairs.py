"""Items scored by one product each have the logits that the program gives pair by pair, crosses and attributes included."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.serving.answers.items import UserPairs
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Query
from state.attributes.store import AttributeStore
from state.events.identity import public_id
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_attributes import known as known
from tests.deploy.serving.test_attributes import predictor as with_attributes
from tests.deploy.serving.test_crosses import ids_of, learn, numbers
from tests.deploy.serving.test_predictor import predictor

CATEGORIES = ("shoes", "hats", "books", "tea", "unheard of")
ITEMS = [(public_id(f"never-{n}"), public_id(CATEGORIES[n % 5])) for n in range(200)] + [(public_id("i1"), 0), (9, 0)]


def both(answers: Predictor, query: Query) -> list[tuple[np.ndarray[Any, Any], list[int]]]:
    """Logits and categories by products, and as of a program that has no query of items."""
    found = []
    with answers.reading() as reader:
        prepared = answers.prepare([query], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        for said in (outputs, {}):
            pairs = UserPairs(answers, prepared, said)
            found.append((np.concatenate([pairs.logits(ITEMS[:150]), pairs.logits(ITEMS[150:])]), pairs.categories))
    return found


def test_with_crosses(stores: Stores) -> None:
    ids = ids_of(stores, "ann", "i1", "hats", "3")
    learn(stores, 2, ids, numbers(len(ids)))
    for user in ("ann", "nobody"):
        (ours, kinds), (theirs, wanted) = both(predictor(stores, context=("tab",)), Query(user, context={"tab": "3"}))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert kinds == wanted and len({*ours.round(4).tolist()}) > 5


def test_with_attributes(stores: Stores, known: AttributeStore) -> None:
    (ours, _), (theirs, _) = both(with_attributes(stores, known), Query("ann"))
    (without, _), _ = both(predictor(stores), Query("ann"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert abs(ours[200] - without[200]) > 1e-3
