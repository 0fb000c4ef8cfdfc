"""What a sweep takes out of histories: old events by log time, and who was read longest ago where users are too many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from state.features.spec import EVENT
from state.history import sweeping
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.history.sweeping import READ_TIMES, Sweeper
from state.positions import Range, Source

SOURCE, OTHER = Source("ab" * 16, 0), Source("ab" * 16, 1)
REACH_MS = 64_000


class World:
    """A store whose clicks come one offset after another, and its sweeper, whose monotonic clock always says that it is time."""

    def __init__(self, path: Path, max_users: int = 1_000_000, map_bytes: int = 1 << 26) -> None:
        self.path, self.max_users = path, max_users
        self.store = HistoryStore(path, history=64, map_bytes=map_bytes)
        self.forgotten: list[int] = []
        self.now_s = 0.0
        self.open()

    def open(self) -> None:
        self.sweeper = Sweeper(self.store, REACH_MS, self.max_users, self.forgotten.extend, elapsed=lambda: self.now_s)

    def click(self, users: list[int], at_ms: int, source: Source = SOURCE) -> None:
        """One click of each user, in one commit."""
        first = self.store.positions().get(source, 0)
        events = np.zeros(len(users), EVENT)
        events["at_ms"], events["topic"], events["partition"] = at_ms, source.topic, source.partition
        events["offset"] = np.arange(first, first + len(users))
        after = first + len(users)
        self.store.commit(
            Appends.of(np.array(users, np.uint64), events), [Range(source, first, after, rows=len(users))]
        )

    def sweep(self, clock_ms: int) -> int:
        """One look; returns how many events and users it took out."""
        self.now_s += 10.0
        removed = self.sweeper.sweep(clock_ms)
        return removed.events + removed.evicted

    def settle(self, clock_ms: int) -> int:
        """Looks until nothing is to be done at that log time."""
        removed = self.sweep(clock_ms)
        for _ in range(10_000):
            removed += self.sweep(clock_ms)
            if self.sweeper.resting and not self.sweep(clock_ms) and self.sweeper.resting:
                return removed
        raise AssertionError("the sweep does not come to an end")

    def known(self, users: list[int]) -> list[int]:
        return [user for user in users if len(self.store.read(user))]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "store")
    yield made
    made.store.close()


def test_an_event_goes_once_its_time_and_its_reading_lie_behind_the_reach(world: World) -> None:
    world.click([1, 2], 1000)
    world.settle(1000)
    world.click([2], 40_000)
    world.settle(1000 + REACH_MS - 1)
    assert world.known([1, 2]) == [1, 2]
    world.settle(1000 + REACH_MS + 1000)
    assert (world.known([1, 2]), world.store.users()) == ([2], 1)


def test_old_clicks_that_are_replayed_now_stay_until_they_have_lain_for_the_reach(world: World) -> None:
    now_ms = 100 * REACH_MS
    world.click([9], now_ms)
    world.settle(now_ms)
    world.click([1, 2], 1000)
    world.settle(now_ms)
    world.settle(now_ms + REACH_MS // 2)
    assert world.known([1, 2]) == [1, 2]
    world.settle(now_ms + 2 * REACH_MS)
    assert world.known([1, 2]) == []


def test_a_clock_that_is_ahead_keeps_its_own_user_and_nobody_else(world: World) -> None:
    world.click([1], 50 * REACH_MS)
    world.click([2], 1000)
    world.settle(1000)
    world.settle(3 * REACH_MS)
    assert world.known([1, 2]) == [1]


def test_users_read_longest_ago_go_first_whatever_their_clocks_say(tmp_path: Path) -> None:
    world = World(tmp_path / "store", max_users=100)
    for turn in range(20):
        # The first to be read say that it is long after, the last ones that it is long before.
        world.click(list(range(1000 - 10 * turn, 1010 - 10 * turn)), 10**9 - turn * 10**6)
        world.settle(turn * 1000)
    world.settle(20_000)
    everyone = [*range(810, 1010)]
    kept = world.known(everyone)
    # At each time somewhat fewer than may be, and always those who were read last.
    assert 90 <= world.store.users() <= 100
    # Of those who were read at the same time some may have gone.
    assert kept[:90] == everyone[:90]
    assert set(kept[90:]) <= set(everyone[90:100])
    assert sorted([*world.forgotten, *kept]) == everyone
    world.store.close()


def test_who_leaves_does_not_depend_on_how_many_are_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for at_once, most in ((500, 100), (7, 3), (64, 1)):
        monkeypatch.setattr(sweeping, "USERS_AT_ONCE", at_once)
        monkeypatch.setattr(sweeping, "MOST_REMOVED", most)
        world = World(tmp_path / str(at_once), max_users=150)
        for turn in range(10):
            world.click([(7919 * (user + 40 * turn)) % 10_007 + 1 for user in range(40)], 1000)
            world.settle(1000 * turn)
        kept.append(world.store.digest())
        assert world.store.users() <= 150
        world.store.close()
    assert len(set(kept)) == 1


def test_a_store_that_is_nearly_full_makes_space_by_itself(tmp_path: Path) -> None:
    world = World(tmp_path / "store", map_bytes=3 << 19)
    for turn in range(300):
        # Without the sweep the map is full after some eighty turns.
        world.click([*range(1 + 100 * turn, 101 + 100 * turn)], turn * 100)
        world.settle(turn * 100)
    newest = [*range(1 + 100 * 290, 101 + 100 * 299)]
    assert world.known(newest) == newest
    assert world.forgotten
    world.store.close()


def test_a_restart_goes_on_from_the_marks(world: World) -> None:
    world.click([1], 1000)
    world.settle(1000)
    assert world.store.extra(READ_TIMES)
    world.open()
    world.settle(1000 + 2 * REACH_MS)
    assert world.known([1]) == []


def test_a_store_without_marks_keeps_everything_for_the_reach(world: World) -> None:
    world.click([1], 1000)
    world.settle(100 * REACH_MS)
    assert world.known([1]) == [1]
    world.settle(101 * REACH_MS)
    assert world.known([1]) == []
