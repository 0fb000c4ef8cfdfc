"""Kills every part of a Flink cluster and rescales the stream on it, then proves that nothing was lost and nothing doubled.

    python -m tests.e2e.chaos --flink [--seed 7] [--rounds 2]

1. A real Kafka; a crowd that clicks, sometimes nonsense, and whose labels come
   seconds later or never; a cluster of two TaskManagers with a slot each, and
   the stream as a job of parallelism 1.
2. In each round kill -9, in an order of chance, of a Python worker, of the pool
   that starts them, of a TaskManager and of the JobManager, whose job is then
   resumed from its newest checkpoint. After each the job must catch up.
3. A savepoint, and the job goes on at parallelism 2; then again at 1.
4. The clicks end, with one more of each user, and are read to their end; the
   account balances. The job ends by a savepoint, and the cluster.
5. The local form reads the same clicks, undisturbed. What a trainer would learn
   and a serving host would keep must be equal, bit for bit. Each row carries
   all that the job remembers of its user, so that its state is compared too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry

from deploy.flink.cluster import end_jobs
from deploy.flink.command import read_state
from deploy.kafka.broker import Broker
from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.notes import CAUGHT_UP_EXTRA
from deploy.watch import scrape
from state import http
from state.config.sections import Kafka
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.flink import JobManager, url
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, Reader, Topics, topic_plan
from state.metrics import ApplierMetrics
from state.microbatch.codec import decode
from state.positions import Source
from state.process.wall_clock import wall_ms
from tests.e2e.crowd import Crowd
from tests.e2e.evidence import Histories, serving_histories
from tests.e2e.flink.cluster import LocalFlink
from tests.e2e.parts import Part, quiet_ports
from tests.e2e.running import until
from tests.e2e.undisturbed import finish_stream, stream_settings
from tests.streaming.distributed.shop import Place, rows_of

RATE = 200.0
REMEMBERED = 32  # events of a user; each row has all of them
OWN: Mapping[str, object] = {
    "flink.task_managers": 2,
    "flink.slots": 1,
    "kafka.clicks_partitions": 3,
    "stream.buckets": 8,
    "shoppers.users": 300,
    "shoppers.rate": RATE,
    "labels.impressions": "view",
    "labels.outcomes": "purchase",
    "labels.wait_s": 5,
    "features.history": REMEMBERED,
    "features.sequence": REMEMBERED,
}
VICTIMS = ("worker", "workers", "task-manager", "job-manager")
BACK_S = 180.0

Say = Callable[[str], None]


@dataclass
class FlinkFindings:
    """What a run found.

    Attributes:
        back_s: What happened -> seconds until all clicks of the second after it had their rows.
        clicks: How many there were.
        rows: Rows that a trainer would learn from, or that histories need.
        again: Rows that came again.
        lost: Rows that only the undisturbed log has.
        invented: Rows that it does not have.
        changed: Rows with other bytes.
        differs: What was compared beside -> both values, where they are not equal.
    """

    back_s: dict[str, list[float]] = field(default_factory=dict)
    clicks: int = 0
    rows: int = 0
    again: int = 0
    lost: int = 0
    invented: int = 0
    changed: int = 0
    differs: dict[str, str] = field(default_factory=dict)

    def compare_rows(self, ours: Mapping[Place, bytes], undisturbed: Mapping[Place, bytes]) -> None:
        """Compares what two logs have, each row once."""
        self.rows = len(ours)
        self.lost = len(undisturbed.keys() - ours.keys())
        self.invented = len(ours.keys() - undisturbed.keys())
        self.changed = sum(ours[place] != undisturbed[place] for place in ours.keys() & undisturbed.keys())

    def compare(self, what: str, ours: object, wanted: object) -> None:
        """Compares two values."""
        if ours != wanted:
            self.differs[what] = f"{ours!s:.200}, not {wanted!s:.200}"

    def problems(self) -> list[str]:
        """The promises that were broken."""
        rows = {"lost": self.lost, "invented": self.invented, "changed": self.changed}
        found = [f"{count} rows are {what}" for what, count in rows.items() if count]
        return found + [f"{what}: {values}" for what, values in self.differs.items()]

    def lines(self) -> list[str]:
        """The figures, then what is wrong."""
        back = (
            f"{what}: caught up after {', '.join(f'{s:.0f}' for s in took)} s" for what, took in self.back_s.items()
        )
        rows = f"{self.rows} rows of {self.clicks} clicks, {self.again} came again: "
        rows += f"{self.lost} lost, {self.invented} doubled or invented, {self.changed} changed"
        return [*back, rows, *(f"WRONG  {one}" for one in self.problems())]


class Reached:
    """How far the training log is, read bit by bit."""

    def __init__(self, kafka: Kafka, buckets: int) -> None:
        self._reader, self._buckets = Reader(kafka, kafka.microbatches_topic, [0]), buckets
        self._next: dict[Source, int] = {}

    def has(self, ends: Mapping[int, int]) -> bool:
        """Whether all buckets have all clicks before `ends`, by partition."""
        for batch in self._reader.poll(0.05):
            for value in batch.values:
                for part in decode(value or b"").header.ranges:
                    self._next[part.source] = max(part.next, self._next.get(part.source, 0))
        reached: dict[int, list[int]] = {one: [] for one in ends}
        for source, after in self._next.items():
            reached[source.partition].append(after)
        return all(len(reached[one]) == self._buckets and min(reached[one]) >= end for one, end in ends.items())

    def close(self) -> None:
        """Closes the reader."""
        self._reader.close()


def read_values(kafka: Kafka, topic: str) -> list[bytes]:
    """All records of a topic of one partition."""
    with Topics(kafka) as topics:
        end = topics.ends(topic)[0][1]
    values: list[bytes] = []
    with Reader(kafka, topic, [0]) as reader:
        while reader.position(0) < end:
            values += [value or b"" for batch in reader.poll(0.2) for value in batch.values]
    return values


def histories_of_log(settings: Settings) -> Histories:
    """What a serving host keeps of the training log, from its beginning to its end."""
    kafka, log, spec = settings.kafka, Log(settings.kafka), FeatureSpec.from_settings(settings)
    store = HistoryStore(settings.serving_dir / HISTORIES, settings.features.history)
    follower = HistoryFollower(
        store,
        spec,
        spec.reach_ms(settings.events),
        ApplierMetrics(CollectorRegistry()),
        wall_ms,
        actions=lambda digest: spec.actions if digest == spec.digest else None,
    )
    follower.connect(log, kafka.microbatches_topic)
    until(
        lambda: not follower.step(0.1) and store.extra(CAUGHT_UP_EXTRA) is not None, "the log has not been read whole"
    )
    follower.disconnect()
    store.close()
    return serving_histories(settings)


class FlinkChaos:
    """One run."""

    def __init__(self, directory: Path, seed: int, rounds: int, say: Say) -> None:
        self._chance, self._rounds, self._say = random.Random(seed), rounds, say
        kafka, metrics = quiet_ports(2, random.Random())
        ports = {"kafka.port": kafka, "stream.metrics_port": metrics}
        self._flink = LocalFlink(directory, {**OWN, **ports})
        self.settings = settings = self._flink.settings
        self._manager = JobManager(url(settings))
        self._broker = Broker(settings.kafka_dir, kafka, retention_h=settings.kafka.retention_h)
        self._crowd = Crowd(settings, seed, wall_ms())
        self._directory, self._log = directory, directory / "job.log"
        self._job: subprocess.Popen[bytes] | None = None
        self._topic_id, self._ends, self._waiting = "", dict[int, int](), 0.0
        self.findings = FlinkFindings()

    def run(self) -> FlinkFindings:
        """All five steps; whatever happens, nothing of it runs afterwards."""
        try:
            # 1.
            self._begin()
            # 2.
            for _ in range(self._rounds):
                for victim in self._chance.sample(VICTIMS, len(VICTIMS)):
                    self._kill(victim)
            # 3.
            for parallelism in (2, 1):
                self._rescale(parallelism)
            # 4.
            self._finish()
            self._flink.close()
            # 5.
            self._compare()
        finally:
            self._crowd.finish()
            self._flink.close()
            self._broker.stop()
        return self.findings

    def _begin(self) -> None:
        kafka = self.settings.kafka
        self._broker.start()
        with Topics(kafka) as topics:
            self._topic_id = topics.ensure(kafka.clicks_topic, kafka.clicks_partitions).topic_id
            topics.ensure(*topic_plan.microbatches(self.settings))
        self._flink.start()
        self._say("the cluster is up")
        self._crowd.start()
        self._submit(1)
        self._await_caught_up("the start", time.monotonic())

    def _submit(self, parallelism: int, *more: str) -> None:
        self._job = self._flink.submit(self.settings, self._log, [f"--parallelism={parallelism}", *more])

    def _kill(self, victim: str) -> None:
        until(self._settled, self._trouble, BACK_S)
        pids = self._flink.pids(victim)
        if victim == "task-manager":
            # Of the two the one that has the job.
            busy = f"taskmanager.resource-id={self._busy()}"
            pids = [pid for pid in pids if busy in psutil.Process(pid).cmdline()]
        assert pids, f"no {victim} runs"
        self._say(f"kill -9 of {victim}")
        os.kill(self._chance.choice(pids), signal.SIGKILL)
        begun_s = time.monotonic()
        if victim == "job-manager":
            self._resume_from_checkpoint()
        self._await_caught_up(f"kill -9 of {victim}", begun_s)

    def _busy(self) -> str:
        """The id of the TaskManager whose slot is taken."""
        listed = json.loads(http.ask(f"{self._manager.url}/taskmanagers", 10.0)[1])["taskmanagers"]
        (found,) = (str(one["id"]) for one in listed if not one["freeSlots"])
        return found

    def _resume_from_checkpoint(self) -> None:
        """A JobManager that died has forgotten its job: the operator hands it in again, at its newest checkpoint."""

        def is_back() -> str | None:
            state = self._state()
            found = state["job_manager"]
            whole = found is not None and found["task_managers"] == 2 and not found["jobs"]
            return state["resumable"].get("checkpoint") if whole else None

        path = until(is_back, self._trouble, BACK_S)
        self._end_client()
        self._submit(1, f"--savepoint_path={path}")

    def _rescale(self, parallelism: int) -> None:
        until(self._settled, self._trouble, BACK_S)
        self._say(f"a savepoint, and on at parallelism {parallelism}")
        begun_s, said = time.monotonic(), list[str]()
        end_jobs(self._manager, said.append)
        (path,) = re.findall(r"--savepoint_path (\S+)", "\n".join(said))
        assert self._job is not None
        self.findings.compare("the end of who followed the job", self._job.wait(60), 0)
        self._submit(parallelism, f"--savepoint_path={path}")
        self._await_caught_up(f"rescaling to {parallelism}", begun_s)

    def _finish(self) -> None:
        """Ends the clicks, waits until the job is done with them, and takes the cluster down."""
        settings, findings = self.settings, self.findings
        self._crowd.finish()
        findings.clicks = self._crowd.click_once_more()
        with Topics(settings.kafka) as topics:
            clicks = settings.kafka.clicks_topic
            self._ends = ends = {one: end for one, (_, end) in topics.ends(clicks).items()}
            until(lambda: topics.committed(settings.kafka.group, clicks) == ends, self._trouble, BACK_S)
        account = until(lambda: self._account(sum(ends.values())), self._trouble)
        findings.compare("faults of the account", account.value("springtide_accounting_stream_faults"), 0.0)
        self._waiting = account.value("springtide_accounting_labels", outcome="waiting") or 0.0
        self._say("all clicks are read; the end, by savepoint")
        done = self._flink.springtide("down")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self._trouble()}"
        findings.compare("a savepoint at the end", "--savepoint_path" in done.stdout, True)

    def _compare(self) -> None:
        self._say("the local form reads the same clicks")
        settings, findings = self.settings, self.findings
        own = stream_settings(settings, self._directory / "undisturbed")
        part = Part("stream", own, self._directory / "undisturbed.log")
        try:
            _, calm = finish_stream(own, part, self._topic_id, self._ends)
        finally:
            part.kill()
        values = read_values(settings.kafka, settings.kafka.microbatches_topic)
        ours = rows_of(values)
        findings.compare_rows(ours, rows_of(read_values(own.kafka, own.kafka.microbatches_topic)))
        findings.again = sum(len(decode(value)) for value in values) - len(ours)
        findings.compare("impressions that wait", self._waiting, float(len(calm.waiting)))
        kept = histories_of_log(settings)
        findings.compare("histories", (kept.digest, kept.users), (calm.digest, calm.users))

    def _account(self, positions: int) -> scrape.Scrape | None:
        """What the job says of its account, once it has all positions."""
        found = scrape.scrape({"job": f"http://127.0.0.1:{self.settings.stream.metrics_port}/metrics"})["job"]
        there = found.value("springtide_accounting_positions", outcome="positions")
        return found if there == positions else None

    def _state(self) -> dict[str, Any]:
        """What `springtide flink status` knows."""
        return read_state(self.settings, self._manager.url, wall_ms())

    def _settled(self) -> dict[str, Any] | None:
        """The job, once all of its tasks run and it has a checkpoint since it last began."""
        found = self._state()
        jobs = [job for job in (found["job_manager"] or {"jobs": ()})["jobs"] if job["state"] == "RUNNING"]
        whole = not found["wrong"] and jobs and jobs[0]["running"] == jobs[0]["tasks"] and jobs[0]["checkpoint"]
        return jobs[0] if whole else None

    def _await_caught_up(self, what: str, begun_s: float) -> None:
        """Waits until all clicks of a second from now on have their rows."""
        kafka = self.settings.kafka
        with Topics(kafka) as topics:
            share = round(RATE / kafka.clicks_partitions)
            wanted = {one: end + share for one, (_, end) in topics.ends(kafka.clicks_topic).items()}
        with contextlib.closing(Reached(kafka, self.settings.stream.buckets)) as reached:
            until(lambda: reached.has(wanted), self._trouble, BACK_S)
        took_s = time.monotonic() - begun_s
        self.findings.back_s.setdefault(what, []).append(took_s)
        self._say(f"{what}: caught up after {took_s:.1f} s")

    def _end_client(self) -> None:
        """The process that handed the job in ends with it, or with the JobManager that forgot it."""
        assert self._job is not None
        self._job.kill()
        self._job.wait()

    def _trouble(self) -> str:
        said = self._log.read_text()[-3000:] if self._log.exists() else ""
        return f"{said}\n{self._flink.said()}\n{self._flink.logs()}"
