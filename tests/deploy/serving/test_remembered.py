"""What a host remembers of items and names goes with log time, and the longest unnamed first where there is too much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.serving.answers.version import Catalogue
from deploy.serving.following.clicks import Remembered
from deploy.serving.host_files import DAY_MS, SEEN, item_extra, name_extra
from state.features.spec import EVENT, Events
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import DATA


def clicks(*items: int) -> Events:
    """A click on each of some items, whose category is 1000 more."""
    events = np.zeros(len(items), EVENT)
    events["item"], events["category"] = items, np.array(items, np.uint64) + 1000
    return events


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    made = HistoryStore(tmp_path / "histories", map_bytes=1 << 26)
    yield made
    made.close()


def name(kept: Remembered, store: HistoryStore, day: int, *items: int, names: dict[int, str] | None = None) -> int:
    """Commits clicks on items; returns how many extras that wrote."""
    extra = kept.news(clicks(*items), names or {}, day * DAY_MS + 5)
    store.commit(Appends.none(), (), extra)
    return len(extra)


def settle(kept: Remembered, day: int) -> int:
    """Looks until a pass finds nothing to do any more."""
    return sum(kept.sweep(day * DAY_MS + 7) for _ in range(200))


def items(store: HistoryStore) -> list[int]:
    return [int(key.partition(":")[2], 16) for key, _ in store.extras("item:", "", 10_000)]


def test_an_item_that_nobody_names_goes_with_its_day_and_one_that_is_named_stays(store: HistoryStore) -> None:
    kept = Remembered(store, keep_days=30, most=1000)
    name(kept, store, 100, 1, 2, names={1001: "shoes", 1002: "hats"})
    for day in range(101, 131):
        name(kept, store, day, 2, names={1002: "hats"})
        assert settle(kept, day) == 0
    assert settle(kept, 131) == 2
    assert items(store) == [2]
    assert [key for key, _ in store.extras("", "", 10)] == sorted(
        [item_extra(2), name_extra(1002), SEEN + item_extra(2), SEEN + name_extra(1002)]
    )
    catalogue = Catalogue(store)
    assert (catalogue.category_of(2), catalogue.category_of(1)) == (1002, 0)
    assert (catalogue.name_of(1002).name, catalogue.name_of(1001).name) == ("hats", f"{1001:016x}")
    # One that comes back is known again, in memory too.
    name(kept, store, 131, 1)
    assert catalogue.category_of(1) == 1001


def test_an_item_keeps_its_name_beside_its_category(store: HistoryStore) -> None:
    """It comes with a click now and then; a process that begins anew does not lose it."""
    kept, catalogue = Remembered(store, keep_days=30, most=1000), Catalogue(store)
    name(kept, store, 100, 1, 2)
    assert catalogue.item_name(1) == (f"{1:016x}", f"{1:016x}")
    assert name(kept, store, 100, 1, 2, names={1: "i1"}) == 1
    assert name(kept, store, 100, 1, names={1: "i1"}) == 0
    assert catalogue.item_name(1) == ("i1", f"{1:016x}") and catalogue.category_of(1) == 1001
    moved = clicks(1)
    moved["category"] = 5
    store.commit(Appends.none(), (), Remembered(store, 30, 1000).news(moved, {}, 101 * DAY_MS))
    assert catalogue.item_name(1).name == "i1" and catalogue.category_of(1) == 5
    assert store.extra(name_extra(1)) is None


def test_an_id_that_is_both_an_item_and_a_category_is_named_as_both(store: HistoryStore) -> None:
    kept, catalogue = Remembered(store, keep_days=30, most=1000), Catalogue(store)
    both = clicks(1, 2)
    both["category"] = (1, 0)
    store.commit(Appends.none(), (), kept.news(both, {1: "one", 2: "two"}, DAY_MS))
    assert catalogue.item_name(1).name == catalogue.name_of(1).name == "one"
    assert catalogue.item_name(2).name == "two"


def test_too_many_are_those_named_longest_ago(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.serving.following.clicks.AT_ONCE", 7)
    kept = Remembered(store, keep_days=10_000, most=50)
    for day in range(100, 110):
        # The first item of each day is named each day.
        name(kept, store, day, *range(10 * (day - 100) + 1, 10 * (day - 100) + 11), *range(1, 10 * (day - 99), 10))
        settle(kept, day)
    left = items(store)
    assert 45 <= len(left) <= 50
    assert set(range(1, 100, 10)) <= set(left)
    others = [item for item in left if item % 10 != 1]
    assert min(others) > 50
    assert kept.counts["item"] == len(left)


def test_a_flood_within_one_day_is_held_too(store: HistoryStore) -> None:
    kept = Remembered(store, keep_days=30, most=100)
    for start in range(1, 5001, 100):
        name(kept, store, 100, *range(start, start + 100))
        settle(kept, 100)
    assert len(items(store)) <= 100


def test_a_day_writes_an_item_once_and_nothing_where_nothing_goes(store: HistoryStore) -> None:
    kept = Remembered(store, keep_days=30, most=1000)
    assert [name(kept, store, day, 1, 2) for day in (100, 100, 101, 101)] == [4, 0, 2, 0]
    settle(kept, 101)
    before = (store.path / DATA).read_bytes()
    assert settle(kept, 101) == settle(kept, 102) == 0
    assert (store.path / DATA).read_bytes() == before


def test_what_an_older_release_left_without_a_day_counts_from_the_first_pass_on(store: HistoryStore) -> None:
    store.commit(Appends.none(), (), {item_extra(7): (1007).to_bytes(8, "big"), name_extra(1007): b"shoes"})
    kept = Remembered(store, keep_days=30, most=1000)
    assert settle(kept, 200) == settle(kept, 230) == 0
    assert Catalogue(store).category_of(7) == 1007
    assert settle(kept, 231) == 2
    assert items(store) == []
