"""What `up` checks before a start, how it waits for its Kafka, and what its Prometheus scrapes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy import up
from deploy.startup import prometheus
from deploy.startup.checks import require_directory, require_disk, require_python
from deploy.startup.steps import LocalKafka, ports
from deploy.watch import scrape
from state.config.loading import load
from state.config.settings import Settings
from state.errors import KafkaFailed, PortTaken, SettingsError, StoreFull, UnusableDisk
from state.metrics import StorageMetrics, SupervisorMetrics
from state.process.network import Port, free_port, listens, require_ports
from state.storage import KAFKA, offer
from tests import rules
from tests.disks import small_disk
from tests.e2e.running import until
from tests.one_kafka import Running, broker_like

HOST = "127.0.0.1"


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 13, 0), (4, 11)])
def test_another_python_is_refused_with_both_versions(version: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match=rf"Python {version[0]}\.{version[1]} is not supported.*3\.11"):
        require_python(version)


def test_a_full_disk_names_the_directory_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match=r"deep.*GiB free.*paths\.state"):
        require_disk(tmp_path / "not" / "yet" / "deep", least_bytes=2**60)


def test_a_taken_port_names_its_owner_and_its_setting() -> None:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is in use.*process {os.getpid()}.*serving\.port"):
            require_ports([Port("serving.port", HOST, port)])


def test_two_settings_with_one_port_are_both_named() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with pytest.raises(PortTaken, match=r"serving\.port and by stream\.metrics_port"):
        require_ports([Port("serving.port", HOST, port), Port("stream.metrics_port", HOST, port)])


def test_port_zero_is_refused_since_the_parts_could_not_find_each_other() -> None:
    with pytest.raises(PortTaken, match=r"trainer\.metrics_port is 0"):
        require_ports([Port("trainer.metrics_port", HOST, 0)])


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PortTaken, match=r"192\.0\.2\.1.*serving\.port"):
        require_ports([Port("serving.port", "192.0.2.1", 8501)])


@pytest.mark.parametrize(
    ("where", "why"),
    [("file", "is a file"), ("file/deep", "cannot be made"), ("/sys/springtide", "cannot be made")],
)
def test_a_state_directory_that_cannot_be_is_refused_with_the_flag(tmp_path: Path, where: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnusableDisk, match=rf"{where}.* {why}.*choose another directory with --state"):
        require_directory(tmp_path / where)


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


def settings_of(tmp_path: Path, *flags: str) -> Settings:
    return load(["--paths.state", str(tmp_path / "state"), *flags], env={})


def test_it_scrapes_each_process_at_the_port_that_it_has(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--trainer.metrics_port", "9992", "--serving.port", "9951")
    jobs = {one["job_name"]: one for one in prometheus.configuration(settings)["scrape_configs"]}
    addresses = scrape.targets(settings)
    assert scrape.urls(settings).items() < addresses.items()
    assert {name: f"http://{one['static_configs'][0]['targets'][0]}/metrics" for name, one in jobs.items()} == {
        f"springtide-{name}": url for name, url in addresses.items()
    }
    assert jobs["springtide-trainer"]["static_configs"] == [{"targets": ["127.0.0.1:9992"]}]
    # The jobs of the file for those who run their own, which the rules name.
    own = yaml.safe_load((rules.PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert set(jobs) == {one["job_name"] for one in own}


def test_it_has_the_token_and_the_scheme_that_a_worker_asks_for(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for file in (certificate, key):
        file.touch(0o600)
    flags = ("--serving.tls_cert", str(certificate), "--serving.tls_key", str(key), "--serving.tokens", "on")
    settings = settings_of(tmp_path, *flags)
    (worker,) = [
        one for one in prometheus.configuration(settings)["scrape_configs"] if one["job_name"] == "springtide-worker"
    ]
    assert worker["scheme"] == "https"
    assert worker["authorization"] == {"credentials_file": str(settings.tokens_dir / "operate")}


@pytest.mark.parametrize("flags", [(), ("--serving.tokens", "on")])
def test_prometheus_takes_what_is_written(tmp_path: Path, flags: tuple[str, ...]) -> None:
    settings = settings_of(tmp_path, *flags)
    settings.tokens_dir.mkdir(parents=True)
    (settings.tokens_dir / "operate").write_text("a token of some length\n")
    prometheus.write_configuration(settings)
    said = subprocess.run(
        [rules.program("promtool"), "check", "config", settings.prometheus_dir / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert f"{len(rules.FILES)} rule files found" in said.stdout


def test_it_listens_on_this_machine_and_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--up.prometheus_port", "9999")
    command = prometheus.plan(settings, "prometheus").command
    assert {"--web.listen-address=127.0.0.1:9999", "--storage.tsdb.retention.size=512MB"} <= set(command)
    assert ("up.prometheus_port", "127.0.0.1", 9999) in ports(settings, local_kafka=False, watched=True)
    assert all(port.setting != "up.prometheus_port" for port in ports(settings, local_kafka=False))


def test_where_there_is_none_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert up.main(["--prometheus", "--paths.state", str(tmp_path / "state")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "apt-get install prometheus" in line
    assert not (tmp_path / "state").exists()
