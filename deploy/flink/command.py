"""`springtide flink up | down | status`: a Flink cluster on this machine, for a laptop and for tests."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from deploy.command_line import output, run_command
from deploy.flink import cluster
from deploy.flink.cluster import CHECKPOINTS, LOGS, SAVEPOINTS, ports
from deploy.formats import seconds
from deploy.java_jars import merged_jar
from deploy.startup.checks import require_disk
from deploy.supervisor import has_ended
from deploy.watch.panel import lines
from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk.lock import DirectoryLock
from state.errors import FlinkFailed, LockHeld, SettingsError
from state.flink import Job, JobManager, Overview, url
from state.process.ending import Signals
from state.process.ports import listens, require_ports
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

DESCRIPTION = """Run a Flink cluster on this machine for the stream on a distributed runner, as configured in `[flink]`: JobManager,
TaskManagers, job server and Python workers. up runs the cluster until Ctrl-C and restarts processes that exit. down stops the
jobs with a savepoint, then the cluster. status shows TaskManagers, slots, jobs, their last checkpoints and restarts, and the
savepoints and checkpoints to resume from; problems come first and set the exit code to 1. For your own cluster see
docs/how-to/flink.md."""
EPILOG = (
    "Settings are written --section.name VALUE; `springtide config flink` lists them. Exit codes: 0 done, 1 failed or "
    "something is wrong, 2 wrong use."
)
LEAST_FREE_BYTES = 1 << 30
DOWN_S, POLL_S = 90.0, 0.1
COLUMNS = (16, 12)
# A job starts a checkpoint about every second; one without a completed checkpoint for so long makes no progress.
STALE_S = 60.0
SHOWN_ENDED = 5


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; settings have been removed from the arguments before."""
    root = argparse.ArgumentParser(prog="springtide flink", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    root.add_argument("action", choices=("up", "down", "status"), help="action")
    root.add_argument(
        "--no-savepoint",
        action="store_true",
        help="down: cancel the jobs without a savepoint; they can resume from their newest checkpoint",
    )
    root.add_argument("--url", help="status: JobManager of another cluster, http://HOST:PORT")
    output(root, of="status: ")
    return root


def up(settings: Settings) -> None:
    """Runs the cluster until it is stopped.

    Raises:
        SpringtideError: The cluster does not start.
    """
    say = functools.partial(print, flush=True)
    require_disk(settings.flink_dir, LEAST_FREE_BYTES)
    with DirectoryLock(settings.flink_dir):
        require_ports(ports(settings.flink))
        # Until the signal handlers are installed, Ctrl-C aborts the download of jars at once.
        jar = merged_jar(say)
        cluster.run(settings, jar, say, Signals())


def down(settings: Settings, savepoint: bool) -> None:
    """Ends the jobs and the cluster.

    Raises:
        FlinkFailed: No cluster runs here, or it does not end.
    """
    say, directory = functools.partial(print, flush=True), settings.flink_dir
    supervisor = holder(directory)
    if supervisor is None:
        raise FlinkFailed(f"no cluster runs in {directory}", "correct paths.state, or end it where it was started")
    # Jobs are ended here rather than in the supervisor, so that this command reports what becomes of them.
    try:
        cluster.end_jobs(JobManager(url(settings)), say, savepoint)
    except FlinkFailed as failure:
        say(f"{failure.what}: no job was ended")
    with contextlib.suppress(psutil.NoSuchProcess):
        supervisor.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + DOWN_S
    while not has_ended(supervisor):
        if time.monotonic() >= deadline_s:
            raise FlinkFailed(f"process {supervisor.pid} did not end within {DOWN_S:.0f} s", f"see {directory / LOGS}")
        time.sleep(POLL_S)
    say("Flink is down")


def holder(directory: Path) -> psutil.Process | None:
    """Returns the process that runs the cluster of a directory; None if none does."""
    if not directory.is_dir():
        return None
    try:
        with DirectoryLock(directory):
            return None
    except LockHeld:
        try:
            return psutil.Process(json.loads((directory / layout.LOCK).read_text())["pid"])
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            # The process has just started, or just ended.
            return None


def read_state(settings: Settings, url: str, now_ms: int, local: bool = True) -> dict[str, Any]:
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
    problems_found = [] if overview.task_managers else ["no TaskManager has reported: no job can run"]
    jobs = (_problem(job, overview.free_slots, now_ms) for job in overview.jobs if not job.ended)
    return problems_found + [problem for problem in jobs if problem]


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
    paths_by_kind = {
        "savepoint": list((directory / SAVEPOINTS).glob("*/_metadata")),
        "checkpoint": [path for path in checkpoints if path.parts[-3] not in running],
    }
    newest = {kind: max(paths, key=lambda path: path.stat().st_mtime) for kind, paths in paths_by_kind.items() if paths}
    return {kind: path.parent.absolute().as_uri() for kind, path in newest.items()}


def is_wrong(state: Mapping[str, Any]) -> bool:
    """Returns whether the state reports any problem."""
    return bool(state["wrong"]) or not all(state["listening"].values())


def as_text(state: Mapping[str, Any], now_ms: int) -> str:
    """Formats the state for a terminal."""
    rows: list[Sequence[str]] = [("state", "WRONG", problem) for problem in state["wrong"]]
    job_manager, jobs = state["job_manager"], []
    if job_manager is None:
        rows.append(("job manager", "unreachable", state["url"]))
    else:
        rows.append(("job manager", "runs", f"{state['url']}, Flink {job_manager['version']}"))
        slots = f"{job_manager['free_slots']} of {job_manager['slots']} slots free"
        rows.append(("task managers", str(job_manager["task_managers"]), slots))
        jobs = job_manager["jobs"]
    rows += [(name, "listens" if listens else "unreachable", "") for name, listens in state["listening"].items()]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    keep_private()
    return run_command("springtide", _main, argv)


def _main(words: Sequence[str]) -> int:
    flags, words_left = split_settings(words)
    args = parser().parse_args(words_left)
    if args.url is not None and (args.action != "status" or not args.url.startswith(("http://", "https://"))):
        raise SettingsError("--url is for status, and is written http://HOST:PORT")
    if args.no_savepoint and args.action != "down":
        raise SettingsError("--no-savepoint is for down")
    settings = load(flags)
    if args.action == "up":
        up(settings)
    elif args.action == "down":
        down(settings, not args.no_savepoint)
    else:
        now_ms, other_url = wall_ms(), args.url
        state = read_state(settings, (other_url or url(settings)).rstrip("/"), now_ms, local=other_url is None)
        print(json.dumps(state, indent=2) if args.output == "json" else as_text(state, now_ms))
        return int(is_wrong(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
