"""The applier's process: it waits for what is away, and stops in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import save

from deploy.serving.host_files import VERSIONS
from state.disk.files import exchange
from state.layout import CURRENT, ROWS
from state.registry.control import start
from state.registry.manifest import Draft, LogRange
from state.registry.registry import SERVING, Registry
from state.rows.store import RowStore
from tests import forked
from tests.deploy.serving.test_following import tensors
from tests.deploy.serving.test_rest import until
from tests.state.registry.hosts import Origin, away

BY = {"actor": "ann", "reason": "a test", "now_ms": 1}


def test_an_applier_waits_for_a_registry_that_cannot_be_read(tmp_path: Path) -> None:
    """It says so once, goes on with what it has, and follows as soon as the registry is there."""
    environment = os.environ | {
        "SPRINGTIDE_PATHS_STATE": str(tmp_path / "state"), "SPRINGTIDE_PATHS_REGISTRY": str(tmp_path / "registry"),
        "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9", "SPRINGTIDE_SERVING_METRICS_PORT": "0",
        "SPRINGTIDE_KAFKA_REQUEST_TIMEOUT_S": "1",
    }  # fmt: skip
    # No directory, so that nobody may list it, root neither.
    (tmp_path / "registry").write_text("")
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = forked.Popen([sys.executable, "-m", "deploy.serving.applier"], env=environment, stderr=errors)
    try:
        until(lambda: "the registry cannot be followed" in log.read_text())
        registry = Registry(tmp_path / "later")
        registry.propose(start(**BY))
        draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, "spec", registry.specs.add_program(b"p"), "salt")
        registry.publish(draft, {SERVING: save(tensors({1: 1.0}))})
        exchange(registry.path, tmp_path / "registry")
        reader = RowStore(tmp_path / "state" / "serving" / ROWS, 1 << 30, readonly=True)

        def serves() -> bool:
            with reader.reader() as read:
                return read.served() is not None

        until(serves)
        reader.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert said.count("the registry cannot be followed") == 1
    assert "UnusableRegistry" in said or "correct its access rights" in said
    assert "Traceback" not in said


def test_the_process_applies_without_kafka_and_stops_in_order(tmp_path: Path) -> None:
    """No broker costs the clicks, not the versions; a second applier is refused; SIGTERM ends it with 0."""
    environment = os.environ | {
        "SPRINGTIDE_PATHS_STATE": str(tmp_path), "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9",
        "SPRINGTIDE_SERVING_METRICS_PORT": "0", "SPRINGTIDE_KAFKA_REQUEST_TIMEOUT_S": "1",
    }  # fmt: skip
    registry = Registry(tmp_path / "registry")
    registry.propose(start(**BY))
    command = [sys.executable, "-m", "deploy.serving.applier"]
    process = forked.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        rows = tmp_path / "serving" / ROWS
        until(lambda: (rows / "mark.json").exists())
        second = forked.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "in use by process" in second.stderr
        draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, "spec", registry.specs.add_program(b"p"), "salt")
        version = registry.publish(draft, {SERVING: save(tensors({1: 1.0}))}).version
        reader = RowStore(rows, 1 << 30, readonly=True)

        def served() -> int:
            with reader.reader() as read:
                found = read.served()
                return 0 if found is None else found.version

        until(lambda: served() == version)
        reader.close()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert json.loads((rows / "mark.json").read_text())["clean"]


def test_a_shared_registry_that_is_unreachable_makes_a_host_old(tmp_path: Path) -> None:
    """Its own copy can be read all the while; what is noted for readiness is when the place was reached last."""
    place = tmp_path / "place"
    Origin(tmp_path / "trainer", str(place))
    environment = os.environ | {
        "SPRINGTIDE_PATHS_STATE": str(tmp_path / "host"), "SPRINGTIDE_PATHS_SHARED_REGISTRY": str(place),
        "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9", "SPRINGTIDE_SERVING_METRICS_PORT": "0",
        "SPRINGTIDE_KAFKA_REQUEST_TIMEOUT_S": "1",
    }  # fmt: skip
    noted = tmp_path / "host" / "serving" / f"{CURRENT}.{VERSIONS}"

    def age_s() -> float:
        return time.time() - noted.stat().st_mtime

    process = forked.Popen(
        [sys.executable, "-m", "deploy.serving.applier"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: noted.exists() and age_s() < 1.5)
        with away(place):
            until(lambda: age_s() > 3.0)
        until(lambda: age_s() < 1.5)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
