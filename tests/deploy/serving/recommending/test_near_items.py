"""A worker's index of items has the rows of the version that answers, some turns later, whichever way it got there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers import item_index as module
from deploy.serving.answers.item_index import NearItems
from state.rows.store import RowStore
from tests.deploy.serving.stocked import MAP, NOW_MS, manifest

DIM = 4
ALONG = np.ones(DIM, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RowStore]:
    made = RowStore(tmp_path, MAP)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 8)


def publish(
    store: RowStore,
    version: int,
    rows: dict[int, float],
    parent: int | None = None,
    removed: tuple[int, ...] = (),
    dim: int = DIM,
) -> None:
    """A version with rows along one direction, each of its length."""
    ids = np.array([*rows], np.uint64)
    tensors: dict[str, Any] = {
        "dense.w": np.ones(1, np.float32),
        "item.ids": ids,
        "item.rows": np.array([[length] * dim for length in rows.values()], np.float32).reshape(len(rows), dim),
        "item.removed": np.array(removed, np.uint64),
        "user.ids": ids,
        "user.rows": np.zeros((len(rows), DIM), np.float32),
    }
    epoch = 1 if parent is None or parent == version - 1 else 2
    made = manifest(version, "program", parent, epoch)
    if epoch > 1:
        made = replace(made, visible=((version, version), (1, parent or 0)))
    store.apply(made, tensors, NOW_MS, follow=True)


def settled(near: NearItems) -> NearItems:
    while near.turn():
        pass
    return near


def asked(store: RowStore) -> NearItems:
    near = NearItems(store)
    assert near.nearest(ALONG, 3) == []
    return settled(near)


def spread(count: int) -> dict[int, float]:
    """Ids as hashes are, the longest row last."""
    return {(place * ((1 << 64) // count) + 1): place / count for place in range(count)}


def test_nothing_is_read_before_anybody_asks(store: RowStore) -> None:
    publish(store, 1, spread(3))
    assert not NearItems(store).turn()


def test_rows_are_followed_from_version_to_version(store: RowStore) -> None:
    first = spread(100)
    publish(store, 1, first)
    near = asked(store)
    best = [*first][:-4:-1]
    assert near.nearest(ALONG, 3) == best
    for version in range(2, 30):
        publish(store, version, {7: version / 10, best[2]: 0.0}, version - 1)
    assert near.turn() is False
    assert near.nearest(ALONG, 3) == [7, *best[:2]]
    publish(store, 30, {}, 29, removed=(7, best[0]))
    settled(near)
    assert near.nearest(ALONG, 1) == [best[1]] and best[0] not in near.nearest(ALONG, 200)
    assert len(near.nearest(ALONG, 200)) == 99


def test_after_a_rollback_the_rows_are_those_of_the_version_that_answers(store: RowStore) -> None:
    """Also of the next one, which goes on from it; what answered before answers meanwhile."""
    publish(store, 1, spread(50))
    best = [*spread(50)][-1]
    publish(store, 2, {7: 9.0}, 1)
    near = asked(store)
    assert near.nearest(ALONG, 1) == [7]
    store.serve(1)
    assert near.turn() and near.nearest(ALONG, 1) == [7]
    assert settled(near).nearest(ALONG, 1) == [best]
    publish(store, 3, {9: 5.0}, 1)
    assert settled(near).nearest(ALONG, 2) == [9, best]


def test_a_worker_that_slept_too_long_reads_all_again(store: RowStore) -> None:
    publish(store, 1, spread(20))
    near = asked(store)
    publish(store, 2, {7: 9.0}, 1)
    publish(store, 3, {9: 8.0}, 2)
    store.drop([1])
    assert settled(near).nearest(ALONG, 2) == [7, 9]


def test_rows_of_another_width_are_begun_anew_and_of_a_former_one_nobody_asks(store: RowStore) -> None:
    publish(store, 1, spread(20))
    near = asked(store)
    publish(store, 2, spread(20), dim=2)
    assert near.nearest(np.ones(2, np.float32), 1) == []
    settled(near)
    assert near.nearest(np.ones(2, np.float32), 1) == [[*spread(20)][-1]] and near.nearest(ALONG, 1) == []


def test_an_index_that_is_outgrown_is_made_anew(store: RowStore) -> None:
    publish(store, 1, spread(8))
    near = asked(store)
    planned = near._planned
    publish(store, 2, spread(200), 1)
    settled(near)
    assert near._planned > planned and near._index is not None and len(near._index) == len({*spread(8), *spread(200)})
    publish(store, 3, {7: 9.0}, 2)
    assert settled(near).nearest(ALONG, 1) == [7]


def test_as_many_are_kept_as_there_is_room_for(store: RowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_INDEXED", 32)
    publish(store, 1, spread(100))
    near = asked(store)
    publish(store, 2, {7: 9.0}, 1)
    assert settled(near).nearest(ALONG, 1) == [7] and len(near.nearest(ALONG, 200)) == 32
