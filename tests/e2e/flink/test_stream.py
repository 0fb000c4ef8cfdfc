"""The stream on a real Flink cluster: its rows are those of the local form, also when a worker is killed and after a savepoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deploy.children.parent_death import die_with
from deploy.flink.cluster import url
from deploy.flink.ending import end_jobs
from deploy.flink.rest import JobManager
from state.config.settings import Settings
from state.log import Topics
from tests.conftest import KafkaFactory
from tests.e2e.flink.cluster import LocalFlink, clean_environment
from tests.e2e.running import ROOT
from tests.streaming.distributed.shop import rows_of
from tests.streaming.distributed.test_job import ends_of, of_local_form, values_in
from tests.streaming.streams import FOREVER, click, send, settings_for, until

CLICKS = 300


def more_clicks(settings: Settings, first: int) -> int:
    """Sends clicks, each user's to one partition; returns how many there are then."""
    send(settings.kafka, [click(first + one) for one in range(CLICKS)], first, lambda number: number % 17 % 2)
    return first + CLICKS


@contextmanager
def handed_in(
    settings: Settings, flink: LocalFlink, log: Path, more: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The stream's job on the cluster, as its command hands it in; the command ends with the block, and the job does not."""
    words = ["--runner", "flink", *more]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "streaming.pipeline", *words],
            cwd=ROOT,
            env=clean_environment() | replace(settings, flink=flink.settings.flink).environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid()),
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def test_on_flink_the_rows_are_those_of_the_local_form(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", buckets=4)
    reached = more_clicks(settings, 0)
    (tmp_path / "flink").mkdir()
    flink, log = LocalFlink(tmp_path / "flink"), tmp_path / "job.log"
    try:
        flink.start()
        with handed_in(settings, flink, log):
            values_in(settings, reached)
            # A worker dies: its buckets go back to the last checkpoint, and rows come again.
            reached = more_clicks(settings, reached)
            os.kill(flink.pids("worker")[0], signal.SIGKILL)
            values_in(settings, reached)
            until(lambda: committed_all(settings), "the group knows what all buckets have")
            said: list[str] = []
            end_jobs(JobManager(url(flink.settings)), said.append)
            path = next(line.split("--savepoint_path ")[1] for line in said if "--savepoint_path" in line)
        reached = more_clicks(settings, reached)
        with handed_in(settings, flink, log, [f"--savepoint_path={path}"]):
            values = values_in(settings, reached)
    finally:
        flink.close()
    assert rows_of(values) == rows_of(of_local_form(settings, tmp_path, reached))


def committed_all(settings: Settings) -> bool:
    """Whether the group says that all was committed."""
    with Topics(settings.kafka) as topics:
        return topics.committed(settings.kafka.group, settings.kafka.clicks_topic) == ends_of(settings)
