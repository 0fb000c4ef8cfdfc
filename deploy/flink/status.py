"""Report of `springtide flink status`: problems, the cluster's processes and jobs, and what can be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.flink.cluster import CHECKPOINTS, SAVEPOINTS
from deploy.kafka.configuration import listens
from deploy.watch.messages import seconds
from deploy.watch.panel import lines
from state.config.settings import Settings
from state.errors import FlinkFailed
from state.flink import Job, JobManager, Overview

COLUMNS = (16, 12)
# A job starts a checkpoint about every second; one without a completed checkpoint for so long makes no progress.
STALE_S = 60.0
SHOWN_ENDED = 5


def read(settings: Settings, url: str, now_ms: int, local: bool = True) -> dict[str, Any]:
    """Returns the state of a cluster as JSON values, even if only parts of it run.

    `local` says whether the processes other than the JobManager are on this machine too.
    """
    state: dict[str, Any] = {"url": url}
    running: set[str] = set()
    try:
        overview = JobManager(url).overview()
        running = {job.id for job in overview.jobs if not job.ended}
        state |= {"wrong": problems(overview, now_ms), "job_manager": asdict(overview)}
    except FlinkFailed as failure:
        state |= {"wrong": [str(failure)], "job_manager": None}
    if not local:
        return state | {"listening": {}, "resumable": {}}
    flink = settings.flink
    listening = {"job server": listens(flink.job_port), "workers": listens(flink.worker_port)}
    return state | {"listening": listening, "resumable": resumable(settings.flink_dir, running)}


def problems(overview: Overview, now_ms: int) -> list[str]:
    """Returns descriptions of what is wrong with TaskManagers and jobs."""
    found = [] if overview.task_managers else ["no TaskManager has reported: no job can run"]
    jobs = (_problem(job, overview.free_slots, now_ms) for job in overview.jobs if not job.ended)
    return found + [problem for problem in jobs if problem]


def _problem(job: Job, free_slots: int, now_ms: int) -> str:
    if job.state != "RUNNING":
        return f"{job.name} is {job.state}"
    if job.running < job.tasks:
        waits = "" if free_slots else ": it waits for a slot, and none is free"
        return f"{job.name}: {job.running} of {job.tasks} tasks run{waits}"
    newest_ms = job.checkpoint.at_ms + job.checkpoint.took_ms if job.checkpoint else job.since_ms
    if now_ms - newest_ms > STALE_S * 1000:
        return f"{job.name}: no checkpoint for {seconds((now_ms - newest_ms) / 1000)}, {job.failed_checkpoints} failed"
    return ""


def resumable(directory: Path, running: set[str]) -> dict[str, str]:
    """Returns the newest savepoint, and the newest checkpoint of a job that does not run, if they exist."""
    checkpoints = (directory / CHECKPOINTS).glob("*/chk-*/_metadata")
    found = {
        "savepoint": list((directory / SAVEPOINTS).glob("*/_metadata")),
        "checkpoint": [path for path in checkpoints if path.parts[-3] not in running],
    }
    newest = {kind: max(paths, key=lambda path: path.stat().st_mtime) for kind, paths in found.items() if paths}
    return {kind: path.parent.absolute().as_uri() for kind, path in newest.items()}


def is_wrong(state: Mapping[str, Any]) -> bool:
    """Returns whether the state reports any problem."""
    return bool(state["wrong"]) or not all(state["listening"].values())


def as_text(state: Mapping[str, Any], now_ms: int) -> str:
    """Formats the state for a terminal."""
    rows: list[Sequence[str]] = [("state", "WRONG", problem) for problem in state["wrong"]]
    found, jobs = state["job_manager"], []
    if found is None:
        rows.append(("job manager", "away", state["url"]))
    else:
        rows.append(("job manager", "runs", f"{state['url']}, Flink {found['version']}"))
        slots = f"{found['free_slots']} of {found['slots']} slots free"
        rows.append(("task managers", str(found["task_managers"]), slots))
        jobs = found["jobs"]
    rows += [(name, "listens" if there else "away", "") for name, there in state["listening"].items()]
    ended = [job for job in jobs if Job(**job).ended]
    for job in jobs:
        if job not in ended[SHOWN_ENDED:]:
            age = seconds((now_ms - job["since_ms"]) / 1000)
            rows.append(("job", job["state"].lower(), f"{job['name']}, id {job['id']}, begun {age} ago"))
            rows += [] if job in ended else [("", "", detail) for detail in _details(job, now_ms)]
    rows += [("resume from", kind, path) for kind, path in state["resumable"].items()]
    return "\n".join(line.rstrip() for line in lines(rows, COLUMNS))


def _details(job: Mapping[str, Any], now_ms: int) -> tuple[str, str]:
    restarts = "unknown" if job["restarts"] is None else job["restarts"]
    tasks = f"{job['running']} of {job['tasks']} tasks run, restarts {restarts}"
    newest = job["checkpoint"]
    if newest is None:
        return tasks, f"no checkpoint yet, {job['failed_checkpoints']} failed"
    at, size = seconds((now_ms - newest["at_ms"]) / 1000), newest["state_bytes"] / 1e6
    return tasks, f"checkpoint {newest['number']}, {at} ago: {size:.1f} MB in {newest['took_ms']} ms"
