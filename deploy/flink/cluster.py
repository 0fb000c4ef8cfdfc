"""Runs a local Flink cluster from start to stop, and ends the jobs of any cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

import deploy
from deploy.children.ending import last_line
from deploy.children.log_files import log_sizes
from deploy.children.supervisor import MALLOC, Supervisor
from deploy.flink import jars, processes
from deploy.flink.processes import HOST
from deploy.kafka.configuration import free_port, listens
from state.config.settings import Settings
from state.errors import FlinkFailed, reason_of
from state.flink.rest import ENDED, JobManager, url
from state.metrics import SupervisorMetrics

Say = Callable[[str], None]
START_S, REMIND_S, POLL_S = 180.0, 30.0, 0.1
SAVEPOINT_S, CANCEL_S = 120.0, 30.0
# The process that follows a job polls its state a few times every 2 s; it would miss a faster end.
FOLLOWED_S = 2.5


def run(settings: Settings, jar: Path, say: Say, stop: Callable[[], bool], hurry: Callable[[], bool]) -> None:
    """Runs the cluster until it is stopped; the caller holds the lock of its directory.

    1. Writes the configuration.
    2. Starts all processes at once.
    3. Waits until jobs can be submitted.
    4. Restarts processes that die.
    5. Ends jobs by savepoint, then the processes, the latest started first.

    Args:
        settings: Settings of the cluster, and of the stream whose workers run in it.
        jar: Class path of every Java process.
        say: Receives a line for the operator.
        stop: Returns whether the operator asked to stop.
        hurry: Returns whether the operator asked again.

    Raises:
        SpringtideError: The cluster does not start; none of its processes is left running.
    """
    begin_s, directory, manager = time.monotonic(), settings.flink_dir.absolute(), JobManager(url(settings))
    # 1.
    _prepare(settings, directory)
    supervisor = _supervisor(settings, directory, say)
    try:
        # 2.
        for plan in processes.process_plans(settings.flink, directory, jar, jars.java()):
            supervisor.start(plan)
        # 3.
        if _wait_until_up(settings, manager, supervisor, say, stop):
            supervisor.settled = True
            flink = settings.flink
            say(
                f"Flink runs after {time.monotonic() - begin_s:.1f} s: JobManager on {manager.url}, "
                f"{flink.task_managers * flink.slots} slots, job server on {HOST}:{flink.job_port}, "
                f"Python workers on {HOST}:{flink.worker_port}"
            )
            say(f"state and logs are in {directory}; `springtide flink status` shows what runs")
            say("Ctrl-C, or `springtide flink down`, ends jobs by savepoint, then all of it")
        # 4.
        while not stop():
            supervisor.look()
            time.sleep(POLL_S)
    finally:
        # 5.
        begin_s = time.monotonic()
        # A JobManager that does not answer cannot make a savepoint.
        with contextlib.suppress(FlinkFailed):
            end_jobs(manager, say, hurry=hurry)
        supervisor.stop_all(hurry)
        say(f"Flink stopped after {time.monotonic() - begin_s:.1f} s")


def _prepare(settings: Settings, directory: Path) -> None:
    try:
        # Each process empties its own temporary directory; those of TaskManagers that are no longer configured would stay.
        for name in (processes.TEMPORARY, processes.ARTIFACTS):
            if (directory / name).exists():
                shutil.rmtree(directory / name)
        for name in (processes.ARTIFACTS, processes.CONFIGURATION, processes.CHECKPOINTS, processes.SAVEPOINTS):
            (directory / name).mkdir(exist_ok=True)
        text = processes.configuration(settings.flink, directory, free_port())
        (directory / processes.CONFIGURATION / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as problem:
        raise FlinkFailed(
            f"Flink was not started ({reason_of(problem)})",
            f"free some space, or correct the access rights of {directory}",
        ) from problem


def _supervisor(settings: Settings, directory: Path, say: Say) -> Supervisor:
    """Creates a supervisor whose processes find the settings in their environment.

    This release comes first in their PYTHONPATH, and its Python first in their PATH.
    """
    environment = {**MALLOC, **os.environ}
    environment = {name: value for name, value in environment.items() if not name.startswith("SPRINGTIDE_")}
    environment |= settings.environment() | {"PYTHONUNBUFFERED": "1"}
    release = str(Path(deploy.__path__[0]).parent)
    for name, first in (("PYTHONPATH", release), ("PATH", str(Path(sys.executable).parent))):
        environment[name] = os.pathsep.join(filter(None, [first, environment.get(name)]))
    metrics, logs = SupervisorMetrics(CollectorRegistry()), directory / processes.LOGS
    return Supervisor(logs, environment, say, metrics, time.monotonic, *log_sizes(settings))


def _wait_until_up(
    settings: Settings, manager: JobManager, supervisor: Supervisor, say: Say, stop: Callable[[], bool]
) -> bool:
    """Returns True once a job can be submitted, False if the operator stops the cluster before.

    Raises:
        FlinkFailed: The cluster is not ready within `START_S`.
    """
    deadline_s, remind_s = time.monotonic() + START_S, time.monotonic() + REMIND_S
    while missing := _missing(settings, manager):
        if stop():
            return False
        supervisor.look()
        if time.monotonic() >= deadline_s:
            log = supervisor.log_path(missing)
            raise FlinkFailed(f"{missing} did not come up in {START_S:.0f} s", f"see {log}: {last_line(log)}")
        if time.monotonic() >= remind_s:
            remind_s = time.monotonic() + REMIND_S
            say(f"still waiting for {missing}; see {supervisor.logs}")
        time.sleep(POLL_S)
    return True


def _missing(settings: Settings, manager: JobManager) -> str:
    """Returns the name of the first process that is not ready; empty if all are ready."""
    if not manager.answers():
        return processes.JOB_MANAGER
    reported = manager.overview().task_managers
    if reported < settings.flink.task_managers:
        return f"{processes.TASK_MANAGER}-{reported + 1}"
    if not listens(settings.flink.worker_port):
        return processes.WORKERS
    return "" if listens(settings.flink.job_port) else processes.JOB_SERVER


def end_jobs(manager: JobManager, say: Say, savepoint: bool = True, hurry: Callable[[], bool] = lambda: False) -> None:
    """Ends all jobs and reports what each can be resumed from; a job without a savepoint is cancelled.

    Args:
        manager: The JobManager of the jobs.
        say: Receives lines for the operator.
        savepoint: Whether to make savepoints.
        hurry: Returns whether to stop waiting.

    Raises:
        FlinkFailed: The JobManager does not answer.
    """
    jobs = manager.running()
    for job in jobs:
        path = ""
        if savepoint:
            say(f"job {job}: a savepoint, then its end")
            try:
                path = _savepoint(manager, job, hurry)
            except FlinkFailed as failure:
                say(f"{failure}")
        if path:
            say(f"job {job} is in {path}; resume it with --savepoint_path {path}")
        else:
            manager.cancel(job)
            say(f"job {job} ends without a savepoint; its newest checkpoint is kept")
    deadline_s = time.monotonic() + CANCEL_S
    for job in jobs:
        while manager.state(job) not in ENDED and time.monotonic() < deadline_s and not hurry():
            time.sleep(POLL_S)
    if jobs and not hurry():
        time.sleep(FOLLOWED_S)


def _savepoint(manager: JobManager, job: str, hurry: Callable[[], bool]) -> str:
    """Makes a savepoint and returns its path.

    Raises:
        FlinkFailed: The savepoint failed, or was not ready within `SAVEPOINT_S`.
    """
    request, deadline_s = manager.begin_savepoint(job), time.monotonic() + SAVEPOINT_S
    while not (path := manager.savepoint(job, request)):
        if hurry() or time.monotonic() >= deadline_s:
            raise FlinkFailed(f"job {job} has no savepoint: it was not ready when waiting ended")
        time.sleep(POLL_S)
    return path
