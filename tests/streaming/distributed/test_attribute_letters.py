"""Attributes with a distributed job: each row has those of the local form, and a refused record is told once, whoever reads it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from state.config.settings import Settings
from state.events.parser import Parser
from state.microbatch.codec import decode
from streaming.distributed.bucket import BucketStore
from streaming.distributed.job import plan_of
from streaming.distributed.worker import JobWorker, close_workers
from streaming.profile import Profiler
from tests.conftest import KafkaFactory
from tests.streaming.distributed.shop import rows_of
from tests.streaming.distributed.test_forgetting import job
from tests.streaming.distributed.test_job import ends_of, of_local_form, values_in
from tests.streaming.streams import click, headers_of, send, settings_for, until
from tests.streaming.test_attributes import attribute_topics, tell


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """200 clicks of users and items of whom some have attributes; a record of each side says nothing."""
    kafka = kafka_settings()
    wanted = attribute_topics(kafka)
    crm, goods = wanted.user_topic, wanted.item_topic
    tell(kafka, crm, ("user-1", {"age": "18-24"}), ("user-1", b"no json"), ("user-1", {"age": "25-34", "level": 2}))
    tell(kafka, crm, ("user-2", {"age": "65+"}), ("user-3", {"age": "65+"}), ("user-3", None))
    tell(kafka, goods, ("item-3", {"brand": "acme"}), ("item-4", b"[]"))
    send(kafka, [click(number) for number in range(200)], partition=lambda number: number % 17 % 2)
    small = {"buckets": 4, "cut_rows": 10, "cut_ms": 50, "sources": 2}
    return replace(settings_for(kafka, tmp_path / "state", tmp_path / "salt", **small), attributes=wanted)


def dead_letters_in(settings: Settings) -> list[tuple[str, str]]:
    """Reason and offset of the dead letters."""
    found = headers_of(settings.kafka, settings.kafka.dead_letters_topic)
    return sorted((one["reason"], one["offset"]) for one in found)


REFUSED = [("undecodable", "1"), ("wrong_type", "1")]


@pytest.mark.nightly
def test_rows_have_the_attributes_of_the_local_form_and_a_job_that_begins_anew_tells_no_letter_again(
    shop: Settings, tmp_path: Path
) -> None:
    for _ in range(2):
        # The second one begins without a savepoint: it reads the clicks and the attributes again.
        with job(plan_of(shop, until=ends_of(shop))):
            pass
        close_workers()
        assert dead_letters_in(shop) == REFUSED
    values = values_in(shop, 200)
    assert rows_of(values) == rows_of(of_local_form(shop, tmp_path, 200))
    batches = [decode(value) for value in values]
    assert {batch.header.attributes for batch in batches} == {(("age", "level"), ("brand",))}
    ages = {one for batch in batches for one in batch.user_attributes[:, 0].tolist()}
    assert len(ages) == 3, "25-34, 65+, and unknown"
    assert "25-34" in {name for batch in batches for name in batch.header.names.values()}


def join_nothing(worker: JobWorker) -> None:
    """What the first portion of a bucket does: the topics are read to their ends."""
    profiler = Profiler(BucketStore(worker.spec.history), worker.spec, cache_users=1)
    worker.join(profiler.update(Parser(worker.settings.events, worker.salt).parse([])))


def has_refused(worker: JobWorker, records: int) -> bool:
    return bool(worker.metrics.attribute_records.labels("user", "dead")._value.get() == records)


def test_of_several_processes_the_one_that_reads_the_first_source_tells_and_who_follows_it_tells_on(
    shop: Settings,
) -> None:
    plan, crm = plan_of(shop), shop.attributes.user_topic
    first, second = JobWorker(plan), JobWorker(plan)
    join_nothing(second)
    assert dead_letters_in(shop) == []
    first.report_dead_letters()
    join_nothing(first)
    assert dead_letters_in(shop) == REFUSED
    tell(shop.kafka, crm, ("user-5", b"no json"), ("user-5", {"level": 1}))
    for worker in (first, second):
        until(partial(has_refused, worker, 2), "both have read it")
    assert dead_letters_in(shop) == sorted([*REFUSED, ("undecodable", "6")])
    first.close()
    # What comes while nobody tells is read again by the next one.
    tell(shop.kafka, crm, ("user-6", b"no json"), ("user-6", {"level": 1}))
    until(lambda: has_refused(second, 3), "the second one has read it")
    second.report_dead_letters()
    join_nothing(second)
    assert dead_letters_in(shop) == sorted([*REFUSED, ("undecodable", "6"), ("undecodable", "8")])
    second.close()
