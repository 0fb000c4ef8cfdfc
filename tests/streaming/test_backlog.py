"""A backlog in four partitions of a real Kafka comes in the order in which it happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from state.log import Topics
from state.microbatch.codec import decode
from state.positions import Source
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
    click,
    following,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

CLICKS = 6000
BATCH = 100
RATES = (8, 5, 2, 1)  # of the partitions


@pytest.mark.nightly
def test_four_partitions_with_a_backlog_come_out_in_order(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    """A click a second over all; each partition lies in one fetch, and would come whole before the next one."""
    settings = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt", batch_events=BATCH)
    kafka, chance = settings.kafka, np.random.default_rng(7)
    of_click = np.repeat(np.arange(4), RATES)[chance.integers(0, sum(RATES), CLICKS)].tolist()
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 4, FOREVER)
        values = [click(number, user=f"user-{of_click[number]}-{number % 17}") for number in range(CLICKS)]
        send(kafka, values, partition=of_click.__getitem__)
        with running(settings, tmp_path / "log") as stream:
            until(lambda: sum(next_offsets(log.poll()).values()) == CLICKS, "all clicks in the log")
            assert stream.stop() == 0, stream.lines
        batches = [decode(value) for value in log.poll()]
    offsets: dict[Source, list[int]] = {}
    for batch in batches:
        for source, offset in zip(batch.source.tolist(), batch.offset.tolist(), strict=True):
            offsets.setdefault(batch.header.ranges[source].source, []).append(offset)
    assert {source.partition: found for source, found in offsets.items()} == {
        number: list(range(of_click.count(number))) for number in range(4)
    }, "in order within a partition, none lost and none twice"
    at_s = (np.concatenate([batch.at_ms for batch in batches]) - BEGIN_MS) // 1000
    # How long before a row others that happened later have come.
    late_s = np.maximum.accumulate(at_s) - at_s
    assert np.percentile(late_s, 99) <= 4 * BATCH
    assert late_s.max() <= 60 + 4 * BATCH
