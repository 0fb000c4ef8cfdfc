"""The applier's process: it waits for what is away, and stops in order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import save

from deploy.serving.host_files import VERSIONS, Currency
from deploy.watch import scrape
from deploy.watch.scrape import Scrape, parsed
from state.disk.files import exchange, noted_at
from state.layout import CURRENT, ROWS
from state.process.network import free_port
from state.registry.control import Decision, start
from state.registry.manifest import Draft, LogRange
from state.registry.registry import SERVING, Registry
from state.rows.store import RowStore
from tests import forked
from tests.deploy.serving.test_following import tensors
from tests.deploy.serving.test_rest import until
from tests.state.registry.hosts import Origin, away

BY: Decision = {"actor": "ann", "reason": "a test", "now_ms": 1}


APPLIER = [sys.executable, "-m", "deploy.serving.applier"]


def environment(metrics_port: int = 0, **paths: Path) -> dict[str, str]:
    """Of an applier that reaches no broker."""
    own = {
        "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9", "SPRINGTIDE_KAFKA_REQUEST_TIMEOUT_S": "1",
        "SPRINGTIDE_SERVING_METRICS_PORT": str(metrics_port),
    }  # fmt: skip
    return os.environ | own | {f"SPRINGTIDE_PATHS_{name.upper()}": str(path) for name, path in paths.items()}


@contextmanager
def applier(log: Path, metrics_port: int = 0, **paths: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, killed where it did not end."""
    variables = environment(metrics_port, **paths)
    with log.open("w") as errors, forked.Popen(APPLIER, env=variables, stderr=errors) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_process_waits_for_a_registry_applies_without_kafka_and_stops_in_order(tmp_path: Path) -> None:
    """It reports an unreadable registry once and follows when it is there. A second applier is refused; SIGTERM ends it with 0."""
    paths, log = {"state": tmp_path / "state", "registry": tmp_path / "registry"}, tmp_path / "log"
    # No directory, so that nobody may list it, root neither.
    paths["registry"].write_text("")
    rows = tmp_path / "state" / "serving" / ROWS
    with applier(log, 0, **paths) as process:
        until(lambda: "the registry cannot be followed" in log.read_text())
        registry = Registry(tmp_path / "later")
        registry.propose(start(**BY))
        draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, "spec", registry.specs.add_program(b"p"), "salt")
        version = registry.publish(draft, {SERVING: save(tensors({1: 1.0}))}).version
        exchange(registry.path, paths["registry"])
        until(lambda: (rows / "mark.json").exists())
        second = forked.run(APPLIER, env=environment(0, **paths), capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "in use by process" in second.stderr
        reader = RowStore(rows, 1 << 30, readonly=True)

        def served() -> int:
            with reader.reader() as read:
                found = read.served()
                return 0 if found is None else found.version

        until(lambda: served() == version)
        reader.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    said = log.read_text()
    assert said.count("the registry cannot be followed") == 1
    assert "UnusableRegistry" in said or "correct its access rights" in said
    assert "Traceback" not in said
    assert json.loads((rows / "mark.json").read_text())["clean"]


@pytest.mark.parametrize("is_mount_point", [False, True])
def test_a_registry_that_is_not_mounted_is_degraded_until_it_is_back(tmp_path: Path, is_mount_point: bool) -> None:
    """Neither a missing directory nor an empty one looks like a registry in which there is nothing new."""
    paths, unmounted, port = (
        {"state": tmp_path / "state", "registry": tmp_path / "registry"},
        tmp_path / "out",
        free_port(),
    )
    registry = Registry(paths["registry"])
    registry.propose(start(**BY))
    draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, "spec", registry.specs.add_program(b"p"), "salt")
    registry.publish(draft, {SERVING: save(tensors({1: 1.0}))})

    def degraded() -> str:
        found = Currency(tmp_path / "state" / "serving").degraded(round(time.time() * 1000)).get(VERSIONS, "")
        status, metrics = scrape.fetch(f"http://127.0.0.1:{port}/metrics", timeout_s=30.0)
        measured = (
            Scrape(parsed(metrics)).value("springtide_serving_degraded", part=VERSIONS) if status == 200 else None
        )
        return found if measured == bool(found) else "the metric differs"

    for restarted in (False, True):
        with applier(tmp_path / "log", port, **paths) as process:
            if not restarted:
                until(lambda: noted_at(tmp_path / "state" / "serving" / f"{CURRENT}.{VERSIONS}").at_ms > 0)
                assert not degraded()
                paths["registry"].rename(unmounted)
                if is_mount_point:
                    paths["registry"].mkdir()
            until(lambda: "lacks control generation 1" in degraded())
            if restarted:
                if paths["registry"].exists():
                    shutil.rmtree(paths["registry"])
                unmounted.rename(paths["registry"])
                until(lambda: not degraded())
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0


def test_a_shared_registry_that_is_unreachable_makes_a_host_old(tmp_path: Path) -> None:
    """Its own copy can be read all the while; what is noted for readiness is when the place was reached last, and why."""
    place = tmp_path / "place"
    Origin(tmp_path / "trainer", str(place))
    noted = tmp_path / "host" / "serving" / f"{CURRENT}.{VERSIONS}"

    def age_s() -> float:
        return time.time() - noted.stat().st_mtime

    with applier(tmp_path / "log", state=tmp_path / "host", shared_registry=place) as process:
        until(lambda: noted.exists() and age_s() < 1.5)
        with away(place):
            until(lambda: age_s() > 3.0)
            assert str(place) in noted_at(noted).problem
        until(lambda: age_s() < 1.5)
        assert not noted_at(noted).problem
        assert process.poll() is None
