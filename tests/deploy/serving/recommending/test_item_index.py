"""The index of items finds nearly all of the nearest rows, and follows the rows of the version that answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers import item_index as module
from deploy.serving.answers.item_index import POINTS, ItemIndex, NearItems, lists_for
from state.rows.store import RowStore
from tests.deploy.serving.stocked import MAP, NOW_MS, manifest

DIM = 16


def made(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Ids over all 64 bits, and rows of items of some kinds, some larger than others."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(0, 0.3, (200, DIM))
    values = (kinds[rng.integers(0, 200, rows)] + rng.normal(0, 0.2, (rows, DIM))) * rng.lognormal(0, 0.4, (rows, 1))
    ids = np.unique(rng.integers(1, 1 << 64, 2 * rows, np.uint64))
    return rng.permutation(ids)[:rows], values.astype(np.float32)


def nearest(ids: np.ndarray, rows: np.ndarray, query: np.ndarray, most: int) -> list[int]:
    """By scoring all."""
    found: list[int] = ids[np.argsort(-(rows @ query), kind="stable")[:most]].tolist()
    return found


def index_of(ids: np.ndarray, rows: np.ndarray) -> ItemIndex:
    made = ItemIndex(rows[: POINTS * lists_for(len(rows))], len(rows))
    made.add(ids, rows)
    return made


def test_nearly_all_of_the_nearest_are_found() -> None:
    ids, rows = made(40_000)
    index, rng = index_of(ids, rows), np.random.default_rng(4)
    queries = rng.normal(0, 0.3, (50, DIM)).astype(np.float32)
    found = [len({*nearest(ids, rows, one, 20)} & {*index.nearest(one, 20)}) / 20 for one in queries]
    assert np.mean(found) >= 0.95


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_few_rows_are_all_found_in_order(rows: int) -> None:
    ids, values = made(rows)
    index = ItemIndex(values, rows)
    index.add(ids, values)
    query = np.ones(DIM, np.float32)
    assert index.nearest(query, 20) == nearest(ids, values, query, 20) and len(index) == rows


def test_rows_that_are_put_anew_or_taken_out_are_so_at_once() -> None:
    ids, rows = made(2_000)
    index, query = index_of(ids, rows), np.ones(DIM, np.float32)
    first, second = index.nearest(query, 2)
    index.remove(np.array([first, 5], np.uint64))
    assert index.nearest(query, 1) == [second] and len(index) == 1_999
    last = nearest(ids, rows, -query, 1)
    index.remove(np.array(last, np.uint64))
    index.add(np.array(last, np.uint64), 100 * query[None])
    assert index.nearest(query, 2) == [*last, second] and len(index) == 1_999


def test_the_oldest_of_the_fullest_list_are_named() -> None:
    index = ItemIndex(np.eye(2, DIM, dtype=np.float32), 4)
    index.add(np.array([1, 2], np.uint64), np.eye(2, DIM, dtype=np.float32))
    index.add(np.array([3], np.uint64), np.eye(1, DIM, 1, dtype=np.float32))
    assert index.oldest(1).tolist() == [2] and index.oldest(9).tolist() == [2, 3]


WIDTH = 4
ALONG = np.ones(WIDTH, np.float32)


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
    dim: int = WIDTH,
) -> None:
    """A version with rows along one direction, each of its length."""
    ids = np.array([*rows], np.uint64)
    tensors: dict[str, Any] = {
        "dense.w": np.ones(1, np.float32),
        "item.ids": ids,
        "item.rows": np.array([[length] * dim for length in rows.values()], np.float32).reshape(len(rows), dim),
        "item.removed": np.array(removed, np.uint64),
        "user.ids": ids,
        "user.rows": np.zeros((len(rows), WIDTH), np.float32),
    }
    epoch = 1 if parent is None or parent == version - 1 else 2
    made = manifest(version, "program", parent, epoch)
    if epoch > 1:
        made = replace(made, visible=((version, version), (1, parent or 0)))
    store.apply(made, tensors, NOW_MS, follow=True)


def settled(near: NearItems) -> NearItems:
    while near.read_more():
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
    assert not NearItems(store).read_more()


def test_rows_are_followed_from_version_to_version(store: RowStore) -> None:
    first = spread(100)
    publish(store, 1, first)
    near = asked(store)
    best = [*first][:-4:-1]
    assert near.nearest(ALONG, 3) == best
    for version in range(2, 30):
        publish(store, version, {7: version / 10, best[2]: 0.0}, version - 1)
    assert near.read_more() is False
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
    assert near.read_more() and near.nearest(ALONG, 1) == [7]
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
