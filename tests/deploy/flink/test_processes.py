"""A local cluster's configuration: what any cluster is told, said once, then this machine's places, addresses and sizes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from deploy.flink.cluster import EMPTIED, FIXED, configuration, ports, process_plans
from state.config.sections import FlinkSettings

DIRECTORY = Path("/state/flink")


def read(settings: FlinkSettings) -> dict[str, object]:
    return dict(yaml.safe_load(configuration(settings, DIRECTORY, 6123)))


def test_no_line_is_said_twice() -> None:
    names = re.findall(r"^([\w.-]+):", configuration(FlinkSettings(), DIRECTORY, 6123), re.MULTILINE)
    assert len(names) > 20
    assert sorted(names) == sorted(set(names))


def test_what_any_cluster_is_told_is_what_the_measured_traps_ask_for() -> None:
    told = yaml.safe_load(FIXED.read_text())
    assert told["pipeline.operator-chaining.enabled"] is False
    assert told["heartbeat.timeout"] == 6000 > 2 * told["heartbeat.interval"]
    assert told["restart-strategy.type"] == "exponential-delay"
    assert told["execution.checkpointing.externalized-checkpoint-retention"] == "RETAIN_ON_CANCELLATION"
    # Places and sizes are the cluster's own.
    assert not [name for name in told if name.endswith(("dir", "dirs", "port", "host", "address", "size"))]


def test_it_listens_on_loopback_alone() -> None:
    told = read(FlinkSettings())
    hosts = {name: value for name, value in told.items() if name.endswith(("host", "address"))}
    assert len(hosts) >= 6
    assert set(hosts.values()) == {"127.0.0.1"}


def test_sizes_are_those_of_the_settings() -> None:
    told = read(FlinkSettings(slots=3, heap_mb=400, state_backend="rocksdb"))
    assert told["taskmanager.numberOfTaskSlots"] == 3
    assert told["state.backend.type"] == "rocksdb"
    heaps = [told[f"taskmanager.memory.{part}.heap.size"] for part in ("framework", "task")]
    assert sum(int(str(size).removesuffix("m")) for size in heaps) == 400
    # RocksDB takes its memory out of what is managed, which nobody else needs.
    assert told["taskmanager.memory.managed.size"] != "0m"
    assert read(FlinkSettings())["taskmanager.memory.managed.size"] == "0m"


def test_each_process_has_a_place_of_its_own_for_what_it_leaves_behind() -> None:
    plans = process_plans(FlinkSettings(task_managers=2), DIRECTORY, Path("/jar"), "/java", "/python")
    assert [plan.name for plan in plans] == ["job-manager", "workers", "task-manager-1", "task-manager-2", "job-server"]
    of_java = [plan for plan in plans if "/java" in plan.command]
    assert len(of_java) == 4
    for plan in of_java:
        assert plan.command[:5] == (*EMPTIED, f"/state/flink/tmp/{plan.name}", "/java")
        assert f"-Djava.io.tmpdir=/state/flink/tmp/{plan.name}" in plan.command
    ids = [word for plan in plans for word in plan.command if word.startswith("taskmanager.resource-id=")]
    assert ids == ["taskmanager.resource-id=task-manager-1", "taskmanager.resource-id=task-manager-2"]


def test_ports_are_those_of_the_settings() -> None:
    settings = FlinkSettings(rest_port=1, job_port=2, worker_port=3)
    assert [port.port for port in ports(settings)] == [1, 2, 3]
    plans = {plan.name: plan.command for plan in process_plans(settings, DIRECTORY, Path("/jar"), "/java", "/python")}
    assert plans["workers"][-1] == "3"
    assert {"--job-port=2", "--flink-master=127.0.0.1:1"} <= set(plans["job-server"])
