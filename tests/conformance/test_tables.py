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
from state.ranking.item_lists import count_visits
from trainer.tables.id_table import DOUBLING_MS, NO_CAP, IdTable
from trainer.tables.lists import CountTable, ItemListTable
from trainer.tables.table import Table

Rows = np.ndarray[Any, Any]


def learn_weights(table: Table, rows: Rows, number: int) -> None:
    shape = len(rows), 4
    table.put(rows, np.full(shape, number, np.float32), np.full(shape, number + 1, np.float32))


def learn_counts(table: CountTable, rows: Rows, number: int) -> None:
    table.count(rows, np.full(len(rows), 1 + number % 70, np.uint64))


def learn_items(table: ItemListTable, rows: Rows, number: int) -> None:
    for row in rows[rows != 0].tolist():
        count_visits(np.array([1 + number % 70], np.uint64), np.zeros(1, np.int64), row, table.held)


MADE: dict[type[IdTable], tuple[Callable[[int, int, int], Any], Callable[[Any, Rows, int], None]]] = {
    Table: (
        lambda capacity, admit_after, most: Table("user", 4, capacity, 1e-6, admit_after, 0.05, most),
        learn_weights,
    ),
    CountTable: (
        lambda capacity, admit_after, most: CountTable("transition", capacity, admit_after, most),
        learn_counts,
    ),
    ItemListTable: (
        lambda capacity, admit_after, most: ItemListTable("followed", capacity, admit_after, most),
        learn_items,
    ),
}
"""How each kind is made, of a capacity, how many sightings an id needs and how many rows there may be; and how its rows
learn from a number, the more the larger."""


def kinds() -> list[type[IdTable]]:
    for module in pkgutil.walk_packages(trainer.tables.__path__, "trainer.tables."):
        importlib.import_module(module.name)
    return sorted(IdTable.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.fixture(params=kinds(), ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[IdTable]:
    found: type[IdTable] = request.param
    assert found in MADE, f"{found.__name__} is a table: say in MADE how it is made and how its rows learn"
    return found


def made(kind: type[IdTable], capacity: int = 50, admit_after: int = 1, max_rows: int = NO_CAP) -> Any:
    return MADE[kind][0](capacity, admit_after, max_rows)


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
    st.sampled_from([4, 8, NO_CAP]),
    st.sampled_from(kinds()),
)
def test_base_and_deltas_rebuild_the_table_in_another_layout(
    events: list[tuple[int, int, int, bool]], admit_after: int, most: int, kind: type[IdTable]
) -> None:
    table, copy = made(kind, 2, admit_after, most), made(kind, 50, admit_after, most)
    restored = False
    for number, (key, at, learned, cut) in enumerate(events):
        # After a restart in the middle the copy goes on beside the table it was loaded from.
        for one in (table, copy) if restored else (table,):
            one.observe(ids(key), times(100 * number + at))
            one.evict()
            row = one.find(ids(key))
            if row[0]:
                learn(one, row, learned)
            if number % 7 == 6:
                one.expire(100 * number - 500)
            assert len(one) <= most and one.pending <= most
        if cut and not restored:
            copy.load(table.take_changes())
            restored = number > 20
    if not restored:
        copy.load(table.take_changes())
    assert copy.digest() == table.digest()
    fresh = made(kind, 7, admit_after, most)
    fresh.load(table.state())
    assert fresh.digest() == table.digest()
    assert fresh.take_changes().ids.size == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 300), st.sampled_from(("", "", "served", "changes"))),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 3),
    st.sampled_from(kinds()),
)
def test_takes_for_answers_and_durable_ones_each_lose_nothing(
    events: list[tuple[int, int, str]], admit_after: int, kind: type[IdTable]
) -> None:
    """Ids that went and came back between two takes of one kind, rows handed out again, growth in between."""
    table, copy = made(kind, 2, admit_after), made(kind, 50, admit_after)
    answers: dict[int, bytes] = {}

    def take_served() -> None:
        taken = table.take_served()
        assert not set(taken["ids"].tolist()) & set(taken["removed"].tolist())
        for key in taken["removed"].tolist():
            answers.pop(key, None)
        answers.update(zip(taken["ids"].tolist(), (row.tobytes() for row in taken["rows"]), strict=True))

    for number, (key, learned, take) in enumerate(events):
        row = table.observe(ids(key), times(100 * number))
        if row[0]:
            learn(table, row, learned)
        if number % 4 == 3:
            table.expire(100 * number - 400)
        if take:
            take_served()
        if take == "changes":
            changes = table.take_changes()
            assert not set(changes.ids.tolist()) & set(changes.removed.tolist())
            copy.load(changes)
            assert copy.digest() == table.digest()
    take_served()
    copy.load(table.take_changes())
    assert copy.digest() == table.digest()
    held = table.state()
    assert answers == dict(zip(held.ids.tolist(), (row.tobytes() for row in held.rows), strict=True))


def test_growth_keeps_every_row(kind: type[IdTable]) -> None:
    table, roomy, keys = made(kind, 2), made(kind, 2000), np.arange(1, 1001, dtype=np.uint64)
    for start in range(0, 1000, 125):
        for one in (table, roomy):
            learn(one, one.observe(keys[start : start + 125], np.ones(125, np.int64)), start)
    assert 1000 < table.capacity <= 2000 and roomy.capacity == 2000
    assert table.digest() == roomy.digest() and len(table) == 1000


def test_a_full_table_lets_the_least_used_leave_and_says_so(kind: type[IdTable]) -> None:
    table, keys, hour = made(kind, max_rows=64), np.arange(1, 65, dtype=np.uint64), 3_600_000
    table.observe(keys, np.arange(64, dtype=np.int64) * hour)
    # The oldest four learned much, the next four a little, all others nothing.
    learn(table, table.find(keys[:4]), 2)
    for _ in range(300):
        learn(table, table.find(keys[:4]), 3000)
    learn(table, table.find(keys[4:8]), 2)
    assert table.evict() == 0
    table.take_changes()
    table.observe(ids(99), times(64 * hour))
    assert table.evict() == 65 - 56 and len(table) == 56
    changes = table.take_changes()
    # Seen longest ago and used least: those of little use too, where that is no day's worth.
    assert set(changes.removed.tolist()).isdisjoint({1, 2, 3, 4, 99}) and changes.ids.tolist() == [99]
    assert changes.removed[-1] < 9 + 9 and len(changes.removed) == 9
    assert table.find(changes.removed).tolist() == [0] * 9


def test_who_leaves_is_the_same_in_another_layout(kind: type[IdTable]) -> None:
    table, copy = made(kind, 2, max_rows=64), made(kind, 500, max_rows=64)
    for number in range(40):
        keys = np.arange(5 * number + 1, 5 * number + 8, dtype=np.uint64)[:: -1 if number % 2 else 1]
        for one in (table, copy):
            one.observe(keys, np.full(7, number // 4))
            one.evict()
            learn(one, one.find(keys), 2 + number % 3)
        if number == 20:
            copy = made(kind, 90, max_rows=64)
            copy.load(table.state())
        assert 0 < len(table) <= 64
    assert copy.digest() == table.digest()


def test_a_flood_of_new_ids_pushes_out_itself(kind: type[IdTable]) -> None:
    table, regulars = made(kind, max_rows=256), np.arange(1, 101, dtype=np.uint64)
    for _ in range(100):
        table.observe(regulars, np.zeros(100, np.int64))
        learn(table, table.find(regulars), 1000)
    for number in range(50):
        flood = np.arange(1000 + 100 * number, 1100 + 100 * number, dtype=np.uint64)
        table.observe(flood, np.full(100, DOUBLING_MS + number))
        table.evict()
        learn(table, np.unique(table.find(flood)), 1)
    assert table.find(regulars).all()


def test_ids_that_wait_are_bounded_and_the_least_seen_wait_no_more(kind: type[IdTable]) -> None:
    table = made(kind, admit_after=9, max_rows=64)
    for number in range(100):
        table.observe(ids(1, 1000 + number), times(number, number))
        table.evict()
        if number == 6:
            table.take_changes()
        assert table.pending <= 64
    assert 1000 not in table.state().pending_ids and 1099 in table.state().pending_ids
    gone = table.take_changes()
    assert gone.pending_counts[gone.pending_ids == 1000].tolist() == [0]
    assert table.find(ids(1))[0] != 0


def test_memory_is_given_back_when_few_ids_are_left(kind: type[IdTable]) -> None:
    table, keys = made(kind, 64), np.arange(1, 20_001, dtype=np.uint64)
    table.observe(keys, np.arange(20_000, dtype=np.int64))
    learn(table, table.find(keys[-50:]), 7)
    kept = made(kind, 64)
    kept.load(table.take_changes())
    assert table.capacity > 20_000
    assert table.expire(before_ms=19_900) == 19_900
    assert len(table) == 100 and table.capacity < 400
    kept.load(table.take_changes())
    assert kept.digest() == table.digest()
    # The rows that are listed as changed are still those, and new ids get places as before.
    learn(table, table.find(keys[-3:]), 8)
    table.touch(table.find(keys[-3:]))
    table.observe(keys[:500], np.full(500, 30_000))
    changes = table.take_changes()
    assert changes.ids.tolist() == [*range(1, 501), *range(19_998, 20_001)]
    kept.load(changes)
    assert kept.digest() == table.digest()


def test_rows_that_changed_stay_listed_where_rows_move(kind: type[IdTable]) -> None:
    table, keys = made(kind, 64), np.arange(1, 2001, dtype=np.uint64)
    table.observe(keys, np.arange(2000, dtype=np.int64))
    copy = made(kind, 64)
    copy.load(table.take_changes())
    learn(table, table.find(keys[-5:]), 9)
    table.touch(table.find(keys[-5:]))
    table.expire(before_ms=1900)
    changes = table.take_changes()
    assert changes.ids.tolist() == keys[-5:].tolist() and changes.removed.size == 1900
    copy.load(changes)
    assert copy.digest() == table.digest()


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
