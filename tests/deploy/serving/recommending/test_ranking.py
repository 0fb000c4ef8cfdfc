"""Items that a caller names are scored as one by one, by one version, and come best first."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.items import rank
from deploy.serving.answers.query import NamedItem, Query
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors
from tests.deploy.serving.test_predictor import predictor


def run(steps: Generator[None, None, Any]) -> tuple[int, Any]:
    """How often a generator stopped, and what it returned."""
    stops = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return stops, end.value
        stops += 1


def test_items_are_scored_as_one_by_one_and_come_best_first(stores: Stores) -> None:
    """Clicked or not, with a category or without; of equal ones the first one named comes first."""
    answers = predictor(stores)
    asked = [
        *(NamedItem(f"never-{n}", ("shoes", "hats", "books")[n % 3]) for n in range(300)),
        NamedItem("i1"),
        NamedItem("never"),
    ]
    stops, found = run(rank(answers, Query("ann"), asked))
    assert stops == 2 and len(found.items) == len(asked)
    given = [one["probability"] for one in found.items]
    assert given == sorted(given, reverse=True)
    shown = {one["item"]: one for one in found.items}
    assert shown["i1"]["category"] == "hats" and shown["never"]["category"] is None
    for one in (asked[0], asked[299], *asked[300:]):
        alone = answers.profile("ann", item=one.item, category=one.category)
        assert alone.engagement is not None
        assert shown[one.item]["probability"] == pytest.approx(alone.engagement["probability"], rel=1e-5)
    shoes = [one["item"] for one in found.items if one["category"] == "shoes"]
    assert shoes == [f"never-{n}" for n in range(0, 300, 3)]
    assert (found.user_id, found.known, found.version["number"]) == ("ann", True, 1)


def test_all_items_are_scored_by_the_version_that_answered_first(stores: Stores) -> None:
    answers, items = predictor(stores), [NamedItem(f"n{n}", "shoes") for n in range(600)]
    _, wanted = run(rank(answers, Query("ann"), items))
    steps = rank(answers, Query("ann"), items)
    next(steps)
    other = {name: value + 0.5 for name, value in stores.lowered.weights.items()}
    made = tensors(stores.lowered, 2, {"category": ["shoes"]}, [])
    made |= {f"dense.{name}": np.asarray(value, np.float32) for name, value in other.items()}
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), made, NOW_MS, follow=True)
    assert answers.profile("ann").version["number"] == 2
    _, found = run(steps)
    assert found.version["number"] == 1 and found.items == wanted.items
    _, later = run(rank(answers, Query("ann"), items))
    assert later.version["number"] == 2 and later.items != wanted.items
