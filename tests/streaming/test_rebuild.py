"""A lost history store comes back from Kafka: the same events, the same positions, or it says what is missing."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower, position_of
from state.config.sections import Events, Kafka, LabelSettings
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, LockHeld, SaltMismatch, StoreError
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.snapshots import Cut, SnapshotWriter, location_of
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, Topics, Writer
from state.metrics import ApplierMetrics
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, turned
from streaming import histories
from streaming.accounts import faults
from streaming.rebuild import Rebuilt, rebuild
from tests import forked
from tests.conftest import KafkaFactory
from tests.disks import crash
from tests.kills import killed_at
from tests.one_kafka import Running
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
    click,
    following,
    headers_of,
    histories_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

CLICKS = 1200
USERS = 16  # each of whom clicks in one of the two partitions
BAD = {100: b"{not json", 333: click(333, user=None)}


@dataclass(frozen=True)
class Lost:
    """A stream's life, crash included, and what its store held at the end."""

    settings: Settings
    digest: str
    counts: dict[Source, dict[str, int]]
    records: int

    def elsewhere(self, state: Path, **kafka: Any) -> Settings:
        """The same stream with an empty state directory."""
        return replace(
            self.settings,
            paths=replace(self.settings.paths, state=str(state)),
            kafka=replace(self.settings.kafka, **kafka),
        )


@pytest.fixture(scope="module")
def lost(kafka: Running, tmp_path_factory: pytest.TempPathFactory) -> Lost:
    """1,200 clicks, two of them bad, each user's in one partition, taken by a stream that was killed between log and store, and then went on."""
    folder, suffix = tmp_path_factory.mktemp("lost"), f"rebuild-{os.getpid()}"
    section = Kafka(
        bootstrap_servers=kafka.bootstrap_servers, clicks_topic=f"clicks-{suffix}", dead_letters_topic=f"dlq-{suffix}",
        microbatches_topic=f"log-{suffix}", group=f"group-{suffix}", request_timeout_s=60.0,
    )  # fmt: skip
    settings = settings_for(section, folder / "state", folder / "salt")
    with Topics(section) as topics, following(section, section.microbatches_topic) as log:
        topics.ensure(section.clicks_topic, 2, FOREVER)
        send(section, [BAD.get(number, click(number, user=f"user-{number % USERS}")) for number in range(CLICKS)])
        with running(settings, folder / "log", "stream.acknowledged:3") as stream:
            assert stream.wait() == -9, stream.lines
        with running(settings, folder / "log") as stream:
            until(lambda: next_offsets(log.poll()) == {0: CLICKS / 2, 1: CLICKS / 2}, "all clicks in the log")
            assert stream.stop() == 0, stream.lines
        records = len(log.poll())
        assert sum(len(decode(value)) for value in log.poll()) > CLICKS - len(BAD), "the crash wrote rows twice"
    with histories_of(settings) as store:
        return Lost(settings, store.digest(), store.counts(), records)


def rebuilt(settings: Settings, copy: Path | None = None) -> Rebuilt:
    return rebuild(settings, copy, io.StringIO())


def snapshot(settings: Settings, polls: int) -> int:
    """Writes a snapshot of a serving host that has read so many polls of the training log; returns how many records."""
    spec = FeatureSpec.from_settings(settings)
    store = HistoryStore(settings.serving_dir / HISTORIES, spec.history, 1 << 30)
    follower = HistoryFollower(store, settings, ApplierMetrics(CollectorRegistry()), lambda: 0)
    follower.connect(Log(settings.kafka), settings.kafka.microbatches_topic)
    records, deadline_s = 0, time.monotonic() + 60
    while polls and time.monotonic() < deadline_s:
        read = follower.step(1.0)
        records, polls = records + read, polls - (read > 0)
    follower.disconnect()
    position, salt = position_of(store), store.extra("salt")
    assert position is not None and salt is not None
    writer = SnapshotWriter(location_of(settings), "host", spec.history)
    assert writer.write(Cut(store.view(), position, salt.decode(), (), None), 1) is not None
    store.close()
    return records


def held(settings: Settings) -> tuple[str, dict[Source, dict[str, int]]]:
    with histories_of(settings) as store:
        return store.digest(), store.counts()


@pytest.fixture
def copied_log(lost: Lost, tmp_path: Path) -> Iterator[Settings]:
    """The stream with a micro-batch log of its own, a copy, so that a test may cut it."""
    kafka = replace(lost.settings.kafka, microbatches_topic=f"log-copy-{os.getpid()}-{tmp_path.name}"[:200])
    with (
        Topics(kafka) as topics,
        following(kafka, lost.settings.kafka.microbatches_topic) as log,
        Writer(kafka) as writer,
    ):
        topics.ensure(kafka.microbatches_topic, 1, FOREVER)
        until(lambda: len(log.poll()) == lost.records, "the log")
        for value in log.poll():
            writer.send(kafka.microbatches_topic, 0, None, value)
        writer.flush()
    yield lost.elsewhere(tmp_path / "state", microbatches_topic=kafka.microbatches_topic)


def test_from_nothing_the_store_is_the_lost_one(lost: Lost, tmp_path: Path) -> None:
    settings = lost.elsewhere(tmp_path / "state")
    found = rebuilt(settings)
    assert held(settings) == (lost.digest, lost.counts)
    assert (found.rows, found.records, found.lost, found.clicks) == (CLICKS - len(BAD), lost.records, 0, 0)
    assert not list(settings.stream_dir.glob("histories.*"))
    again = rebuilt(settings)
    assert again.aside == settings.stream_dir / "histories.bad1"
    assert held(settings) == (lost.digest, lost.counts)


def test_a_store_from_before_a_power_cut_is_refused_rebuilt_and_gone_on_from(lost: Lost, tmp_path: Path) -> None:
    settings = lost.elsewhere(tmp_path / "state")
    shutil.copytree(lost.settings.stream_dir, settings.stream_dir)
    crash(HistoryStore(settings.stream_dir / "histories", 256, 1 << 30, boot_id="before the cut"))
    with running(settings, tmp_path / "log") as stream:
        assert stream.wait() == 1
    (line,) = (one for one in stream.lines if " ERROR " in one)
    assert "CorruptStore" in line and "springtide rebuild-history" in line

    command = [sys.executable, "-m", "streaming.rebuild"]
    done = forked.run(command, env={**os.environ, **settings.environment()}, capture_output=True, text=True, check=True)
    assert "complete; the old store is " in done.stdout and "histories.bad1" in done.stdout
    assert "100 %" in done.stderr and "rows/s" in done.stderr
    assert held(settings) == (lost.digest, lost.counts)
    with running(settings, tmp_path / "log") as stream:
        until(lambda: any("'" not in line and f"0: {CLICKS // 2}" in line for line in stream.lines), "it goes on")
        assert stream.stop() == 0, stream.lines


def test_a_snapshot_of_servings_histories_is_gone_on_from(lost: Lost, copied_log: Settings) -> None:
    """Although neither the log nor the clicks have what is before it, records after it repeat clicks of it, and the
    process is killed while it loads and after it."""
    settings, kafka = copied_log, copied_log.kafka
    with Topics(kafka) as topics:
        read = snapshot(settings, 1)
        topics.delete_before(kafka.microbatches_topic, {0: read})
    without_clicks = replace(settings, kafka=replace(kafka, clicks_topic="no-such-topic"))
    for point in ("snapshot.share:3", "snapshot.loaded"):
        with killed_at(point):
            rebuilt(without_clicks)
    found = rebuilt(without_clicks)
    assert held(settings) == (lost.digest, lost.counts)
    assert (found.snapshot, found.records, found.lost, found.clicks) == (1, lost.records - read, 0, 0)


@pytest.mark.parametrize("cut", [5, 10_000])
def test_where_the_log_does_not_reach_back_the_clicks_are_read(lost: Lost, copied_log: Settings, cut: int) -> None:
    settings, kafka = copied_log, copied_log.kafka
    with Topics(kafka) as topics:
        end = topics.ends(kafka.microbatches_topic)[0][1]
        topics.delete_before(kafka.microbatches_topic, {0: min(cut, end)})
    found = rebuilt(settings)
    assert held(settings) == (lost.digest, lost.counts)
    assert (found.lost, found.incomplete) == (0, 0)
    assert found.clicks > 0


def test_what_is_gone_from_both_is_counted(lost: Lost, copied_log: Settings, kafka: Running, tmp_path: Path) -> None:
    settings = copied_log
    clicks = f"clicks-cut-{os.getpid()}"
    settings = replace(settings, kafka=replace(settings.kafka, clicks_topic=clicks))
    with Topics(settings.kafka) as topics:
        topics.ensure(clicks, 2, FOREVER)
        topics.delete_before(settings.kafka.microbatches_topic, {0: 5})
    # The clicks of the log's topic id are not there at all: all below the log's first ranges is gone.
    found = rebuilt(settings)
    with histories_of(settings) as store:
        assert found.lost == sum(count["first"] for count in store.counts().values()) > 0
        assert found.incomplete == found.users == store.users() == USERS
        assert {source: count["next"] for source, count in store.counts().items()} == {
            source: count["next"] for source, count in lost.counts.items()
        }


def test_a_copy_is_gone_on_from_and_one_not_closed_in_order_is_refused(lost: Lost, tmp_path: Path) -> None:
    first = lost.elsewhere(tmp_path / "first")
    rebuilt(first)
    copy = tmp_path / "copy"
    store = HistoryStore(first.stream_dir / HISTORIES, first.features.history, 1 << 30)
    store.copy_to(copy)
    crash(store)
    with pytest.raises(CorruptStore, match="was not closed cleanly"):
        rebuilt(lost.elsewhere(tmp_path / "second"), first.stream_dir / "histories")
    second = lost.elsewhere(tmp_path / "second")
    found = rebuilt(second, copy)
    assert (found.rows, found.clicks, found.lost) == (0, 0, 0)
    assert held(second) == (lost.digest, lost.counts)
    with pytest.raises(StoreError):
        rebuilt(second, tmp_path)


def test_a_rebuild_beside_a_running_stream_is_refused(lost: Lost, tmp_path: Path) -> None:
    settings = lost.elsewhere(tmp_path / "state")
    with DirectoryLock(settings.stream_dir), pytest.raises(LockHeld, match=f"process {os.getpid()}"):
        rebuilt(settings)


def test_another_salt_is_refused_and_nothing_changes(lost: Lost, tmp_path: Path) -> None:
    settings = lost.elsewhere(tmp_path / "state")
    salt = tmp_path / "salt"
    salt.write_text("another salt than that of the log")
    salt.chmod(0o600)
    settings = replace(settings, paths=replace(settings.paths, salt_file=str(salt)))
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        rebuilt(settings)
    assert not (settings.stream_dir / "histories").exists()


@pytest.mark.parametrize("point", ["rebuild.committed", "rebuild.promised", "rebuild.aside"])
def test_a_rebuild_cut_short_leaves_the_old_store_or_the_new_one(lost: Lost, tmp_path: Path, point: str) -> None:
    settings = lost.elsewhere(tmp_path / "state")
    HistoryStore(settings.stream_dir / "histories", 256, 1 << 30).close()
    with killed_at(point):
        rebuilt(settings)
    histories.finish(settings.stream_dir)
    with histories_of(settings) as store:
        assert store.users() == (0 if point == "rebuild.committed" else USERS)
    found = rebuilt(settings)
    assert found.users == USERS
    assert held(settings) == (lost.digest, lost.counts)


def test_impressions_that_wait_come_back_from_the_log_and_if_that_is_gone_from_the_clicks(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    actions = ("impression", "view", "click", "impression")
    settings = replace(
        settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt"),
        events=Events(actions=("view", "impression", "click"), action_weights=(1.0, 1.0, 3.0)),
        labels=LabelSettings(impressions=("impression",), outcomes=("click",), wait_s=60),
    )
    kafka, count = settings.kafka, 400

    def stored(settings: Settings) -> tuple[object, ...]:
        with histories_of(settings) as store:
            assert faults(store) == ()
            return list(store.waiting()), store.cut(), store.digest()

    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
        # Each user in turn: an impression, a view, a click (of every third user on that impression), an impression.
        clicks = []
        for number in range(count):
            turn, user = divmod(number, 10)
            item = f"item-{turn - 2 if turn % 4 == 2 and user % 3 == 0 else turn}"
            clicks.append(click(number, user=f"user-{user}", item=item, action=actions[turn % 4]))
        send(kafka, clicks)
        with running(settings, tmp_path / "log", "stream.acknowledged:3") as stream:
            assert stream.wait() == -9, stream.lines
        with running(settings, tmp_path / "log") as stream:
            until(lambda: next_offsets(log.poll()) == {0: count / 2, 1: count / 2}, "all clicks in the log")
            assert stream.stop() == 0, stream.lines
        before = stored(settings)
        assert before[0]
        elsewhere = replace(settings, paths=replace(settings.paths, state=str(tmp_path / "from-snapshot")))
        read, total = snapshot(elsewhere, 1), len(log.poll())
        found = rebuilt(elsewhere)
        assert stored(elsewhere) == before
        assert (found.snapshot, found.records) == (1, total - read)
        for name in ("from-log", "from-clicks"):
            elsewhere = replace(settings, paths=replace(settings.paths, state=str(tmp_path / name)))
            rebuilt(elsewhere)
            assert stored(elsewhere) == before
            topics.delete_before(kafka.microbatches_topic, {0: topics.ends(kafka.microbatches_topic)[0][1]})


GOOD, ALL = 600, 1200
MASKED_S = GOOD + 100, GOOD + 160


def values() -> list[bytes]:
    actions = ("favorite", "cart", "view", "view", "view")
    made = [click(number, action=actions[number % 5]) for number in range(ALL)]
    made[7] = made[GOOD + 7] = b"{not json"
    return made


def content(settings: Settings) -> dict[str, Any]:
    with histories_of(settings) as store:
        return {"digest": store.digest(), "counts": store.counts(), "waiting": dict(store.waiting())}


@pytest.mark.nightly
def test_the_stream_reverts_reads_again_and_is_rebuilt_along_the_new_branch(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    settings = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt")
    labels = LabelSettings(impressions=("favorite",), outcomes=("cart",), wait_s=90.0)
    settings = replace(settings, labels=labels)
    kafka, controls = settings.kafka, Controls(settings.registry_dir)
    controls.propose(start(actor="trainer", reason="first start", now_ms=0))

    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        source = Source(topics.ensure(kafka.clicks_topic, 1, FOREVER).topic_id, 0)
        send(kafka, values()[:GOOD], partition=lambda _: 0)
        with running(settings, tmp_path / "log") as stream:
            # 1. A version stands at the end of the good clicks.
            until(lambda: next_offsets(log.poll()) == {0: GOOD}, "the good clicks")
            place = topics.ends(kafka.microbatches_topic)[0][1]
            send(kafka, values()[GOOD:], GOOD, partition=lambda _: 0)
            until(lambda: next_offsets(log.poll()) == {0: ALL}, "the later clicks")
            # 2. Control goes back there.
            branch = turned(WHOLE, 1, place, topics.ends(kafka.microbatches_topic)[0][1], ((source, GOOD),))
            mask = Mask(generation=2, times=((BEGIN_MS + MASKED_S[0] * 1000, BEGIN_MS + MASKED_S[1] * 1000),))
            controls.change(lambda now: roll_back(now, 3, mask, actor="ann", reason="bots", now_ms=5, log=branch))
            until(lambda: topics.committed(kafka.group, kafka.clicks_topic) == {0: ALL}, "the clicks are committed")
            until(lambda: sum(" reading " in line for line in stream.lines) == 2, "the stream is opened again")
            until(lambda: _masked(log.poll()) == MASKED_S[1] - MASKED_S[0], "they are read again")
            assert stream.stop() == 0, stream.lines
    before = content(settings)
    assert before["counts"][source]["masked"] == MASKED_S[1] - MASKED_S[0]
    assert before["counts"][source]["next"] == ALL and before["waiting"]
    # 3. Each dead letter is written once.
    offsets = [letter["offset"] for letter in headers_of(kafka, kafka.dead_letters_topic)]
    assert offsets == ["7", str(GOOD + 7)]
    # 4. A lost store comes back along the branch.
    rebuild(settings, None, io.StringIO())
    assert content(settings) == before


def _masked(records: list[bytes]) -> int:
    """Masked positions in the micro-batches of the second epoch, once all of it is there."""
    headers = [header for record in records if (header := decode(record).header).log_epoch == 2]
    reached = max((part.next for header in headers for part in header.ranges), default=0)
    return sum(part.masked for header in headers for part in header.ranges) if reached == ALL else -1
