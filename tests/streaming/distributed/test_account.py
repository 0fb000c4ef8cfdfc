"""What travels in a distributed job, and its account: what buckets count adds up, and one process shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from apache_beam.options.pipeline_options import PortableOptions, StandardOptions

from deploy.watch.scrape import Scrape, scrape, urls
from state.config.settings import Settings
from state.errors import SettingsError
from state.events.dead_letters import DeadLetter, Reason
from state.events.identity import load_salt
from state.events.parser import EventBatch
from state.log import Topics
from state.positions import Range, Source
from state.process.ports import free_port
from streaming.distributed.account import Account, BundleReport, Publisher
from streaming.distributed.job import FLINK, PRISM, beam_options
from streaming.distributed.portions import Portion, decode, divide, encode
from streaming.distributed.worker import JobPlan, JobWorker
from streaming.event_clock import BatchClock, Moves, OffClock, moves_of
from streaming.pipeline import take_runner
from tests.conftest import KafkaFactory
from tests.streaming.pieces import ZERO, piece
from tests.streaming.streams import settings_for, until


def told(events: EventBatch, clock_ms: list[int] | None = None) -> BatchClock:
    """What time it was, made up."""
    clocks = tuple((one, one + 5) for one in range(len(events.ranges)))
    after = np.arange(len(events), dtype=np.int64) if clock_ms is None else np.array(clock_ms, np.int64)
    moves = moves_of(events.ranges, np.full(len(clocks), -3), events, after)
    return BatchClock(after, moves, clocks, {"clock:all": b"x"}, (OffClock("ahead", 0, 3, 70),))


def test_a_bucket_that_lags_holds_back_what_was_reached_and_one_that_is_missing_too() -> None:
    account = Account()
    first, second = (ZERO._replace(bucket=bucket, buckets=2) for bucket in (0, 1))
    account.take([Range(first, 0, 9, rows=9)])
    assert account.reached(ZERO.topic_id) == {}
    account.take([Range(second, 0, 4, elsewhere=4)])
    assert (account.reached(ZERO.topic_id), account.faults()) == ({0: 4}, ())
    account.take([Range(second, 5, 9, elsewhere=4)])
    assert account.faults()[0] == "1 ranges did not begin where their bucket was"


def test_an_offset_that_two_buckets_count_is_a_fault() -> None:
    account = Account()
    account.take(Range(ZERO._replace(bucket=bucket, buckets=2), 0, 1, rows=1) for bucket in (0, 1))
    (fault,) = account.faults()
    assert "1 offsets, and its buckets have 2 of their own" in fault


def test_a_portion_arrives_as_it_was_sent() -> None:
    batch = piece((ZERO, 5, 3), dead=1).batch
    letter = DeadLetter(ZERO, 8, Reason.TOO_LARGE)
    batch = replace(batch, dead=(letter,), names={7: "x"})
    ((mine, clock),) = divide(batch, told(batch), 1)
    sent = Portion(mine, clock, 9, 2, 77)
    came = decode(encode(sent), Portion)
    assert came.batch.dead == (letter,)
    assert (came.control, came.log_epoch, came.appended_ms, came.batch.names) == (9, 2, 77, {7: "x"})
    assert (came.batch.ranges, came.clock.believed, came.clock.off) == (mine.ranges, clock.believed, clock.off)
    for name in Moves._fields:
        np.testing.assert_array_equal(getattr(came.clock.moves, name), getattr(sent.clock.moves, name))
    for name in ("user", "offset", "label", "context", "request"):
        np.testing.assert_array_equal(getattr(came.batch, name), getattr(batch, name))
        # Numba compiles once more for arrays that cannot be written.
        assert getattr(came.batch, name).flags.writeable


def test_flink_and_prism_are_told_what_a_job_needs_there_and_what_is_given_wins() -> None:
    runner, words = take_runner(["--runner", "flink", "--parallelism=2", "--environment_type=DOCKER"])
    options = beam_options(runner, words, Settings())
    said = options.get_all_options(drop_default=True)
    assert (runner, said["runner"], said["streaming"]) == (FLINK, "PortableRunner", True)
    assert said["environment_type"] == "DOCKER"
    assert "--parallelism=2" in words and options.view_as(StandardOptions).streaming
    assert options.view_as(PortableOptions).job_endpoint == "127.0.0.1:8099"
    prism = beam_options(PRISM, [], Settings())
    assert prism.view_as(StandardOptions).runner == "PrismRunner"
    with pytest.raises(SettingsError, match="unknown argument --parallelism"):
        take_runner(["--parallelism", "2"])


def shown(settings: Settings) -> Scrape:
    """What is on the stream's port."""
    return scrape({"stream": urls(settings)["stream"]})["stream"]


def positions(settings: Settings) -> float | None:
    """How many positions are shown there."""
    return shown(settings).value("springtide_accounting_positions", outcome="positions")


def take(showing: Publisher, source: Source, after: int) -> None:
    """Shows the account of a job that has read so far."""
    account = Account()
    account.take([Range(source, 0, after, rows=after)])
    showing.take(account, BundleReport.of([], 0, 0.0, []))


def test_where_the_account_moves_to_another_process_that_one_shows_it(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        source = Source(topics.ensure(kafka.clicks_topic, 1).topic_id, 0)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", metrics_port=free_port())
    plan = JobPlan("shown", settings, load_salt(settings.salt_path).fingerprint)
    workers = JobWorker(plan), JobWorker(plan)
    first, second = (Publisher(one) for one in workers)
    try:
        take(first, source, 5)
        until(lambda: positions(settings) == 5, "the first process shows the account")
        take(second, source, 9)
        until(lambda: positions(settings) == 9, "the second one does")
        # It comes back.
        take(first, source, 12)
        until(lambda: positions(settings) == 12, "the first one does again")
    finally:
        for one in (first, second, *workers):
            one.close()
    assert shown(settings).problem
