"""The commit of histories and positions: together or not at all, in order or not at all, whatever is committed and whoever dies."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.accounts import StreamAccount, check_accounts
from state.errors import PositionConflict
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.positions import Range, Source
from tests.disks import crash

SOURCES = tuple(Source("ab" * 16, partition) for partition in range(3))
N = 32

outcomes = st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
# Where a range begins, against where its source stands: mostly there, sometimes before or after.
misplaced = st.sampled_from([0, 0, 0, 0, 0, -1, -3, 1, 2])
parts = st.tuples(st.integers(0, 2), misplaced, outcomes)
commits = st.tuples(
    st.lists(parts, max_size=4), st.integers(0, 1 << 16), st.sampled_from(["go on", "go on", "crash", "close"])
)


@dataclass
class Model:
    """What the store must hold."""

    next: dict[Source, int] = field(default_factory=dict)
    first: dict[Source, int] = field(default_factory=dict)
    counts: dict[Source, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0, 0]))
    histories: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    note: bytes | None = None


@given(plan=st.lists(commits, min_size=1, max_size=10))
def test_a_commit_is_whole_and_in_order_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[list[tuple[int, int, tuple[int, ...]]], int, str]]
) -> None:
    path = tmp_path_factory.mktemp("commits") / "store"
    store, model = open_store(path), Model()
    for number, (wanted, seed, then) in enumerate(plan):
        ranges: list[Range] = []
        after = dict(model.next)
        in_order = True
        for place, shift, (rows, dead, filtered, absent) in wanted:
            source = SOURCES[place]
            stands = after.get(source)
            first = max(0, (5 if stands is None else stands) + shift)
            in_order = in_order and (stands is None or first == stands)
            length = rows + dead + filtered + absent
            ranges.append(Range(source, first, first + length, rows, dead, filtered, absent))
            after[source] = first + length
        users, events = rows_of(ranges, seed)
        note = b"commit %d" % number
        before = store.digest()
        try:
            store.commit(Appends.of(users, events), ranges, {"note": note})
        except PositionConflict:
            assert not in_order
            assert store.digest() == before
        else:
            assert in_order
            take(model, ranges, users, events, note)
        store = end(store, then)
        check(store, model)
    store.close()


def open_store(path: object) -> HistoryStore:
    return HistoryStore(path, history=N, map_bytes=64 << 20, boot_id="boot")  # type: ignore[arg-type]


def rows_of(ranges: list[Range], seed: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    count = sum(part.rows for part in ranges)
    events = np.zeros(count, EVENT)
    events["offset"] = [part.first + row for part in ranges for row in range(part.rows)]
    events["partition"] = [part.source.partition for part in ranges for _ in range(part.rows)]
    return np.random.default_rng(seed).integers(1, 5, count).astype(np.uint64), events


def take(model: Model, ranges: list[Range], users: np.ndarray, events: np.ndarray, note: bytes) -> None:  # type: ignore[type-arg]
    for part in ranges:
        model.first.setdefault(part.source, part.first)
        model.next[part.source] = part.next
        for place, count in enumerate(part.outcomes.values()):
            model.counts[part.source][place] += count
    for user, event in zip(users.tolist(), events, strict=True):
        model.histories[user].append((int(event["partition"]), int(event["offset"])))
    model.note = note


def end(store: HistoryStore, then: str) -> HistoryStore:
    """A crash leaves what the kernel has: the environment goes without a sync or a clean mark."""
    if then == "go on":
        return store
    if then == "crash":
        crash(store)
    else:
        store.close()
    return open_store(store.path)


def check(store: HistoryStore, model: Model) -> None:
    assert store.positions() == model.next
    for source, counts in store.counts().items():
        assert counts["first"] == model.first[source]
        assert [counts[name] for name in ("rows", "dead", "filtered", "absent")] == model.counts[source]
    assert store.users() == sum(map(bool, model.histories.values()))
    for user, read in zip(range(1, 5), store.read_many(range(1, 5)), strict=True):
        held = [(int(event["partition"]), int(event["offset"])) for event in read]
        assert held == model.histories[user][-N:]
        assert store.total(user) == len(model.histories[user])
    assert store.extra("note") == model.note
    assert check_accounts(StreamAccount(**store.totals)) == ()
    # Every row counted is in a history, and the other way round.
    assert store.totals["rows"] == sum(map(len, model.histories.values()))
