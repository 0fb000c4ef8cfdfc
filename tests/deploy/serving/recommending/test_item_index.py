"""The index finds nearly all of the nearest rows, and what is put anew or taken out is so at once."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.serving.answers.item_index import POINTS, ItemIndex, lists_for

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
