"""A stream fences its own zombie, of whatever release, and no stream of another deployment on the same Kafka."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import FencedWriter
from state.features.spec import FeatureSpec
from state.layout import HISTORIES, WRITER
from state.log import Topics, Writer
from streaming.histories import open_histories
from streaming.writer import id_of_first_release, last_id, note_first_release, open_writer
from tests.conftest import KafkaFactory


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
            with pytest.raises(FencedWriter):
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
        with pytest.raises(FencedWriter):
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
