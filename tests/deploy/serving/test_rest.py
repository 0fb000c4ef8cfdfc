"""A worker's process: it takes its port or says why not, and ends in order, its parent's death included."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client import CollectorRegistry

from deploy.kafka.configuration import free_port
from deploy.serving.answers.host import Host
from deploy.serving.requests.connections import ConnectionLimits
from deploy.serving.requests.server import DrainingServer
from deploy.serving.rest import App
from state.events.identity import Salt
from tests import forked
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, digest_of, manifest, tensors


@contextmanager
def worker(
    stores: Stores, port: int, workers: int = 1, grpc_port: int = 0, **more: str
) -> Iterator[subprocess.Popen[str]]:
    given = {
        "port": str(port), "workers": str(workers), "map_gb": "1", "grpc_port": str(grpc_port), "drain_s": "0",
        # A machine that has other things to do is no reason to refuse an answer; what is has tests of its own.
        "max_queue_ms": "60000",
    } | more  # fmt: skip
    environment = os.environ | {f"SPRINGTIDE_SERVING_{name.upper()}": value for name, value in given.items()}
    environment["SPRINGTIDE_PATHS_STATE"] = stores.settings.paths.state
    process = forked.Popen(
        [sys.executable, "-m", "deploy.serving.rest"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30.0).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_answers_and_ends_in_order(stores: Stores, workers: int) -> None:
    """It reads what this process writes, refuses a taken port with one line, and SIGTERM ends it with 0."""
    port = free_port()
    with worker(stores, port, workers) as process:
        until(lambda: answers(port, "/readyz"))
        assert answers(port, "/v1/profiles/ann")
        foreign = httpx.get(f"http://127.0.0.1:{port}/v1/profiles/ann", headers={"host": "evil.example"}, timeout=30.0)
        assert foreign.status_code == 403
        program = digest_of(stores.lowered)
        stores.rows.apply(
            manifest(2, program, parent=1), tensors(stores.lowered, 2, {"user": ["ann"]}, []), NOW_MS, follow=True
        )
        until(
            lambda: httpx.get(f"http://127.0.0.1:{port}/v1/profiles/ann", timeout=30.0).json()["version"]["number"] == 2
        )
        with worker(stores, port) as second:
            _, log = second.communicate(timeout=60)
        assert second.returncode == 1 and len(log.splitlines()) == 1 and f"port {port}" in log
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log


def test_a_signal_before_the_server_runs_still_ends_it(stores: Stores) -> None:
    """A parent that is killed while its worker starts must not leave the worker behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    app = App(Host(stores.settings, Salt(SALT_KEY), now_ms=lambda: NOW_MS), CollectorRegistry())
    server = DrainingServer(app, ConnectionLimits(10.0, 10), drain_s=0.0)
    try:
        server.end_on_signals()
        signal.raise_signal(signal.SIGTERM)
        assert server.should_exit
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_says_that_it_ends_before_it_does(stores: Stores) -> None:
    """/readyz turns 503, connections are still accepted, each answer is its connection's last; SIGINT ends that too."""
    port = free_port()
    with worker(stores, port, drain_s="60") as process:
        until(lambda: answers(port, "/readyz"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            assert "connection" not in client.get("/v1/profiles/ann").headers
            process.send_signal(signal.SIGTERM)
            until(lambda: not answers(port, "/readyz"))
            last = client.get("/v1/profiles/ann")
            assert (last.status_code, last.headers["connection"]) == (200, "close")
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60.0)
            assert ready.status_code == 503 and ready.json()["error"] == "this worker is about to end"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log


def test_workers_do_not_outlive_their_parent(stores: Stores) -> None:
    """A killed parent leaves no worker that holds the port."""
    port = free_port()
    with worker(stores, port, workers=2) as process:
        until(lambda: answers(port, "/healthz"))
        process.kill()
        until(lambda: not answers(port, "/healthz"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_without_salt_says_so(stores: Stores, workers: int) -> None:
    """It does not make one: with another salt nobody would be known; and none is started for ever."""
    stores.settings.salt_path.unlink()
    with worker(stores, free_port(), workers) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1 and "there is no salt" in log
