"""The directory, configuration and processes of a local Flink cluster.

paths.state/flink/
├── lock                       held by `springtide flink up`
├── conf/config.yaml           written at each start
├── checkpoints/<job>/chk-<n>  newest three of each job, kept when it ends
├── savepoints/                kept until somebody deletes them
├── tmp/<process>/             emptied at each start of the process
├── artifacts/                 of submitted jobs
└── logs/                      one file per process
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.children.supervisor import ProcessPlan
from deploy.startup.checks import Port
from state.config.sections import FlinkSettings

HOST = "127.0.0.1"
FIXED = Path(__file__).with_name("config.yaml")
CONFIGURATION, CHECKPOINTS, SAVEPOINTS = "conf", "checkpoints", "savepoints"
TEMPORARY, ARTIFACTS, LOGS = "tmp", "artifacts", "logs"
JOB_MANAGER, TASK_MANAGER, JOB_SERVER, WORKERS = "job-manager", "task-manager", "job-server", "workers"
STOP_S = 15.0
# Memory of a TaskManager, MB. Flink's own scripts compute these; without them a TaskManager requires each explicitly.
FRAMEWORK_MB, NETWORK_MB, OFF_HEAP_MB, METASPACE_MB = 96, 64, 64, 256
MANAGED_MB = {"hashmap": 0, "rocksdb": 128}
# Flink leaves its temporary files behind when it is killed, so each start empties the directory of its process.
EMPTIED = ("/bin/sh", "-c", 'rm -rf "$0" && mkdir -p "$0" && exec "$@"')
# Packages that Flink's and Beam's serialisers read by reflection.
OPENED = (
    *("java.lang", "java.lang.reflect", "java.net", "java.io", "java.nio", "java.text", "java.time", "java.util"),
    *("java.util.concurrent", "java.util.concurrent.atomic", "java.util.concurrent.locks", "sun.nio.ch"),
)


def configuration(settings: FlinkSettings, directory: Path, rpc_port: int) -> str:
    """Returns `config.yaml` of a cluster: the fixed part, then the paths, addresses and sizes of this cluster.

    Args:
        settings: Ports and sizes.
        directory: Directory of the cluster.
        rpc_port: Port on which TaskManagers reach the JobManager.
    """
    own: dict[str, object] = {
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
        "state.backend.type": settings.state_backend,
        "state.backend.incremental": "true",
        "taskmanager.numberOfTaskSlots": settings.slots,
        "taskmanager.cpu.cores": settings.slots,
    }
    memory_mb = {
        "framework.heap.size": FRAMEWORK_MB,
        "task.heap.size": settings.heap_mb - FRAMEWORK_MB,
        "framework.off-heap.size": OFF_HEAP_MB,
        "task.off-heap.size": OFF_HEAP_MB,
        "network.min": NETWORK_MB,
        "network.max": NETWORK_MB,
        "managed.size": MANAGED_MB[settings.state_backend],
        "jvm-metaspace.size": METASPACE_MB,
        "jvm-overhead.min": OFF_HEAP_MB,
        "jvm-overhead.max": OFF_HEAP_MB,
    }
    own |= {f"taskmanager.memory.{part}": f"{size}m" for part, size in memory_mb.items()}
    return FIXED.read_text(encoding="utf-8") + "".join(f"{name}: {value}\n" for name, value in own.items())


def process_plans(
    settings: FlinkSettings, directory: Path, jar: Path, java: str, python: str = sys.executable
) -> list[ProcessPlan]:
    """Returns all processes in start order; the latest started is stopped first.

    Args:
        settings: Ports and sizes.
        directory: Directory of the cluster.
        jar: Class path of every Java process.
        java: The Java executable.
        python: The interpreter of the worker pool.
    """
    conf = ("--configDir", str(directory / CONFIGURATION))

    def flink(name: str, main: str, *options: str, words: tuple[str, ...] = ()) -> ProcessPlan:
        temporary = directory / TEMPORARY / name
        options = (*java_options(settings.heap_mb), f"-Djava.io.tmpdir={temporary}", *options)
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


def java_options(heap_mb: int) -> list[str]:
    """Returns the options of each Java process."""
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
    return [Port(f"flink.{name}", HOST, getattr(settings, name)) for name in ("rest_port", "job_port", "worker_port")]
