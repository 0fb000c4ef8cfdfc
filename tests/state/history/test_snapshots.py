"""A store that is loaded from a snapshot equals the store at its cut, whatever was killed, damaged, evicted or branched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.features.erased import Erased, Erasure, MaskedUsers
from state.features.spec import EVENT
from state.file_store import DirectoryStore
from state.history import snapshots
from state.history.appends import Appends
from state.history.rewinding import branch_extra
from state.history.snapshots import Cut, Gained, HistorySnapshot, SnapshotWriter, Wanted
from state.history.store import HistoryStore
from state.log.follow import Position
from state.positions import Range, Source
from state.registry.log_line import WHOLE, LogLine, turned
from state.user_shares import SHARES, UserShares
from tests.kills import killed_at

MAP, HISTORY, LOG = 1 << 26, 32, "cd" * 16
SOURCE = Source("ab" * 16, 0)
DAY_MS = 86_400_000


@dataclass
class Host:
    """A store, and a writer of its snapshots with the events since the last one."""

    path: Path
    users: int = 300
    at: int = 0
    now_ms: int = 0
    last: HistorySnapshot | None = None
    gained: list[Gained] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = HistoryStore(self.path / "store", HISTORY, MAP)
        self.location = DirectoryStore(self.path / "registry")
        self.writer = SnapshotWriter(self.location, "host", HISTORY)
        self.rng = np.random.default_rng(7)

    def click(self, count: int) -> None:
        users = self.rng.integers(1, self.users + 1, count).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        events = np.zeros(count, EVENT)
        events["at_ms"], events["item"] = 1000 * self.at, self.rng.integers(1, 9, count)
        events["topic"], events["offset"] = SOURCE.topic, np.arange(self.at, self.at + count)
        part = Range(SOURCE, self.at, self.at + count, rows=count)
        extra = {f"item:{item:016x}": str(item % 3).encode() for item in events["item"].tolist()}
        self.store.commit(Appends.of(users, events), [part], extra)
        self.gained.append(Gained(users, events))
        self.at += count

    def snapshot(self, restarted: bool = False) -> HistorySnapshot:
        gained = None if restarted else self.gained
        cut = Cut(self.store.view(), Position(LOG, {0: self.at}), "salt", gained, self.last)
        self.now_ms += 1000
        made = self.writer.write(cut, self.now_ms)
        assert made is not None
        self.last, self.gained = made, []
        return made

    def wanted(self, branch: LogLine = WHOLE, begin: int = 0, topic_id: str = LOG, salt: str = "salt") -> Wanted:
        return Wanted(HISTORY, salt, branch, topic_id, {0: (begin, self.at)})

    def other(self, name: str = "other") -> HistoryStore:
        return HistoryStore(self.path / name, HISTORY, MAP)


def same(one: HistoryStore, other: HistoryStore) -> bool:
    """Whether two stores answer alike in all that they hold."""
    extras = [store.extras("", "", 10_000) for store in (one, other)]
    whole = [(store.digest(), store.users(), store.counts()) for store in (one, other)]
    return whole[0] == whole[1] and extras[0] == extras[1]


@settings(max_examples=8, deadline=None)
@given(clicks=st.lists(st.integers(0, 4000), min_size=1, max_size=8), range_bytes=st.sampled_from([1 << 26, 20_000]))
def test_a_loaded_store_equals_the_store_at_the_cut(
    clicks: list[int], range_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the number of ranges and deltas, although clicks go on after the cut, and after a restart."""
    host = Host(tmp_path_factory.mktemp("host"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "RANGE_BYTES", range_bytes)
        patch.setattr(snapshots, "FILE_BYTES", range_bytes // 64)
        for number, count in enumerate(clicks):
            host.click(count)
            made = host.snapshot(restarted=number % 2 == 1)
            loaded = host.other(f"other{number}")
            assert snapshots.load_newest(host.location, host.wanted(), loaded) == made
            assert same(loaded, host.store)
            host.gained.clear()
            loaded.close()


def test_users_whose_events_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    """A snapshot after a few clicks writes those, and its extras; one after none writes nothing."""
    host = Host(tmp_path)
    host.click(9000)
    first = host.snapshot()
    assert {file.kind for file in first.files} == {"base", "extras"}
    host.click(10)
    second = host.snapshot()
    assert sum(file.events for file in second.files if (file.kind, file.number) == ("delta", second.number)) == 10
    assert not [file for file in second.files if (file.kind, file.number) == ("base", second.number)]
    third = host.snapshot()
    assert {file.number for file in third.files} == {first.number, second.number}


def test_a_snapshot_after_a_restart_has_the_events_since_the_one_before(tmp_path: Path) -> None:
    """Each bucket of a partition's users has its own position."""
    host, even, odd = Host(tmp_path), *(SOURCE._replace(bucket=bucket, buckets=2) for bucket in (0, 1))

    def click(source: Source, first: int, after: int) -> None:
        events = np.zeros(after - first, EVENT)
        events["topic"], events["offset"] = source.topic, np.arange(first, after)
        users = (events["offset"] * 2 % 40 + source.bucket).astype(np.uint64)
        host.store.commit(Appends.of(users, events), [Range(source, first, after, rows=after - first)])

    click(even, 0, 900)
    click(odd, 0, 300)
    first = host.snapshot()
    click(odd, 300, 310)
    second = host.snapshot(restarted=True)
    assert [file.events for file in second.files if (file.kind, file.number) == ("delta", second.number)] == [10]
    assert {file.number for file in second.files if file.kind == "base"} == {first.number}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "MOST_GAINED", 5)
        click(odd, 310, 320)
        third = host.snapshot(restarted=True)
    assert {file.number for file in third.files if file.kind == "base"} == {third.number}


def test_shares_are_loaded_alone(tmp_path: Path) -> None:
    """A host with some of the shares has their users, and no others."""
    host = Host(tmp_path)
    store = HistoryStore(tmp_path / "part", HISTORY, MAP, shares=UserShares.of(range(16)))
    host.click(3000)
    host.snapshot()
    host.click(500)
    made = host.snapshot()
    assert snapshots.load_newest(host.location, host.wanted(), store) == made
    users = (np.arange(1, host.users + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).tolist()
    for user in users:
        assert np.array_equal(store.read(user), host.store.read(user)[: None if user % SHARES < 16 else 0])
    assert store.users() == sum(user % SHARES < 16 and len(host.store.read(user)) > 0 for user in users)
    # What such a host writes is used by hosts with no more shares.
    view, position = store.view(), Position(LOG, {0: host.at})
    part = SnapshotWriter(host.location, "part", HISTORY, store.shares).write(
        Cut(view, position, "salt", (), None), 9000
    )
    assert part is not None and host.wanted().refuse(part).startswith("it has the users of the shares 0-15")
    assert replace(host.wanted(), shares=UserShares.of([3, 7])).refuse(part) == ""
    assert snapshots.newest(host.location) == host.last and snapshots.newest(host.location, store.shares) == part


@pytest.mark.parametrize("kind", ["base", "delta", "extras", "document"])
@pytest.mark.parametrize("how", ["missing", "flipped"])
def test_a_damaged_snapshot_is_skipped_and_the_next_older_one_is_used(
    kind: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the log; without an older one the store is empty."""
    host = Host(tmp_path)
    host.click(3000)
    first = host.snapshot()
    digest = host.store.digest()
    host.click(3000 if kind == "base" else 100)
    second = host.snapshot()
    mine = [file.name for file in second.files if (file.kind, file.number) == (kind, second.number)]
    name = snapshots.document_name(second.number) if kind == "document" else mine[0]
    path = tmp_path / "registry" / name
    if how == "missing" and kind != "document":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    loaded = host.other()
    assert snapshots.load_newest(host.location, host.wanted(), loaded) == first
    assert loaded.digest() == digest and name in caplog.text
    (tmp_path / "registry" / snapshots.document_name(first.number)).unlink()
    empty = host.other("empty")
    assert snapshots.load_newest(host.location, host.wanted(), empty) is None
    assert empty.users() == 0 and not empty.positions() and not empty.is_loading


def test_a_snapshot_of_an_abandoned_branch_is_never_used(tmp_path: Path) -> None:
    """One from before the branch point is used, and so is a later one of the new branch."""
    host = Host(tmp_path)
    host.click(1000)
    first = host.snapshot()
    host.click(1000)
    second = host.snapshot()
    cut = turned(WHOLE, 1, 1500, 2000, ())
    assert [one.number for one in snapshots.usable(host.location, host.wanted())] == [second.number, first.number]
    assert [one.number for one in snapshots.usable(host.location, host.wanted(cut))] == [first.number]
    host.store.commit(Appends.none(), (), branch_extra(cut))
    host.click(1000)
    host.last = None
    third = host.snapshot()
    host.last = second
    assert next(snapshots.usable(host.location, host.wanted(cut))).next == third.next
    assert third.branch != second.branch


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"salt": "pepper"}, "its salt"),
        ({"topic_id": "ee" * 16}, "another topic"),
        ({"begin": 1001}, "the training log now has"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_not_used(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Its users are of another salt, or the log was recreated or no longer has the next record."""
    host = Host(tmp_path)
    host.click(1000)
    made = host.snapshot()
    assert reason in host.wanted(**other).refuse(made)
    assert host.wanted().refuse(made) == ""


POINTS = ["snapshot.file", "snapshot.written", "snapshot.named"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("visit", [1, 2])
def test_a_killed_writer_leaves_the_snapshots_before_it(point: str, visit: int, tmp_path: Path) -> None:
    """Or the complete new one; what else it left is removed later."""
    host = Host(tmp_path)
    host.click(2000)
    first = host.snapshot()
    host.click(2000)
    with killed_at(f"{point}:{visit if point == 'snapshot.file' else 1}"):
        host.snapshot()
    made = snapshots.newest(host.location)
    assert made is not None and (made.number > first.number) == (point == "snapshot.named")
    loaded = host.other()
    assert snapshots.load_newest(host.location, host.wanted(), loaded) == made
    host.last, host.gained = None, []
    last = host.snapshot() if point != "snapshot.named" else made
    snapshots.remove(host.location, [first.number], 2 * snapshots.LEFT_BEHIND_MS)
    left = {f"{snapshots.FILES}/{name}" for name in host.location.names(snapshots.FILES)}
    assert left == {file.name for file in last.files}


@pytest.mark.parametrize(
    ("point", "visit"), [("snapshot.cleared", 1), ("snapshot.share", 1), ("snapshot.share", 60), ("snapshot.loaded", 1)]
)
def test_a_killed_load_is_begun_again(point: str, visit: int, tmp_path: Path) -> None:
    """The store says that it is not complete, until it is."""
    host, loaded = Host(tmp_path), HistoryStore(tmp_path / "other", HISTORY, MAP)
    host.click(4000)
    host.snapshot()
    with killed_at(f"{point}:{visit}"):
        snapshots.load_newest(host.location, host.wanted(), loaded)
    assert loaded.is_loading == (not loaded.positions()) == (point != "snapshot.loaded")
    snapshots.load_newest(host.location, host.wanted(), loaded)
    assert not loaded.is_loading and same(loaded, host.store)


def test_an_erased_user_comes_back_from_an_older_snapshot_only_to_be_erased_again(tmp_path: Path) -> None:
    """A snapshot says through which erasure its users are erased."""
    host = Host(tmp_path)
    host.click(4000)
    before = host.snapshot()
    user = 5 * 0x9E3779B97F4A7C15 % (1 << 64)
    erasure = Erasure(1, 1, 0, MaskedUsers.of([user]), ((SOURCE.topic, 0, host.at),))
    host.store.forget(Erased((erasure,)))
    host.last, host.gained = None, []
    after = host.snapshot()
    assert (before.erased, after.erased) == (0, 1)
    loaded = host.other()
    snapshots.load(host.location, before, loaded)
    assert len(loaded.read(user)) > 0
    loaded.forget(Erased((erasure,)))
    assert loaded.digest() == host.store.digest()
    snapshots.remove(host.location, [before.number], 0)
    snapshots.load(host.location, after, loaded)
    assert len(loaded.read(user)) == 0 and loaded.forgotten.through == 1
    assert {name.split("/")[0] for name in host.location.names(snapshots.FILES)} == {f"{after.number:015d}"}


def test_a_removal_that_is_killed_is_completed_by_the_next_one(tmp_path: Path) -> None:
    """Documents go first, so no snapshot lacks a file."""
    host = Host(tmp_path)
    for _ in range(3):
        host.click(2000)
        host.last, host.gained = None, []
        host.snapshot()
    first, second, third = snapshots.numbers(host.location)
    with killed_at("snapshot.unnamed"):
        snapshots.remove(host.location, [first, second], 0)
    for number in snapshots.numbers(host.location):
        snapshots.load(host.location, snapshots.read(host.location, number), host.other(f"other{number}"))
    snapshots.remove(host.location, [second], 2 * snapshots.LEFT_BEHIND_MS)
    assert snapshots.numbers(host.location) == [third]
    assert {name.partition("/")[0] for name in host.location.names(snapshots.FILES)} == {f"{third:015d}"}
