"""Whoever has a job's account shows it: once it is another process, that one has the port, and the one before shows nothing."""

from __future__ import annotations

from pathlib import Path

from deploy.kafka.configuration import free_port
from deploy.watch.scrape import Scrape, scrape, urls
from state.config.settings import Settings
from state.events.identity import load_salt
from state.log import Topics
from state.positions import Range, Source
from streaming.distributed.account import Account, BundleReport, Publisher
from streaming.distributed.worker import JobPlan, JobWorker
from tests.conftest import KafkaFactory
from tests.streaming.streams import settings_for, until


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
