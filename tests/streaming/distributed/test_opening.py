"""What a source finds where it goes on: deleted clicks, a log that was cut back, new partitions, another topic of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from state.accounts import StreamAccount
from state.config.sections import Kafka, LabelSettings
from state.config.settings import Settings
from state.errors import GapError, UnknownTopic
from state.log import Topics, Writer
from state.log.accepted_gaps import Consent, parse_allowance
from state.microbatch.codec import decode
from streaming.distributed.handing_in import Account, plan_of
from streaming.distributed.steps import SourceReading
from streaming.distributed.worker import JobPlan, worker_of
from tests.conftest import KafkaFactory
from tests.segments import cut_back
from tests.streaming.distributed.engine import Engine
from tests.streaming.distributed.shop import rows_of
from tests.streaming.distributed.test_forgetting import job
from tests.streaming.distributed.test_job import values_in
from tests.streaming.streams import BEGIN_MS, FOREVER, click, following, send, settings_for, until

BUCKETS = 4
SMALL = {"buckets": BUCKETS, "bundle_events": 50, "bundle_ms": 50}


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """A job of one source; a view may wait for a purchase."""
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", **SMALL)
    return replace(settings, labels=LabelSettings(impressions=("view",), outcomes=("purchase",), wait_s=60.0))


def clicks(settings: Settings, first: int, after: int, partitions: int = 2) -> None:
    """Sends clicks, each user's to one partition."""
    values = [click(number) for number in range(first, after)]
    send(settings.kafka, values, first, partition=lambda number: number % 17 % partitions)


def opened(plan: JobPlan) -> JobPlan:
    """The plan, whose worker is there."""
    worker_of(plan)
    return plan


def account_of(engine: Engine) -> Account:
    account = Account.from_bytes(engine.now.account)
    assert account.faults() == ()
    return account


def reading_of(engine: Engine) -> SourceReading:
    return SourceReading.from_bytes(engine.now.readings[0].value)


def read_to(engine: Engine, positions: int) -> None:
    """Reads until the account has so many positions, and keeps that."""

    def passed() -> bool:
        engine.read(0)
        engine.checkpoint()
        return account_of(engine).totals["positions"] >= positions

    until(passed, f"{positions} positions")


def allowing(error: GapError) -> Consent:
    """What an operator types whom the error told so."""
    assert "to go on without them: springtide stream --runner RUNNER --savepoint_path=PATH --accept-gap" in str(error)
    allowances = tuple(parse_allowance(one.place) for one in error.gaps)
    assert all(f"--accept-gap {one.place}" in str(error) for one in error.gaps)
    return Consent(allowances, "ann", "retention")


def gaps_in(values: Sequence[bytes]) -> set[tuple[int, int]]:
    """Partition and length of each gap that micro-batches tell of."""
    ranges = [part for value in values for part in decode(value).header.ranges]
    return {(part.source.partition, part.gap) for part in ranges if part.gap}


def test_clicks_that_were_deleted_unread_stop_a_job_until_somebody_accepts_it_and_are_counted(shop: Settings) -> None:
    clicks(shop, 0, 100)
    engine = Engine(opened(plan_of(shop)))
    read_to(engine, 100)
    ends = dict(reading_of(engine).next)
    clicks(shop, 100, 300)
    with Topics(shop.kafka) as topics:
        topics.delete_before(shop.kafka.clicks_topic, {0: ends[0] + 30, 1: ends[1] + 7})
    engine.crash(opened(plan_of(shop)))
    with pytest.raises(GapError, match=f"partition 0, positions {ends[0]} to {ends[0] + 29} ") as found:
        engine.read(0)
    engine.crash(opened(plan_of(shop, allowing(found.value))))
    read_to(engine, 300)
    account = account_of(engine)
    assert account.totals["gap"] == 37
    assert sum(reading_of(engine).next.values()) == 300
    with following(shop.kafka, shop.kafka.microbatches_topic) as log:
        until(lambda: gaps_in(log.poll()) == {(0, 30), (1, 7)}, "readers of the training log know it")
    (one, two) = reading_of(engine).accepted
    assert (one.actor, one.reason, one.gap.positions + two.gap.positions) == ("ann", "retention", 37)
    # What was passed once needs no words again.
    engine.crash(opened(plan_of(shop)))
    clicks(shop, 300, 310)
    read_to(engine, 310)
    engine.close()


def test_a_topic_whose_beginning_is_gone_is_read_from_where_it_begins(shop: Settings) -> None:
    clicks(shop, 0, 100)
    with Topics(shop.kafka) as topics:
        topics.delete_before(shop.kafka.clicks_topic, {0: 9})
    engine = Engine(opened(plan_of(shop)))
    read_to(engine, 91)
    assert "gap" not in account_of(engine).totals
    engine.close()


def test_partitions_that_a_topic_gets_meanwhile_are_read_from_their_beginning(shop: Settings) -> None:
    shop = replace(shop, labels=LabelSettings(), stream=replace(shop.stream, sources=2))
    clicks(shop, 0, 100)
    with Topics(shop.kafka) as topics:
        ends = {one: end for one, (_, end) in topics.ends(shop.kafka.clicks_topic).items()}
        # Who reads partition 0 goes on until its last click has come.
        plan = plan_of(shop, until={0: ends[0] + 1, 1: ends[1] + 1, 2: 30, 3: 30})
        with job(plan):
            values_in(shop, 100)
            topics.grow(shop.kafka.clicks_topic, 4)
            until(lambda: topics.describe(shop.kafka.clicks_topic).partitions == 4, "the new partitions")
            send(shop.kafka, [click(number) for number in range(100, 160)], 100, lambda number: 2 + number % 2)
            values_in(shop, 160)
            send(shop.kafka, [click(number) for number in (160, 161)], 160, lambda number: number % 2)
    rows = rows_of(values_in(shop, 162))
    assert sorted(offset for _, partition, offset, _, _ in rows if partition == 2) == list(range(30))
    assert {partition for _, partition, *_ in rows} == {0, 1, 2, 3}


def test_a_topic_that_is_made_again_is_another_one_and_is_read_from_its_beginning(shop: Settings) -> None:
    clicks(shop, 0, 100)
    engine = Engine(opened(plan_of(shop)))
    read_to(engine, 100)
    before = account_of(engine)
    assert before.waiting
    name = shop.kafka.clicks_topic
    with Topics(shop.kafka) as topics:
        former = topics.describe(name).topic_id
        topics.delete(name)
        now = topics.ensure(name, 2, FOREVER).topic_id
    # More than before: whoever took one for the other would find clicks at its positions.
    clicks(shop, 100, 400)

    def refused() -> bool:
        engine.read(0)
        return False

    with pytest.raises(UnknownTopic, match=f"id {former} is now {now}"):
        until(refused, "an error")
    # As an engine does by itself.
    engine.crash(opened(plan_of(shop)))
    read_to(engine, 400)
    account = account_of(engine)
    assert account.reached(now) == dict(reading_of(engine).next)
    assert sum(account.reached(now).values()) == 300
    assert account.totals["dropped"] - before.totals.get("dropped", 0) == before.waiting, (
        "no outcome of theirs can come"
    )
    of_former = [StreamAccount.of(one) for source, one in account.counts.items() if source.topic_id == former]
    assert [one.waiting for one in of_former] == [0] * len(of_former)
    engine.close()


def one_by_one(kafka: Kafka, first: int, after: int) -> None:
    """Sends clicks, one batch each, so that they can be cut between them."""
    with Writer(kafka) as writer:
        for number in range(first, after):
            writer.send(kafka.clicks_topic, 0, None, click(number), (), BEGIN_MS + number * 1000)
            writer.flush()


def cut_back_behind(own: Broker, tmp_path: Path) -> tuple[Settings, Engine]:
    """A job that has read twelve clicks, of which the log has seven by now."""
    kafka = Kafka(bootstrap_servers=own.bootstrap_servers)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", **SMALL)
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 1, FOREVER)
    one_by_one(kafka, 0, 12)
    engine = Engine(opened(plan_of(settings)))
    read_to(engine, 12)
    own.kill()
    cut_back(own.directory / "data", kafka.clicks_topic, 0, 7)
    own.start()
    return settings, engine


@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_clicks_that_were_cut_back_and_grew_again_are_never_read_at_offsets_that_are_used_twice(
    own: Broker, tmp_path: Path
) -> None:
    settings, engine = cut_back_behind(own, tmp_path)
    one_by_one(settings.kafka, 12, 24)
    engine.crash(opened(plan_of(settings)))
    with pytest.raises(GapError, match=r"we were at 12, but what we read ends at 7.* grown again to 19") as found:
        engine.read(0)
    assert "never read: send them again" in str(found.value)
    engine.crash(opened(plan_of(settings, allowing(found.value))))
    read_to(engine, 19)
    rows = rows_of(values_in(settings, 19))
    assert sorted(offset for _, _, offset, _, _ in rows) == list(range(19))
    (lost,) = reading_of(engine).accepted
    assert (lost.gap.first, lost.gap.next, lost.actor) == (7, 12, "ann")
    # Of the clicks behind it the leader is known: nobody needs to accept it again.
    engine.crash(opened(plan_of(settings)))
    engine.read(0)
    engine.close()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_a_log_that_ends_before_where_a_job_was_is_filled_up_where_somebody_accepts_it(
    own: Broker, tmp_path: Path
) -> None:
    settings, engine = cut_back_behind(own, tmp_path)
    engine.crash(opened(plan_of(settings, Consent((), "ann", "the power went", cut_back=True))))
    engine.read(0)
    one_by_one(settings.kafka, 12, 13)
    read_to(engine, 13)
    assert sorted(offset for _, _, offset, _, _ in rows_of(values_in(settings, 13))) == list(range(13))
    engine.close()
