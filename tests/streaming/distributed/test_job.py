"""The distributed job: its rows are those of the local form, its graph is what engines need, and its account adds up."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from deploy.watch import accounts
from deploy.watch.scrape import Scrape, scrape, urls
from state.config.settings import Settings
from state.errors import RewoundLog, SettingsError
from state.events.decoding import DeadLetter, Reason
from state.events.identity import load_salt
from state.events.parser import EventBatch
from state.features.mask import Mask
from state.log import Topics
from state.microbatch.codec import decode
from state.positions import Range, Source
from state.process.network import free_port
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from state.registry.log_line import turned
from streaming.distributed.account import Account, BundleReport, Publisher
from streaming.distributed.bucket import Portion, divide, encode
from streaming.distributed.bucket import decode as decode_portion
from streaming.distributed.job import FLINK, PRISM, beam_options, build_distributed, plan_of
from streaming.distributed.steps import Partitions, SourceReading
from streaming.distributed.worker import JobPlan, JobWorker, close_workers, worker_of
from streaming.event_clock import BatchClock, Moves, OffClock, moves_of
from streaming.pipeline import take_runner
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.streaming.distributed.shop import Click, rows_of, settings_of, written
from tests.streaming.pieces import ZERO, piece
from tests.streaming.streams import BEGIN_MS, FOREVER, click, following, running, send, settings_for, until

BAD = [b"{not json", click(1, user=None), click(2, time=2 * BEGIN_MS)]


def ends_of(settings: Settings) -> dict[int, int]:
    """Where the clicks end."""
    with Topics(settings.kafka) as topics:
        return {partition: end for partition, (_, end) in topics.ends(settings.kafka.clicks_topic).items()}


def committed(settings: Settings) -> Mapping[int, int]:
    """What the group says."""
    with Topics(settings.kafka) as topics:
        return topics.committed(settings.kafka.group, settings.kafka.clicks_topic)


def values_in(settings: Settings, rows: int) -> list[bytes]:
    """The training log, once it has so many rows."""
    with following(settings.kafka, settings.kafka.microbatches_topic) as log:
        until(lambda: len(rows_of(log.poll())) >= rows, f"{rows} rows in the log")
        return list(log.poll())


def of_local_form(settings: Settings, folder: Path, rows: int) -> list[bytes]:
    """What the local form writes of the same clicks, to a topic of its own."""
    topics: dict[str, Any] = {
        f"{name}_topic": f"{getattr(settings.kafka, f'{name}_topic')}-local"
        for name in ("microbatches", "dead_letters")
    }
    kafka = replace(settings.kafka, group="local", **topics)
    paths = replace(settings.paths, state=str(folder / "local"))
    local = replace(settings, kafka=kafka, paths=paths)
    with running(local, folder / "log"):
        return values_in(local, rows)


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """Clicks of 17 users in two partitions, some of them broken."""
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    clicks = [*(click(number) for number in range(600)), *BAD]
    # Each user in one partition.
    send(kafka, clicks, partition=lambda number: number % 17 % 2)
    small = {"buckets": 4, "cut_rows": 10, "cut_ms": 50, "sources": 2, "metrics_port": free_port()}
    return settings_for(kafka, tmp_path / "state", tmp_path / "salt", **small)


def test_on_beams_own_runner_the_rows_are_those_of_the_local_form(shop: Settings, tmp_path: Path) -> None:
    plan = plan_of(shop, until=ends_of(shop))
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(["--streaming"]))
    build_distributed(pipeline, plan)
    pipeline.run().wait_until_finish()

    def refused() -> float | None:
        (shown,) = scrape({"stream": urls(shop)["stream"]}).values()
        return shown.value("springtide_stream_clocks_off_total", direction="refused")

    def is_shown() -> bool:
        # Figures are shown one after the other.
        found = accounts.account(shop)
        counted = [found.get("stream", {}).get(name) for name in ("positions", "rows", "dead")]
        stands = (found["balanced"], found["compared"], accounts.AS_SHOWN in found["notes"])
        return counted == [600 + len(BAD), 600, len(BAD)] and stands == (True, False, True)

    until(is_shown, "the account is shown")
    until(lambda: refused() == 1, "the click whose clock is off is shown")
    close_workers()
    values = values_in(shop, 600)
    assert rows_of(values) == rows_of(of_local_form(shop, tmp_path, 600))
    sources = {part.source for value in values for part in decode(value).header.ranges}
    assert {(one.bucket, one.buckets) for one in sources} == {(bucket, 4) for bucket in range(4)}
    until(lambda: committed(shop) == ends_of(shop), "the group knows what all buckets have")
    with following(shop.kafka, shop.kafka.dead_letters_topic) as letters:
        until(lambda: len(letters.poll()) == len(BAD), "dead letters")


@pytest.mark.skipif(
    shutil.which("prism") is None,
    reason="no `prism` in PATH: go install github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0",
)
def test_on_prism_the_rows_are_those_of_the_local_form(shop: Settings, tmp_path: Path) -> None:
    # First: a process cannot be forked where gRPC has its threads.
    expected = rows_of(of_local_form(shop, tmp_path, 600))
    pipeline = beam.Pipeline(options=beam_options(PRISM, [], shop))
    build_distributed(pipeline, plan_of(shop))
    result = pipeline.run()
    try:
        assert rows_of(values_in(shop, 600)) == expected
        until(lambda: committed(shop) == ends_of(shop), "the group knows what all buckets have")
    finally:
        result.cancel()


def payloads(proto: Any) -> dict[str, beam_runner_api_pb2.ParDoPayload]:
    """By step label the ParDos of a pipeline."""
    found = {}
    for one in proto.components.transforms.values():
        if one.spec.urn == common_urns.primitives.PAR_DO.urn:
            found[one.unique_name] = beam_runner_api_pb2.ParDoPayload.FromString(one.spec.payload)
    return found


def test_the_graph_reads_and_keeps_its_state_by_key_on_dataflow_too(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, buckets=4)
    log = written([Click(0, 0, 0, 0)], 1, settings)
    plan = plan_of(settings, log=log)
    words = ["--project=shop", "--region=europe-west4", "--temp_location=gs://shop/tmp", "--sdk_location=container"]
    options = beam_options("DataflowRunner", words, settings)
    assert options.view_as(GoogleCloudOptions).project == "shop"
    # Of that runner itself Beam would ask Google for the bucket.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=options)
    build_distributed(pipeline, plan)
    proto = pipeline.to_runner_api()
    found = payloads(proto)
    assert set(found["Read partitions"].state_specs) == {"reading"}
    assert len(found["Read partitions"].timer_family_specs) == 1
    assert set(found["Update buckets"].state_specs) == {"head", "snapshot", "deltas"}
    assert set(found["Keep account"].state_specs) == {"account"}
    assert common_urns.requirements.REQUIRES_STATEFUL_PROCESSING.urn in proto.requirements


def test_a_job_carries_no_secret_and_is_refused_where_users_cannot_be_divided(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, buckets=3)
    log = written([], 1, settings)
    with pytest.raises(SettingsError, match=r"stream\.buckets 3 is no divisor of 64"):
        plan_of(settings, log=log)


def turn(settings: Settings, at: Mapping[int, int], topic_id: str) -> None:
    """Takes control through an exact rollback to a version that had read the clicks up to `at`."""
    controls = Controls(settings.registry_dir)
    first = controls.propose(start(actor="trainer", reason="first start", now_ms=0))
    sources = [(Source(topic_id, partition), offset) for partition, offset in at.items()]
    line = turned(first.log, 1, 1, 9, sources)
    mask = Mask(times=((0, 9),))
    controls.propose(roll_back(first, 1, mask, actor="ann", reason="poison", now_ms=1, log=line))


def reading(settings: Settings, number: int, log: MemoryLog, begin: SourceReading) -> Partitions:
    plan = JobPlan(f"turned-{number}", settings, load_salt(settings.salt_path).fingerprint)
    return Partitions(worker_of(plan, log), 0, begin)


def test_where_the_line_turned_off_a_job_that_is_ahead_stops_and_an_older_savepoint_goes_on(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, buckets=2, cut_rows=1, masks=True)
    load_salt(settings.salt_path)
    settings.registry_dir.mkdir()
    log = written([Click(0, 0, one, one) for one in range(12)], 1, settings)
    partitions = reading(settings, 1, log, SourceReading())
    _, early = partitions.read(60.0)
    _, late = partitions.read(60.0)
    assert early is not None and late is not None
    assert (early.next, late.next, late.log_epoch) == ({0: 5}, {0: 10}, 1)
    turn(settings, {0: 6}, late.topic_id)
    with pytest.raises(RewoundLog, match="into epoch 2 before what this job has read: partition 0 at 6"):
        partitions.read(60.0)
    partitions.close()
    again = reading(settings, 2, log, early)
    portions, after = again.read(60.0)
    assert after is not None and after.log_epoch == 2
    assert {one.log_epoch for one in portions} == {2}
    assert [part.first for one in portions for part in one.batch.ranges] == [5, 5]
    again.close()


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
    came = decode_portion(encode(sent), Portion)
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
