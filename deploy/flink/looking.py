"""What `springtide flink status` shows: the cluster's parts, its jobs, and what could be resumed; what is wrong first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.flink.configuration import CHECKPOINTS, SAVEPOINTS
from deploy.flink.process_plan import ports
from deploy.kafka.configuration import listens
from deploy.watch.messages import seconds
from deploy.watch.panel import lines
from state.config.settings import Settings
from state.errors import FlinkFailed
from state.flink.rest import Job, JobManager, Overview

METADATA = "_metadata"
COLUMNS = (16, 12)
# A job begins a checkpoint each second or so; one that has none for so long gets none done.
STALE_S = 60.0
SHOWN_ENDED = 5
LISTENERS: Mapping[str, str] = {"flink.job_port": "job server", "flink.worker_port": "workers"}


def look(settings: Settings, url: str, now_ms: int, local: bool = True) -> dict[str, Any]:
    """The state of a cluster as JSON values, whatever of it runs.

    Args:
        settings: Of the local cluster.
        url: Of the JobManager.
        now_ms: Wall clock.
        local: Whether the rest of it is on this machine too.
    """
    overview, problem = None, ""
    try:
        overview = JobManager(url).overview()
    except FlinkFailed as failure:
        problem = str(failure)
    known = {one.id for one in overview.jobs if not one.ended} if overview else set()
    return {
        "wrong": [problem] if overview is None else troubles(overview, now_ms),
        "url": url,
        "job_manager": None if overview is None else asdict(overview),
        "listening": {
            LISTENERS[one.setting]: listens(one.port) for one in ports(settings.flink) if one.setting in LISTENERS
        }
        if local
        else {},
        "resumable": resumable(settings.flink_dir, known) if local else {},
    }


def troubles(overview: Overview, now_ms: int) -> list[str]:
    """What is not as it should be, the worst first.

    >>> troubles(Overview("1.19.0", 0, 0, 0), 0)
    ['no TaskManager has reported: no job can run']
    """
    found = [] if overview.task_managers else ["no TaskManager has reported: no job can run"]
    for job in overview.jobs:
        found += _troubles_of(job, overview.free_slots, now_ms)
    return found


def _troubles_of(job: Job, free_slots: int, now_ms: int) -> list[str]:
    if job.ended:
        return []
    if job.state != "RUNNING":
        return [f"{job.name} is {job.state}"]
    if job.running < job.tasks:
        waits = ": it waits for a slot, and none is free" if not free_slots else ""
        return [f"{job.name}: {job.running} of {job.tasks} tasks run{waits}"]
    newest_ms = job.checkpoint.at_ms + job.checkpoint.took_ms if job.checkpoint else job.since_ms
    if now_ms - newest_ms > STALE_S * 1000:
        return [
            f"{job.name}: no checkpoint for {seconds((now_ms - newest_ms) / 1000)}, {job.failed_checkpoints} failed"
        ]
    return []


def resumable(directory: Path, running: set[str]) -> dict[str, str]:
    """The newest savepoint, and the newest checkpoint of a job that does not run; what is not there is left out.

    Args:
        directory: Of the cluster.
        running: Jobs whose checkpoints are in use.
    """
    found = {
        "savepoint": (directory / SAVEPOINTS).glob(f"*/{METADATA}"),
        "checkpoint": (
            path for path in (directory / CHECKPOINTS).glob(f"*/chk-*/{METADATA}") if path.parts[-3] not in running
        ),
    }
    newest = {kind: max(paths, key=lambda path: path.stat().st_mtime, default=None) for kind, paths in found.items()}
    return {kind: path.parent.absolute().as_uri() for kind, path in newest.items() if path is not None}


def is_wrong(state: Mapping[str, Any]) -> bool:
    """Whether something is."""
    return bool(state["wrong"]) or not all(state["listening"].values())


def as_text(state: Mapping[str, Any], now_ms: int) -> str:
    """The state for people."""
    rows: list[Sequence[str]] = [("state", "WRONG", one) for one in state["wrong"]]
    found = state["job_manager"]
    if found is None:
        rows.append(("job manager", "away", state["url"]))
    else:
        rows.append(("job manager", "runs", f"{state['url']}, Flink {found['version']}"))
        slots = f"{found['free_slots']} of {found['slots']} slots free"
        rows.append(("task managers", str(found["task_managers"]), slots))
    rows += [(name, "listens" if there else "away", "") for name, there in state["listening"].items()]
    jobs = found["jobs"] if found else ()
    ended = [one for one in jobs if one["state"] in ("FINISHED", "CANCELED", "FAILED")]
    for job in jobs:
        if job not in ended[SHOWN_ENDED:]:
            rows += _job_rows(job, now_ms, job in ended)
    rows += [("resume from", kind, path) for kind, path in state["resumable"].items()]
    return "\n".join(line.rstrip() for line in lines(rows, COLUMNS))


def _job_rows(job: Mapping[str, Any], now_ms: int, ended: bool) -> list[Sequence[str]]:
    age = seconds((now_ms - job["since_ms"]) / 1000)
    rows: list[Sequence[str]] = [("job", job["state"].lower(), f"{job['name']}, id {job['id']}, begun {age} ago")]
    if ended:
        return rows
    restarts = "unknown" if job["restarts"] is None else job["restarts"]
    rows.append(("", "", f"{job['running']} of {job['tasks']} tasks run, restarts {restarts}"))
    newest = job["checkpoint"]
    if newest is None:
        rows.append(("", "", f"no checkpoint yet, {job['failed_checkpoints']} failed"))
    else:
        at = seconds((now_ms - newest["at_ms"]) / 1000)
        size, took = newest["state_bytes"] / 1e6, newest["took_ms"]
        rows.append(("", "", f"checkpoint {newest['number']}, {at} ago: {size:.1f} MB in {took} ms"))
    return rows
