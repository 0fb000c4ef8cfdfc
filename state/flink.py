"""A client of a JobManager's REST interface, of the local or any other cluster: jobs, checkpoints, savepoints."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from state.config.settings import Settings
from state.errors import FlinkFailed
from state.process import network

TIMEOUT_S = 10.0
ENDED = ("FINISHED", "CANCELED", "FAILED")


@dataclass(frozen=True)
class Checkpoint:
    """A completed checkpoint; `number` counts from 1 within the job, and `path` is what a job can be resumed from."""

    number: int
    at_ms: int
    took_ms: int
    state_bytes: int
    path: str


@dataclass(frozen=True)
class Job:
    """A job that the JobManager knows."""

    id: str
    name: str
    state: str
    since_ms: int
    running: int
    tasks: int
    restarts: int | None = None
    checkpoint: Checkpoint | None = None
    failed_checkpoints: int = 0

    @property
    def ended(self) -> bool:
        """Whether the job is in a final state."""
        return self.state in ENDED


@dataclass(frozen=True)
class Overview:
    """The state of a JobManager at one moment, with its jobs, newest first."""

    version: str
    task_managers: int
    slots: int
    free_slots: int
    jobs: tuple[Job, ...] = ()


def url(settings: Settings) -> str:
    """The URL of the local cluster's JobManager."""
    return f"http://127.0.0.1:{settings.flink.rest_port}"


class JobManager:
    """A client of one JobManager at `http://HOST:PORT`.

    Every method except `answers` raises `FlinkFailed` if the JobManager does not answer, or refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def answers(self) -> bool:
        """Whether it responds."""
        return network.ask(f"{self.url}/overview", 1.0)[0] == 200

    def overview(self) -> Overview:
        """The cluster and all its jobs; takes two further requests per job."""
        cluster = self._ask("/overview")
        jobs = sorted(self._ask("/jobs/overview")["jobs"], key=lambda job: -int(job["start-time"]))
        return Overview(
            cluster["flink-version"],
            cluster["taskmanagers"],
            cluster["slots-total"],
            cluster["slots-available"],
            tuple(self._job(job) for job in jobs),
        )

    def running(self) -> list[str]:
        """The ids of the jobs that have not ended."""
        return [job["jid"] for job in self._ask("/jobs/overview")["jobs"] if job["state"] not in ENDED]

    def state(self, job: str) -> str:
        """A job's state."""
        return str(self._ask(f"/jobs/{job}")["state"])

    def named(self, name: str) -> str | None:
        """The id of the newest job with a name; None if there is none."""
        jobs = [job for job in self._ask("/jobs/overview")["jobs"] if job["name"] == name]
        return str(max(jobs, key=lambda job: int(job["start-time"]))["jid"]) if jobs else None

    def failure(self, job: str) -> str:
        """The stack trace of a job's last task failure; empty if there was none."""
        failures = self._ask(f"/jobs/{job}/exceptions")["exceptionHistory"]["entries"]
        return str(failures[0]["stacktrace"]) if failures else ""

    def last_savepoint(self, job: str) -> str:
        """The path of a job's newest savepoint if no checkpoint followed, as for a job stopped with it; else empty."""
        latest = self._ask(f"/jobs/{job}/checkpoints")["latest"]
        savepoint, checkpoint = latest["savepoint"], latest["completed"]
        if savepoint is None or (checkpoint is not None and checkpoint["id"] > savepoint["id"]):
            return ""
        return str(savepoint["external_path"])

    def begin_savepoint(self, job: str) -> str:
        """Requests a savepoint after which the job is cancelled; returns the request's id."""
        # Not `stop`, which asks the sources to end: sources of portable jobs cannot do that.
        return str(self._ask(f"/jobs/{job}/savepoints", {"cancel-job": True})["request-id"])

    def savepoint(self, job: str, request: str) -> str:
        """The location of a requested savepoint; empty while it is in progress. FlinkFailed if it could not be made."""
        answer = self._ask(f"/jobs/{job}/savepoints/{request}")
        if answer["status"]["id"] != "COMPLETED":
            return ""
        operation = answer["operation"]
        if "location" not in operation:
            raise FlinkFailed(
                f"job {job} has no savepoint: {_first(operation.get('failure-cause', {}).get('stack-trace', ''))}",
                "it can be resumed from its newest checkpoint, which `springtide flink status` names",
            )
        return str(operation["location"])

    def cancel(self, job: str) -> None:
        """Asks a job to end, without a further savepoint; it can be resumed from its newest checkpoint."""
        self._ask(f"/jobs/{job}?mode=cancel", method="PATCH")

    def _job(self, job: Mapping[str, Any]) -> Job:
        checkpoints = self._ask(f"/jobs/{job['jid']}/checkpoints")
        latest, tasks = checkpoints["latest"]["completed"], job["tasks"]
        checkpoint = latest and Checkpoint(
            latest["id"],
            latest["trigger_timestamp"],
            latest["end_to_end_duration"],
            latest["state_size"],
            latest["external_path"],
        )
        metrics = self._ask(f"/jobs/{job['jid']}/metrics?get=numRestarts")
        return Job(
            job["jid"],
            job["name"],
            job["state"],
            int(job["start-time"]),
            tasks["running"],
            tasks["total"],
            # A job that has ended has no metrics.
            next((int(float(metric["value"])) for metric in metrics), None),
            checkpoint,
            checkpoints["counts"]["failed"],
        )

    def _ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"}, method=method)
        status, answer = network.ask(request, TIMEOUT_S)
        if status == 0:
            raise FlinkFailed(
                f"no JobManager answers at {self.url} ({answer})",
                "start one with `springtide flink up`, or correct flink.rest_port",
            )
        if status >= 300:
            raise FlinkFailed(
                f"the JobManager at {self.url} refuses {path} with {status}: {_first(answer)}",
                "see its log for the cause",
            )
        return json.loads(answer or "{}")


def _first(text: str, most: int = 300) -> str:
    r"""The first line of a Java message, without its stack trace."""
    lines = text.replace("\\n", "\n").strip().splitlines()
    return lines[0][:most] if lines else "it gives no reason"
