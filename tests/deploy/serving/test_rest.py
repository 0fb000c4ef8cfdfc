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
import uvicorn

from deploy.serving.rest import end_on_signals
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def worker(stores: Stores, port: int, workers: int = 1, grpc_port: int = 0) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {
        "SPRINGTIDE_PATHS_STATE": stores.settings.paths.state, "SPRINGTIDE_SERVING_PORT": str(port),
        "SPRINGTIDE_SERVING_WORKERS": str(workers), "SPRINGTIDE_SERVING_MAP_GB": "1", "SPRINGTIDE_SERVING_GRPC_PORT": str(grpc_port),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.serving.rest"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
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


def test_a_signal_before_the_server_runs_still_ends_it() -> None:
    """A parent that is killed while its worker starts must not leave the worker behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    server = uvicorn.Server(uvicorn.Config(lambda *_: None, lifespan="off", log_level="warning"))
    try:
        end_on_signals(server)
        signal.raise_signal(signal.SIGTERM)
        assert server.should_exit
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_workers_do_not_outlive_their_parent(stores: Stores) -> None:
    """A killed parent leaves no worker that holds the port."""
    port = free_port()
    with worker(stores, port, workers=2) as process:
        until(lambda: answers(port, "/healthz"))
        process.kill()
        until(lambda: not answers(port, "/healthz"))


def test_a_worker_without_salt_says_so(stores: Stores) -> None:
    """It does not make one: with another salt nobody would be known."""
    stores.settings.salt_path.unlink()
    with worker(stores, free_port()) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1 and "there is no salt" in log
