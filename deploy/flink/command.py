"""`springtide flink up | down | status`: a Flink cluster on this machine, for a laptop and for tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry

from deploy.formats import seconds
from deploy.java_jars import FLINK, merged_jar
from deploy.startup.checks import require_disk
from deploy.supervisor import ProcessPlan, Supervisor, environment_of, has_ended, last_line, log_bytes
from deploy.watch.panel import lines
from state import layout
from state.config.loading import load
from state.config.sections import FlinkSettings
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk.lock import DirectoryLock
from state.errors import FlinkFailed, LockHeld, SettingsError, reason_of
from state.flink import Job, JobManager, Overview, url
from state.metrics import SupervisorMetrics
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.network import Port, free_port, listens, require_ports
from state.process.part import Signals, run_command
from state.process.private_files import keep_private
from state.process.user_code import for_children

HOST = "127.0.0.1"
FIXED, LOCAL = Path(__file__).with_name("config.yaml"), Path(__file__).with_name("local.yaml")
JAVA_OPTIONS = Path(__file__).with_name("java.options")
CONFIGURATION, CHECKPOINTS, SAVEPOINTS = "conf", "checkpoints", "savepoints"
TEMPORARY, ARTIFACTS, LOGS = "tmp", "artifacts", "logs"
JOB_MANAGER, TASK_MANAGER, JOB_SERVER, WORKERS = "job-manager", "task-manager", "job-server", "workers"
STOP_S = 15.0
SLOTS = 2  # of each TaskManager
# Memory of a TaskManager, MB. Flink's own scripts compute these; without them a TaskManager requires each explicitly.
FRAMEWORK_MB, NETWORK_MB, OFF_HEAP_MB, METASPACE_MB = 96, 64, 64, 256
# Flink leaves its temporary files behind when it is killed, so each start empties the directory of its process.
EMPTIED = ("/bin/sh", "-c", 'rm -rf "$0" && mkdir -p "$0" && exec "$@"')


def configuration(settings: FlinkSettings, directory: Path, rpc_port: int) -> str:
    """Returns `config.yaml` of a cluster: the fixed part, then its paths, addresses and sizes.

    TaskManagers reach the JobManager on `rpc_port`.
    """
    return FIXED.read_text(encoding="utf-8") + LOCAL.read_text(encoding="utf-8").format(
        checkpoints=(directory / CHECKPOINTS).absolute().as_uri(),
        savepoints=(directory / SAVEPOINTS).absolute().as_uri(),
        rpc_port=rpc_port,
        rest_port=settings.rest_port,
        slots=SLOTS,
        framework_mb=FRAMEWORK_MB,
        network_mb=NETWORK_MB,
        off_heap_mb=OFF_HEAP_MB,
        metaspace_mb=METASPACE_MB,
        task_mb=settings.heap_mb - FRAMEWORK_MB,
    )


def process_plans(
    settings: FlinkSettings, directory: Path, jar: Path, java: str, python: str = sys.executable
) -> list[ProcessPlan]:
    """Returns all processes in start order; the latest started is stopped first.

    `jar` is the class path of every Java process, and `python` the interpreter of the worker pool.
    """
    conf = ("--configDir", str(directory / CONFIGURATION))

    def flink(name: str, main: str, *options: str, words: tuple[str, ...] = ()) -> ProcessPlan:
        temporary = directory / TEMPORARY / name
        options = (f"-Xmx{settings.heap_mb}m", f"@{JAVA_OPTIONS}", f"-Djava.io.tmpdir={temporary}", *options)
        return ProcessPlan(name, (*EMPTIED, str(temporary), java, *options, "-cp", str(jar), main, *words), STOP_S)

    def own_temporary(name: str) -> tuple[str, str]:
        return "-D", f"io.tmp.dirs={directory / TEMPORARY / name}"

    entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
    runner = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
    driver = "org.apache.beam.runners.flink.FlinkJobServerDriver"
    limits = (f"-XX:MaxDirectMemorySize={NETWORK_MB + 2 * OFF_HEAP_MB}m", f"-XX:MaxMetaspaceSize={METASPACE_MB}m")
    plans = [
        flink(JOB_MANAGER, entry, words=(*conf, *own_temporary(JOB_MANAGER))),
        ProcessPlan(WORKERS, (python, "-m", "deploy.flink.worker_pool", str(settings.worker_port)), STOP_S),
    ]
    for number in range(1, settings.task_managers + 1):
        name = f"{TASK_MANAGER}-{number}"
        # A restarted TaskManager has the same id, so that the JobManager knows at once that the old process is gone.
        words = (*conf, "-D", f"taskmanager.resource-id={name}", *own_temporary(name))
        plans.append(flink(name, runner, *limits, words=words))
    job_server = (
        f"--flink-master={HOST}:{settings.rest_port}",
        f"--flink-conf-dir={directory / CONFIGURATION}",
        f"--job-host={HOST}",
        f"--job-port={settings.job_port}",
        "--artifact-port=0",
        "--expansion-port=0",
        f"--artifacts-dir={directory / ARTIFACTS}",
    )
    return [*plans, flink(JOB_SERVER, driver, words=job_server)]


def ports(settings: FlinkSettings) -> list[Port]:
    """Returns the ports that other programs connect to."""
    return [
        Port("flink.rest_port", HOST, port) for port in (settings.rest_port, settings.job_port, settings.worker_port)
    ]


Say = Callable[[str], None]
START_S, POLL_S = 180.0, 0.1
SAVEPOINT_S, CANCEL_S = 120.0, 30.0
# The process that follows a job polls its state a few times in 2 s, and would miss an earlier end of the cluster.
FOLLOWED_S = 2.5


def run(settings: Settings, jar: Path, say: Say, signals: Signals) -> None:
    """Runs the cluster until it is stopped; the caller holds the lock of its directory.

    1. Writes the configuration.
    2. Starts all processes at once.
    3. Waits until jobs can be submitted.
    4. Restarts processes that die.
    5. Ends jobs by savepoint, then the processes, the latest started first.

    Raises:
        SpringtideError: The cluster does not start; none of its processes is left running.
    """
    begin_s, directory, manager = time.monotonic(), settings.flink_dir.absolute(), JobManager(url(settings))
    # 1.
    _prepare(settings, directory)
    supervisor = _supervisor(settings, directory, say)
    try:
        # 2.
        for plan in process_plans(settings.flink, directory, jar, FLINK.java()):
            supervisor.start(plan)
        # 3.
        if _wait_until_up(settings, manager, supervisor, signals.stop):
            supervisor.settled = True
            flink = settings.flink
            say(
                f"Flink runs after {time.monotonic() - begin_s:.1f} s: JobManager on {manager.url}, "
                f"{flink.task_managers * SLOTS} slots, job server on {HOST}:{flink.job_port}, "
                f"Python workers on {HOST}:{flink.worker_port}"
            )
            say(f"state and logs are in {directory}; `springtide flink status` shows what runs")
            say("Ctrl-C, or `springtide flink down`, stops the jobs with a savepoint, then the cluster")
        # 4.
        while not signals.stop():
            supervisor.poll()
            time.sleep(POLL_S)
    finally:
        # 5.
        begin_s = time.monotonic()
        # A JobManager that does not answer cannot make a savepoint.
        with contextlib.suppress(FlinkFailed):
            end_jobs(manager, say, hurry=signals.hurry)
        supervisor.stop_all(signals.hurry)
        say(f"Flink stopped after {time.monotonic() - begin_s:.1f} s")


def _prepare(settings: Settings, directory: Path) -> None:
    try:
        # Each process empties its own temporary directory; those of TaskManagers that are no longer configured would stay.
        for name in (TEMPORARY, ARTIFACTS):
            if (directory / name).exists():
                shutil.rmtree(directory / name)
        for name in (ARTIFACTS, CONFIGURATION, CHECKPOINTS, SAVEPOINTS):
            (directory / name).mkdir(exist_ok=True)
        text = configuration(settings.flink, directory, free_port())
        (directory / CONFIGURATION / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as problem:
        raise FlinkFailed(
            f"Flink was not started ({reason_of(problem)})",
            f"free some space, or correct the access rights of {directory}",
        ) from problem


def _supervisor(settings: Settings, directory: Path, say: Say) -> Supervisor:
    """Creates a supervisor whose processes find the settings in their environment.

    They import this release, and its Python comes first in their PATH.
    """
    environment = for_children(environment_of(settings))
    environment["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), environment.get("PATH")]))
    metrics, logs = SupervisorMetrics(CollectorRegistry()), directory / LOGS
    return Supervisor(logs, environment, say, metrics, time.monotonic, log_bytes(settings))


def _wait_until_up(settings: Settings, manager: JobManager, supervisor: Supervisor, stop: Callable[[], bool]) -> bool:
    """Returns True once a job can be submitted, False if the operator stops the cluster before."""
    deadline_s = time.monotonic() + START_S
    while missing := _missing(settings, manager):
        if stop():
            return False
        supervisor.poll()
        if time.monotonic() >= deadline_s:
            log = supervisor.log_path(missing)
            raise FlinkFailed(f"{missing} did not come up in {START_S:.0f} s", f"see {log}: {last_line(log)}")
        time.sleep(POLL_S)
    return True


def _missing(settings: Settings, manager: JobManager) -> str:
    """Returns the name of the first process that is not ready; empty if all are ready."""
    if not manager.answers():
        return JOB_MANAGER
    reported = manager.overview().task_managers
    if reported < settings.flink.task_managers:
        return f"{TASK_MANAGER}-{reported + 1}"
    if not listens(settings.flink.worker_port):
        return WORKERS
    return "" if listens(settings.flink.job_port) else JOB_SERVER


def end_jobs(manager: JobManager, say: Say, savepoint: bool = True, hurry: Callable[[], bool] = lambda: False) -> None:
    """Ends all jobs and reports what each can be resumed from; a job without a savepoint is cancelled.

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
    # A question about a single job that ends in this moment is answered with 500.
    while not {*jobs}.isdisjoint(manager.running()) and time.monotonic() < deadline_s and not hurry():
        time.sleep(POLL_S)
    if jobs and not hurry():
        time.sleep(FOLLOWED_S)


def _savepoint(manager: JobManager, job: str, hurry: Callable[[], bool]) -> str:
    request, deadline_s = manager.begin_savepoint(job), time.monotonic() + SAVEPOINT_S
    while not (path := manager.savepoint(job, request)):
        if hurry() or time.monotonic() >= deadline_s:
            raise FlinkFailed(
                f"job {job} has no savepoint: it was not ready when waiting ended",
                "resume the job from its newest checkpoint, which `springtide flink status` lists",
            )
        time.sleep(POLL_S)
    return path


LEAST_FREE_BYTES = 1 << 30
DOWN_S = 90.0
COLUMNS = (16, 12)
# A job starts a checkpoint about every second; one without a completed checkpoint for so long makes no progress.
STALE_S = 60.0
SHOWN_ENDED = 5


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
        run(settings, jar, say, Signals())


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
        end_jobs(JobManager(url(settings)), say, savepoint)
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
    args = parser_of("flink").parse_args(words_left)
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
