"""One stream writes each store: who fences whom, which store continues, and which one is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.sections import Kafka, StorageSettings
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.disk.memory_place import MEMORY
from state.errors import CorruptStore, LockHeld, LogError, SaltMismatch, SpecMismatch
from state.features.spec import FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore, open_history_store
from state.layout import HISTORIES, MARK, WRITER, streams
from state.log import Topics, Writer
from state.registry.registry import Registry
from state.registry.specs import SpecActions
from state.storage import STREAM
from streaming import histories
from streaming.histories import check_identity, open_histories
from streaming.rebuild import main, rebuild
from streaming.writer import id_of_first_release, keep_id, last_id, note_first_release, open_writer, transactional_id
from tests.conftest import KafkaFactory
from tests.disks import forget_memory
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


SPEC = FeatureSpec()
KNOWN = SpecActions(Path("nowhere"), SPEC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore(tmp_path, map_bytes=1 << 24)
    yield opened
    opened.close()


def test_another_salt_is_refused(store: HistoryStore) -> None:
    check_identity(store, SPEC, "salt", KNOWN)
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        check_identity(store, SPEC, "pepper", KNOWN)


def test_other_features_take_the_store_over_with_the_names_of_its_actions(store: HistoryStore) -> None:
    check_identity(store, SPEC, "salt", KNOWN)
    other = FeatureSpec(actions=("cart", "view"), windows_s=(60,))
    check_identity(store, other, "salt", SpecActions(Path("nowhere"), other))
    assert store.extra("spec") == other.digest.encode()
    assert store.extra("actions") == b'["view", "favorite", "cart", "purchase"]'


def test_actions_of_a_store_of_0_1_0_are_those_of_the_spec_that_the_registry_knows(
    store: HistoryStore, tmp_path: Path
) -> None:
    store.commit(Appends.none(), (), {"spec": SPEC.digest.encode(), "salt": b"salt"})
    other = FeatureSpec(actions=("cart", "view"))
    with pytest.raises(SpecMismatch, match=r"start the stream once with the former events\.actions"):
        check_identity(store, other, "salt", SpecActions(tmp_path / "nowhere", other))
    registry = Registry(tmp_path / "registry")
    registry.specs.add_spec(SPEC.digest, {"spec": SPEC.to_json()}, lambda folder: None)
    check_identity(store, other, "salt", SpecActions(registry.path, other))
    assert store.extra("actions") == b'["view", "favorite", "cart", "purchase"]'


@pytest.fixture
def one_shard(tmp_path: Path) -> Settings:
    plain = Settings()
    return replace(plain, paths=replace(plain.paths, state=str(tmp_path)), storage=StorageSettings(memory_dir=""))


def test_what_is_not_there_yet_or_was_closed_in_order_or_killed_is_not_lost(one_shard: Settings) -> None:
    folder = one_shard.stream_dir
    assert not histories.is_lost(folder)
    store = open_history_store(one_shard, STREAM, folder)
    assert not histories.is_lost(folder), "kill -9 under this start of the machine loses nothing"
    store.close()
    assert not histories.is_lost(folder)


def test_what_was_open_under_another_start_of_the_machine_is_lost(one_shard: Settings) -> None:
    folder = one_shard.stream_dir
    open_history_store(one_shard, STREAM, folder).close()
    (folder / HISTORIES / MARK).write_text(json.dumps({"clean": False, "boot_id": "another"}))
    assert histories.is_lost(folder)


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason=f"{MEMORY} cannot be written here")
def test_what_lay_in_memory_that_is_gone_is_lost(one_shard: Settings) -> None:
    one_shard = replace(one_shard, storage=StorageSettings(memory_dir=MEMORY))
    folder = one_shard.stream_dir
    store = open_history_store(one_shard, STREAM, folder)
    if not store.in_memory:
        pytest.skip(f"{MEMORY} has no room here")
    assert not histories.is_lost(folder)
    (folder / HISTORIES).readlink().joinpath("data.mdb").unlink()
    forget_memory(one_shard.state_dir)
    assert histories.is_lost(folder)


def test_nothing_is_rebuilt_where_nothing_is_lost_and_no_kafka_is_asked(
    one_shard: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "127.0.0.1:1"
    words = ["--state", str(one_shard.state_dir), "--bootstrap-servers", nobody, "--storage.memory_dir="]
    assert main(["--if-lost", *words]) == 0
    assert "nothing is rebuilt" in capsys.readouterr().out
    open_history_store(one_shard, STREAM, one_shard.stream_dir).close()
    (one_shard.stream_dir / HISTORIES / MARK).write_text(json.dumps({"clean": False, "boot_id": "another"}))
    assert main(["--if-lost", *words, "--kafka.request_timeout_s", "0.2"]) == 1, (
        "now it is, and there is no salt either"
    )
