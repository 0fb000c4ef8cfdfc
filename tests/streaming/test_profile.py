"""Histories in memory: cuts, crashes, sweeps and users who leave memory change no bit of a row."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.errors import StoreFull
from state.events.parser import EventBatch
from state.features.arrays import Vector
from state.features.spec import EVENT, Events, FeatureSpec, Mask
from state.history import sweeping
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.history.sweeping import READ_TIMES, Sweeper
from state.metrics import StreamMetrics
from streaming.commit import StreamSweep
from streaming.event_clock import PREFIX, BatchClock, Moves, Quorum, believe
from streaming.profile import ABSENT, Profiler, SlotTable
from streaming.rows import Cut, Rows
from tests.disks import crash as kill
from tests.streaming import pieces
from tests.streaming.committing import sink, with_history
from tests.streaming.pieces import ONE, ZERO, context_of, piece
from tests.streaming.streams import until
from tests.vectors import vectorise

SPEC = FeatureSpec(windows_s=(60, 600, 7200), half_lives_s=(30, 900), history=16, recent_categories=5, sequence=7)
BASE_MS = 1_700_000_000_000
Click = tuple[int, int, int, int, float]
streams = st.lists(
    st.tuples(
        st.integers(1, 4),  # user
        st.integers(-20, 3),  # time, steps of 30 s: late, equal, out of order
        st.integers(0, 3),  # category
        st.integers(0, 1),  # partition
        st.sampled_from([np.nan, 0.0, 0.5, 1.0]),  # label
    ),
    min_size=1,
    max_size=90,
)


def batch_of(clicks: Sequence[Click], following: list[int]) -> EventBatch:
    """A batch with one range for each partition it has; `following` keeps the next offsets."""
    user, step, category, partition, label = (list(column) for column in zip(*clicks, strict=True))
    return pieces.batch_of(
        partition,
        following,
        user=np.array(user, np.uint64) + np.uint64(2**63),
        item=category,
        category=category,
        action=np.array(user) % 4,
        at_ms=BASE_MS + 30_000 * np.array(step, np.int64),
        label=np.array(label, np.float32),
    )


def batches_of(clicks: Sequence[Click], sizes: Callable[[], int]) -> list[EventBatch]:
    made, following, place = [], [0, 0], 0
    while place < len(clicks):
        size = sizes()
        made.append(batch_of(clicks[place : place + size], following))
        place += size
    return made


def open_store(path: Path) -> HistoryStore:
    return HistoryStore(path, SPEC.history, 16 << 20)


def run(
    path: Path, batches: list[EventBatch], cache_users: int, behind: int = 0, crash: Callable[[], bool] = lambda: False
) -> tuple[list[Vector], str, int]:
    """Profiles and commits `behind` batches later; a crash forgets what is not committed and does it again."""
    store = open_store(path)
    profiler = Profiler(store, SPEC, cache_users)
    done: list[list[Vector]] = []
    queue: deque[Rows] = deque()
    place = 0

    def commit() -> None:
        rows = queue.popleft()
        store.commit(rows.appends, rows.batch.ranges)
        profiler.committed(rows)
        done.append([Vector(*row) for row in zip(*rows.vectors, strict=True)])

    while place < len(batches) or queue:
        if place < len(batches):
            queue.append(profiler.update(batches[place]))
            place += 1
        while queue and (len(queue) > behind or place == len(batches)):
            commit()
        if crash():
            kill(store)
            store = open_store(path)
            profiler = Profiler(store, SPEC, cache_users)
            place -= len(queue)
            queue.clear()
    digest, cached = store.digest(), profiler.cached_users
    store.close()
    return [row for rows in done for row in rows], digest, cached


def assert_same(left: list[Vector], right: list[Vector]) -> None:
    assert len(left) == len(right)
    for place, (one, other) in enumerate(zip(left, right, strict=True)):
        for name, mine, theirs in zip(Vector._fields, one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs, f"{name} of row {place}")


def by_definition(batches: list[EventBatch]) -> list[Vector]:
    """Each row from the plain list of the user's events before it."""
    histories: dict[int, list[Events]] = defaultdict(list)
    rows = []
    for batch in batches:
        for user, event in zip(batch.user.tolist(), events_of(batch, batch.ranges), strict=True):
            before = np.array(histories[user], EVENT)
            rows.append(vectorise(before, int(event["at_ms"]), None, Mask.NONE, SPEC))
            histories[user].append(event)
    return rows


@given(clicks=streams, seed=st.integers(0, 1 << 16), cache_users=st.integers(1, 4), behind=st.integers(0, 4))
def test_cuts_cache_lag_and_crashes_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], seed: int, cache_users: int, behind: int
) -> None:
    folder = tmp_path_factory.mktemp("profile")
    chance = random.Random(seed)
    each = batches_of(clicks, lambda: 1)
    whole, whole_digest, _ = run(folder / "whole", batches_of(clicks, lambda: len(clicks)), 100)
    assert_same(whole, by_definition(each))
    cut = batches_of(clicks, lambda: chance.randint(1, 12))
    some, some_digest, _ = run(folder / "some", cut, cache_users, behind, lambda: chance.random() < 0.2)
    assert_same(some, whole)
    assert some_digest == whole_digest


def test_users_leave_memory_only_when_committed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    profiler = Profiler(store, SPEC, cache_users=4)
    waiting = []
    following = [0, 0]
    for user in range(12):
        waiting.append(profiler.update(batch_of([(user, 0, 1, 0, 0.0)], following)))
    assert profiler.cached_users == 12
    for rows in waiting:
        store.commit(rows.appends, rows.batch.ranges)
        profiler.committed(rows)
    for user in range(12, 60):
        rows = profiler.update(batch_of([(user, 0, 1, 0, 0.0)], following))
        store.commit(rows.appends, rows.batch.ranges)
        profiler.committed(rows)
    assert profiler.cached_users <= 20
    # A user who left is read again.
    back = profiler.update(batch_of([(0, 1, 1, 0, 0.0)], following))
    assert back.vectors.features[0, SPEC.names.index("events.visible")] == 1
    store.close()


def test_labels_become_flags() -> None:
    batch = batch_of([(1, 0, 1, 0, label) for label in (np.nan, 0.0, 0.49, 0.5, 1.0)], [0, 0])
    assert events_of(batch, batch.ranges)["flags"].tolist() == [0, 1, 1, 3, 3]


@pytest.mark.parametrize("crowded", [False, True])
def test_it_finds_what_a_dictionary_finds(crowded: bool) -> None:
    """Crowded: most users would have one of a few slots of the table, so that gaps must be closed."""
    rng = np.random.default_rng(5)
    spread = rng.integers(0, 1 << 63, 4000).astype(np.uint64)
    users = (np.arange(600, dtype=np.uint64) << np.uint64(32)) + spread[:600] % np.uint64(4) if crowded else spread
    table, known = SlotTable(), dict[int, int]()
    for number in range(60):
        absent = [user for user in rng.permutation(users).tolist() if user not in known][: int(rng.integers(0, 200))]
        table.put(np.array(absent, np.uint64), number + np.arange(len(absent)))
        known |= dict(zip(absent, range(number, number + len(absent)), strict=True))
        gone = rng.permutation(np.array(list(known), np.uint64))[: int(rng.integers(0, len(known) // 2 + 1))].tolist()
        table.remove(gone)
        for user in gone:
            del known[user]
        assert table.find(users).tolist() == [known.get(user, ABSENT) for user in users.tolist()]
        assert len(table) == len(known)


LATE_S = 600
REACH_MS = 1000 * (SPEC.windows_s[-1] + LATE_S)
DAY_MS = 86_400_000


def clicks_of(seed: int, count: int = 400) -> list[Click]:
    """Clicks of six users, some of them seldom, over some forty hours; each up to ten minutes late."""
    rng = np.random.default_rng(seed)
    users = rng.choice([1, 2, 3, 4, 5, 6], count, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
    steps = np.sort(rng.integers(0, 5000, count)) - rng.integers(0, LATE_S // 30, count)
    return [
        (int(user), int(step), int(rng.integers(0, 4)), int(user) % 2, float(rng.integers(0, 2)))
        for user, step in zip(users, steps, strict=True)
    ]


@pytest.mark.parametrize("cache_users", [1, 3, 100])
def test_no_bit_of_a_row_changes_by_a_sweep_whoever_is_in_memory(tmp_path: Path, cache_users: int) -> None:
    batches = [batch_of([click], following) for following in [[0, 0]] for click in clicks_of(cache_users)]
    store = open_store(tmp_path / "store")
    profiler = Profiler(store, SPEC, cache_users)
    sweeper = Sweeper(store, REACH_MS, 1000, profiler.forget, elapsed=iter(range(10**9)).__next__)
    made: list[Rows] = []
    behind: deque[Rows] = deque()
    clock_ms = swept = 0
    for batch in batches:
        behind.append(profiler.update(batch))
        made.append(behind[-1])
        if len(behind) > 2:
            rows = behind.popleft()
            store.commit(rows.appends, rows.batch.ranges)
            profiler.committed(rows)
            clock_ms = max(clock_ms, int(rows.batch.at_ms.max()))
            swept += sum(sweeper.sweep(clock_ms).events for _ in range(3))
    assert swept > 100
    store.close()
    found = [type(rows.vectors)(*row) for rows in made for row in zip(*rows.vectors, strict=True)]
    assert_same(found, by_definition(batches))


def test_a_user_taken_out_begins_anew_in_memory_too(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    profiler = Profiler(store, SPEC, cache_users=4)
    visible, following = SPEC.names.index("events.visible"), [0, 0]

    def click(user: int, step: int) -> Rows:
        return profiler.update(batch_of([(user, step, 1, 0, 0.0)], following))

    def commit(rows: Rows) -> None:
        store.commit(rows.appends, rows.batch.ranges)
        profiler.committed(rows)

    commit(click(1, -4))
    commit(click(2, -3))
    uncommitted = click(2, -2)
    gone = [1 + 2**63, 2 + 2**63]
    store.sweep([], lambda events: np.zeros(len(events), np.bool_), gone)
    profiler.forget(gone)
    assert click(1, -1).vectors.features[0, visible] == 0
    # Whose click is under way is read again once that is committed.
    commit(uncommitted)
    assert click(2, -1).vectors.features[0, visible] == 1
    assert len(store.read(gone[1])) == 1
    store.close()


def told(rows: Rows, clock_ms: int) -> Rows:
    """Rows that say what time it is, and are appended to histories as of an hour before."""
    appends = with_history(rows).appends
    appends.events["at_ms"] = clock_ms - 3_600_000
    appends.events["topic"] = ZERO.topic
    nothing = np.empty(0, np.int64)
    moves = Moves(nothing.astype(np.uint16), nothing, nothing)
    return replace(rows, appends=appends, clock=BatchClock(nothing, moves, ((clock_ms, clock_ms),), {}, ()))


def test_the_commit_thread_sweeps_at_rest_too_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_S", "REST_S"):
        monkeypatch.setattr(sweeping, name, 0.001)
    with sink(tmp_path) as shard:
        shard.spec.windows_s = (3600,)
        shard.commits.put(Cut((told(piece((ZERO, 0, 3)), BASE_MS),), 0))
        shard.commits.flush()
        # No click comes to wake the thread.
        until(lambda: shard.store.extra(READ_TIMES) is not None and shard.committer.due_s is None, "nothing is due")
        assert shard.store.users() == 3
        shard.commits.put(Cut((told(piece((ZERO, 3, 1)), BASE_MS + 100 * DAY_MS),), 0))
        until(lambda: shard.store.users() == 1, "the old users leave")
        metrics = shard.metrics
        until(lambda: metrics.history_users._value.get() == 1, "one user is counted")
        until(lambda: metrics.swept_users.labels("old")._value.get() == 3, "those who left are counted")
        assert metrics.swept_events._value.get() == 3


def test_a_store_at_the_end_of_its_map_makes_room_for_the_commit_that_it_refused(tmp_path: Path) -> None:
    store, gone = HistoryStore(tmp_path / "store", map_bytes=1 << 20), list[int]()
    profiler = SimpleNamespace(forget=gone.extend)
    metrics, spec = StreamMetrics(CollectorRegistry()), FeatureSpec()
    sweep = StreamSweep(context_of(store=store, settings=Settings(), spec=spec, profiler=profiler), metrics)
    refused = 0
    pseudonyms = np.random.default_rng(5).permutation(1 << 20).astype(np.uint64) << np.uint64(40)
    number = after_it = 0
    while after_it < 3:
        rows = told(piece((ZERO, 60 * number, 60)), BASE_MS + number * 1000)
        appends = Appends.of(pseudonyms[60 * number :][:60], rows.appends.events)
        for _ in range(100):
            try:
                with sweep.freeing_space():
                    store.commit(appends, rows.batch.ranges)
                break
            except StoreFull:
                refused += 1
        sweep.note([rows])
        number, after_it = number + 1, after_it + (refused > 0)
    assert store.positions() == {ZERO: number * 60}
    assert gone
    store.close()


def test_a_partition_that_was_not_read_on_yet_holds_the_sweep_back(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path / "store", map_bytes=1 << 24)
    first = told(piece((ONE, 0, 1)), BASE_MS)
    witnesses = Quorum.of(1)
    believe(witnesses, np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([BASE_MS]), BASE_MS)
    store.commit(first.appends, first.batch.ranges, {PREFIX + str(ONE): witnesses.pack(0)})
    spec = FeatureSpec(windows_s=(3600, 7200, 10800))
    profiler = SimpleNamespace(forget=lambda _: None)
    metrics = StreamMetrics(CollectorRegistry())
    sweep = StreamSweep(context_of(store=store, settings=Settings(), spec=spec, profiler=profiler), metrics)
    # After a start the other partition is read to its end first, 20 days later; beyond the reach of some 30 days nobody waits.
    for offset, days in ((0, 20), (1, 28), (2, 60)):
        rows = told(piece((ZERO, offset, 1)), BASE_MS + days * DAY_MS)
        store.commit(rows.appends, rows.batch.ranges)
        sweep.note([rows])
        assert sweep.log_time_ms == (BASE_MS if days < 30 else BASE_MS + days * DAY_MS)
    store.close()
