"""A local Flink cluster as its user has it, and the stream on it: its rows are those of the local form, whatever happens to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.flink.command import end_jobs
from state.config.settings import Settings
from state.flink import JobManager, url
from state.log import Topics
from state.process.network import listens
from tests.conftest import KafkaFactory
from tests.e2e.flink.cluster import LocalFlink
from tests.e2e.running import until
from tests.streaming.distributed.shop import rows_of
from tests.streaming.distributed.test_job import ends_of, of_local_form, turn, values_in
from tests.streaming.streams import FOREVER, click, send, settings_for

CLICKS = 300


@pytest.fixture(scope="module")
def flink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFlink]:
    """A cluster that is up; the last test takes it down."""
    cluster = LocalFlink(tmp_path_factory.mktemp("flink"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def more_clicks(settings: Settings, first: int) -> int:
    """Sends clicks, each user's to one partition; returns how many there are then."""
    send(settings.kafka, [click(first + one) for one in range(CLICKS)], first, lambda number: number % 17 % 2)
    return first + CLICKS


def committed_all(settings: Settings) -> bool:
    """Whether the group says that all was committed."""
    with Topics(settings.kafka) as topics:
        return topics.committed(settings.kafka.group, settings.kafka.clicks_topic) == ends_of(settings)


@contextmanager
def handed_in(
    flink: LocalFlink, settings: Settings, log: Path, words: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The stream's job on the cluster; the process that follows it ends with the block at the latest, and the job does not."""
    process = flink.submit(settings, log, words)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def test_a_cluster_that_is_up_says_so_and_is_not_started_twice(flink: LocalFlink) -> None:
    state = flink.status()
    assert state["wrong"] == []
    assert state["listening"] == {"job server": True, "workers": True}
    assert (state["job_manager"]["task_managers"], state["job_manager"]["free_slots"]) == (1, 2)
    again = flink.springtide("up")
    assert again.returncode == 1
    assert "is in use by process" in again.stderr


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """A stream of two partitions that may run on the cluster."""
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", buckets=4)
    settings.registry_dir.mkdir(parents=True)
    return settings


@pytest.mark.nightly
def test_on_flink_the_rows_are_those_of_the_local_form(flink: LocalFlink, shop: Settings, tmp_path: Path) -> None:
    sent = more_clicks(shop, 0)
    log = tmp_path / "job.log"
    with handed_in(flink, shop, log) as following:
        values = values_in(shop, sent)
        (job,) = flink.status()["job_manager"]["jobs"]
        assert (job["state"], job["running"]) == ("RUNNING", job["tasks"])
        until(lambda: committed_all(shop), "the group knows what all buckets have")
        assert rows_of(values) == rows_of(of_local_form(shop, tmp_path, sent))
        end_jobs(JobManager(url(flink.settings)), lambda line: None)
        # Who handed it in learns how it ended.
        assert following.wait(60) == 0, log.read_text()


@pytest.mark.nightly
def test_kills_of_each_process_savepoints_and_an_exact_rollback_leave_the_rows_of_the_local_form(
    flink: LocalFlink, shop: Settings, tmp_path: Path
) -> None:
    with Topics(shop.kafka) as topics:
        topic_id = topics.describe(shop.kafka.clicks_topic).topic_id
    reached = more_clicks(shop, 0)
    first, second, third = (tmp_path / f"{name}.log" for name in ("first", "second", "third"))
    with handed_in(flink, shop, first):
        values_in(shop, reached)
        # Buckets go back to the last checkpoint, and rows come again.
        for victim in ("worker", "workers", "task-manager"):
            reached = more_clicks(shop, reached)
            os.kill(flink.pids(victim)[0], signal.SIGKILL)
            values_in(shop, reached)
        until(lambda: committed_all(shop), "the group knows what all buckets have")
        os.kill(flink.pids("job-manager")[0], signal.SIGKILL)
        checkpoint = until(lambda: forgotten(flink), "the JobManager is not back without the job")
    reached = more_clicks(shop, reached)
    with handed_in(flink, shop, second, [f"--savepoint_path={checkpoint}"]):
        values_in(shop, reached)
        until(lambda: committed_all(shop), "the group knows what all buckets have")
        said: list[str] = []
        end_jobs(JobManager(url(flink.settings)), said.append)
        (path,) = re.findall(r"--savepoint_path (\S+)", "\n".join(said))
        until(lambda: f"--savepoint_path={path}" in second.read_text(), "the job does not report its savepoint")
    reached = more_clicks(shop, reached)
    with handed_in(flink, shop, third, [f"--savepoint_path={path}", "--parallelism=2"]) as following:
        values = values_in(shop, reached)
        assert rows_of(values) == rows_of(of_local_form(shop, tmp_path, reached))
        # An exact rollback to before what the job has read: no restart mends that.
        turn(shop, {0: 6, 1: 6}, topic_id)
        assert following.wait(60) == 1, third.read_text()
        assert "RewoundLog: the training log branched into epoch 2" in third.read_text()
        until(lambda: not JobManager(url(flink.settings)).running(), "the job is cancelled")


def forgotten(flink: LocalFlink) -> str | None:
    """The newest checkpoint, once a JobManager that was killed is back and knows no job any more."""
    state = flink.status()
    manager = state["job_manager"]
    is_back = manager is not None and manager["task_managers"] and not manager["jobs"]
    return state["resumable"].get("checkpoint") if is_back else None


def test_down_ends_all_of_it_and_status_says_so(flink: LocalFlink) -> None:
    assert flink.process is not None
    done = flink.springtide("down")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "Flink is down"
    assert flink.process.wait(60) == 0, flink.said()
    settings = flink.settings.flink
    assert not any(map(listens, (settings.rest_port, settings.job_port, settings.worker_port)))
    state = flink.status()
    assert state["job_manager"] is None
    assert "no JobManager answers" in state["wrong"][0]
