"""What was trained is what serving answers with: said to be equal where it is, and found out where it is not."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.following.parity import WHOLE_EXTRA
from state.config.sections import Events as EventSettings
from state.config.sections import Features as FeatureSettings
from state.config.sections import HistorySettings
from state.config.settings import Settings
from state.features.mask import Mask
from state.features.spec import EVENT, FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.metrics import ApplierMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.registry.log_line import WHOLE
from streaming.profile import Profiler
from streaming.rows import leave_out
from tests.memory_log import MemoryLog
from tests.streaming.pieces import SOURCES
from tests.streaming.test_profile import BASE_MS, SPEC, batches_of

LOG = "microbatches"
FIRST_USER, USERS = 2**63, 6
SETTINGS = Settings(
    events=EventSettings(max_age_s=3600.0, max_future_s=0.0),
    features=FeatureSettings(
        windows_s=SPEC.windows_s,
        half_lives_s=SPEC.half_lives_s,
        history=SPEC.history,
        recent_categories=SPEC.recent_categories,
        sequence=SPEC.sequence,
    ),
)
REACH_MS = SPEC.reach_ms(SETTINGS.events)
CLICKS = 400
MASK = Mask(3, offsets=((SOURCES[0].topic, 0, 20, 60),), times=((BASE_MS - 90_000, BASE_MS - 60_000),))


@pytest.fixture(scope="module")
def clicks() -> list[tuple[int, int, int, int, int]]:
    """Clicks of a few users, late and out of order too, so that histories are full."""
    rng = random.Random(7)
    return [
        (rng.randrange(USERS), rng.randint(-40, 3) + number // 8, rng.randrange(4), rng.randrange(2), number % 2)
        for number in range(CLICKS)
    ]


def streamed(
    path: Path,
    clicks: list[tuple[int, int, int, int, int]],
    mask: Mask = Mask.NONE,
    spec: FeatureSpec = SPEC,
    epoch: int = 1,
) -> list[bytes]:
    """What the stream's own profiler makes of clicks, as records of the training log of 1 to 9 rows."""
    store, sizes = HistoryStore(path, SPEC.history, 1 << 26), random.Random(1)
    profiler = Profiler(store, SPEC, 100, mask)
    found = []
    for batch in batches_of(clicks, lambda: sizes.randint(1, 9)):
        rows = profiler.update(leave_out(batch, mask))
        header = Header(spec.digest, "salt", rows.batch.ranges, 7, mask.generation, log_epoch=epoch)
        found.append(encode(header, rows.columns))
    store.close()
    return found


@dataclass
class Turning:
    """A wall clock on which a comparison is due at each look."""

    now_ms: int = 1_000_000

    def __call__(self) -> int:
        self.now_ms += 5_000
        return self.now_ms


@dataclass
class Host:
    """The histories of a host, which follow a log."""

    path: Path
    log: MemoryLog
    max_users: int = 1_000
    now_ms: Callable[[], int] = field(default_factory=Turning)

    def __post_init__(self) -> None:
        self.store = HistoryStore(self.path, SPEC.history, 1 << 26)
        self.metrics = ApplierMetrics(CollectorRegistry())
        settings = replace(SETTINGS, history=HistorySettings(max_users=self.max_users))
        self.follower = HistoryFollower(self.store, settings, self.metrics, self.now_ms)

    def drain(self) -> None:
        if not self.follower.connected:
            self.follower.connect(self.log, LOG)
        while self.follower.step(0.0):
            pass

    @property
    def counted(self) -> dict[str, int]:
        outcomes = ("equal", "differs", "unknown")
        return {one: int(self.metrics.parity_rows.labels(one)._value.get()) for one in outcomes}


Open = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Open]:
    opened: list[Host] = []

    def open_host(records: list[bytes], name: str = "host", **options: Any) -> Host:
        log = MemoryLog(ids=lambda: "cd" * 16)
        log.topics().ensure(LOG, 1)
        opened.append(Host(tmp_path / name, log, **options))
        append(opened[-1], records)
        return opened[-1]

    yield open_host
    for one in opened:
        one.follower.disconnect()
        one.store.close()


def append(to: Host, records: list[bytes]) -> None:
    with to.log.writer() as writer:
        for value in records:
            writer.send(LOG, 0, None, value)


Clicks = list[tuple[int, int, int, int, int]]


def test_what_the_stream_wrote_is_what_serving_computes(tmp_path: Path, clicks: Clicks, host: Open) -> None:
    """Full histories, late clicks, several clicks of a user in a record, and a host that starts again."""
    records = streamed(tmp_path / "stream", clicks)
    ours = host(records[:30])
    ours.drain()
    ours.follower.disconnect()
    ours.store.close()
    again = Host(ours.path, ours.log)
    append(again, records[30:])
    again.drain()
    assert ours.counted == {"equal": 30, "differs": 0, "unknown": 0}
    assert again.counted == {"equal": len(records) - 30, "differs": 0, "unknown": 0}
    assert min(len(again.store.read(FIRST_USER + user)) for user in range(USERS)) == SPEC.history
    again.follower.disconnect()
    again.store.close()
    ours.store = HistoryStore(ours.path, SPEC.history, 1 << 26)


def test_an_event_that_serving_has_and_the_stream_had_not_is_found_and_named(
    tmp_path: Path, clicks: Clicks, host: Open, caplog: pytest.LogCaptureFixture
) -> None:
    records = streamed(tmp_path / "stream", clicks)
    ours = host(records[:20])
    ours.drain()
    stray = np.zeros(USERS, EVENT)
    stray["at_ms"], stray["category"], stray["offset"] = BASE_MS - 1_500_000, 3, 1_000
    ours.store.commit(Appends.of(np.arange(USERS, dtype=np.uint64) + np.uint64(FIRST_USER), stray))
    append(ours, records[20:23])
    with caplog.at_level(logging.ERROR):
        ours.drain()
    assert ours.counted == {"equal": 20, "differs": 3, "unknown": 0}
    said = caplog.messages[0]
    assert said.startswith("record 20 of partition 0 of the training log: the click at offset ")
    assert " was trained as " in said
    assert "more numbers differ" in said
    assert str(FIRST_USER)[:12] not in caplog.text


def test_events_that_serving_lost_are_found_while_nothing_says_that_it_lacks_any(
    tmp_path: Path, clicks: Clicks, host: Open
) -> None:
    records = streamed(tmp_path / "stream", clicks)
    ours = host(records[:20])
    ours.drain()
    users = [FIRST_USER + user for user in range(USERS)]
    ours.store.sweep([], lambda events: np.zeros(len(events), np.bool_), users)
    append(ours, records[20:23])
    ours.drain()
    assert ours.counted == {"equal": 20, "differs": 3, "unknown": 0}


def test_a_host_that_began_in_the_middle_cannot_know_of_users_whose_events_it_lacks(
    tmp_path: Path, clicks: Clicks, host: Open
) -> None:
    """Their rows are unknown; once windows see nothing of before, they are compared again."""
    records = streamed(tmp_path / "stream", clicks)
    ours = host(records)
    ours.log.topics().delete_before(LOG, {0: 20})
    ours.drain()
    assert ours.counted["differs"] == 0
    assert ours.counted["unknown"] > 10
    assert sum(ours.counted.values()) == len(records) - 20
    since_ms = json.loads(ours.store.extra(WHOLE_EXTRA) or b"0")
    later = 1 + (since_ms + REACH_MS - BASE_MS) // 30_000
    more = [*clicks, *((user, later + n, 1, 0, 0) for n in range(30) for user in range(USERS))]
    unknown = ours.counted["unknown"]
    append(ours, streamed(tmp_path / "again", more)[len(records) - 1 :])
    ours.drain()
    assert ours.counted["unknown"] == unknown
    assert ours.counted["differs"] == 0
    assert ours.counted["equal"] > 20


def test_after_a_gap_what_differs_is_unknown_also_for_a_host_that_starts_again(
    tmp_path: Path, clicks: Clicks, host: Open
) -> None:
    records = streamed(tmp_path / "stream", clicks)
    ours = host([*records[:10], *records[25:40]])
    ours.drain()
    assert ours.counted["unknown"] > 5
    ours.follower.disconnect()
    ours.store.close()
    ours.__post_init__()
    append(ours, records[40:55])
    ours.drain()
    assert ours.counted["unknown"] > 0
    assert ours.counted["differs"] == 0


def test_masked_clicks_are_left_out_of_both(tmp_path: Path, clicks: Clicks, host: Open) -> None:
    records = streamed(tmp_path / "stream", clicks, MASK)
    ours = host(records, "knows")
    ours.follower.follow_branch(WHOLE, MASK, lambda at: ours.log.reader(LOG, [0], {0: at}))
    ours.drain()
    assert ours.counted["equal"] > 20
    assert ours.counted["differs"] == ours.counted["unknown"] == 0
    late = host(streamed(tmp_path / "unmasked", clicks), "late")
    late.follower.follow_branch(WHOLE, MASK, lambda at: late.log.reader(LOG, [0], {0: at}))
    late.drain()
    assert late.counted["unknown"] > 10
    assert late.counted["differs"] == 0


def test_rows_of_another_feature_spec_are_unknown(tmp_path: Path, clicks: Clicks, host: Open) -> None:
    ours = host(streamed(tmp_path / "stream", clicks, spec=replace(SPEC, half_lives_s=(30, 901))))
    ours.drain()
    assert ours.counted["unknown"] == sum(ours.counted.values()) > 20


def test_one_row_a_second_is_compared(tmp_path: Path, clicks: Clicks, host: Open) -> None:
    now = [1_000_000]
    ours = host(streamed(tmp_path / "stream", clicks)[:40], now_ms=lambda: now[0])
    ours.drain()
    now[0] += 999
    append(ours, streamed(tmp_path / "again", clicks)[40:45])
    ours.drain()
    now[0] += 1
    append(ours, streamed(tmp_path / "third", clicks)[45:50])
    ours.drain()
    assert sum(ours.counted.values()) == 2
