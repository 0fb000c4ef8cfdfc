"""What the real processes report: few series, all declared; consumer lag that Kafka's clients see; log lines without user ids."""

from __future__ import annotations

import re
import urllib.request

import pytest
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from deploy.watch import scrape
from state import metrics
from tests.e2e.running import Loop, until

MOST_SERIES = 300
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S")
USER = "ada-who-is-in-no-log"
VERSIONED = {"applier": "springtide_serving_weight_age_seconds", "worker": "springtide_request_seconds"}


def url(loop: Loop, part: str) -> str:
    return scrape.targets(loop.settings)[part]


@pytest.mark.parametrize("part", ["stream", "trainer", "applier", "worker", "up", "validation", "segments", "console"])
def test_a_process_has_few_series_and_all_of_them_are_declared(loop: Loop, part: str) -> None:
    status, text = scrape.fetch(url(loop, part), timeout_s=30.0)
    assert status == 200
    series = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(series) <= MOST_SERIES, f"{len(series)} series of {part}"
    names = {line.partition("{")[0].partition(" ")[0] for line in series}
    assert names <= metrics.names()
    assert names >= {"process_cpu_seconds_total", "process_start_time_seconds", "springtide_build_info"}


@pytest.mark.parametrize("part", VERSIONED)
def test_exemplars_name_a_version(loop: Loop, part: str) -> None:
    assert loop.profile("shopper-1") is not None

    def exemplars() -> list[Exemplar]:
        asked = urllib.request.Request(url(loop, part), headers=OPENMETRICS)
        with urllib.request.urlopen(asked, timeout=30.0) as answer:
            families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
        return [one.exemplar for one in families[VERSIONED[part]].samples if one.exemplar]

    named = until(exemplars, "no version is named")
    assert all(int(one.labels["version"]) > 0 for one in named)


def test_the_group_that_kafka_knows_follows_both_topics(loop: Loop) -> None:
    """Any client sees it; how far exactly is told where nothing moves, in the tests of stream and trainer."""
    kafka = loop.settings.kafka
    consumer = KafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group, enable_auto_commit=False)

    def seen(topic: str) -> dict[int, int]:
        places = [TopicPartition(topic, one) for one in consumer.partitions_for_topic(topic) or ()]
        return {one.partition: consumer.committed(one) or 0 for one in places}

    before = {topic: sum(seen(topic).values()) for topic in (kafka.clicks_topic, kafka.microbatches_topic)}
    for topic, then in before.items():
        until(
            lambda topic=topic, then=then: sum(seen(topic).values()) > then, f"the group stays where it is in {topic}"
        )
    consumer.close()


@pytest.mark.parametrize("part", ["stream", "trainer", "applier", "worker", "console"])
def test_a_line_says_when_who_and_how_bad(loop: Loop, part: str) -> None:
    lines = (loop.settings.logs_dir / f"{part}.log").read_text().splitlines()
    assert [line for line in lines if not LOG_LINE.match(line)] == []


def test_no_log_names_a_user_as_it_was_sent(loop: Loop) -> None:
    """Neither one who clicks and is answered, nor one in a click that is refused, nor one in a question that is."""
    loop.answer_trained_on(
        USER, loop.click([(USER, "kettle", "kitchen", "view"), (USER, "kettle", "kitchen", "stare")])
    )
    assert loop.get(f"/v1/profiles/{USER}?at=never")[0] == 400
    said = {
        path.name: path.read_text() for path in loop.settings.logs_dir.glob("*.log*") if "shoppers" not in path.name
    }
    assert said
    assert [name for name, text in said.items() if USER in text or re.search(r"shopper-\d", text)] == []
