"""An exact rollback at the command line: it turns the log at the version, and is refused where clicks or log are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from state.config.sections import Kafka
from state.errors import LogError, UnfitVersion
from state.log import Topics, Writer
from state.positions import Source
from state.registry.control import start
from state.registry.manifest import LogRange
from state.registry.registry import SERVING
from tests.conftest import KafkaFactory
from tests.deploy.operating import NOW_MS, Operator, draft

Command = Callable[..., str]


@pytest.fixture
def kafka(kafka_settings: KafkaFactory) -> Kafka:
    """Topics of clicks and micro-batches with ten records each."""
    made = kafka_settings(clicks_partitions=1)
    with Topics(made) as topics, Writer(made) as writer:
        for name in (made.clicks_topic, made.microbatches_topic):
            topics.ensure(name, 1, {"retention.ms": "-1"})
            for _ in range(10):
                writer.send(name, 0, None, b"")
        writer.flush()
    return made


@pytest.fixture
def command(kafka: Kafka, tmp_path: Path) -> Command:
    """A registry whose version 1 has four clicks of two records, and version 2 eight of five."""
    operator = Operator(tmp_path)
    with Topics(kafka) as topics:
        clicks, log = (topics.describe(name).topic_id for name in (kafka.clicks_topic, kafka.microbatches_topic))
    registry = operator.registry
    registry.propose(start(actor="trainer", reason="first start", now_ms=NOW_MS))
    for number, (records, have) in enumerate(((2, 4), (5, 8)), 1):
        made = replace(
            draft(number, number - 1 or None),
            log=LogRange(kafka.microbatches_topic, log, 0, 0, records),
            sources=((Source(clicks, 0), have),),
        )
        registry.publish(made, {SERVING: b"x"})
    flags = [
        *("--kafka.bootstrap_servers", kafka.bootstrap_servers, "--kafka.clicks_topic", kafka.clicks_topic),
        *("--kafka.microbatches_topic", kafka.microbatches_topic),
    ]
    return lambda *words: operator(*words, "--reason", "bots", "--mode", "exact", *flags)


def test_the_log_turns_off_at_the_version_and_the_plan_says_what_is_read_again(
    command: Command, tmp_path: Path
) -> None:
    printed = command("rollback", "--to", "1", "--dry-run")
    assert "4 clicks are read again" in printed
    assert "the stream's store is not on this machine" in printed
    assert len(Operator(tmp_path).registry.controls()) == 1
    document = json.loads(command("rollback", "--to", "1", "-o", "json"))
    assert document["plan"]["exact"] == {"clicks": 4, "histories": None, "log_epoch": 2}
    control = Operator(tmp_path).registry.control()
    assert control is not None
    assert (control.mode, control.epoch) == ("exact", 2)
    assert [(one.epoch, one.first, one.until) for one in control.log] == [(1, 0, 2), (2, 10, None)]
    assert [after for _, after in control.log[1].sources] == [4]
    assert "nothing was changed" in command("rollback", "--to", "1")
    # What it abandoned is no version to go back to any more.
    with pytest.raises(UnfitVersion, match="a rollback abandoned"):
        command("rollback", "--to", "2")


@pytest.mark.parametrize(
    ("topic", "before", "says"), [("clicks_topic", 5, "read again"), ("microbatches_topic", 3, "training log begins")]
)
def test_it_is_refused_where_the_clicks_or_the_log_are_gone(
    command: Command, kafka: Kafka, tmp_path: Path, topic: str, before: int, says: str
) -> None:
    with Topics(kafka) as topics:
        topics.delete_before(getattr(kafka, topic), {0: before})
    with pytest.raises(UnfitVersion, match=says):
        command("rollback", "--to", "1")
    assert len(Operator(tmp_path).registry.controls()) == 1


def test_it_is_refused_where_the_clicks_are_another_topic(command: Command, kafka: Kafka) -> None:
    with Topics(kafka) as topics:
        topics.delete(kafka.clicks_topic)
        topics.ensure(kafka.clicks_topic, 1)
    with pytest.raises(LogError, match="which was recreated"):
        command("rollback", "--to", "1")
