"""The configuration of a local cluster: what any cluster is told (`config.yaml`), then this machine's places and sizes.

paths.state/flink/
├── lock                       of `springtide flink up`
├── conf/config.yaml           made at each start
├── checkpoints/<job>/chk-<n>  newest three of each job, kept when it ends
├── savepoints/                kept until somebody removes them
├── tmp/<process>/             emptied at each start of the process
├── artifacts/                 of jobs that are handed in
└── logs/                      one file a process
"""

from __future__ import annotations

from pathlib import Path

from state.config.sections import FlinkSettings

HOST = "127.0.0.1"
FIXED = Path(__file__).with_name("config.yaml")

CONFIGURATION, CHECKPOINTS, SAVEPOINTS = "conf", "checkpoints", "savepoints"
TEMPORARY, ARTIFACTS, LOGS = "tmp", "artifacts", "logs"

# Megabytes beside the heap, of each TaskManager; the heap is divided between Flink itself and its tasks.
FRAMEWORK_MB, NETWORK_MB, OFF_HEAP_MB, METASPACE_MB = 96, 64, 64, 256
MANAGED_MB = {"hashmap": 0, "rocksdb": 128}


def configuration(settings: FlinkSettings, directory: Path, rpc_port: int) -> str:
    r"""The file `config.yaml` of a cluster.

    Args:
        settings: Ports and sizes.
        directory: Of the cluster.
        rpc_port: Where TaskManagers find their JobManager.

    >>> text = configuration(FlinkSettings(slots=3), Path("/state/flink"), 6123)
    >>> [line for line in text.splitlines() if line.startswith(("state.checkpoints.dir", "taskmanager.number"))]
    ['state.checkpoints.dir: file:///state/flink/checkpoints', 'taskmanager.numberOfTaskSlots: 3']
    """
    own = {**places(directory), **addresses(settings, rpc_port), **sizes(settings)}
    return FIXED.read_text(encoding="utf-8") + "".join(f"{name}: {value}\n" for name, value in own.items())


def places(directory: Path) -> dict[str, object]:
    """Where checkpoints and savepoints lie; who runs says where its temporary files do."""
    return {
        "state.checkpoints.dir": (directory / CHECKPOINTS).absolute().as_uri(),
        "state.savepoints.dir": (directory / SAVEPOINTS).absolute().as_uri(),
        # The same jar is on the cluster's class path: a second copy of each class, for each job, would be for nothing.
        "classloader.resolve-order": "parent-first",
    }


def addresses(settings: FlinkSettings, rpc_port: int) -> dict[str, object]:
    """Who listens where: on loopback alone, for whoever reaches these ports may run what he likes."""
    return {
        "jobmanager.rpc.address": HOST,
        "jobmanager.rpc.port": rpc_port,
        "jobmanager.bind-host": HOST,
        "taskmanager.host": HOST,
        "taskmanager.bind-host": HOST,
        "rest.address": HOST,
        "rest.bind-address": HOST,
        "rest.port": settings.rest_port,
        "rest.bind-port": settings.rest_port,
    }


def sizes(settings: FlinkSettings) -> dict[str, object]:
    """Slots and memory; Flink's own scripts compute the latter, and without them a TaskManager asks for each part."""
    task_mb = settings.heap_mb - FRAMEWORK_MB
    return {
        "state.backend.type": settings.state_backend,
        "state.backend.incremental": "true",
        "taskmanager.numberOfTaskSlots": settings.slots,
        "taskmanager.cpu.cores": settings.slots,
        "taskmanager.memory.framework.heap.size": f"{FRAMEWORK_MB}m",
        "taskmanager.memory.task.heap.size": f"{task_mb}m",
        "taskmanager.memory.framework.off-heap.size": f"{OFF_HEAP_MB}m",
        "taskmanager.memory.task.off-heap.size": f"{OFF_HEAP_MB}m",
        "taskmanager.memory.network.min": f"{NETWORK_MB}m",
        "taskmanager.memory.network.max": f"{NETWORK_MB}m",
        "taskmanager.memory.managed.size": f"{MANAGED_MB[settings.state_backend]}m",
        "taskmanager.memory.jvm-metaspace.size": f"{METASPACE_MB}m",
        "taskmanager.memory.jvm-overhead.min": f"{OFF_HEAP_MB}m",
        "taskmanager.memory.jvm-overhead.max": f"{OFF_HEAP_MB}m",
    }
