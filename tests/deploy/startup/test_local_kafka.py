"""The local Kafka is started again when it died, also where that fails at first, and ends nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy.startup.steps import LocalKafka
from state.config.loading import load
from state.errors import KafkaFailed
from state.metrics import StorageMetrics, SupervisorMetrics
from state.process.ports import free_port, listens
from state.storage.shares import KAFKA, offer
from tests.disks import small_disk
from tests.e2e.running import until
from tests.one_kafka import Running, broker_like


def test_a_broker_that_cannot_start_waits_longer_and_is_there_once_it_can(kafka: Running, tmp_path: Path) -> None:
    now, lines, collected, port = [0.0], list[str](), CollectorRegistry(), free_port()
    settings = load(["--paths.state", str(tmp_path), "--kafka.port", str(port)], {})
    broker_like(kafka, settings.kafka_dir)
    storage = offer(collected, settings, [KAFKA])
    own = LocalKafka(settings, lines.append, SupervisorMetrics(collected), lambda: now[0], storage)
    own.begin()
    try:
        until(own.is_up, "Kafka is not up")
        pid = own._broker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not lines:
            own.poll()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "ended with status -9" in lines[0] and lines[0].endswith("starting it again in 0.25 s")
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", port))
            holder.listen()
            now[0] += 0.2
            own.poll()
            assert len(lines) == 1, "it is not time yet"
            now[0] += 0.1
            own.poll()
        assert f"port {port}" in lines[1] and lines[1].endswith("starting it again in 0.5 s, after 2 deaths in a row")
        assert collected.get_sample_value("springtide_up_deaths_in_a_row", {"part": "kafka"}) == 2
        now[0] += 1.0
        own.poll()
        assert listens(port) and len(lines) == 2
        assert (collected.get_sample_value("springtide_storage_used_bytes", {"part": "kafka"}) or 0.0) > 10_000
        now[0] += 60.0
        own.poll()
        assert collected.get_sample_value("springtide_up_deaths_in_a_row", {"part": "kafka"}) == 0
    finally:
        own.stop(0.0)


@pytest.mark.nightly
def test_a_broker_whose_disk_is_full_waits_for_room_and_is_not_tried_before(tmp_path: Path) -> None:
    now, lines, collected = [0.0], list[str](), CollectorRegistry()

    def starts() -> float:
        return collected.get_sample_value("springtide_up_starts_total", {"part": "kafka"}) or 0.0

    def waiting() -> float | None:
        return collected.get_sample_value("springtide_storage_waiting", {"part": "kafka"})

    with small_disk(tmp_path / "disk", "256m") as disk:
        settings = load(["--paths.state", str(disk.path), "--kafka.port", str(free_port())], {})
        metrics, storage = SupervisorMetrics(collected), StorageMetrics(collected)
        kafka = LocalKafka(settings, lines.append, metrics, lambda: now[0], storage)
        settings.kafka_dir.mkdir()
        try:
            full = disk.fill()
            kafka._bury(KafkaFailed("Kafka ended with status 1", "the disk is full"))
            for _ in range(5):
                now[0] += 2.0
                kafka.poll()
            assert (starts(), waiting(), len(lines)) == (0, 1, 2)
            assert lines[1].startswith("Kafka waits for space: Kafka was not started: ") and "0 MB free" in lines[1]
            full.unlink()
            now[0] += 2.0
            kafka.poll()
            assert (starts(), waiting(), len(lines)) == (1, 0, 3)
            assert lines[2] == "Kafka continues: there is space again"
            assert listens(settings.kafka.port)
        finally:
            kafka.stop(20.0)
