"""The profiler: cuts, cache and crashes change no bit; each row is `vectorise` of what came before."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.events.parser import EventBatch
from state.features.arrays import Vector
from state.features.spec import EVENT, Events, FeatureSpec, Mask
from state.history.appends import events_of
from state.history.store import HistoryStore
from streaming.profile import ABSENT, Profiler, SlotTable
from streaming.rows import Rows
from tests.disks import crash as kill
from tests.streaming import pieces
from tests.vectors import vectorise

SPEC = FeatureSpec(windows_s=(60, 600, 7200), half_lives_s=(30, 900), history=16, recent_categories=5, sequence=7)
BASE_MS = 1_700_000_000_000

Click = tuple[int, int, int, int, int]

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


def batch_of(clicks: list[Click], following: list[int]) -> EventBatch:
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


def batches_of(clicks: list[Click], sizes: Callable[[], int]) -> list[EventBatch]:
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
