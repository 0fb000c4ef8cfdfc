"""Runs a local Flink cluster: its directory, configuration and processes. It also stops the jobs of any cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from deploy.java_jars import FLINK
from deploy.supervisor import ProcessPlan, Supervisor, environment_of, last_line, log_bytes
from state.config.sections import FlinkSettings
from state.config.settings import Settings
from state.errors import FlinkFailed, reason_of
from state.flink import JobManager, url
from state.metrics import SupervisorMetrics
from state.process.ending import Signals
from state.process.ports import Port, free_port, listens
from state.process.user_code import for_children

HOST = "127.0.0.1"
FIXED = Path(__file__).with_name("config.yaml")
CONFIGURATION, CHECKPOINTS, SAVEPOINTS = "conf", "checkpoints", "savepoints"
TEMPORARY, ARTIFACTS, LOGS = "tmp", "artifacts", "logs"
JOB_MANAGER, TASK_MANAGER, JOB_SERVER, WORKERS = "job-manager", "task-manager", "job-server", "workers"
STOP_S = 15.0
SLOTS = 2  # of each TaskManager
# Memory of a TaskManager, MB. Flink's own scripts compute these; without them a TaskManager requires each explicitly.
FRAMEWORK_MB, NETWORK_MB, OFF_HEAP_MB, METASPACE_MB = 96, 64, 64, 256
# Flink leaves its temporary files behind when it is killed, so each start empties the directory of its process.
EMPTIED = ("/bin/sh", "-c", 'rm -rf "$0" && mkdir -p "$0" && exec "$@"')
# Packages that Flink's and Beam's serialisers read by reflection.
OPENED = (
    *("java.lang", "java.lang.reflect", "java.net", "java.io", "java.nio", "java.text", "java.time", "java.util"),
    *("java.util.concurrent", "java.util.concurrent.atomic", "java.util.concurrent.locks", "sun.nio.ch"),
)


def configuration(settings: FlinkSettings, directory: Path, rpc_port: int) -> str:
    """Returns `config.yaml` of a cluster: the fixed part, then its paths, addresses and sizes.

    TaskManagers reach the JobManager on `rpc_port`.
    """
    entries: dict[str, object] = {
        "state.checkpoints.dir": (directory / CHECKPOINTS).absolute().as_uri(),
        "state.savepoints.dir": (directory / SAVEPOINTS).absolute().as_uri(),
        # The cluster has the same jar on its class path; a second copy of each class per job would waste memory.
        "classloader.resolve-order": "parent-first",
        # Loopback only, because anyone who can connect to these ports can run any program.
        **dict.fromkeys(("jobmanager.rpc.address", "jobmanager.bind-host", "taskmanager.host"), HOST),
        **dict.fromkeys(("taskmanager.bind-host", "rest.address", "rest.bind-address"), HOST),
        "jobmanager.rpc.port": rpc_port,
        "rest.port": settings.rest_port,
        "rest.bind-port": settings.rest_port,
        "state.backend.type": "hashmap",
        "taskmanager.numberOfTaskSlots": SLOTS,
        "taskmanager.cpu.cores": SLOTS,
    }
    memory_mb = {
        "framework.heap.size": FRAMEWORK_MB,
        "task.heap.size": settings.heap_mb - FRAMEWORK_MB,
        "framework.off-heap.size": OFF_HEAP_MB,
        "task.off-heap.size": OFF_HEAP_MB,
        "network.min": NETWORK_MB,
        "network.max": NETWORK_MB,
        "managed.size": 0,
        "jvm-metaspace.size": METASPACE_MB,
        "jvm-overhead.min": OFF_HEAP_MB,
        "jvm-overhead.max": OFF_HEAP_MB,
    }
    entries |= {f"taskmanager.memory.{part}": f"{size}m" for part, size in memory_mb.items()}
    return FIXED.read_text(encoding="utf-8") + "".join(f"{name}: {value}\n" for name, value in entries.items())


def process_plans(
    settings: FlinkSettings, directory: Path, jar: Path, java: str, python: str = sys.executable
) -> list[ProcessPlan]:
    """Returns all processes in start order; the latest started is stopped first.

    `jar` is the class path of every Java process, and `python` the interpreter of the worker pool.
    """
    conf = ("--configDir", str(directory / CONFIGURATION))

    def flink(name: str, main: str, *options: str, words: tuple[str, ...] = ()) -> ProcessPlan:
        temporary = directory / TEMPORARY / name
        options = (*_java_options(settings.heap_mb), f"-Djava.io.tmpdir={temporary}", *options)
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


def _java_options(heap_mb: int) -> list[str]:
    return [
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",
        *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED),
        "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
        "--enable-native-access=ALL-UNNAMED",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
    ]


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
