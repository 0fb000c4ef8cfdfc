"""Histories of a serving host follow the training log, and answers report how current they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from deploy.serving.applier import LogCheck
from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.host_files import CAUGHT_UP_EXTRA, CLICKS, CLOCK_EXTRA, VERSIONS, Currency
from state.config.sections import Events as EventSettings
from state.config.sections import Paths
from state.config.settings import Settings
from state.disk.files import Progress
from state.errors import SaltMismatch
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.layout import CURRENT, GAPS
from state.log.accepted_gaps import Accepted, Journal
from state.metrics import ApplierMetrics
from state.microbatch.batch import Header, new_ranges
from state.microbatch.codec import encode
from state.positions import Gap, Range, Source
from tests.deploy.serving.http_api.test_app import app_of, ask
from tests.deploy.serving.stocked import NOW_MS, Stores
from tests.memory_log import MemoryLog
from tests.microbatches import columns

MAP = 1 << 27
TOPIC = "cd" * 16
LOG = "microbatches"
EVENTS = EventSettings(max_age_s=3600.0, max_future_s=0.0)
SOURCE = Source("ab" * 16, 3)


@dataclass
class Clock:
    """A wall clock that tests move."""

    now_ms: int = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def written(*records: bytes, topic_id: str = TOPIC) -> MemoryLog:
    """A micro-batch topic of one partition."""
    log = MemoryLog(ids=lambda: topic_id)
    log.topics().ensure(LOG, 1)
    append(log, *records)
    return log


def append(log: MemoryLog, *records: bytes) -> None:
    with log.writer() as writer:
        for value in records:
            writer.send(LOG, 0, None, value)


def record(
    first: int,
    next_: int,
    salt: str = "salt",
    users: int = 3,
    label: float = float("nan"),
    clocks: tuple[tuple[int, int], ...] = (),
    names: Mapping[int, str] = {50: "shoes"},
) -> bytes:
    """A micro-batch of the source's offsets [first, next_), each a row."""
    rows = next_ - first
    offsets = np.arange(first, next_, dtype=np.int64)
    made = columns(
        rows,
        user=offsets % users + 1,
        item=offsets % 5 + 100,
        category=offsets % 4 + 50,
        action=offsets % 2,
        at_ms=offsets * 1000,
        label=np.full(rows, label),
        offset=offsets,
    )
    header = Header("spec", salt, (Range(SOURCE, first, next_, rows=rows),), 7, names={**names}, clocks=clocks)
    return encode(header, made)


@dataclass
class Following:
    """A history follower on a log."""

    path: Path
    log: MemoryLog
    clock: Clock = field(default_factory=Clock)
    own_salt: str | None = None
    history: int = Settings().features.history

    def __post_init__(self) -> None:
        self.store = HistoryStore(self.path, self.history, MAP)
        self.metrics = ApplierMetrics(CollectorRegistry())
        settings = Settings(paths=Paths(registry=str(self.path.parent / "registry")), events=EVENTS)
        self.follower = HistoryFollower(self.store, settings, self.metrics, self.clock, own_salt=self.own_salt)
        self.connect()

    def connect(self) -> None:
        self.follower.connect(self.log, LOG)

    def drain(self) -> None:
        while self.follower.step(0.0):
            pass

    def offsets(self) -> list[int]:
        """The offsets in all histories, each user's in order."""
        found = []
        for user in range(1, 4):
            mine = self.store.read(user)["offset"].tolist()
            assert mine == sorted(mine)
            found += mine
        return sorted(found)


@given(
    cuts=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=12),
    restarts=st.sets(st.integers(0, 11)),
)
def test_each_click_is_in_the_histories_once(
    cuts: list[tuple[int, int]], restarts: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Records written again after a crash of the stream, and restarts of the applier, add nothing."""
    log, path = written(), tmp_path_factory.mktemp("histories")
    following = Following(path, log)
    end = 0
    for number, (rows, again) in enumerate(cuts):
        first = max(0, end - again)
        end = max(end, first + rows)
        append(log, record(first, first + rows))
        if number in restarts:
            following.store.close()
            following = Following(path, log)
        following.drain()
    assert following.offsets() == list(range(end))
    assert following.store.positions() == {SOURCE: end}
    totals = following.store.totals
    assert totals["rows"] == totals["positions"] == end
    following.store.close()


def test_events_are_those_of_the_stream(tmp_path: Path) -> None:
    log = written(record(0, 3, label=0.75))
    following = Following(tmp_path, log)
    following.drain()
    (event,) = following.store.read(2)
    assert dict(zip(event.dtype.names, event.tolist(), strict=True)) == {
        "at_ms": 1000, "category": 51, "item": 101, "offset": 1, "topic": SOURCE.topic, "partition": 3, "action": 1, "flags": 3,
    }  # fmt: skip
    following.store.close()


def test_a_commit_carries_names_items_clock_and_position(tmp_path: Path) -> None:
    log = written(record(0, 9))
    following = Following(tmp_path, log, Clock(77_000))
    assert following.store.extra(CAUGHT_UP_EXTRA) is None
    following.drain()
    extra = following.store.extra
    assert extra(f"name:{50:016x}") == b"shoes"
    assert extra(f"item:{100:016x}") == (51).to_bytes(8, "big")
    assert json.loads(extra(CLOCK_EXTRA) or b"") == {"event_ms": 8000, "accepted_ms": 77_000}
    assert json.loads(extra("microbatches") or b"") == {
        "topic_id": TOPIC,
        "next": {"0": 1},
        "leaders": {"0": 0},
    }
    assert extra(CAUGHT_UP_EXTRA) == b"1"
    following.store.close()


def test_the_event_clock_is_what_the_header_believes_and_one_that_a_click_set_years_ahead_comes_back(
    tmp_path: Path,
) -> None:
    following = Following(tmp_path, written(record(0, 2)))
    years = json.dumps({"event_ms": 1 << 42, "accepted_ms": 0}).encode()
    following.store.commit(Appends.none(), (), {CLOCK_EXTRA: years})
    following.store.close()
    following = Following(tmp_path, following.log)
    following.drain()
    assert following.follower.newest_ms == 1 << 42
    # Rows of 2 to 5 s, of which 3 s are believed.
    append(following.log, record(2, 6, clocks=((1000, 3000),)))
    following.drain()
    assert following.follower.newest_ms == 3000
    assert json.loads(following.store.extra(CLOCK_EXTRA) or b"")["event_ms"] == 3000
    following.store.close()


def test_a_gap_between_batches_is_counted_and_passed(tmp_path: Path) -> None:
    following = Following(tmp_path, written(record(0, 4), record(9, 12)))
    following.drain()
    assert following.offsets() == [0, 1, 2, 3, 9, 10, 11]
    assert following.metrics.gap_positions._value.get() == 5
    assert following.store.totals["absent"] == 5
    following.store.close()


def test_a_record_that_is_no_microbatch_is_left_out(tmp_path: Path) -> None:
    following = Following(tmp_path, written(record(0, 2), b"garbage", record(2, 4)))
    following.drain()
    assert following.offsets() == [0, 1, 2, 3]
    assert following.metrics.unreadable_microbatches._value.get() == 1
    following.store.close()


def test_another_salt_stops(tmp_path: Path) -> None:
    following = Following(tmp_path, written(record(0, 2), record(2, 4, salt="other")))
    with pytest.raises(SaltMismatch, match="record 1"):
        following.drain()
    assert following.offsets() == [0, 1], "what came before it"
    following.store.close()


def test_records_of_a_lost_salt_before_the_first_of_ours_are_left_out(tmp_path: Path) -> None:
    log = written(record(0, 3, salt="lost"), record(0, 2))
    following = Following(tmp_path, log, own_salt="salt")
    following.drain()
    assert following.offsets() == [0, 1]
    append(log, record(2, 4, salt="lost"))
    with pytest.raises(SaltMismatch, match="record 2"):
        following.drain()
    following.store.close()


def test_a_record_of_another_salt_that_the_trainer_leaves_out_is_left_out_here_too(tmp_path: Path) -> None:
    following = Following(tmp_path / "store", written(record(0, 3), record(0, 9, salt="other"), record(3, 5)))
    journal = Journal(tmp_path / "registry" / GAPS)
    with pytest.raises(SaltMismatch, match="record 1"):
        following.drain()
    # While it runs: an operator started the trainer with --skip-record.
    journal.add(Accepted(Gap(Source(TOPIC, 0), 1, 2), "ann", "a test wrote it", 5, record="another salt"))
    following.connect()
    following.drain()
    assert following.offsets() == [0, 1, 2, 3, 4]
    assert following.metrics.unreadable_microbatches._value.get() == 1
    following.store.close()


def test_ranges_go_on_from_the_marks() -> None:
    from state.microbatch.codec import decode

    batch = decode(record(4, 8))
    assert new_ranges(batch, {SOURCE: 9}) == ([], 0)
    assert new_ranges(batch, {SOURCE: 6}) == ([Range(SOURCE, 6, 8, rows=2)], 0)
    assert new_ranges(batch, {SOURCE: 1}) == ([Range(SOURCE, 1, 4, absent=3), Range(SOURCE, 4, 8, rows=4)], 3)
    assert new_ranges(batch, {}) == ([Range(SOURCE, 4, 8, rows=4)], 0)
    assert len(events_of(batch, batch.header.ranges)) == 4


def test_a_moment_is_noted_at_most_once_a_second_whatever_the_clock_does(tmp_path: Path) -> None:
    notes, path = Currency(tmp_path), tmp_path / f"{CURRENT}.{VERSIONS}"

    def noted_ms(at_ms: int) -> int:
        notes.note(VERSIONS, at_ms)
        return path.stat().st_mtime_ns // 1_000_000

    assert noted_ms(NOW_MS) == NOW_MS
    assert noted_ms(NOW_MS + Progress.NOTE_MS - 1) == NOW_MS
    assert noted_ms(NOW_MS + Progress.NOTE_MS) == NOW_MS + Progress.NOTE_MS
    assert noted_ms(NOW_MS - 5_000) == NOW_MS - 5_000


def test_what_is_missed_for_a_minute_is_degraded_and_still_ready(stores: Stores) -> None:
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0])
    notes = Currency(stores.settings.serving_dir)
    for part in (VERSIONS, CLICKS):
        notes.note(part, NOW_MS)
    now[0] += 59_000
    assert "degraded" not in ask(app, "GET", "/readyz").json()
    now[0] += 16_000
    notes.note(CLICKS, now[0])
    found = ask(app, "GET", "/readyz")
    assert found.status_code == 200 and found.json()["ready"]
    assert found.json()["degraded"] == {VERSIONS: "what came in the last 75 s is not all taken up"}
    app.close()


def test_a_known_problem_is_degraded_at_once_until_it_is_over(stores: Stores) -> None:
    """A host that never took anything up has no age; the time of the last success stays through a problem."""
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0])
    applier = Currency(stores.settings.serving_dir)
    applier.note(VERSIONS, NOW_MS)
    applier.fail(CLICKS, "no broker is reachable")
    applier.fail(VERSIONS, "the registry is a plaice \udcff, not a place")
    now[0] += 61_000
    found = ask(app, "GET", "/readyz")
    assert found.status_code == 200 and found.json()["ready"]
    assert found.json()["degraded"] == {
        VERSIONS: "the registry is a plaice ?, not a place; what came in the last 61 s is not all taken up",
        CLICKS: "no broker is reachable",
    }
    # A problem outlives the applier that had it, and the next one ends it.
    applier = Currency(stores.settings.serving_dir)
    applier.fail(VERSIONS, "")
    applier.note(CLICKS, now[0])
    late = {VERSIONS: "what came in the last 61 s is not all taken up"}
    assert ask(app, "GET", "/readyz").json()["degraded"] == late
    applier.note(VERSIONS, now[0])
    assert "degraded" not in ask(app, "GET", "/readyz").json()
    app.close()


def test_readiness_ends_with_currency_and_comes_again(stores: Stores) -> None:
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0], serving=replace(stores.settings.serving, max_age_s=30.0))
    assert ask(app, "GET", "/readyz").status_code == 503
    notes = Currency(stores.settings.serving_dir)
    for part in (VERSIONS, CLICKS):
        notes.note(part, NOW_MS)
    assert ask(app, "GET", "/readyz").json()["ready"]
    now[0] += 31_000
    notes.note(VERSIONS, now[0])
    old = ask(app, "GET", "/readyz")
    assert (old.status_code, old.json()["version"], old.json()["histories"]) == (503, True, False)
    assert "serving.max_age_s" in old.json()["error"]
    # Answers go on: who asks may prefer old ones to none.
    assert ask(app, "GET", "/v1/profiles/ann").status_code == 200
    app.close()


@pytest.mark.parametrize("transactional_id", [None, "stream"])
def test_histories_are_current_once_they_hold_what_the_log_held(tmp_path: Path, transactional_id: str | None) -> None:
    """Also behind a transaction's marker, which is no record; and what came later is not waited for."""
    log = written(record(0, 5))
    following, check = Following(tmp_path / "histories", log), LogCheck(1000)
    with log.writer(transactional_id) as writer:
        if transactional_id is None:
            writer.send(LOG, 0, None, record(5, 10))
        else:
            with writer.transaction():
                writer.send(LOG, 0, None, record(5, 10))
    ends = {partition: end for partition, (_, end) in log.topics().ends(LOG, committed_only=True).items()}
    assert check.due(5_000)
    check.asked(5_000, ends)
    assert not check.due(90_000) and check.reached(following.follower.positions) is None
    following.drain()
    append(log, record(10, 15))
    assert check.reached(following.follower.positions) == 5_000
    assert not check.due(5_500) and check.due(6_000)
