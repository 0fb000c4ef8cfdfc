"""Crosses have names that last: versions hold weights under them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from state.features.spec import FeatureSpec
from state.ranking.crosses import ANSWERS, Crosses, Values, logits_of

SPEC = FeatureSpec()
CROSSES = Crosses(SPEC, ("tab",), ("age",), ("author", "length"))
WITH_EVENTS = Crosses(dataclasses.replace(SPEC, sequence=4), ("tab",), ("age",), ("author", "length"))


GOLDEN = {
    "every": "48d1e5283955699d",
    "user*category": "ca12e3cb12bea161",
    "context.tab*item.author": "7ed7185fa99d0180",
    "answer.share": "94f83454a468aef4",
    "answer.share by weight": "aea3b2a41e040242",
    "answer.positive of labelled": "580476a2a08e7e6e",
    "answer.pause": "c58f32b09f2a1c20",
}

GOLDEN_SHARES = {
    "every": "678cc7e4f1caa19f",
    "user*category": "4cdacd2b2b5f73ce",
    "answer.share by weight": "527233573f1b60b1",
}


def rows(count: int = 6, seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)

    def ids(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        return rng.integers(1, 2**63, shape).astype(np.uint64)

    features = rng.integers(0, 3000, (count, len(SPEC.names))).astype(np.uint16)
    none = np.zeros((count, 0), np.uint64)
    return Values(ids(count), ids(count), ids(count), ids(count, 1), ids(count, 1), ids(count, 2), features, none)


def column(values: Values, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    found: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] = CROSSES.ids(values)[:, CROSSES.names.index(name)]
    return found


def test_ids_are_those_of_every_release() -> None:
    one = Values(
        np.array([1], np.uint64), np.array([2], np.uint64), np.array([3], np.uint64), np.array([[4]], np.uint64),
        np.array([[5]], np.uint64), np.array([[6, 7]], np.uint64), np.arange(len(SPEC.names), dtype=np.uint16)[None] * 9,
        np.zeros((1, 0), np.uint64),
    )  # fmt: skip
    found = dict(zip(CROSSES.names, (f"{name:016x}" for name in CROSSES.ids(one)[0].tolist()), strict=True))
    assert {name: found[name] for name in GOLDEN} == GOLDEN


def test_shares_are_kept_under_ids_of_every_release_that_no_cross_has() -> None:
    names = (*CROSSES.names, "network")
    found = dict(zip(names, (f"{one:016x}" for one in CROSSES.shares.tolist()), strict=True))
    assert {name: found[name] for name in GOLDEN_SHARES} == GOLDEN_SHARES
    assert len(set(found.values())) == len(CROSSES) + 1


def test_margins_count_nothing_and_weights_half_until_shares_are_learned() -> None:
    rows = np.array([[[0.4, 3.0], [-0.2, 5.0]], [[0.0, 0.0], [1.0, 1.0]]], np.float32)
    none = np.zeros((2, 2), np.float32)
    np.testing.assert_allclose(logits_of(rows, none), [0.1, 0.5], rtol=1e-6)
    learned = np.array([[0.5, 0.1], [0.0, -0.2]], np.float32)
    np.testing.assert_allclose(logits_of(rows, learned), [0.4 + 0.3 - 0.1 - 1.0, 0.5 - 0.2], rtol=1e-6)


def test_every_cross_has_an_id_of_its_own_and_a_kind() -> None:
    found = CROSSES.ids(rows())
    assert found.shape == (6, len(CROSSES)) and len(np.unique(found)) >= 6 * (len(CROSSES) - 1 - len(ANSWERS))
    assert len(set(CROSSES.names)) == len(CROSSES) == len(CROSSES.kinds)
    of = dict(zip(CROSSES.names, CROSSES.kinds, strict=True))
    assert of["user*item.author"] == "user*item attribute"
    assert of["answer.pause"] == "pause"


def test_a_rows_ids_depend_on_nothing_but_the_row() -> None:
    values = rows()
    order = np.array([3, 0, 5])
    chosen = CROSSES.ids(Values(*(part[order] for part in values)))
    assert (chosen == CROSSES.ids(values)[order]).all()


def test_a_pair_changes_with_each_of_its_values_and_with_nothing_else() -> None:
    values, name = rows(), "user*category"
    before = column(values, name)
    for field in Values._fields:
        part = getattr(values, field)
        after = column(values._replace(**{field: part + part.dtype.type(16)}), name)
        assert (after != before).all() if field in ("user", "category") else (after == before).all()


def test_the_same_value_in_two_columns_is_two_crosses() -> None:
    values = rows()
    same = values._replace(item=values.user, category=values.user)
    assert len({column(same, name)[0] for name in ("user", "item", "category", "user*item", "user*category")}) == 5


@pytest.mark.parametrize("field", ["item", "category", "context"])
def test_a_value_that_is_not_there_takes_its_crosses_out(field: str) -> None:
    values = rows()
    found = CROSSES.ids(values._replace(**{field: np.zeros_like(getattr(values, field))}))
    gone = [field in name.replace("context.tab", "context").split("*") for name in CROSSES.names]
    assert ((found == 0) == np.array(gone)).all()


def test_answers_follow_the_labels_so_far() -> None:
    values = rows()
    names = [name for name in CROSSES.names if name.startswith("answer.")]
    for feature, changes in (("positive.decayed_3d", 2), ("positive.count_7d", 1), ("labelled.count_7d", 2)):
        features = values.features.copy()
        features[:, SPEC.names.index(feature)] = 1
        before = values._replace(features=features)
        features = features.copy()
        features[:, SPEC.names.index(feature)] = 700
        after = before._replace(features=features)
        assert sum((column(before, name) != column(after, name)).all() for name in names) == changes


def test_latest_items_are_crosses_only_if_examples_contain_them_and_change_no_other_id() -> None:
    values = rows()
    latest = np.arange(1, 25, dtype=np.uint64).reshape(6, 4)
    latest[2:, 1:] = 0
    found = WITH_EVENTS.ids(values._replace(latest_items=latest))
    names = [f"latest item.{place}" for place in (1, 2, 3)]
    assert [name for name in WITH_EVENTS.names if name not in CROSSES.names] == names
    others = [WITH_EVENTS.names.index(name) for name in CROSSES.names]
    assert (found[:, others] == CROSSES.ids(values)).all()
    mine = found[:, [WITH_EVENTS.names.index(name) for name in names]]
    assert len(np.unique(mine[mine != 0])) == 10
    assert ((mine != 0) == (latest[:, :3] != 0)).all(), "a user without so many events has none"
    moved = WITH_EVENTS.ids(values._replace(latest_items=np.roll(latest, 1, 1)))
    at = [WITH_EVENTS.names.index(name) for name in names]
    assert (moved[:2, at[1:]] == mine[:2, :2]).all(), "an item has the same cross in every place"
    one = Crosses(dataclasses.replace(SPEC, sequence=1), ("tab",), ("age",), ("author", "length"))
    assert [name for name in one.names if name not in CROSSES.names] == names[:1]
    alone = one.ids(values._replace(latest_items=latest[:, :1]))
    assert (alone == np.delete(found, at[1:], 1)).all()
    assert [f"{number:016x}" for number in mine[0].tolist()] == [
        "31683aa51fb4ce39",
        "8b3c4da87f612de2",
        "63edfa18663a10c3",
    ], "versions hold weights under them"
