"""A deployment that had several shards goes on with one stream: nothing of theirs is passed over, and none of them writes on."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, FencedWriter, LockHeld
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES, streams
from state.log import Topics, Writer
from streaming.histories import open_histories
from streaming.rebuild import progress_on, rebuild
from streaming.writer import id_of_first_release, keep_id, transactional_id
from tests.conftest import KafkaFactory
from tests.streaming.streams import FOREVER, click, following, next_offsets, running, send, settings_for, until

CLICKS = 300
SHARDS = 3


@pytest.fixture
def settings(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """A stream that has read all of four partitions."""
    made = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt")
    with Topics(made.kafka) as topics, following(made.kafka, made.kafka.microbatches_topic) as log:
        topics.ensure(made.kafka.clicks_topic, 4, FOREVER)
        send(made.kafka, [click(number) for number in range(CLICKS)], partition=lambda number: number % 4)
        with running(made, tmp_path / "log") as stream:
            until(lambda: sum(next_offsets(log.poll()).values()) == CLICKS, "all clicks in the log")
            assert stream.stop() == 0, stream.lines
    return made


def shard(settings: Settings, number: int) -> Path:
    return settings.state_dir / f"stream-{number}"


def digest(settings: Settings) -> str:
    store = HistoryStore(settings.stream_dir / HISTORIES, settings.features.history, 1 << 30)
    try:
        return store.digest()
    finally:
        store.close()


def sharded(settings: Settings) -> dict[str, Writer]:
    """Makes histories of shards of this stream's, as an earlier release left them; their writers, which live on."""
    kafka = settings.kafka
    with Topics(kafka) as topics:
        clicks, log = (topics.describe(name).topic_id for name in (kafka.clicks_topic, kafka.microbatches_topic))
    ids = {number: transactional_id(clicks, log, kafka.group, number) for number in range(1, SHARDS)}
    for number, own in ids.items():
        shutil.copytree(settings.stream_dir / HISTORIES, shard(settings, number) / HISTORIES)
        keep_id(shard(settings, number), own)
    # The last one is of 0.1.0, and one more runs on another host.
    (shard(settings, SHARDS - 1) / "writer").unlink()
    named = [ids[1], id_of_first_release(SHARDS - 1), transactional_id(clicks, log, kafka.group, 3)]
    zombies = {one: Writer(kafka, transactional_id=one) for one in named}
    for zombie in zombies.values():
        with zombie.transaction():
            zombie.send(kafka.dead_letters_topic, 0, None, b"of a shard")
    return zombies


def test_beside_histories_of_other_shards_no_stream_goes_on(settings: Settings) -> None:
    for zombie in sharded(settings).values():
        zombie.close()
    with (
        pytest.raises(CorruptStore, match=r"stream-1, .*stream-2: .*springtide rebuild-history"),
        open_histories(settings, FeatureSpec.from_settings(settings)),
    ):
        pass


def test_a_rebuild_takes_all_partitions_fences_every_shard_and_sets_their_stores_aside(settings: Settings) -> None:
    whole, zombies = digest(settings), sharded(settings)
    # As a shard leaves it: of its own partitions alone.
    shutil.rmtree(settings.stream_dir / HISTORIES)
    rebuild(settings, None, progress_on(io.StringIO()))
    assert digest(settings) == whole
    assert [one.parent for one in streams(settings.state_dir)] == [settings.stream_dir]
    assert (shard(settings, 1) / "histories.bad1").is_dir() and (shard(settings, 2) / "histories.bad1").is_dir()
    for name, zombie in zombies.items():
        with pytest.raises(FencedWriter), zombie.transaction():
            zombie.send(settings.kafka.dead_letters_topic, 0, None, name.encode())
        zombie.close()
    with open_histories(settings, FeatureSpec.from_settings(settings)) as (store, _):
        assert len(store.positions()) == 4


def test_a_shard_that_still_runs_here_is_not_rebuilt_over(settings: Settings) -> None:
    for zombie in sharded(settings).values():
        zombie.close()
    with DirectoryLock(shard(settings, 1)), pytest.raises(LockHeld):
        rebuild(settings, None, progress_on(io.StringIO()))
    assert len(streams(settings.state_dir)) == SHARDS
