"""A host that starts from a snapshot answers as one that read the whole log, and reads only the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy.sections import history_snapshots
from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.following.parity import WHOLE_EXTRA
from deploy.serving.following.snapshots import SnapshotTaker, load_if_behind
from deploy.serving.host_files import CAUGHT_UP_EXTRA, name_extra
from state.config.sections import HistorySettings, Kafka, Paths, StorageSettings
from state.config.settings import Settings
from state.events.identity import fingerprint_at
from state.features.erased import Erased, MaskedUsers
from state.history import snapshots
from state.history.appends import Appends
from state.history.rewinding import branch_extra
from state.history.store import HistoryStore
from state.metrics import ApplierMetrics
from state.registry.controls import ControlPoll
from state.registry.log_line import WHOLE, turned
from tests.deploy.serving.test_clicks import EVENTS, LOG, MAP, SOURCE, Following, append, record, written
from tests.deploy.serving.test_rest import until

PATIENCE_S = 30.0


def settings_in(path: Path, **changed: Any) -> Settings:
    made = Settings(
        paths=Paths(state=str(path / "state")),
        kafka=Kafka(microbatches_topic=LOG),
        history=HistorySettings(snapshot_every_s=60.0),
        events=EVENTS,
    )
    return replace(made, **changed)


class Taking:
    """A host with a taker of snapshots, whose clock the test moves."""

    def __init__(self, settings: Settings, following: Following) -> None:
        self.following, self.stop = following, threading.Event()
        metrics = ApplierMetrics(CollectorRegistry())
        self.taker = SnapshotTaker(settings, following.store, metrics, self.stop, following.clock)
        following.follower.committed = self.taker.take
        self.location = snapshots.location_of(settings)

    def taken(self, count: int) -> list[int]:
        """The snapshots' numbers once there are so many."""
        until_s = time.monotonic() + PATIENCE_S
        while len(found := snapshots.numbers(self.location)) < count and time.monotonic() < until_s:
            self.following.drain()
            self.taker.poll(self.following.follower.caught_up)
            time.sleep(0.01)
        while self.taker.reading:
            time.sleep(0.01)
        return found


@contextmanager
def taking(settings: Settings, following: Following) -> Iterator[Taking]:
    host = Taking(settings, following)
    thread = threading.Thread(target=host.taker.run)
    thread.start()
    try:
        yield host
    finally:
        host.stop.set()
        thread.join()


def new_host(settings: Settings, path: Path, following: Following) -> tuple[HistoryStore, HistoryFollower]:
    """A host with empty histories, after it has loaded a snapshot as its control and its salt allow."""
    store = HistoryStore(path, map_bytes=MAP)
    metrics = ApplierMetrics(CollectorRegistry())
    follower = HistoryFollower(store, settings, metrics, following.clock)
    control = ControlPoll(settings.registry_dir).poll()
    branch, salt = WHOLE if control is None else control.log, fingerprint_at(settings.salt_path) or "salt"
    if load_if_behind(settings, store, salt, branch, following.log):
        follower.begin()
    follower.connect(following.log, LOG)
    return store, follower


def test_a_new_host_reads_a_snapshot_and_the_rest_of_the_log(tmp_path: Path) -> None:
    """Although the log has lost its beginning; a delta and clicks after the snapshot are among it."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 500)))
    with taking(settings, following) as host:
        assert len(host.taken(1)) == 1
        append(following.log, record(500, 700))
        following.clock.now_ms += 61_000
        assert len(host.taken(2)) == 2
    with following.log.topics() as topics:
        topics.delete_before(LOG, {0: 2})
    append(following.log, record(700, 900))
    following.drain()
    store, follower = new_host(settings, tmp_path / "two", following)
    assert store.extra(CAUGHT_UP_EXTRA) is None and store.positions() == {SOURCE: 700}
    while follower.step(0.0):
        pass
    assert store.digest() == following.store.digest() and store.counts() == following.store.counts()
    # It knows that its histories lack nothing; a host with histories of its own learns that as it runs.
    assert dict(store.extras("", "", 10_000)) == dict(following.store.extras("", "", 10_000)) | {WHOLE_EXTRA: b"0"}
    assert follower.caught_up and follower.newest_ms == following.follower.newest_ms


def test_a_snapshot_after_a_restart_builds_on_the_newest(tmp_path: Path) -> None:
    """Unless the histories were rolled back behind it."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 500)))
    with taking(settings, following) as host:
        (first,) = host.taken(1)
    append(following.log, record(500, 520))
    following.drain()
    following.clock.now_ms += 61_000
    with taking(settings, following) as host:
        _, second = host.taken(2)
    assert {file.number for file in snapshots.read(host.location, second).files if file.kind == "base"} == {first}
    store, _ = new_host(settings, tmp_path / "two", following)
    assert store.digest() == following.store.digest() and store.users() == following.store.users()
    following.store.commit(Appends.none(), (), branch_extra(turned(WHOLE, 1, 1, 2, ())))
    following.clock.now_ms += 61_000
    with taking(settings, following) as host:
        third = host.taken(3)[-1]
    assert {file.number for file in snapshots.read(host.location, third).files if file.kind == "base"} == {third}


@pytest.mark.parametrize("kind", ["base", "extras"])
@pytest.mark.parametrize("by", ["a new host", "the writer"])
def test_a_snapshot_with_a_damaged_file_is_replaced_by_one_without_it(
    kind: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads the file removes the snapshots that name it; the writer reads each file in turn."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 500)))
    if by == "the writer":
        monkeypatch.setattr("deploy.serving.following.snapshots.CHECKED_MS", 60_000)
    with taking(settings, following) as host:
        (first,) = host.taken(1)
        damaged = next(file for file in snapshots.read(host.location, first).files if file.kind == kind)
        path = settings.registry_dir / damaged.name
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        if by == "a new host":
            store, _ = new_host(settings, tmp_path / "two", following)
            assert store.users() == 0 and snapshots.numbers(host.location) == []

        def is_replaced() -> bool:
            following.clock.now_ms += 11_000
            following.drain()
            host.taker.poll(following.follower.caught_up)
            newest = snapshots.newest(host.location)
            return newest is not None and damaged not in newest.files

        until(is_replaced)
    assert damaged.name in caplog.text
    store, _ = new_host(settings, tmp_path / "three", following)
    assert store.digest() == following.store.digest() and store.counts() == following.store.counts()


def test_status_shows_the_age_of_the_newest_snapshot_that_can_be_read(tmp_path: Path) -> None:
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 100)))
    with taking(settings, following) as host:
        (first,) = host.taken(1)
        following.clock.now_ms += 61_000
        _, second = host.taken(2)
    section = history_snapshots(settings, second)
    assert section is not None and section["ages_s"] == [0.0, (second - first) / 1000] and not section["late"]
    assert section["held"] == "0-63" and section["users"] == following.store.users()
    (settings.registry_dir / snapshots.document_name(second)).write_bytes(b"{}")
    section = history_snapshots(settings, second + 1000)
    assert section is not None and section["ages_s"] == [1 + (second - first) / 1000]
    section = history_snapshots(settings, second + 3_600_000)
    assert section is not None and section["late"]


def test_a_host_that_can_use_no_snapshot_has_its_names_and_items(tmp_path: Path) -> None:
    """The log has lost the record after the snapshot, and what is left repeats no name."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 100)))
    with taking(settings, following) as host:
        host.taken(1)
    append(following.log, record(100, 110), record(110, 130, names={}))
    following.drain()
    with following.log.topics() as topics:
        topics.delete_before(LOG, {0: 2})
    store, follower = new_host(settings, tmp_path / "two", following)
    assert store.users() == 0 and store.extra(name_extra(50)) == b"shoes"
    while follower.step(0.0):
        pass
    assert store.positions() == {SOURCE: 130} and store.read(1)["offset"].min() >= 110
    assert store.extras("item:", "", 1000) == following.store.extras("item:", "", 1000)


def test_a_host_that_is_little_behind_keeps_its_histories(tmp_path: Path) -> None:
    """One that is far behind starts from the snapshot."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 100)))
    other = Following(tmp_path / "two", following.log)
    other.drain()
    append(following.log, record(100, 400))
    with taking(settings, following) as host:
        host.taken(1)
    assert not load_if_behind(settings, other.store, "salt", WHOLE, following.log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.serving.following.snapshots.FAR_CLICKS", 200)
        assert load_if_behind(settings, other.store, "salt", WHOLE, following.log)
    assert other.store.positions() == {SOURCE: 400}


def test_an_erasure_makes_a_new_snapshot_without_the_user_at_once(tmp_path: Path) -> None:
    """The next one builds on it."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 300)))
    with taking(settings, following) as host:
        (first,) = host.taken(1)
        until = [(SOURCE.topic, SOURCE.partition, 300)]
        following.store.forget(Erased.NOBODY.and_also(MaskedUsers.of([1]), until, 2, 3))
        host.taker.start_over()
        following.clock.now_ms += 1000
        _, second = host.taken(2)
        append(following.log, record(300, 330))
        following.clock.now_ms += 61_000
        third = host.taken(3)[-1]
    found = snapshots.read(host.location, second)
    assert found.erased == 1 and {file.number for file in found.files} == {second}
    snapshots.remove(host.location, [first], 0)
    store = HistoryStore(tmp_path / "two", map_bytes=MAP)
    snapshots.load(host.location, snapshots.read(host.location, third), store)
    assert store.digest() == following.store.digest()
    assert store.read(1)["offset"].min() == 300


def test_another_host_takes_over_after_three_intervals(tmp_path: Path) -> None:
    """Until then it leaves snapshots to the one that wrote the newest."""
    settings, following = settings_in(tmp_path), Following(tmp_path / "one", written(record(0, 100)))
    with taking(settings, following) as host:
        host.taken(1)
    elsewhere = replace(
        settings, paths=replace(settings.paths, state=str(tmp_path / "b"), registry=str(settings.registry_dir))
    )
    following.clock.now_ms += 100_000
    standby = Taking(elsewhere, following)
    newest = snapshots.newest(standby.location)
    assert not standby.taker._due(newest, following.clock.now_ms)
    following.clock.now_ms += 100_000
    with taking(elsewhere, following) as host:
        assert len(host.taken(2)) == 2
    first, second = (snapshots.read(host.location, number) for number in snapshots.numbers(host.location))
    assert first.writer != second.writer


def test_a_snapshot_beyond_the_budget_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says which setting to change, and leaves no file."""
    settings = settings_in(tmp_path, storage=StorageSettings(budget_gb=1e-6))
    following = Following(tmp_path / "one", written(record(0, 300)))
    with taking(settings, following) as host:
        until_s = time.monotonic() + PATIENCE_S
        while "raise storage.budget_gb" not in caplog.text and time.monotonic() < until_s:
            following.drain()
            host.taker.poll(following.follower.caught_up)
            time.sleep(0.01)
    assert "raise storage.budget_gb" in caplog.text
    assert not host.location.names(snapshots.FILES)
