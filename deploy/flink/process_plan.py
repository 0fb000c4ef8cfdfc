"""The processes of a local cluster: their commands, in the order of their starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.children.supervisor import ProcessPlan
from deploy.flink.configuration import (
    ARTIFACTS,
    CONFIGURATION,
    HOST,
    METASPACE_MB,
    NETWORK_MB,
    OFF_HEAP_MB,
    TEMPORARY,
)
from deploy.startup.checks import Port
from state.config.sections import FlinkSettings

JOB_MANAGER, TASK_MANAGER = "job-manager", "task-manager"
JOB_SERVER, WORKERS = "job-server", "workers"

OPENED = ("lang", "lang.reflect", "net", "io", "nio", "text", "time", "util", "util.concurrent")
"""Packages of Java's own that Flink's and Beam's serialisers look into."""
STOP_S = 15.0


def process_plans(
    settings: FlinkSettings, directory: Path, jar: Path, java: str, python: str = sys.executable
) -> list[ProcessPlan]:
    """All processes; the latest are stopped first.

    Args:
        settings: Ports and sizes.
        directory: Of the cluster.
        jar: What all of Java runs from.
        java: The Java executable.
        python: The interpreter.
    """
    conf = str(directory / CONFIGURATION)

    def of_java(name: str, main: str, *words: str, options: Sequence[str] = ()) -> ProcessPlan:
        # Flink leaves its temporary files behind when it is killed: each start empties its own place.
        place = directory / TEMPORARY / name
        first = (python, "-m", "deploy.flink.emptied", str(place))
        machine = (java, *java_options(settings.heap_mb), f"-Djava.io.tmpdir={place}", *options)
        return ProcessPlan(name, (*first, *machine, "-cp", str(jar), main, *words), STOP_S)

    def place_of(name: str) -> tuple[str, str]:
        return "-D", f"io.tmp.dirs={directory / TEMPORARY / name}"

    direct_mb = NETWORK_MB + 2 * OFF_HEAP_MB
    entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
    runner = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
    task_managers = [f"{TASK_MANAGER}-{number}" for number in range(1, settings.task_managers + 1)]
    return [
        of_java(JOB_MANAGER, entry, "--configDir", conf, *place_of(JOB_MANAGER)),
        ProcessPlan(WORKERS, (python, "-m", "deploy.flink.worker_pool", str(settings.worker_port)), STOP_S),
        *(
            of_java(
                name,
                runner,
                "--configDir",
                conf,
                # The same name again, so that the JobManager knows at once that the one before is gone.
                "-D",
                f"taskmanager.resource-id={name}",
                *place_of(name),
                options=(f"-XX:MaxDirectMemorySize={direct_mb}m", f"-XX:MaxMetaspaceSize={METASPACE_MB}m"),
            )
            for name in task_managers
        ),
        of_java(
            JOB_SERVER,
            "org.apache.beam.runners.flink.FlinkJobServerDriver",
            f"--flink-master={HOST}:{settings.rest_port}",
            f"--flink-conf-dir={conf}",
            f"--job-host={HOST}",
            f"--job-port={settings.job_port}",
            "--artifact-port=0",
            "--expansion-port=0",
            f"--artifacts-dir={directory / ARTIFACTS}",
        ),
    ]


def java_options(heap_mb: int) -> list[str]:
    """What each Java is told.

    >>> java_options(400)[:2]
    ['-Xmx400m', '-XX:+UseSerialGC']
    """
    return [
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",
        *(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in OPENED),
        "--add-opens=java.base/java.util.concurrent.atomic=ALL-UNNAMED",
        "--add-opens=java.base/java.util.concurrent.locks=ALL-UNNAMED",
        "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
        "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
        "--enable-native-access=ALL-UNNAMED",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
    ]


def ports(settings: FlinkSettings) -> list[Port]:
    """The ports that somebody else has to find.

    >>> [port.setting for port in ports(FlinkSettings())]
    ['flink.rest_port', 'flink.job_port', 'flink.worker_port']
    """
    return [Port(f"flink.{name}", HOST, getattr(settings, name)) for name in ("rest_port", "job_port", "worker_port")]
