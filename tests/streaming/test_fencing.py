"""A stream fences its own zombies, of whatever release and shard, and no stream of another deployment on the same Kafka."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, LockHeld, LogError
from state.features.spec import FeatureSpec
from state.layout import HISTORIES, WRITER, streams
from state.log import Topics, Writer
from streaming.histories import open_histories
from streaming.rebuild import rebuild
from streaming.writer import id_of_first_release, keep_id, last_id, note_first_release, open_writer, transactional_id
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    FOREVER,
    click,
    following,
    histories_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)


def deployment(kafka: Kafka, state: Path) -> Settings:
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 1)
        topics.ensure(kafka.microbatches_topic, 1)
    plain = load([], {})
    return replace(plain, kafka=kafka, paths=replace(plain.paths, state=str(state)))


def write(writer: Writer, settings: Settings) -> None:
    with writer.transaction():
        writer.send(settings.kafka.microbatches_topic, 0, None, b"x")


def test_two_deployments_on_one_kafka_do_not_fence_each_other(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    # Both have the default group, and read the same clicks.
    ours = deployment(replace(kafka_settings(), group="springtide-stream"), tmp_path / "ours")
    other = replace(kafka_settings(), group="springtide-stream", clicks_topic=ours.kafka.clicks_topic)
    theirs = deployment(other, tmp_path / "theirs")
    with open_writer(ours) as mine, open_writer(theirs) as another:
        for _ in range(2):
            write(mine, ours)
            write(another, theirs)


def test_a_restart_and_a_copy_of_the_state_fence_the_one_before(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    settings = deployment(kafka_settings(), tmp_path / "state")
    copied = deployment(settings.kafka, tmp_path / "copy")
    zombie = open_writer(settings)
    for again in (settings, copied):
        with open_writer(again) as writer:
            write(writer, again)
            with pytest.raises(LogError, match="another writer took over"):
                write(zombie, settings)
        zombie.close()
        zombie = open_writer(settings)
    zombie.close()


def test_after_an_upgrade_the_zombie_of_0_1_0_is_fenced_once_and_for_all(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    settings = deployment(kafka_settings(), tmp_path)
    (settings.stream_dir / HISTORIES).mkdir(parents=True)
    zombie = Writer(settings.kafka, transactional_id=id_of_first_release())
    write(zombie, settings)
    note_first_release(settings.stream_dir)
    with open_writer(settings) as writer:
        with pytest.raises(LogError, match="another writer took over"):
            write(zombie, settings)
        write(writer, settings)
        kept = (settings.stream_dir / WRITER).read_text()
        assert kept == last_id(settings.stream_dir) != id_of_first_release()
    zombie.close()
    # Another deployment that still runs 0.1.0 has to start again once; then nobody takes its id any more.
    with Writer(settings.kafka, transactional_id=id_of_first_release()) as another:
        note_first_release(settings.stream_dir)
        open_writer(settings).close()
        write(another, settings)


def test_a_stream_that_never_ran_fences_nobody(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    settings = deployment(kafka_settings(), tmp_path)
    with Writer(settings.kafka, transactional_id=id_of_first_release()) as another:
        with open_histories(settings, FeatureSpec.from_settings(settings)):
            open_writer(settings).close()
        write(another, settings)


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
    with histories_of(settings) as store:
        return store.digest()


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
    rebuild(settings, None, io.StringIO())
    assert digest(settings) == whole
    assert [one.parent for one in streams(settings.state_dir)] == [settings.stream_dir]
    assert (shard(settings, 1) / "histories.bad1").is_dir() and (shard(settings, 2) / "histories.bad1").is_dir()
    for name, zombie in zombies.items():
        with pytest.raises(LogError, match="another writer took over"), zombie.transaction():
            zombie.send(settings.kafka.dead_letters_topic, 0, None, name.encode())
        zombie.close()
    with open_histories(settings, FeatureSpec.from_settings(settings)) as (store, _):
        assert len(store.positions()) == 4


def test_a_shard_that_still_runs_here_is_not_rebuilt_over(settings: Settings) -> None:
    for zombie in sharded(settings).values():
        zombie.close()
    with DirectoryLock(shard(settings, 1)), pytest.raises(LockHeld):
        rebuild(settings, None, io.StringIO())
    assert len(streams(settings.state_dir)) == SHARDS
