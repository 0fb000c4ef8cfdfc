"""Claims about the histories: what is read is what was appended, all or nothing, also after a crash."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.accounts import StreamAccount, check_accounts
from state.config.loading import load
from state.config.settings import Settings
from state.disk import memory_place
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, PositionConflict
from state.features.spec import EVENT, Events
from state.history.appends import ACTIONS, Appends, numbered
from state.history.appends import OTHER as UNKNOWN
from state.history.store import HistoryStore, open_history_store, open_or_replace
from state.layout import DATA, HISTORIES
from state.positions import Range, Source
from state.storage import SERVING, STREAM, store_bytes, used_bytes
from streaming import histories
from tests.disks import Disk, crash
from tests.state.disk.held_histories import MIB, commit, told

MAP = 64 << 20
SOURCE = Source("ab" * 16, 0)
OTHER = Source("ab" * 16, 1)


def events(count: int, first: int = 0, at_ms: int = 0) -> Events:
    made = np.zeros(count, EVENT)
    made["offset"] = np.arange(first, first + count)
    made["at_ms"] = at_ms + made["offset"]
    return made


def appends(*parts: tuple[int, Events]) -> Appends:
    users = np.repeat([user for user, _ in parts], [len(part) for _, part in parts]).astype(np.uint64)
    return Appends.of(users, np.concatenate([part for _, part in parts]))


def store_at(path: Path, history: int = 32, map_bytes: int = MAP, boot_id: str = "boot-1") -> HistoryStore:
    return HistoryStore(path, history=history, map_bytes=map_bytes, boot_id=boot_id)


def test_equal_histories_have_equal_digests_whatever_the_commits(tmp_path: Path) -> None:
    digests = set()
    for name, cuts in (("one", [100]), ("some", [3, 40, 100]), ("each", list(range(1, 101)))):
        store = store_at(tmp_path / name)
        first = 0
        for cut in cuts:
            store.commit(appends((5, events(cut - first, first))))
            first = cut
        digests.add(store.digest())
        store.close()
    assert len(digests) == 1


def test_another_length_of_history_takes_what_is_there(tmp_path: Path) -> None:
    """A longer one goes on from it; a shorter one reads its last events, and gains as if it had always been short."""
    store = store_at(tmp_path / "store", history=32)
    store.commit(appends((1, events(100)), (2, events(5))))
    store.close()
    store = store_at(tmp_path / "store", history=64)
    # As far as whole chunks go, somewhat more than the former N.
    assert store.read(1)["offset"].tolist() == list(range(64, 100))
    store.commit(appends((1, events(20, 100))))
    assert store.read(1)["offset"].tolist() == list(range(64, 120))
    store.close()
    store = store_at(tmp_path / "store", history=16)
    assert (store.read(1)["offset"].tolist(), len(store.read(2))) == (list(range(104, 120)), 5)
    store.commit(appends((1, events(9, 120)), (2, events(15, 5))))
    assert store.read(1)["offset"].tolist() == list(range(113, 129))
    assert store.read(2)["offset"].tolist() == list(range(4, 20))
    store.close()


def test_actions_keep_their_names_whatever_the_settings_call_them(tmp_path: Path) -> None:
    def read(actions: tuple[str, ...], gains: list[int], before: tuple[str, ...] | None = None) -> list[int]:
        store = store_at(tmp_path / "store", history=32)
        store.numbering, extra = numbered(store.extra(ACTIONS), actions, before)
        store.commit(Appends.none(), (), extra)
        gained = events(len(gains))
        gained["action"] = gains
        store.commit(appends((1, gained)))
        found: list[int] = store.read(1)["action"].tolist()
        store.close()
        return found

    assert read(("view", "cart"), [0, 1, 1]) == [0, 1, 1]
    # Another order, and one more.
    assert read(("cart", "wish", "view"), [1, 2]) == [2, 0, 0, 1, 2]
    # One less: it counts among all actions.
    assert read(("view", "wish"), [1]) == [0, UNKNOWN, UNKNOWN, 1, 0, 1]
    # Back again nothing was lost.
    assert read(("view", "cart"), []) == [0, 1, 1, UNKNOWN, 0, UNKNOWN]


def test_sweeping_removes_only_leading_old_events_and_whole_users(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store", history=64)
    late = events(16, 16)
    late["at_ms"][3] = 10_000
    store.commit(appends((1, np.concatenate([events(16), late, events(8, 32)])), (2, events(5)), (3, events(40, 9000))))
    found = store.ends(0, 2)
    assert (found.users, found.following, found.newest["offset"].tolist()) == ([1, 2], 3, [39, 4])
    assert store.ends(3, 2)[0] == [3]

    def old(events: Events) -> Any:
        return events["at_ms"] <= 100

    assert store.sweep([1, 2], old) == (16 + 5, 1, 0)
    before = (tmp_path / "store" / DATA).read_bytes()
    assert store.sweep([1, 3], old) == (0, 0, 0)
    # Nothing was old, and so nothing is written.
    assert (tmp_path / "store" / DATA).read_bytes() == before
    assert store.read(1)["offset"].tolist() == list(range(16, 40))
    assert (len(store.read(2)), len(store.read(3)), store.users()) == (0, 40, 2)
    # The last N are still counted from the first event ever appended.
    store.commit(appends((1, events(50, 40)), (2, events(1, 7))))
    assert store.read(1)["offset"].tolist() == list(range(26, 90))
    assert (store.read(2)["offset"].tolist(), store.users()) == ([7], 3)
    store.close()


@pytest.mark.parametrize(
    ("clean", "boot", "trusted"), [(b"1", b"before", True), (b"0", b"boot-1", True), (b"0", b"before", False)]
)
def test_the_mark_that_0_1_0_kept_among_the_values_counts_once(
    tmp_path: Path, clean: bytes, boot: bytes, trusted: bool
) -> None:
    store = store_at(tmp_path / "store")
    store.commit(appends((5, events(3))))
    with store._write() as transaction:
        transaction.put(b"clean", clean, db=store._meta)
        transaction.put(b"boot", boot, db=store._meta)
    store.close()
    (tmp_path / "store" / "mark.json").unlink()
    if not trusted:
        with pytest.raises(CorruptStore, match="open when the machine went down"):
            store_at(tmp_path / "store")
        return
    again = store_at(tmp_path / "store")
    assert (len(again.read(5)), again.closed_in_order()) == (3, False)
    crash(again)
    # It was taken over: a kill is a kill, and a power cut is one.
    crash(store_at(tmp_path / "store"))
    with pytest.raises(CorruptStore):
        store_at(tmp_path / "store", boot_id="boot-2")


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


def open_store(path: Path) -> HistoryStore:
    return HistoryStore(path, history=N, map_bytes=64 << 20, boot_id="boot")


def rows_of(ranges: list[Range], seed: int) -> tuple[np.ndarray, np.ndarray]:
    count = sum(part.rows for part in ranges)
    events = np.zeros(count, EVENT)
    events["offset"] = [part.first + row for part in ranges for row in range(part.rows)]
    events["partition"] = [part.source.partition for part in ranges for _ in range(part.rows)]
    return np.random.default_rng(seed).integers(1, 5, count).astype(np.uint64), events


def take(model: Model, ranges: list[Range], users: np.ndarray, events: np.ndarray, note: bytes) -> None:
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
    assert store.extra("note") == model.note
    assert check_accounts(StreamAccount(**store.totals)) == ()
    # Every row counted is in a history, and the other way round.
    assert store.totals["rows"] == sum(map(len, model.histories.values()))


@pytest.fixture
def settings(tmp_path: Path, memory: Disk) -> Settings:
    return load(["--paths.state", str(tmp_path / "state"), "--storage.memory_dir", str(memory.path)], env={})


def test_histories_in_memory_take_nothing_of_the_disk_and_are_limited_by_its_share(settings: Settings) -> None:
    store = open_history_store(settings, STREAM, settings.stream_dir)
    commit(store, 500, new=True)
    assert memory_place.size(store.path) > MIB > used_bytes([settings.stream_dir])
    # What comes back at a clean stop has room there.
    assert store.bytes_limit() <= store_bytes(settings, STREAM, HISTORIES)
    store.close()
    assert used_bytes([settings.stream_dir]) > MIB


@pytest.mark.parametrize("wanted", [True, False])
def test_on_the_disk_the_log_says_why_where_nobody_asked_for_it(
    settings: Settings, memory: Disk, wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if wanted:
        memory.fill()
    else:
        settings = load(["--paths.state", settings.paths.state, "--storage.memory_dir", ""], env={})
    store = open_history_store(settings, STREAM, settings.stream_dir)
    assert not store.in_memory
    store.close()
    why = f"{memory.path} has space for 0 MB, and 1 MB are wanted. Each page that a click changes is written there"
    assert caplog.text.count(why) == wanted == bool(caplog.text)


def test_a_host_whose_histories_went_with_the_memory_begins_them_anew_and_a_stream_does_not(
    settings: Settings, memory: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    for part, folder in ((STREAM, settings.stream_dir), (SERVING, settings.serving_dir)):
        store = open_history_store(settings, part, folder)
        commit(store)
        crash(store)
    for one in memory.path.iterdir():
        shutil.rmtree(one)
    with pytest.raises(CorruptStore, match="rebuild-history"):
        open_history_store(settings, STREAM, settings.stream_dir)
    store = open_or_replace(settings, SERVING, settings.serving_dir)
    assert store.in_memory and store.users() == 0
    assert "are rebuilt from the micro-batch topic" in caplog.text
    store.close()


@pytest.mark.parametrize("lost", [True, False])
def test_a_rebuild_takes_the_place_of_histories_in_memory(settings: Settings, memory: Disk, lost: bool) -> None:
    folder = settings.stream_dir
    store = open_history_store(settings, STREAM, folder)
    commit(store, 2)
    before = told(store)
    crash(store)
    if lost:
        for one in memory.path.iterdir():
            shutil.rmtree(one)
    with DirectoryLock(folder):
        made = HistoryStore(histories.begin(folder), 32, 1 << 24)
        commit(made, 5)
        rebuilt = told(made)
        made.close()
        histories.promise(folder)
        aside = histories.finish(folder)
    assert (aside is None) == lost
    if aside is not None:
        kept = HistoryStore(aside, settings.features.history, readonly=True)
        assert told(kept) == before
        kept.close()
    store = open_history_store(settings, STREAM, folder)
    assert store.in_memory and told(store) == rebuilt
    store.close()


def test_what_a_removed_state_directory_left_in_memory_goes_at_the_next_start(
    settings: Settings, memory: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    crash(open_history_store(settings, STREAM, settings.stream_dir))
    shutil.rmtree(settings.stream_dir)
    monkeypatch.setattr(memory_place, "FORGOTTEN_S", -1.0)
    open_history_store(settings, SERVING, settings.serving_dir).close()
    assert "is removed: its state directory is gone" in caplog.text and list(memory.path.iterdir()) == []
