"""What a source finds where it goes on: deleted clicks, a log that was cut back, new partitions, another topic of the same name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from state.accounts import StreamAccount
from state.config.sections import Kafka, LabelSettings
from state.errors import GapError, UnknownTopic
from state.log import Topics
from state.log.accepted_gaps import Consent, parse_allowance
from state.microbatch.codec import decode
from streaming.context import NO_CONSENT
from streaming.distributed.account import Account
from streaming.distributed.bucket import stored
from streaming.distributed.job import plan_of
from streaming.distributed.steps import SourceReading
from streaming.distributed.worker import JobPlan, worker_of
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.streaming.distributed.engine import Engine
from tests.streaming.distributed.shop import rows_of
from tests.streaming.distributed.test_forgetting import job
from tests.streaming.distributed.test_job import values_in
from tests.streaming.streams import BEGIN_MS, FOREVER, click, send, settings_for, until

BUCKETS = 4
SMALL = {"buckets": BUCKETS, "cut_rows": 10, "cut_ms": 50}


class Shop:
    """A job of one source over a log in memory; a view may wait for a purchase."""

    def __init__(self, folder: Path) -> None:
        plain = settings_for(Kafka(), folder / "state", folder / "salt", **SMALL)
        self.settings = replace(plain, labels=LabelSettings(impressions=("view",), outcomes=("purchase",), wait_s=60.0))
        self.log, self.clicks_topic = MemoryLog(), Kafka().clicks_topic
        self.topics = self.log.topics()
        self.topics.ensure(self.clicks_topic, 2)

    def click(self, first: int, after: int) -> None:
        """Writes clicks, each user's to one partition."""
        with self.log.writer() as writer:
            for number in range(first, after):
                at_ms = BEGIN_MS + number * 1000
                writer.send(self.clicks_topic, number % 17 % 2, None, click(number), (), at_ms)

    def plan(self, consent: Consent = NO_CONSENT) -> JobPlan:
        """A plan whose worker is there."""
        plan = plan_of(self.settings, consent, log=self.log)
        worker_of(plan, self.log)
        return plan

    @property
    def values(self) -> list[bytes]:
        """The training log."""
        return [one.value or b"" for one in self.log.records(Kafka().microbatches_topic)]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def account_of(engine: Engine) -> Account:
    account = stored(engine.now.account, Account)
    assert account.faults() == ()
    return account


def reading_of(engine: Engine) -> SourceReading:
    return stored(engine.now.readings[0], SourceReading)


def read_to(engine: Engine, positions: int) -> None:
    """Reads until the account has so many positions, and keeps that."""
    for _ in range(positions + 1):
        engine.read(0)
        engine.checkpoint()
        if account_of(engine).totals["positions"] >= positions:
            return
    raise AssertionError(f"not {positions} positions, but {account_of(engine).totals}")


def allowing(error: GapError) -> Consent:
    """What an operator types whom the error told so."""
    assert "to go on without them: springtide stream --runner RUNNER --savepoint_path=PATH --accept-gap" in str(error)
    allowances = tuple(parse_allowance(one.place) for one in error.gaps)
    assert all(f"--accept-gap {one.place}" in str(error) for one in error.gaps)
    return Consent(allowances, "ann", "retention")


def gaps_in(values: Sequence[bytes]) -> Counter[int]:
    """Positions in gaps by partition, in all micro-batches. A large batch may split a gap into two."""
    gaps = Counter[int]()
    for part in (part for value in values for part in decode(value).header.ranges):
        gaps[part.source.partition] += part.gap
    return gaps


def test_clicks_that_were_deleted_unread_stop_a_job_until_somebody_accepts_it_and_are_counted(shop: Shop) -> None:
    shop.click(0, 100)
    engine = Engine(shop.plan())
    read_to(engine, 100)
    ends = dict(reading_of(engine).next)
    shop.click(100, 300)
    shop.topics.delete_before(shop.clicks_topic, {0: ends[0] + 30, 1: ends[1] + 7})
    engine.crash(shop.plan())
    with pytest.raises(GapError, match=f"partition 0, positions {ends[0]} to {ends[0] + 29} ") as found:
        engine.read(0)
    engine.crash(shop.plan(allowing(found.value)))
    read_to(engine, 300)
    assert account_of(engine).totals["gap"] == 37
    assert sum(reading_of(engine).next.values()) == 300
    assert gaps_in(shop.values) == {0: 30, 1: 7}, "readers of the training log know it"
    (one, two) = reading_of(engine).accepted
    assert (one.actor, one.reason, one.gap.positions + two.gap.positions) == ("ann", "retention", 37)
    # What was passed once needs no words again.
    engine.crash(shop.plan())
    shop.click(300, 310)
    read_to(engine, 310)
    engine.close()


def test_a_topic_whose_beginning_is_gone_is_read_from_where_it_begins(shop: Shop) -> None:
    shop.click(0, 100)
    shop.topics.delete_before(shop.clicks_topic, {0: 9})
    engine = Engine(shop.plan())
    read_to(engine, 91)
    assert "gap" not in account_of(engine).totals
    engine.close()


def test_partitions_that_a_topic_gets_meanwhile_are_read_from_their_beginning(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    shop = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt", **SMALL, sources=2)
    with Topics(shop.kafka) as topics:
        topics.ensure(shop.kafka.clicks_topic, 2, FOREVER)
        send(shop.kafka, [click(number) for number in range(100)], partition=lambda number: number % 17 % 2)
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


def test_a_topic_that_is_made_again_is_another_one_and_is_read_from_its_beginning(shop: Shop) -> None:
    shop.click(0, 100)
    engine = Engine(shop.plan())
    read_to(engine, 100)
    before = account_of(engine)
    assert before.waiting
    former = shop.topics.describe(shop.clicks_topic).topic_id
    shop.topics.delete(shop.clicks_topic)
    now = shop.topics.ensure(shop.clicks_topic, 2).topic_id
    # More than before: whoever took one for the other would find clicks at its positions.
    shop.click(100, 400)
    with pytest.raises(UnknownTopic, match=f"id {former} is now {now}"):
        engine.read(0)
    # As an engine does by itself.
    engine.crash(shop.plan())
    read_to(engine, 400)
    account = account_of(engine)
    assert account.reached(now) == dict(reading_of(engine).next)
    assert sum(account.reached(now).values()) == 300
    dropped = account.totals["dropped"] - before.totals.get("dropped", 0)
    assert dropped == before.waiting, "no outcome of theirs can come"
    of_former = [StreamAccount.of(one) for source, one in account.counts.items() if source.topic_id == former]
    assert [one.waiting for one in of_former] == [0] * len(of_former)
    engine.close()


def test_clicks_that_were_cut_back_and_grew_again_are_never_read_at_offsets_that_are_used_twice(shop: Shop) -> None:
    shop.click(0, 24)
    ends = {one: end for one, (_, end) in shop.topics.ends(shop.clicks_topic).items()}
    engine = Engine(shop.plan())
    read_to(engine, 24)
    shop.log.cut_back(shop.clicks_topic, {0: ends[0] - 5})
    shop.click(24, 60)
    grown = shop.topics.ends(shop.clicks_topic)[0][1]
    engine.crash(shop.plan())
    lost = (
        rf"the stored position is {ends[0]}, but the log that was read ends at {ends[0] - 5}.* grown again to {grown}"
    )
    with pytest.raises(GapError, match=lost) as found:
        engine.read(0)
    assert "never read: send them again" in str(found.value)
    engine.crash(shop.plan(allowing(found.value)))
    read_to(engine, sum(end for _, end in shop.topics.ends(shop.clicks_topic).values()))
    seen = {offset for _, partition, offset, *_ in rows_of(shop.values) if partition == 0}
    assert seen == set(range(grown))
    (one,) = reading_of(engine).accepted
    assert (one.gap.first, one.gap.next, one.actor) == (ends[0] - 5, ends[0], "ann")
    # Of the clicks behind it the leader is known: nobody needs to accept it again.
    engine.crash(shop.plan())
    engine.read(0)
    engine.close()
