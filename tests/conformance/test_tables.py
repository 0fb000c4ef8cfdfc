"""What every table of rows by id promises. A new subclass of `IdTable` is found unasked, and fails until `MADE` can use it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.tables
from trainer.tables.count_table import CountTable
from trainer.tables.id_table import IdTable
from trainer.tables.table import Table

Rows = np.ndarray[Any, Any]


def learn_weights(table: Table, rows: Rows, number: int) -> None:
    shape = len(rows), 4
    table.put(rows, np.full(shape, number, np.float32), np.full(shape, number + 1, np.float32))


def learn_counts(table: CountTable, rows: Rows, number: int) -> None:
    table.count(rows, np.full(len(rows), 1 + number % 70, np.uint64))


MADE: dict[type[IdTable], tuple[Callable[[int, int], Any], Callable[[Any, Rows, int], None]]] = {
    Table: (lambda capacity, admit_after: Table("user", 4, capacity, admit_after=admit_after), learn_weights),
    CountTable: (lambda capacity, admit_after: CountTable("transition", capacity, admit_after), learn_counts),
}
"""How each kind is made, of a capacity and with how many sightings an id needs; and how its rows learn from a number."""


def kinds() -> list[type[IdTable]]:
    for module in pkgutil.walk_packages(trainer.tables.__path__, "trainer.tables."):
        importlib.import_module(module.name)
    return sorted(IdTable.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.fixture(params=kinds(), ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[IdTable]:
    found: type[IdTable] = request.param
    assert found in MADE, f"{found.__name__} is a table: say in MADE how it is made and how its rows learn"
    return found


def made(kind: type[IdTable], capacity: int = 50, admit_after: int = 1) -> Any:
    return MADE[kind][0](capacity, admit_after)


def learn(table: IdTable, rows: Rows, number: int) -> None:
    MADE[type(table)][1](table, rows, number)


def ids(*numbers: int) -> Rows:
    return np.array(numbers, np.uint64)


def times(*numbers: int) -> Rows:
    return np.array(numbers, np.int64)


def test_a_new_row_depends_on_table_and_id_only(kind: type[IdTable]) -> None:
    small, large = made(kind, 2), made(kind, 100)
    small.observe(ids(1, 2, 3), times(1, 1, 1))
    large.observe(ids(3), times(1))
    assert large.state().rows[0].tobytes() == small.state().rows[2].tobytes()


def test_no_id_is_none_and_has_no_row(kind: type[IdTable]) -> None:
    table = made(kind)
    assert table.observe(ids(0, 7), times(5, 5)).tolist() == [0, 1]
    assert table.find(ids(0, 8)).tolist() == [0, 0]
    assert table.take_changes().ids.tolist() == [7]


def test_a_row_is_admitted_by_its_nth_sighting(kind: type[IdTable]) -> None:
    table = made(kind, admit_after=3)
    assert table.observe(ids(7, 7), times(1, 2)).tolist() == [0, 0]
    changes = table.take_changes()
    assert (changes.ids.size, changes.pending_ids.tolist(), changes.pending_counts.tolist()) == (0, [7], [2])
    assert table.observe(ids(7), times(3))[0] != 0
    changes = table.take_changes()
    assert (changes.ids.tolist(), changes.pending_ids.tolist(), changes.pending_counts.tolist()) == ([7], [7], [0])
    assert table.pending == 0


def test_expiry_by_log_time_leaves_a_tombstone_and_forgets_pending_ids(kind: type[IdTable]) -> None:
    table = made(kind, admit_after=2)
    table.observe(ids(1, 1, 2, 2, 3), times(10, 20, 10, 50, 10))
    table.take_changes()
    assert table.expire(before_ms=30) == 1
    changes = table.take_changes()
    assert (changes.removed.tolist(), changes.pending_ids.tolist()) == ([1], [3])
    assert table.find(ids(1, 2)).tolist() == [0, 2]


def test_an_expired_id_that_comes_back_starts_anew_and_is_no_tombstone(kind: type[IdTable]) -> None:
    table = made(kind)
    table.observe(ids(1, 2), times(10, 10))
    first = table.state()
    learn(table, table.find(ids(1)), 5)
    assert table.state().rows[0].tobytes() != first.rows[0].tobytes()
    table.expire(before_ms=20)
    table.observe(ids(1), times(30))
    changes = table.take_changes()
    assert (changes.removed.tolist(), changes.ids.tolist()) == ([2], [1])
    assert changes.rows.tobytes() == first.rows[:1].tobytes() and changes.accum.tobytes() == first.accum[:1].tobytes()


def test_distinct_order_is_that_of_first_occurrence(kind: type[IdTable]) -> None:
    table = made(kind)
    table.observe(ids(1, 2, 3), times(1, 1, 1))
    unique, positions = table.distinct(table.find(ids(3, 9, 1, 3)))
    assert unique.tolist() == [0, *table.find(ids(3, 1))]
    assert positions.tolist() == [1, 0, 2, 1]
    again, _ = table.distinct(table.find(ids(3, 9, 1, 3)))
    assert again.tolist() == unique.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 9), st.integers(1, 300), st.booleans()), min_size=1, max_size=40
    ),
    st.integers(1, 3),
    st.sampled_from(kinds()),
)
def test_base_and_deltas_rebuild_the_table_in_another_layout(
    events: list[tuple[int, int, int, bool]], admit_after: int, kind: type[IdTable]
) -> None:
    table, copy = made(kind, 2, admit_after), made(kind, 50, admit_after)
    for number, (key, at, learned, cut) in enumerate(events):
        row = table.observe(ids(key), times(100 * number + at))
        if row[0]:
            learn(table, row, learned)
        if number % 7 == 6:
            table.expire(100 * number - 500)
        if cut:
            copy.load(table.take_changes())
    copy.load(table.take_changes())
    assert copy.digest() == table.digest()
    fresh = made(kind, 7, admit_after)
    fresh.load(table.state())
    assert fresh.digest() == table.digest()
    assert fresh.take_changes().ids.size == 0


def test_growth_keeps_every_row(kind: type[IdTable]) -> None:
    table, roomy, keys = made(kind, 2), made(kind, 2000), np.arange(1, 1001, dtype=np.uint64)
    for start in range(0, 1000, 125):
        for one in (table, roomy):
            learn(one, one.observe(keys[start : start + 125], np.ones(125, np.int64)), start)
    assert (table.capacity, roomy.capacity) == (1024, 2000)
    assert table.digest() == roomy.digest() and len(table) == 1000


def test_clear_forgets_everything(kind: type[IdTable]) -> None:
    table = made(kind)
    empty = table.digest()
    table.observe(ids(1), times(1))
    first = table.digest()
    assert first != empty
    learn(table, table.find(ids(1)), 5)
    table.clear()
    assert table.digest() == empty and len(table) == 0
    table.observe(ids(1), times(1))
    assert table.digest() == first


@pytest.mark.parametrize("field", ["rows", "last_seen_ms", "pending_counts"])
def test_the_digest_sees_each_array(kind: type[IdTable], field: str) -> None:
    table = made(kind, admit_after=2)
    table.observe(ids(1, 1, 2), times(1, 1, 1))
    state = table.state()
    changed = {name: getattr(state, name) for name in state.FIELDS}
    changed[field] = changed[field] + 1
    assert type(state)(**changed).digest() != state.digest()
