"""Items by category, as the applier notes them and a worker follows: counted, within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.serving import host_files
from deploy.serving.answers import item_index as module
from deploy.serving.answers.item_index import ClickedItems
from deploy.serving.following.clicks import Remembered
from deploy.serving.host_files import ItemFeed
from state.features.spec import EVENT, Events
from state.history.appends import Appends
from state.history.store import HistoryStore
from tests.deploy.serving.stocked import MAP, NOW_MS

DAY_MS = 86_400_000


def clicks(*pairs: tuple[int, int]) -> Events:
    """Events of (item, category)."""
    events = np.zeros(len(pairs), EVENT)
    for place, (item, category) in enumerate(pairs):
        events[place]["at_ms"], events[place]["item"], events[place]["category"] = NOW_MS, item, category
    return events


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    made = HistoryStore(tmp_path, map_bytes=MAP)
    yield made
    made.close()


def news(kept: Remembered, store: HistoryStore, events: Events, at_ms: int) -> dict[str, bytes | None]:
    """As `Upkeep` makes them."""
    return kept.news(events, {}, at_ms) | ItemFeed(store).news(events, at_ms)


def take(kept: Remembered, store: HistoryStore, at_ms: int, *pairs: tuple[int, int]) -> None:
    """As the applier does: the notes are committed with the clicks."""
    events = clicks(*pairs)
    store.commit(
        Appends.of(np.arange(1, 1 + len(events), dtype=np.uint64), events), (), news(kept, store, events, at_ms)
    )


def settled(clicked: ClickedItems) -> ClickedItems:
    while clicked.read_more():
        pass
    return clicked


def test_items_are_ordered_by_their_clicks_and_later_ones_count_more(store: HistoryStore) -> None:
    kept, clicked = Remembered(store, 90, 100), settled(ClickedItems(store))
    take(kept, store, NOW_MS, (1, 7), (1, 7), (1, 7), (2, 7), (3, 8), (4, 0))
    settled(clicked)
    assert clicked.best(7, 10) == [1, 2] and clicked.best(8, 10) == [3] and clicked.best(9, 10) == []
    take(kept, store, NOW_MS + 2 * DAY_MS, (2, 7))
    assert settled(clicked).best(7, 1) == [2]


def test_a_worker_that_starts_later_knows_what_users_clicked_last(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_files, "SLOTS", 2)
    monkeypatch.setattr(module, "SLOTS", 2)
    kept = Remembered(store, 90, 100)
    for item in range(1, 6):
        events = clicks((item, 7))
        store.commit(Appends.of(np.array([item], np.uint64), events), (), news(kept, store, events, NOW_MS))
    assert sorted(settled(ClickedItems(store)).best(7, 10)) == [1, 2, 3, 4, 5]


def test_what_is_remembered_is_bounded(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least clicked items go, of each category in its turn."""
    for name, value in (("MOST_OF_CATEGORY", 8), ("MOST_ITEMS", 20)):
        monkeypatch.setattr(module, name, value)
    kept, clicked = Remembered(store, 90, 1000), settled(ClickedItems(store))
    for round_ in range(6):
        take(
            kept,
            store,
            NOW_MS + round_,
            *((100 * category + item, category) for category in range(1, 7) for item in range(round_ + 1)),
        )
        settled(clicked)
    held = [clicked.best(category, 100) for category in range(1, 7)]
    assert 0 < sum(map(len, held)) <= 20
    assert all(each[0] == 100 * category for category, each in enumerate(held, 1) if each)


def test_a_store_begun_anew_is_followed_from_its_beginning(store: HistoryStore, tmp_path: Path) -> None:
    kept, clicked = Remembered(store, 90, 100), ClickedItems(store)
    for _ in range(3):
        take(kept, store, NOW_MS, (1, 7))
    settled(clicked)
    store.commit(Appends.none(), (), {host_files.FEED: None})
    take(Remembered(store, 90, 100), store, NOW_MS, (5, 7))
    assert 5 in settled(clicked).best(7, 10)
