"""A distributed job forgets erased users in every bucket, those without new clicks included, and `erase --status` knows when."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from deploy.operate.erase import erase, holdings
from state.config.sections import Attributes
from state.config.settings import Settings
from state.events.identity import load_salt, user_id
from state.features.erased import MaskedUsers
from state.features.spec import FeatureSpec
from state.log import Topics
from state.positions import Source
from state.process.environment import wall_ms
from state.registry.control import erase as erasing
from state.registry.control import start
from state.registry.controls import Controls
from state.registry.hosts import erasure_reports
from state.registry.registry import Registry
from streaming.distributed.account import PART, Account
from streaming.distributed.bucket import Head, stored
from streaming.distributed.job import build_distributed, plan_of
from streaming.distributed.steps import SourceReading
from streaming.distributed.worker import JobPlan, close_workers, worker_of
from tests.conftest import KafkaFactory
from tests.deploy.operating import draft
from tests.streaming.distributed.engine import Engine
from tests.streaming.distributed.shop import BASE_MS, TOPIC, Click, rows_of, settings_of, written
from tests.streaming.distributed.test_job import ends_of, of_local_form, values_in
from tests.streaming.streams import FOREVER, click, send, settings_for, until

BUCKETS, PARTITIONS = 4, 2
ERASED = 3


class Shop:
    """A job in memory that has read clicks of twelve users in two partitions; impressions of each wait."""

    def __init__(self, folder: Path) -> None:
        settings = settings_of(folder, BUCKETS, sources=2, cut_rows=200, masks=True)
        self.settings = replace(settings, attributes=Attributes())
        salt = load_salt(self.settings.salt_path)
        self.user = user_id(salt, f"user-{ERASED}")
        self.settings.registry_dir.mkdir(parents=True)
        self.controls = Controls(self.settings.registry_dir)
        self.controls.propose(start(actor="trainer", reason="first start", now_ms=0))
        self.log = written([Click(one % 12, one % 2, one % 6, 1) for one in range(48)], PARTITIONS, self.settings)
        plan = JobPlan("erasing", self.settings, salt.fingerprint)
        worker_of(plan, self.log)
        self.engine = Engine(plan)

    def click(self, user: int) -> None:
        with self.log.writer() as writer:
            writer.send(
                self.settings.kafka.clicks_topic, user % PARTITIONS, None, Click(user, 0, 1, 2).value, (), BASE_MS + 2
            )

    def erase(self) -> None:
        """Erases the user, up to where the clicks end now."""
        control, ends = self.controls.control(), self.log.topics().ends(self.settings.kafka.clicks_topic)
        assert control is not None
        until = [(Source(TOPIC, one).topic, one, end) for one, (_, end) in ends.items()]
        self.controls.propose(
            erasing(control, MaskedUsers.of([self.user]), until, actor="ann", reason="asked", now_ms=9)
        )

    def read(self, source: int) -> None:
        self.collect(source)
        self.engine.checkpoint()

    def collect(self, source: int) -> None:
        """Reads a source to the end of its partition. On a busy machine a moment may pass without a click."""
        end = self.log.topics().ends(self.settings.kafka.clicks_topic)[source][1]
        for _ in range(100):
            self.engine.read(source)
            if stored(self.engine.now.readings[source], SourceReading).next.get(source) == end:
                return
        raise AssertionError(f"source {source} does not come to {end}")

    @property
    def kept(self) -> int:
        """In how many values of the buckets' state the user's pseudonym stands."""
        name, found = self.user.to_bytes(8, "little"), 0
        for state in self.engine.now.buckets.values():
            values = [state.head.value or b"", *state.snapshot.values, *state.deltas.values]
            found += sum(name in value for value in values)
        return found

    @property
    def account(self) -> Account:
        account = stored(self.engine.now.account, Account)
        assert account.faults() == ()
        return account


def test_a_bucket_without_new_clicks_forgets_and_an_engine_that_goes_back_lets_it_forget_again(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.read(0)
    shop.read(1)
    assert shop.kept
    before = shop.account
    shop.erase()
    shop.collect(0)
    for bucket in range(BUCKETS):
        shop.engine.deliver(bucket)
    shop.engine.finish(0)
    assert (shop.kept, shop.account.forgotten(BUCKETS)) == (0, 1)
    # Before a checkpoint: state and account are as they were.
    shop.engine.crash()
    assert shop.kept and shop.account.forgotten(BUCKETS) == 0
    shop.read(0)
    assert (shop.kept, shop.account.forgotten(BUCKETS)) == (0, 1)
    dropped = shop.account.totals["dropped"] - before.totals.get("dropped", 0)
    assert dropped == before.waiting - shop.account.waiting > 0
    shop.read(1)
    told = shop.engine.now.account
    shop.read(0)
    shop.read(1)
    assert shop.engine.now.account == told, "buckets are told once"


def test_what_a_source_brings_that_had_not_heard_of_it_is_forgotten_too(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.read(0)
    shop.read(1)
    # The user's partition is read by the second source, before the erasure; what it read comes late.
    shop.click(ERASED)
    shop.collect(1)
    shop.erase()
    shop.collect(0)
    for waiting in shop.engine._on_the_way.values():
        waiting.rotate(-1)
    shop.engine.checkpoint()
    assert shop.kept and shop.account.forgotten(BUCKETS) == 0
    shop.read(1)
    assert (shop.kept, shop.account.forgotten(BUCKETS)) == (0, 1)
    assert {stored(one.head, Head).erased for one in shop.engine.now.buckets.values()} == {1}


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """600 clicks of 17 users in two partitions of a real topic, each user in one."""
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, PARTITIONS, FOREVER)
    settings = settings_for(
        kafka, tmp_path / "state", tmp_path / "salt", buckets=BUCKETS, cut_rows=10, cut_ms=50, sources=2
    )
    send_clicks(settings, 0, 600)
    return replace(settings, paths=replace(settings.paths, registry=str(tmp_path / "registry")))


def send_clicks(settings: Settings, first: int, after: int) -> None:
    clicks = [click(number) for number in range(first, after)]
    send(settings.kafka, clicks, first, partition=lambda number: number % 17 % PARTITIONS)


@contextmanager
def job(plan: JobPlan) -> Iterator[None]:
    """The job on Beam's own runner; it has ended when the block has."""
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(["--streaming"]))
    build_distributed(pipeline, plan)
    thread = threading.Thread(target=lambda: pipeline.run().wait_until_finish(), daemon=True)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()


def held(settings: Settings) -> list[str]:
    """What `erase --status` says that still holds something."""
    registry = Registry(settings.registry_dir)
    control = registry.control()
    assert control is not None
    return [one.where for one in holdings(settings, registry, control, wall_ms())]


@pytest.mark.nightly
def test_on_a_real_log_status_names_the_job_until_it_has_forgotten_and_the_user_is_a_new_one(
    shop: Settings, tmp_path: Path
) -> None:
    more = 17 * PARTITIONS
    ends = ends_of(shop)
    later = {one: sum(number % 17 % PARTITIONS == one for number in range(600, 600 + more)) for one in ends}
    plan = plan_of(shop, until={one: end + later[one] for one, end in ends.items()})
    salt = load_salt(shop.salt_path)
    first = replace(draft(1, None), salt=salt.fingerprint, spec=FeatureSpec.from_settings(shop).digest, sources=())
    shop.registry_dir.mkdir()
    Controls(shop.registry_dir).propose(start(actor="trainer", reason="first start", now_ms=0))
    Registry(shop.registry_dir).publish(first, {})
    asked = argparse.Namespace(status=False, user=f"user-{ERASED}", users=None, reason="asked", output="text")
    with job(plan):
        before = rows_of(values_in(shop, 600))
        until(
            lambda: [one.part for one in erasure_reports(shop.registry_dir)] == [PART], "the job says that it is there"
        )
        (told,) = erasure_reports(shop.registry_dir)
        assert told.through == 0
        erase(shop, asked, wall_ms(), lambda line: None)
        # No click comes: all buckets are told all the same.
        until(lambda: not any(PART in one for one in held(shop)), "the job has forgotten")
        (told,) = erasure_reports(shop.registry_dir)
        assert (told.through, told.pages) == (1, 1)
        send_clicks(shop, 600, 600 + more)
    close_workers()
    rows = rows_of(values_in(shop, 600 + more))
    assert before.items() <= rows.items()
    # Where a stream reads them all after the erasure, the user's clicks of before are left out.
    theirs = len([number for number in range(600) if number % 17 == ERASED])
    expected = rows_of(of_local_form(shop, tmp_path, 600 + more - theirs))
    assert expected.items() <= rows.items()
    assert len(rows) - len(expected) == theirs
